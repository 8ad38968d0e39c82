"""The world over MPI.

Sums go by pieces: each rank receives its share of the buffer from all others (Alltoallv), adds the pieces
in rank order, and gives the result to all (Allgatherv). It moves 2 (N-1)/N of the buffer per rank, as a
ring allreduce does, and, unlike MPI_Allreduce, promises the same bits on all ranks, in all runs and under
any MPI library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.launch import NUM_LEARNERS_ENV
from kaldi_mpi.transport.world import split_evenly, sum_in_rank_order


class MpiWorld:
    """All ranks of a communicator (a private duplicate of it), COMM_WORLD by default.

    Raises:
        ConfigError: the run was launched for another number of ranks than MPI reports, which happens when
            one vendor's mpiexec starts another vendor's library: N runs of one rank each.
    """

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        expected = os.environ.get(NUM_LEARNERS_ENV)
        if comm is None and expected is not None and int(expected) != self.size:
            raise ConfigError(
                f"mpiexec was asked for {expected} learners but MPI counts {self.size}: mpiexec and "
                f"{MPI.Get_library_version().split(',')[0].strip()} do not belong together"
            )

    def sum_(self, buffer: NDArray[np.float32]) -> None:
        """Replace `buffer` by its sum over ranks, in rank order (see `World.sum_`)."""
        counts, starts = split_evenly(buffer.size, self.size)
        mine = int(counts[self.rank])
        pieces = np.empty((self.size, mine), np.float32)
        each = np.full(self.size, mine, np.int64)
        self._comm.Alltoallv(
            [buffer, (counts, starts), MPI.FLOAT], [pieces, (each, np.arange(self.size) * mine), MPI.FLOAT]
        )
        self._comm.Allgatherv([sum_in_rank_order(pieces), MPI.FLOAT], [buffer, (counts, starts), MPI.FLOAT])

    def sum_float64(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over ranks, in rank order (see `World.sum_float64`)."""
        values = np.ascontiguousarray(values, np.float64)
        total = np.empty_like(values)
        if self.rank == 0:
            # One rank's array at a time, so that large statistics never stand N-fold in memory.
            total[...] = values
            received = np.empty_like(values)
            for source in range(1, self.size):
                self._comm.Recv(received, source)
                total += received
        else:
            self._comm.Send(values, 0)
        self._comm.Bcast(total, 0)
        return total

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks (see `World.gather`)."""
        return self._comm.allgather(value)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (see `World.broadcast`)."""
        return self._comm.bcast(value, 0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._comm.Barrier()

    def abort(self, status: int) -> NoReturn:
        """End all ranks with MPI_Abort."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(status)
        os._exit(status)  # MPI_Abort does not return; this tells the type checker so


def die_with_parent() -> None:
    """Have Linux kill this process when its parent (mpiexec's daemon) dies.

    Without this, learners live on as orphans when mpiexec itself is killed with SIGKILL. On other systems
    nothing happens.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # a libc without prctl: the old behaviour stays
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
