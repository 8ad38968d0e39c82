"""The world over MPI: transfers by non-blocking point-to-point calls, made on the communication thread alone.

One communicator (a private duplicate) carries everything; tags keep worlds and streams apart, so that splitting
a world is no call of MPI's, and no call of MPI's ever blocks the thread.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport import guard
from kaldi_mpi.transport.comm_world import CommWorld
from kaldi_mpi.transport.point_to_point import HEADERS, NUM_STREAMS
from kaldi_mpi.transport.status import check_size, say_abort
from kaldi_mpi.transport.thread import CommThread, PeersDiedError, Transfer

# A thread that computes in Python holds the interpreter for this long before another thread gets a turn; the
# communication thread needs several turns to answer a message. Python's own 5 ms would make that 50 ms.
_SWITCH_SECONDS = 0.5e-3


def _bytes(array: Any) -> Any:
    """What mpi4py takes: bytes of main memory, or a tensor in device memory as it is, whose address it passes on."""
    return array.view(np.uint8) if isinstance(array, np.ndarray) else array


def _dead(comm: MPI.Intracomm) -> set[int]:
    """The ranks whose processes have died, under an MPI library and mpiexec that survive it (ULFM); else none."""
    try:
        failed = comm.Get_failed()
    except (NotImplementedError, MPI.Exception):
        return set()
    return set(failed.Translate_ranks(list(range(failed.Get_size())), comm.Get_group()))


class _Contexts:
    """Numbers of worlds on one communicator; shared by all that use it in this process."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.next = 1
        highest = comm.Get_attr(MPI.TAG_UB)
        self.most = (int(highest) if highest else 32767) // NUM_STREAMS


class MpiPointToPoint:
    """Transfers among some ranks of a communicator; see `point_to_point.PointToPoint`."""

    def __init__(self, comm: MPI.Intracomm, ranks: Sequence[int], context: int, contexts: _Contexts) -> None:
        if context >= contexts.most:
            raise ConfigError(f"this MPI library's tags allow only {contexts.most} worlds in one run")
        contexts.next = max(contexts.next, context + 1)
        self._comm, self._ranks, self._tag, self._contexts = comm, list(ranks), context * NUM_STREAMS, contexts
        self._numbers = {rank: number for number, rank in enumerate(self._ranks)}
        self.rank = self._numbers[comm.Get_rank()]
        self.size = len(self._ranks)
        self.bytes_sent = 0

    @property
    def next_context(self) -> int:
        return self._contexts.next

    def send(self, array: NDArray[Any], to: int, stream: int) -> Transfer:
        self.bytes_sent += array.nbytes
        peer = self._ranks[to]
        return self._begin(self._comm.Isend, array, "to", peer, stream)

    def receive(self, array: NDArray[Any], source: int, stream: int) -> Transfer:
        peer = self._ranks[source]
        return self._begin(self._comm.Irecv, array, "from", peer, stream)

    def _begin(
        self, call: Callable[..., MPI.Request], array: NDArray[Any], way: str, peer: int, stream: int
    ) -> Transfer:
        try:
            return Transfer(call(_bytes(array), peer, self._tag + stream), way, peer)
        except MPI.Exception:
            if peer not in _dead(self._comm):
                raise
            return Transfer(MPI.Request(), way, peer)  # one that never ends

    def probe(self, header: NDArray[Any]) -> tuple[int, Transfer] | None:
        status = MPI.Status()
        try:
            message = self._comm.Improbe(MPI.ANY_SOURCE, self._tag + HEADERS, status)
        except MPI.Exception:
            if not _dead(self._comm):
                raise
            self._comm.Ack_failed()  # from here on those that live are looked for again
            return None
        if message is None:
            return None
        peer = status.Get_source()
        return self._numbers[peer], Transfer(message.Irecv(header.view(np.uint8)), "from", peer)

    def narrow(self, ranks: Sequence[int], context: int) -> MpiPointToPoint:
        return MpiPointToPoint(self._comm, [self._ranks[rank] for rank in ranks], context, self._contexts)


class MpiWorld(CommWorld):
    """All ranks of a communicator (a private duplicate of it), COMM_WORLD by default.

    Construction and `close` are collective. Until it is closed, only its communication thread calls MPI. A process
    needs one: worlds of fewer ranks are made by `split`, and share the thread.

    Raises:
        ConfigError: the run was started for another number of ranks than MPI reports (`status.check_size`), or the
            library cannot be called from a second thread.
    """

    _num_open: ClassVar[int] = 0

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        # A second world beside this one means a second thread that calls MPI.
        needed = MPI.THREAD_MULTIPLE if MpiWorld._num_open else MPI.THREAD_SERIALIZED
        if MPI.Query_thread() < needed:
            raise ConfigError(
                "this MPI library does not let another thread communicate (MPI_THREAD_SERIALIZED is needed); "
                "is MPI4PY_RC_THREADS or mpi4py.rc.thread_level set?"
            )
        if comm is None:
            library = MPI.Get_library_version().split(",")[0].splitlines()[0].strip()
            check_size(os.environ, MPI.COMM_WORLD.Get_size(), library)
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        size = self._comm.Get_size()
        rank = MPI.COMM_WORLD.Get_rank()
        thread = CommThread(rank, self._completed, polls=True, on_failure=self._end_run)
        p2p = MpiPointToPoint(self._comm, range(size), 0, _Contexts(self._comm))
        super().__init__(thread, p2p, self._abort_run)
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        # A run that forgets to close the world still ends: the thread must be out of MPI before mpi4py finalizes
        # it, which is after Python's exit handlers.
        atexit.register(thread.stop)
        MpiWorld._num_open += 1

    def close(self) -> None:
        """End the communication thread, when all ranks have come here and no message is under way."""
        if self._thread.alive():
            self._meet_to_close()
            self._thread.stop()
            atexit.unregister(self._thread.stop)
            MpiWorld._num_open -= 1

    def _completed(self, requests: list[MPI.Request]) -> Sequence[int]:
        try:
            return MPI.Request.Testsome(requests) or ()
        except MPI.Exception as error:
            dead = _dead(self._comm)
            if not dead:
                raise
            done = [index for index, request in enumerate(requests) if request == MPI.REQUEST_NULL]
            raise PeersDiedError(done, dead) from error

    def _end_run(self, error: BaseException) -> None:
        """An exception on the communication thread: nobody else would notice."""
        guard.end_run(self, error, "on its communication thread")

    def _abort_run(self, status: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        # mpiexec kills all: without this word it is chance who is found dead first.
        say_abort(MPI.COMM_WORLD.Get_rank(), status)
        self._comm.Abort(status)
        os._exit(status)  # MPI_Abort does not return; this tells the type checker so


def is_cuda_aware() -> bool:
    """Whether the MPI library says, at run time, that it takes addresses of device memory.

    Open MPI and MPICH both answer `MPIX_Query_cuda_support`; where a library has no such function, it is not aware.
    """
    # Looked up through mpi4py's extension, the symbol is found in the library that it is bound to.
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    if query is None:
        return False
    query.restype = ctypes.c_int
    return query() == 1
