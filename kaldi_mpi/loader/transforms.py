"""What is done to features: normalisation by speaker, then deltas or splicing, as Kaldi's programs do it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.scp import TextTable, read_table
from kaldi_mpi.loader.native import Archives, borrow, ffi, lib, new_error, raise_data_error
from kaldi_mpi.loader.tables import TableSource, locate, name_of
from kaldi_mpi.options import kaldi_options

LIMIT = 1000  # of orders, windows and contexts, below which Kaldi's add-deltas wants them


def speakers_of(utterances: Sequence[str], utt2spk: str | os.PathLike[str] | Mapping[str, str] | None) -> list[str]:
    """The speaker of each utterance; without `utt2spk` each utterance is its own, as in apply-cmvn.

    Raises:
        DataError: an utterance has no speaker; names the file and the utterance.
    """
    if utt2spk is None:
        return list(utterances)
    table: Mapping[str, str] = utt2spk if isinstance(utt2spk, Mapping) else read_table(utt2spk)
    name = table.name if isinstance(table, TextTable) else "utt2spk"
    for utterance in utterances:
        if utterance not in table:
            raise DataError("the utterance has no speaker", file=name, key=utterance)
    return [table[utterance] for utterance in utterances]


def read_norms(
    cmvn_scp: TableSource,
    speakers: Sequence[str],
    dim: int,
    *,
    norm_vars: bool,
    skip_dims: Sequence[int] = (),
) -> NDArray[np.float32]:
    """Offsets and scales of some speakers: normalised = x * scale + offset.

    Args:
        cmvn_scp: script file (or rspecifier, see `tables.locate`) of matrices 2 x (dim + 1) as
            compute-cmvn-stats writes them: sums and count, sums of squares.
        speakers: the keys wanted.
        dim: the features' dimension.
        norm_vars: scale to unit variance too; without it all scales are 1.
        skip_dims: columns that are left as they are: offset 0, scale 1.

    Returns:
        Array (speakers, 2, dim): row 0 offsets, row 1 scales; in the arithmetic of Kaldi's apply-cmvn.

    Raises:
        DataError: a speaker without statistics, of another dimension, or with a count below 1.
        ConfigError: a column to skip that the features do not have.
    """
    for column in skip_dims:
        if not 0 <= column < dim:
            raise ConfigError(f"--skip-dims has {column}, and the features have columns 0 to {dim - 1}")
    name = name_of(cmvn_scp)
    archives = Archives()
    locations = locate(cmvn_scp, archives, wanted=set(speakers), doubles=True).locations
    norms = np.empty((len(speakers), 2, dim), dtype=np.float32)
    matrix = ffi.new("km_matrix *")
    for speaker, norm in zip(speakers, norms, strict=True):
        if speaker not in locations:
            raise DataError("no normalisation statistics for this speaker", file=name, key=speaker)
        location = locations[speaker]
        index = archives.open(location.path, named_in=name, key=speaker)
        archives.open_matrix(index, location.offset, matrix, key=speaker)
        if matrix.cols != dim + 1 or matrix.rows != 2:
            raise DataError(
                f"normalisation statistics are {matrix.rows} x {matrix.cols}, and features of "
                f"dimension {dim} need 2 x {dim + 1}",
                file=location.path,
                key=speaker,
                offset=location.offset,
            )
        stats = archives.doubles(index, matrix, key=speaker)
        if skip_dims:  # as Kaldi does it: statistics of mean 0 and variance 1
            stats[:, list(skip_dims)] = np.array([[0.0], [stats[0, dim]]])
        error = new_error()
        if lib.km_cmvn_norms(
            borrow(stats, "double", np.float64), dim, norm_vars, borrow(norm, "float", np.float32), error
        ):
            error.offset = location.offset
            raise_data_error(error, file=location.path, key=speaker)
    return norms


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
