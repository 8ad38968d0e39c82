"""N learners as threads of one process, with the same guarantees as over MPI: for tests and examples.

Each rank has its communication thread; what differs from MPI is only how an array gets from one to another.
Large arrays are handed over when their receiver is ready, as by a library's rendezvous: code that counts on
sends to complete by themselves hangs here too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.transport.comm_world import CommWorld
from kaldi_mpi.transport.point_to_point import HEADERS, NUM_STREAMS
from kaldi_mpi.transport.thread import BrokenWorldError, CommThread, Transfer

T = TypeVar("T")

EAGER = 4096  # bytes: sends up to this size complete at once

_Address = tuple[int, int]  # receiver, tag


class _Handle:
    """One end of a transfer."""

    __slots__ = ("array", "done", "owner", "source")

    def __init__(self, array: NDArray[np.uint8], source: int, owner: int) -> None:
        self.array, self.source, self.owner = array, source, owner
        self.done = False


class _Hub:
    """Where the ranks of one world of threads leave their arrays for each other."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.failures: list[BaseException] = []
        self._lock = threading.Lock()
        self._sent: dict[_Address, list[_Handle]] = {}  # not yet received, oldest first
        self._wanted: dict[_Address, list[_Handle]] = {}  # receives that wait
        self.threads = [
            CommThread(rank, _completed, polls=False, on_failure=self.fail, patience=timeout) for rank in range(size)
        ]

    def send(self, array: NDArray[Any], source: int, to: int, tag: int) -> _Handle:
        handle = _Handle(array.view(np.uint8), source, source)
        with self._lock:
            wanted = self._wanted.get((to, tag), [])
            for index, receiver in enumerate(wanted):
                if receiver.source == source:
                    self._match(handle, wanted.pop(index))
                    break
            else:
                if array.nbytes <= EAGER:
                    handle.array = handle.array.copy()
                    handle.done = True
                self._sent.setdefault((to, tag), []).append(handle)
        self.threads[to].nudge()
        return handle

    def receive(self, array: NDArray[Any], source: int, to: int, tag: int) -> _Handle:
        handle = _Handle(array.view(np.uint8), source, to)
        with self._lock:
            sent = self._sent.get((to, tag), [])
            for index, sender in enumerate(sent):
                if sender.source == source:
                    self._match(sent.pop(index), handle)
                    break
            else:
                self._wanted.setdefault((to, tag), []).append(handle)
        return handle

    def probe(self, to: int, tag: int) -> int | None:
        with self._lock:
            sent = self._sent.get((to, tag))
            return sent[0].source if sent else None

    def fail(self, error: BaseException) -> None:
        """End everybody's waits; the first error is the reason."""
        self.failures.append(error)
        for thread in self.threads:
            thread.fail(error)

    def _match(self, sender: _Handle, receiver: _Handle) -> None:
        if sender.array.size != receiver.array.size:
            raise RuntimeError(f"{sender.array.size} bytes sent where {receiver.array.size} are awaited")
        receiver.array[...] = sender.array
        for handle in (sender, receiver):
            if not handle.done:
                handle.done = True
                self.threads[handle.owner].nudge()


def _completed(handles: list[_Handle]) -> Sequence[int]:
    return [index for index, handle in enumerate(handles) if handle.done]


class _ThreadPointToPoint:
    """Transfers among some ranks of a hub; see `point_to_point.PointToPoint`."""

    def __init__(self, hub: _Hub, me: int, ranks: Sequence[int], context: int, contexts: list[int]) -> None:
        contexts[0] = max(contexts[0], context + 1)
        self._hub, self._me, self._ranks, self._tag, self._contexts = (
            hub,
            me,
            list(ranks),
            context * NUM_STREAMS,
            contexts,
        )
        self.rank, self.size = self._ranks.index(me), len(self._ranks)
        self.bytes_sent = 0

    @property
    def next_context(self) -> int:
        return self._contexts[0]

    def send(self, array: NDArray[Any], to: int, stream: int) -> Transfer:
        self.bytes_sent += array.nbytes
        peer = self._ranks[to]
        return Transfer(self._hub.send(array, self._me, peer, self._tag + stream), "to", peer)

    def receive(self, array: NDArray[Any], source: int, stream: int) -> Transfer:
        peer = self._ranks[source]
        return Transfer(self._hub.receive(array, peer, self._me, self._tag + stream), "from", peer)

    def probe(self, header: NDArray[Any]) -> tuple[int, Transfer] | None:
        source = self._hub.probe(self._me, self._tag + HEADERS)
        if source is None:
            return None
        number = self._ranks.index(source)
        return number, self.receive(header, number, HEADERS)

    def narrow(self, ranks: Sequence[int], context: int) -> _ThreadPointToPoint:
        return _ThreadPointToPoint(self._hub, self._me, [self._ranks[rank] for rank in ranks], context, self._contexts)


class ThreadWorld(CommWorld):
    """One learner of a world of threads; made by `run_world`.

    A learner or communication thread that fails breaks the world: the others raise BrokenWorldError in place
    of waiting.
    """

    def __init__(self, rank: int, hub: _Hub) -> None:
        self._hub = hub
        p2p = _ThreadPointToPoint(hub, rank, range(hub.size), 0, [1])
        super().__init__(hub.threads[rank], p2p, self._break)

    def close(self) -> None:
        """Meet the others, and end the communication thread."""
        if self._thread.alive():
            self._meet_to_close()
            self._thread.stop()

    def _break(self, status: int) -> NoReturn:
        """End this learner, and all waits of the others."""
        self._hub.fail(BrokenWorldError(f"rank {self.rank} ended the run"))
        raise SystemExit(status)


def run_world(size: int, learner: Callable[[ThreadWorld], T], timeout: float = 60.0) -> list[T]:
    """Run `learner` on `size` threads, each with its world, and return what each returned.

    Args:
        timeout: seconds after which a learner that waits fails.

    Raises:
        BaseException: what the first failing learner, or handler on a communication thread, raised.
    """
    hub = _Hub(size, timeout)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = learner(ThreadWorld(rank, hub))
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            hub.fail(error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"learner-{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for communication in hub.threads:
        communication.stop()
    for error in hub.failures:
        if not isinstance(error, BrokenWorldError):
            raise error
    if hub.failures:
        raise hub.failures[0]
    return results
