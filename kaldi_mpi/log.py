"""Log lines in Kaldi's own form, so that its scripts and its users' eyes can parse them.

``LOG (program[version]:function():file.py:line) message``, and WARNING and ERROR likewise, on standard
error as in Kaldi. The program's name and the rank are set once by `set_up`.
"""

from __future__ import annotations

import logging
import os
import sys

import kaldi_mpi

logger = logging.getLogger("kaldi_mpi")

_LEVEL_NAMES = {logging.DEBUG: "VLOG[1]", logging.INFO: "LOG", logging.WARNING: "WARNING"}


class KaldiFormatter(logging.Formatter):
    """Formats records as Kaldi's KALDI_LOG does.

    Args:
        program: the name shown before the version, for example ``kaldi-mpi-train``.
        rank: the learner's rank, or None outside a parallel run; shown as ``program/rank``.
    """

    def __init__(self, program: str, rank: int | None = None) -> None:
        super().__init__()
        self._program = program if rank is None else f"{program}/{rank}"

    def format(self, record: logging.LogRecord) -> str:
        """Return one line (two where an exception's traceback is attached)."""
        level = _LEVEL_NAMES.get(record.levelno, "ERROR")
        where = f"{record.funcName}():{os.path.basename(record.pathname)}:{record.lineno}"
        line = f"{level} ({self._program}[{kaldi_mpi.__version__}]:{where}) {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(program: str, rank: int | None = None, level: int = logging.INFO) -> None:
    """Send the package's log to standard error in Kaldi's form; replaces an earlier set-up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KaldiFormatter(program, rank))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
