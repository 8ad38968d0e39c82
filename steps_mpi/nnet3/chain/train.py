#!/usr/bin/env python3
"""In place of Kaldi's steps/nnet3/chain/train.py: chain (LF-MMI) models, by N persistent learners."""

import sys

try:
    import kaldi_mpi.programs.start  # noqa: F401 - with all that it needs
    from kaldi_mpi.cli import main
except ImportError as error:
    sys.exit(f"chain/train.py: {sys.executable} cannot import kaldi_mpi ({error}): put its python3 first on PATH")

sys.exit(main(["train-chain", *sys.argv[1:]]))
