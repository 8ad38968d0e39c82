"""Feature archives in Python: reading by scp, writing, and deltas as Kaldi's add-deltas appends them.

This is the convenient path, for the GMM and for decoding; training reads through the C loader.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import kaldi_native_io
import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded.datadir import PathLike, read_table
from kaldi_mpi.errors import ConfigError, DataError


def read_matrix(rxfilename: str, *, file: str | None = None, key: str | None = None) -> NDArray[np.float32]:
    """Read one matrix, of any of Kaldi's plain or compressed kinds, from ``path`` or ``path:offset``.

    Args:
        rxfilename: where it is.
        file: the scp that names it, for errors.
        key: its key, for errors.

    Returns:
        (rows, columns) float32, a copy of its own (kaldi_native_io hands out views of its buffers).

    Raises:
        DataError: no such file, or no readable matrix there.
    """
    return np.array(_read(kaldi_native_io.FloatMatrix, rxfilename, file, key), dtype=np.float32)


def read_double_matrix(rxfilename: str, *, file: str | None = None, key: str | None = None) -> NDArray[np.float64]:
    """As `read_matrix`, in double precision: CMVN statistics, for example."""
    return np.array(_read(kaldi_native_io.DoubleMatrix, rxfilename, file, key), dtype=np.float64)


def _read(kind: Any, rxfilename: str, file: str | None, key: str | None) -> NDArray[Any]:
    path, _, offset = rxfilename.rpartition(":")
    name = path if path and offset.isdigit() else rxfilename
    if not name.endswith("|") and not os.path.isfile(name):
        raise DataError(f"no such file: {name}", file=file or rxfilename, key=key)
    try:
        matrix: NDArray[Any] = kind.read(rxfilename).numpy()
    except RuntimeError as error:
        raise DataError(f"cannot read a matrix at {rxfilename}: {cause_of(error)}", file=file, key=key) from error
    return matrix


def cause_of(error: RuntimeError) -> str:
    """What an error of kaldi_native_io says, without the C++ signatures that come before the last ``[E]``."""
    return " ".join(str(error).split("[E]")[-1].split())


def read_features(
    feats_scp: PathLike, utterances: Sequence[str] | None = None
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (utterance, features (T, D) float32) of a ``feats.scp``.

    Args:
        feats_scp: the script file.
        utterances: which ones, in this order; all in the C locale's order by default.

    Raises:
        DataError: see `read_matrix`; an utterance asked for that the scp lacks.
    """
    table, scp = read_table(feats_scp), str(feats_scp)
    for utterance in table if utterances is None else utterances:
        if utterance not in table:
            raise DataError("no features for the utterance", file=scp, key=utterance)
        yield utterance, read_matrix(table[utterance], file=scp, key=utterance)


@contextlib.contextmanager
def archive_writer(kind: Any, stem: PathLike) -> Iterator[Any]:
    """Open ``STEM.ark`` and ``STEM.scp`` for writing, with errors that name the archive.

    Args:
        kind: one of kaldi_native_io's writer classes.
        stem: an absolute path, which the scp will hold.

    Raises:
        ConfigError: the path cannot stand in a Kaldi wspecifier.
        DataError: the archive cannot be made or, a full disk for example, not be written.
    """
    if "," in str(stem):
        raise ConfigError(f"{stem}: Kaldi's table names cannot hold a comma")
    try:
        # "f": flushed at each matrix, so that the last failure is not lost at the end.
        with kind(f"ark,scp,f:{stem}.ark,{stem}.scp") as writer:
            yield writer
    except RuntimeError as error:
        raise DataError("cannot write the archive (disk full, or not allowed)", file=f"{stem}.ark") from error


def add_deltas(feats: NDArray[np.float32], *, window: int = 2, order: int = 2) -> NDArray[np.float32]:
    """Append time derivatives, as Kaldi's add-deltas does; frames beyond the ends repeat the edge frame.

    Args:
        feats: (T, D) float32.
        window: frames on either side of which a derivative is the regression slope.
        order: number of derivatives.

    Returns:
        (T, D * (order + 1)) float32: static, first, second ... derivatives.
    """
    frames = len(feats)
    slope = np.arange(-window, window + 1, dtype=np.float64)
    slope /= np.sum(slope**2)
    scales = np.ones(1)
    parts = [np.asarray(feats, dtype=np.float32)]
    for _ in range(order):
        # Each order is the slope of the one before; as in Kaldi, the edge is repeated in the statics only,
        # so the filters are composed before they meet the signal.
        scales = np.convolve(scales, slope)
        reach = len(scales) // 2
        padded = np.pad(feats, ((reach, reach), (0, 0)), mode="edge")
        parts.append(
            sum(
                (np.float32(scale) * padded[lag : lag + frames] for lag, scale in enumerate(scales) if scale),
                start=np.zeros_like(parts[0]),
            )
        )
    return np.concatenate(parts, axis=1)
