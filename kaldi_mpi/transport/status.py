"""What a learner and its launcher tell each other: environment variables, and one small status file a rank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kaldi_mpi.files import atomic_write

NUM_LEARNERS_ENV = "KALDI_MPI_NUM_LEARNERS"
STATUS_DIR_ENV = "KALDI_MPI_STATUS_DIR"
TERMINAL_ENV = "KALDI_MPI_TERMINAL"


class Status:
    """This learner's status file: what the launcher reads when the run ends badly.

    Without a launcher (no status directory in the environment) it does nothing.
    """

    def __init__(self, rank: int) -> None:
        folder = os.environ.get(STATUS_DIR_ENV)
        self._path = Path(folder) / f"rank.{rank}" if folder else None
        self._rank = rank
        self.write("running", "")

    def write(self, state: str, message: str) -> None:
        """Replace the file: `state` is running, finished or failed; `message` the last words."""
        if self._path is None:
            return
        with atomic_write(self._path, "w", sync=False) as stream:
            json.dump(
                {
                    "rank": self._rank,
                    "pid": os.getpid(),
                    "host": os.uname().nodename,
                    "state": state,
                    "message": message,
                },
                stream,
            )


def say_abort(rank: int, status: int) -> None:
    """Leave word that this rank is about to end the run with an MPI abort, unless it has already said why."""
    folder = os.environ.get(STATUS_DIR_ENV)
    if folder and all(s["state"] != "failed" for s in read_status(Path(folder)) if s["rank"] == rank):
        Status(rank).write("failed", f"it ended the run with status {status}")


def read_status(folder: Path) -> list[dict[str, Any]]:
    """All learners' status files in order of rank."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank.*")]
    return sorted(found, key=lambda status: int(status["rank"]))
