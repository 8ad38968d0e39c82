"""Log-likelihoods of a data directory as a matrix archive, for Kaldi's ``latgen-faster-mapped``.

``python -m kaldi_mpi.embedded.loglikes [--nj N --job J] MODEL DATA_DIR WSPECIFIER`` writes for each utterance the
(frames, pdfs) matrix that `kaldi_mpi.embedded.decode` decodes: a GMM's log-likelihoods, or a network's
log-posteriors less the log-priors. With WSPECIFIER ``ark:-`` it can stand at the head of a pipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import kaldi_native_io

from kaldi_mpi.embedded.command import run_command
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.feature_io import read_features
from kaldi_mpi.embedded.scorers import ChunkOptions, load_scorer
from kaldi_mpi.embedded.split import split_by_speaker
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.log import logger


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; see the module's text.

    Raises:
        DataError: unusable input, or an archive that cannot be written.
        ConfigError: there is no such job.
    """
    parser = argparse.ArgumentParser(prog="kaldi_mpi.embedded.loglikes", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data_dir")
    parser.add_argument("wspecifier")
    parser.add_argument("--nj", type=int, default=1)
    parser.add_argument("--job", type=int, default=1)
    parser.add_argument("--frames-per-chunk", type=int, default=0, help="0: whole utterances")
    parser.add_argument("--extra-left-context", type=int, default=0)
    parser.add_argument("--online-ivector-dir", help="for networks that take i-vectors")
    chosen = parser.parse_args(arguments)
    if not 1 <= chosen.job <= chosen.nj:
        raise ConfigError(f"job {chosen.job} of {chosen.nj} jobs")
    data = DataDir(chosen.data_dir)
    chunks = ChunkOptions(
        chosen.frames_per_chunk, chosen.extra_left_context, online_ivector_dir=chosen.online_ivector_dir
    )
    scorer, _ = load_scorer(chosen.model, data, chunks)
    utterances = split_by_speaker(data.utt2spk, chosen.nj)[chosen.job - 1]
    try:
        with kaldi_native_io.FloatMatrixWriter(chosen.wspecifier) as writer:
            for key, feats in read_features(data.file("feats.scp"), utterances):
                writer.write(key, scorer(key, feats))
    except RuntimeError as error:
        raise DataError("cannot write the archive", file=chosen.wspecifier) from error
    logger.info("Wrote log-likelihoods of %d utterances", len(utterances))


if __name__ == "__main__":
    run_command(main)
