"""Log-likelihoods of a data directory as a matrix archive, for Kaldi's ``latgen-faster-mapped``.

``python -m tests.embedded.loglikes MODEL DATA_DIR WSPECIFIER`` writes for each utterance the
(frames, pdfs) matrix that `kaldi_mpi.embedded.decode` decodes: a GMM's log-likelihoods, or a network's
log-posteriors less the log-priors. With WSPECIFIER ``ark:-`` it can stand at the head of a pipe.
"""

from __future__ import annotations

import argparse

import kaldi_native_io

from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.features import read_features
from kaldi_mpi.embedded.scorers import load_scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data_dir")
    parser.add_argument("wspecifier")
    chosen = parser.parse_args()
    data = DataDir(chosen.data_dir)
    scorer, _ = load_scorer(chosen.model, data)
    with kaldi_native_io.FloatMatrixWriter(chosen.wspecifier) as writer:
        for key, feats in read_features(data.file("feats.scp"), data.utterances):
            writer.write(key, scorer(key, feats))


if __name__ == "__main__":
    main()
