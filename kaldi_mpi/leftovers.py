"""What a run that was killed leaves behind, and only that: shared memory, sockets' directories, status directories.

Each learner writes down which files of shared memory its MPI library has mapped, each launcher which process it is
and which mpiexec it has started; so that whoever comes later removes the files of those processes, when they are gone,
and nobody else's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

from kaldi_mpi.files import atomic_write
from kaldi_mpi.log import logger
from kaldi_mpi.processes import Process
from kaldi_mpi.transport.status import read_status

PREFIX = ".learners."  # of status directories
_LAUNCHER = "launcher.json"
_SHM = Path("/dev/shm")


def claim(status_dir: Path, mpiexec: int) -> None:
    """Write down that this process is the launcher, and `mpiexec` the process that it has started."""
    own = Process.of(os.getpid())
    said = {"host": socket.gethostname(), "pid": os.getpid(), "started": own.started if own else 0, "mpiexec": mpiexec}
    with atomic_write(status_dir / _LAUNCHER, "w", sync=False) as stream:
        json.dump(said, stream)


def make_room() -> None:
    """In the process that becomes mpiexec: remove what one of the same number has left, whoever had started it.

    Open MPI's server does not start where the files of another one are in its place, and numbers come round again.
    """
    shutil.rmtree(Path(tempfile.gettempdir(), f"ompi.{os.getpid()}"), ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what launchers of this host have left that are gone, with all their learners."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            said = json.loads((folder / _LAUNCHER).read_text(encoding="utf-8"))
            launcher = Process.of(int(said["pid"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another launcher's, which has just made it; or none of ours
        if said["host"] != socket.gethostname() or (launcher is not None and launcher.started == said["started"]):
            continue
        if remove(folder):
            logger.info("removed %s, left by process %d, which is gone", folder, said["pid"])


def remove(status_dir: Path) -> bool:
    """Remove a run's status directory, and what its processes have left on this host; False: some are still there."""
    here = [s for s in read_status(status_dir) if s["host"] == socket.gethostname()]
    if any(Process.of(int(s["pid"])) is not None for s in here):
        return False
    _remove_files(Path(name) for s in here for name in s.get("shm", []))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        mpiexec = int(json.loads((status_dir / _LAUNCHER).read_text(encoding="utf-8"))["mpiexec"])
        sockets = Path(tempfile.gettempdir(), f"ompi.{mpiexec}")
        if Process.of(mpiexec) is None and sockets.is_dir() and sockets.stat().st_uid == os.getuid():
            shutil.rmtree(sockets, ignore_errors=True)
    shutil.rmtree(status_dir, ignore_errors=True)
    return True


def _remove_files(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.parent == _SHM and path.exists() and path.stat().st_uid == os.getuid():
            path.unlink(missing_ok=True)
