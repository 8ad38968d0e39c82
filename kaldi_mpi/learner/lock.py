"""One run a directory: a second one would write over the first one's files.

DIR/.lock is held (flock) by rank 0 as long as it lives, and says by whom. A lock is the kernel's, so that of a process
which was killed is free; what it says then tells that the run before did not end well.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.log import logger


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a training's directory while the block runs.

    Raises:
        ConfigError: another run holds it; names its host and process.
        DataError: the directory cannot be written to.
    """
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held while the block runs
        except OSError as error:
            raise DataError(f"cannot write: {error.strerror or error}", file=str(path)) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"{folder} is in use: {_owner(path)} trains there; wait for its end, or give another --dir"
                ) from error
            except OSError as error:
                logger.warning(
                    "%s: no lock can be had there (%s): see that no other run uses the directory", path, error
                )
            if not _is_still(path, stream.fileno()):
                continue  # its holder has just removed it
            if path.stat().st_size:
                logger.warning("taking over %s of %s, which is gone", path, _owner(path))
            stream.truncate(0)
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}, stream)
            stream.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']} (since {said['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said its name"
