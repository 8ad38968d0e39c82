"""What the command lines of the embedded back end have in common."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from kaldi_mpi import log
from kaldi_mpi.errors import KaldiMpiError


def run_command(main: Callable[[], None]) -> None:
    """Run `main` as a program: Kaldi-like log, and one ERROR line and status 1 for the user's errors."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    log.set_up(spec.name.rsplit(".", 1)[-1] if spec is not None else os.path.basename(sys.argv[0]))
    try:
        main()
    except KaldiMpiError as error:
        log.logger.error("%s", error)
        sys.exit(1)
