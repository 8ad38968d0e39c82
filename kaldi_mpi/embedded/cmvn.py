"""CMVN statistics by speaker: what steps/compute_cmvn_stats.sh does, without Kaldi.

    python -m kaldi_mpi.embedded.cmvn DATA_DIR [LOG_DIR [CMVN_DIR]]

writes CMVN_DIR/cmvn_NAME.{ark,scp} and DATA_DIR/cmvn.scp.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded.command import run_command
from kaldi_mpi.embedded.datadir import DataDir, PathLike, make_directories
from kaldi_mpi.embedded.feature_io import archive_writer, read_features
from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.log import logger


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
    import kaldi_native_io

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


def main() -> None:
    """Command line; takes the arguments of steps/compute_cmvn_stats.sh."""
    parser = argparse.ArgumentParser(
        prog="python -m kaldi_mpi.embedded.cmvn", description="CMVN statistics of a Kaldi data directory"
    )
    parser.add_argument("data_dir")
    parser.add_argument("log_dir", nargs="?", help="default: DATA_DIR/log")
    parser.add_argument("cmvn_dir", nargs="?", help="default: DATA_DIR/data")
    options = parser.parse_args()
    make_cmvn(options.data_dir, log_dir=options.log_dir, cmvn_dir=options.cmvn_dir)


if __name__ == "__main__":
    run_command(main)
