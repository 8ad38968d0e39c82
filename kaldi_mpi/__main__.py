"""``python -m kaldi_mpi VERB`` is ``kaldi-mpi VERB``."""

import sys

from kaldi_mpi.cli import main

sys.exit(main())
