"""CMVN by speaker without Kaldi: statistics as steps/compute_cmvn_stats.sh makes them, applied as by apply-cmvn.

``kaldi-mpi compute-cmvn-stats DATA_DIR [LOG_DIR [CMVN_DIR]]`` writes CMVN_DIR/cmvn_NAME.{ark,scp} and
DATA_DIR/cmvn.scp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import kaldi_native_io
import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded.datadir import DataDir, PathLike, make_directories, read_table
from kaldi_mpi.embedded.features import archive_writer, read_double_matrix, read_features
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.cmvn_options import CmvnOptions, parse_cmvn_opts
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

Normalise = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]


def cmvn_stats(utterances: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Sums over the frames of some utterances, in Kaldi's layout.

    Args:
        utterances: (T, D) float32 each.

    Returns:
        (2, D + 1) float64: sums and, last, the number of frames; sums of squares and 0. The squares are
        taken in float32, as Kaldi does.

    Raises:
        DataError: no utterance, or utterances of different dimension.
    """
    stats: NDArray[np.float64] | None = None
    for feats in utterances:
        dim = feats.shape[1]
        if stats is None:
            stats = np.zeros((2, dim + 1))
        elif stats.shape[1] != dim + 1:
            raise DataError(f"features of dimension {dim} after some of {stats.shape[1] - 1}")
        stats[0, :dim] += feats.sum(axis=0, dtype=np.float64)
        stats[0, dim] += len(feats)
        stats[1, :dim] += np.square(feats).sum(axis=0, dtype=np.float64)
    if stats is None:
        raise DataError("CMVN statistics of no utterance")
    return stats


def make_cmvn(data_dir: PathLike, *, log_dir: PathLike | None = None, cmvn_dir: PathLike | None = None) -> None:
    """Write the CMVN statistics of each speaker of a data directory that has features.

    Args:
        data_dir: the data directory; needs feats.scp and utt2spk.
        log_dir: where the log goes, DATA_DIR/log by default.
        cmvn_dir: where the archive goes, DATA_DIR/data by default.

    Raises:
        DataError: features missing or unreadable.
    """
    data = DataDir(data_dir)
    logs, archives = Path(log_dir or data.path / "log"), Path(cmvn_dir or data.path / "data").resolve()
    make_directories(logs, archives)
    (data.path / "cmvn.scp").unlink(missing_ok=True)
    name, scp = data.path.resolve().name, data.path / "feats.scp"
    stem = archives / f"cmvn_{name}"
    with archive_writer(kaldi_native_io.DoubleMatrixWriter, stem) as writer:
        for speaker, utterances in data.spk2utt.items():
            writer.write(speaker, cmvn_stats(feats for _, feats in read_features(scp, utterances)))
    speakers, count = len(data.spk2utt), len(data.utterances)
    with open(logs / f"cmvn_{name}.log", "w", encoding="utf-8") as log:
        log.write(f"LOG Done accumulating CMVN stats for {count} utterances of {speakers} speakers.\n")
    with atomic_write(data.path / "cmvn.scp", "w") as stream:
        stream.write(Path(f"{stem}.scp").read_text(encoding="utf-8"))
    logger.info("%s: CMVN statistics of %d speakers", data.path, speakers)


def read_cmvn_opts(path: PathLike, default: CmvnOptions) -> CmvnOptions:
    """The options in a file ``cmvn_opts`` (an empty one means apply-cmvn's defaults); `default` where there is none.

    Raises:
        ConfigError: see `parse_cmvn_opts`.
        DataError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return default
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read: {error}", file=str(path)) from error
    return parse_cmvn_opts(text, where=str(path))


def apply_cmvn(
    feats: NDArray[np.float32], stats: NDArray[np.float64], options: CmvnOptions, *, key: str | None = None
) -> NDArray[np.float32]:
    """Normalise features by CMVN statistics as Kaldi's apply-cmvn does.

    Args:
        feats: (T, D) float32.
        stats: (2, D + 1) float64: sums and count, sums of squares.
        options: variances are normalised only together with the means, as in Kaldi.
        key: the utterance, for errors.

    Returns:
        (T, D) float32, the input itself where nothing is to be done.

    Raises:
        DataError: dimensions that do not fit, a count below one, variances without means.
        ConfigError: a column to skip that the features do not have.
    """
    if options.norm_vars and not options.norm_means:
        raise DataError("variances cannot be normalised without the means", key=key)
    if not options.norm_means:
        return feats
    dim = feats.shape[1]
    if stats.shape != (2, dim + 1):
        raise DataError(f"CMVN statistics of shape {stats.shape} for features of dimension {dim}", key=key)
    for column in options.skip_dims:
        if column >= dim:
            raise ConfigError(f"--skip-dims has {column}, and the features have columns 0 to {dim - 1}")
    count = stats[0, dim]
    if count < 1.0:
        raise DataError(f"CMVN statistics of too few frames: {count}", key=key)
    if options.skip_dims:  # as Kaldi does it: statistics of mean 0 and variance 1
        stats = stats.copy()
        stats[:, list(options.skip_dims)] = [[0.0], [count]]
    if not options.norm_vars:
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
        options: see `apply_cmvn`.
    """

    def __init__(self, cmvn_scp: PathLike, utt2spk: Mapping[str, str], options: CmvnOptions) -> None:
        self._scp, self._table, self._utt2spk = str(cmvn_scp), read_table(cmvn_scp), utt2spk
        self._options = options
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
        return apply_cmvn(feats, self._stats[speaker], self._options, key=utterance)


def speaker_cmvn(data: DataDir, options: CmvnOptions) -> Normalise:
    """A function that normalises an utterance's features; see `SpeakerCmvn`.

    ``cmvn.scp`` is needed only where something is to be normalised.
    """
    if not options.norm_means and not options.norm_vars:
        return lambda utterance, feats: feats
    return SpeakerCmvn(data.file("cmvn.scp"), data.utt2spk, options)


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi compute-cmvn-stats``; takes the arguments of steps/compute_cmvn_stats.sh."""
    parser = Parser(prog="kaldi-mpi compute-cmvn-stats", description="CMVN statistics of a Kaldi data directory")
    parser.add_argument("data_dir")
    parser.add_argument("log_dir", nargs="?", help="default: DATA_DIR/log")
    parser.add_argument("cmvn_dir", nargs="?", help="default: DATA_DIR/data")
    options = parser.parse_args(arguments)
    make_cmvn(options.data_dir, log_dir=options.log_dir, cmvn_dir=options.cmvn_dir)
