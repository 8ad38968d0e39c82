"""The world of a rank that has a communication thread: what `MpiWorld` and `ThreadWorld` have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.transport import collectives
from kaldi_mpi.transport.messages import CommMessages
from kaldi_mpi.transport.point_to_point import CLOSING, COLLECTIVES, PointToPoint
from kaldi_mpi.transport.thread import CommThread, Completion, Lane, Task

_SHRUNK = 2**16  # numbers of worlds after the first that has lost a rank


class _Pending:
    """See `world.Pending`."""

    def __init__(self, world: CommWorld, completion: Completion) -> None:
        self._world, self._completion = world, completion

    def wait(self) -> None:
        self._world._count_wait(self._completion)


class CommWorld:
    """See `kaldi_mpi.transport.world.World`.

    Args:
        thread: this process's communication thread.
        p2p: among the ranks of this world.
        abort: ends the whole run.
    """

    def __init__(self, thread: CommThread, p2p: PointToPoint, abort: Callable[[int], NoReturn]) -> None:
        self.rank, self.size = p2p.rank, p2p.size
        self._present = list(range(p2p.size))
        self.seconds_waited = 0.0
        self._thread, self._p2p, self._abort = thread, p2p, abort
        self._lane = Lane("collective")
        self._closing = Lane("end")
        self.messages = CommMessages(thread, p2p, self._count_wait)

    @property
    def bytes_sent(self) -> int:
        """By this rank to others of this world, messages and collectives."""
        return self._p2p.bytes_sent

    def sum_(self, buffer: NDArray[np.float32], wire: str = "float32") -> None:
        self.start_sum(buffer, wire).wait()

    def start_sum(self, buffer: NDArray[np.float32], wire: str = "float32") -> _Pending:
        task = collectives.sum_float32(self._p2p, COLLECTIVES, _flat(buffer, np.float32), wire)
        return _Pending(self, self._submit(task, f"sum of {buffer.size}"))

    def mean_into(self, buffer: NDArray[np.float32], wire: str = "float32") -> None:
        self.start_mean(buffer, buffer, wire).wait()

    def start_mean(self, source: NDArray[np.float32], into: NDArray[np.float32], wire: str = "float32") -> _Pending:
        if _flat(source, np.float32).size != into.size:
            raise ValueError(f"the mean of {source.size} numbers does not fit into {into.size}")
        apart = None if source is into else source
        task = collectives.mean_into(self._p2p, COLLECTIVES, _flat(into, np.float32), wire, apart)
        return _Pending(self, self._submit(task, f"mean of {into.size}"))

    def sum_float64(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.array(values, np.float64, order="C")
        task = collectives.sum_float64(self._p2p, COLLECTIVES, total.reshape(-1))
        self._thread.wait(self._submit(task, f"float64 sum of {total.size}"))
        return total

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = self._thread.wait(self._submit(collectives.gather(self._p2p, COLLECTIVES, value), "gather"))
        return values

    def broadcast(self, value: Any) -> Any:
        return self._thread.wait(self._submit(collectives.broadcast(self._p2p, COLLECTIVES, value), "broadcast"))

    def barrier(self) -> None:
        self._thread.wait(self._submit(collectives.barrier(self._p2p, COLLECTIVES), "barrier"))

    def split(self, color: int) -> CommWorld:
        of_all = self.gather((color, self._p2p.next_context))
        context = max(free for _, free in of_all)
        ranks = [rank for rank, (other, _) in enumerate(of_all) if other == color]
        return CommWorld(self._thread, self._p2p.narrow(ranks, context), self._abort)

    def shrink(self, ranks: Sequence[int]) -> None:
        # These ranks may have made different numbers of worlds, and cannot ask the others; from here on they agree.
        sent = self._p2p.bytes_sent
        self._p2p = self._p2p.narrow(ranks, max(self._p2p.next_context, _SHRUNK))
        self._p2p.bytes_sent = sent
        self.rank, self.size = self._p2p.rank, self._p2p.size
        self._present = [self._present[rank] for rank in ranks]
        self._lane, self._closing = Lane("collective"), Lane("end")

    @property
    def lost(self) -> list[int]:
        return sorted(set(range(self.messages.size)) - set(self._present))

    def waits(self) -> str:
        return self._thread.waits()

    def last_exchanges(self) -> list[str]:
        return self._thread.last_exchanges()

    def abort(self, status: int) -> NoReturn:
        self._abort(status)

    def close(self) -> None:
        """See `World.close`; a world made by `split` ends with the one it was split from."""
        self.messages.post(self.messages.forget)

    def _meet_to_close(self) -> None:
        """Bring all ranks here, and all messages to their end: afterwards nothing of this world is under way."""
        self.messages.post(self.messages.drain)
        for _ in range(2):
            barrier = collectives.barrier(self._p2p, CLOSING)
            self._thread.wait(self._thread.submit(self._closing, barrier, "everybody to close the world"))
            self._thread.wait(self._thread.when(lambda: not self.messages.sending, "messages to leave"))
        self.messages.post(self.messages.forget)

    def _submit(self, task: Task, what: str) -> Completion:
        return self._thread.submit(self._lane, task, what)

    def _count_wait(self, completion: Completion) -> float:
        began = time.perf_counter()
        self._thread.wait(completion)
        seconds = time.perf_counter() - began
        self.seconds_waited += seconds
        return seconds


def _flat(buffer: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """`buffer` itself, which must be a contiguous 1-dim array."""
    if buffer.ndim != 1 or buffer.dtype != dtype or not buffer.flags.c_contiguous:
        raise ValueError(f"a contiguous 1-dim {np.dtype(dtype)} array is needed, not {buffer.dtype}{buffer.shape}")
    return buffer
