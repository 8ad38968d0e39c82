"""Feature archives in Python: reading by scp, CMVN and deltas as Kaldi's programs apply them.

This is the convenient path, for the GMM and for decoding; training reads through the C loader.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
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
        # The message is several lines of C++ signatures; the cause stands behind the last "[E]".
        cause = " ".join(str(error).split("[E]")[-1].split())
        raise DataError(f"cannot read a matrix at {rxfilename}: {cause}", file=file, key=key) from error
    return matrix


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


def apply_cmvn(
    feats: NDArray[np.float32],
    stats: NDArray[np.float64],
    *,
    norm_means: bool = True,
    norm_vars: bool = False,
    key: str | None = None,
) -> NDArray[np.float32]:
    """Normalise features by CMVN statistics, with the defaults of Kaldi's apply-cmvn.

    Args:
        feats: (T, D) float32.
        stats: (2, D + 1) float64: sums and count, sums of squares.
        norm_means: subtract the mean.
        norm_vars: divide by the standard deviation as well; needs `norm_means`, as in Kaldi.
        key: the utterance, for errors.

    Returns:
        (T, D) float32, the input itself where nothing is to be done.

    Raises:
        DataError: dimensions that do not fit, a count below one, variances without means.
    """
    if norm_vars and not norm_means:
        raise DataError("variances cannot be normalised without the means", key=key)
    if not norm_means:
        return feats
    dim = feats.shape[1]
    if stats.shape != (2, dim + 1):
        raise DataError(f"CMVN statistics of shape {stats.shape} for features of dimension {dim}", key=key)
    count = stats[0, dim]
    if count < 1.0:
        raise DataError(f"CMVN statistics of too few frames: {count}", key=key)
    if not norm_vars:
        # Kaldi rounds the factor -1/count to float32 before it scales the double sums.
        offset = (stats[0, :dim] * float(np.float32(-1.0 / count))).astype(np.float32)
        return np.asarray(feats + offset, dtype=np.float32)
    mean = stats[0, :dim] / count
    scale = 1.0 / np.sqrt(np.maximum(stats[1, :dim] / count - mean * mean, 1e-20))
    return np.asarray(feats * scale.astype(np.float32) + (-mean * scale).astype(np.float32), dtype=np.float32)


class SpeakerCmvn:
    """CMVN by speaker, from ``cmvn.scp`` and utt2spk; each speaker's statistics are read once.

    Args:
        cmvn_scp: the script file of (2, D + 1) statistics by speaker.
        utt2spk: utterance -> speaker.
        norm_means: see `apply_cmvn`.
        norm_vars: see `apply_cmvn`.
    """

    def __init__(
        self,
        cmvn_scp: PathLike,
        utt2spk: Mapping[str, str],
        *,
        norm_means: bool = True,
        norm_vars: bool = False,
    ) -> None:
        self._scp, self._table, self._utt2spk = str(cmvn_scp), read_table(cmvn_scp), utt2spk
        self._norm_means, self._norm_vars = norm_means, norm_vars
        self._stats: dict[str, NDArray[np.float64]] = {}

    def __call__(self, utterance: str, feats: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the normalised features (T, D) of `utterance`.

        Raises:
            DataError: the utterance has no speaker or the speaker no statistics; see `apply_cmvn`.
        """
        if utterance not in self._utt2spk:
            raise DataError("the utterance has no speaker in utt2spk", file=self._scp, key=utterance)
        speaker = self._utt2spk[utterance]
        if speaker not in self._stats:
            if speaker not in self._table:
                raise DataError("no CMVN statistics for the speaker", file=self._scp, key=speaker)
            self._stats[speaker] = read_double_matrix(self._table[speaker], file=self._scp, key=speaker)
        return apply_cmvn(
            feats,
            self._stats[speaker],
            norm_means=self._norm_means,
            norm_vars=self._norm_vars,
            key=utterance,
        )


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
