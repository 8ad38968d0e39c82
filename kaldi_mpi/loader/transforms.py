"""Deltas and splicing: features made from those of neighbouring frames, as add-deltas and splice-feats do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader.native import borrow, ffi
from kaldi_mpi.options import kaldi_options

LIMIT = 1000  # of orders, windows and contexts, below which Kaldi's add-deltas wants them


class DeltaOptions(NamedTuple):
    """What add-deltas is told; the defaults are its own.

    Attributes:
        order: of the highest derivative; the output has order + 1 times the columns.
        window: frames on either side from which each derivative is estimated.
        truncate: columns to use, the first ones; 0 for all.
    """

    order: int = 2
    window: int = 2
    truncate: int = 0


class SpliceOptions(NamedTuple):
    """What splice-feats is told; the defaults are its own.

    Attributes:
        left: frames before.
        right: frames after.
    """

    left: int = 4
    right: int = 4


def parse_delta_opts(text: str, *, where: str = "delta_opts") -> DeltaOptions:
    """Take apart what a file ``delta_opts`` of Kaldi holds, for example ``--delta-order=2 --delta-window=3``.

    Args:
        text: the options; none of them gives add-deltas' own defaults.
        where: what to call the text in errors.

    Raises:
        ConfigError: an option that add-deltas does not have, or a value that is not a number from 0 on.
    """
    found = _numbers(text, ("delta-order", "delta-window", "truncate"), where)
    return DeltaOptions(found.get("delta-order", 2), found.get("delta-window", 2), found.get("truncate", 0))


def parse_splice_opts(text: str, *, where: str = "splice_opts") -> SpliceOptions:
    """Take apart what a file ``splice_opts`` of Kaldi holds, for example ``--left-context=3 --right-context=3``.

    Args:
        text: the options; none of them gives splice-feats' own defaults.
        where: what to call the text in errors.

    Raises:
        ConfigError: an option that splice-feats does not have, or a value that is not a number from 0 on.
    """
    found = _numbers(text, ("left-context", "right-context"), where)
    return SpliceOptions(found.get("left-context", 4), found.get("right-context", 4))


def _numbers(text: str, known: tuple[str, ...], where: str) -> dict[str, int]:
    found = {}
    for name, value in kaldi_options(text, known, where).items():
        if not (value.isascii() and value.isdecimal() and len(value) < 9):
            raise ConfigError(f"{where}: --{name} is {value!r}, and must be a number from 0 on")
        found[name] = int(value)
    return found


def read_opts(path: str | os.PathLike[str]) -> str:
    """The text of a file ``cmvn_opts``, ``delta_opts`` or ``splice_opts``, for the functions that parse it.

    Raises:
        DataError: it cannot be read, or is not text.
    """
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=os.fspath(path)) from error
    except UnicodeDecodeError as error:
        raise DataError("not a text file in UTF-8", file=os.fspath(path), offset=error.start) from error


@dataclass(frozen=True)
class Transform:
    """Blocks of columns, each a weighted sum of input rows at fixed distances.

    Attributes:
        columns: of the input that are used, the first ones.
        blocks: per block its taps: (distance in rows from the output row, weight).
    """

    columns: int
    blocks: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def dim(self) -> int:
        """Columns of the output."""
        return self.columns * len(self.blocks)

    def lend(self) -> tuple[Any, list[Any]]:
        """The C library's ``km_transform *``, and what must be kept for as long as it is used."""
        taps = [tap for block in self.blocks for tap in block]
        first = np.cumsum([0, *(len(block) for block in self.blocks)], dtype=np.int32)
        offsets = np.array([offset for offset, _ in taps], dtype=np.int32)
        weights = np.array([weight for _, weight in taps], dtype=np.float32)
        fields = {
            "columns": self.columns,
            "blocks": len(self.blocks),
            "left": max(0, -int(offsets.min())),
            "right": max(0, int(offsets.max())),
            "first": borrow(first, "int32_t", np.int32),
            "offsets": borrow(offsets, "int32_t", np.int32),
            "weights": borrow(weights, "float", np.float32),
        }
        return ffi.new("km_transform *", fields), list(fields.values())


def make_transform(deltas: DeltaOptions | None, splice: tuple[int, int] | None, dim: int) -> Transform | None:
    """The transform that the options ask for, of features with `dim` columns; None if they ask for none.

    Raises:
        ConfigError: both are asked for; an order, window or context out of range; or truncation to more
            columns than there are.
    """
    if deltas is not None and splice is not None:
        raise ConfigError("both deltas and splicing of the features are asked for; Kaldi's scripts do one of them")
    if deltas is not None:
        order, window, truncate = deltas
        if not (0 <= order < LIMIT and 0 < window < LIMIT and order * window < LIMIT):
            raise ConfigError(f"deltas of order {order} with a window of {window} frames cannot be computed")
        if not 0 <= truncate <= dim:
            raise ConfigError(f"cannot truncate features of dimension {dim} to {truncate}")
        return Transform(truncate or dim, tuple(_nonzero(scales) for scales in delta_scales(order, window)))
    if splice is not None:
        left, right = splice
        if not (0 <= left < LIMIT and 0 <= right < LIMIT):
            raise ConfigError(f"contexts of {left} and {right} frames cannot be spliced: 0 to {LIMIT - 1} can")
        return Transform(dim, tuple(((offset, 1.0),) for offset in range(-left, right + 1)))
    return None


def delta_scales(order: int, window: int) -> list[NDArray[np.float32]]:
    """Per order 0 .. `order`, the weights of frames -order*window .. order*window, in Kaldi's precision.

    Each order is the regression of the one before: the weight of frame j is j / sum of squares.
    """
    ramp = np.arange(-window, window + 1, dtype=np.float32)
    unit = np.float32(1.0 / float(np.sum(ramp * ramp)))
    scales = [np.ones(1, dtype=np.float32)]
    for _ in range(order):
        scales.append(np.convolve(ramp, scales[-1]).astype(np.float32) * unit)
    return scales


def _nonzero(scales: NDArray[np.float32]) -> tuple[tuple[int, float], ...]:
    middle = len(scales) // 2
    return tuple((i - middle, float(scale)) for i, scale in enumerate(scales) if scale != 0.0)
