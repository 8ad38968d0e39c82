"""What stands around every learner: no exception may leave the others waiting.

Under mpiexec an uncaught exception in one rank makes all hang (MPI_Finalize waits for the rank that is no
longer coming). So everything that a rank runs goes through `guarded`, which says what happened and ends
the whole run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from kaldi_mpi.errors import KaldiMpiError
from kaldi_mpi.log import logger
from kaldi_mpi.transport.status import Status
from kaldi_mpi.transport.world import World

_END_SECONDS = 60.0  # after which a rank ends by itself that the launcher should have ended


def describe(error: BaseException) -> str:
    """One line for an error: a user's error as it is, any other with its type."""
    if isinstance(error, KaldiMpiError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def end_run(world: World, error: BaseException, where: str = "") -> NoReturn:
    """Log why this rank fails (`where` in it, if that helps), tell the launcher, and end all ranks."""
    message = f"{describe(error)} ({where})" if where else describe(error)
    if isinstance(error, KaldiMpiError) and world.rank != 0:
        # All ranks mostly find the same bad option or file: rank 0 tells it once and ends the others here.
        time.sleep(0.5)
    if isinstance(error, KaldiMpiError):
        logger.error("learner rank %d: %s", world.rank, message)
    else:
        logger.error("learner rank %d: %s", world.rank, message, exc_info=error)
    Status(world.messages.rank).write("failed", message, mend=isinstance(error, KaldiMpiError))
    world.abort(1)


def end_apart(world: World, status: Status, state: str, message: str) -> NoReturn:
    """End this rank where some are lost, or it is one of these: MPI's own end would wait for them for ever.

    The launcher, which reads how each rank has ended, ends them all; without one, rank 0 does.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    status.write(state, message, lost=world.lost)
    if not status.is_read and world.messages.rank == 0:
        world.abort(0)
    time.sleep(_END_SECONDS)
    os._exit(0)


@contextlib.contextmanager
def guarded(world: World) -> Iterator[Status]:
    """Run the block of one learner; if it fails, log why, tell the launcher, and end all ranks.

    The block gets what the launcher reads: a block that stops before it is done says so there.

    A `KaldiMpiError` is one line in the log; anything else comes with its traceback. Exceptions in other
    threads of the learner end the run too.
    """
    status = Status(world.rank)

    def fail_in_thread(failure: threading.ExceptHookArgs) -> None:
        end_run(world, failure.exc_value or RuntimeError(f"a thread failed with {failure.exc_type.__name__}"))

    threading.excepthook = fail_in_thread
    try:
        yield status
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            end_run(world, leaving)
        raise
    except BaseException as error:  # noqa: BLE001 - logged, and ends the run
        end_run(world, error)
    if status.state == "running":
        status.write("finished", "")
