"""A fake world for tests: N learners as threads of one process, with the same guarantees as over MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.transport.world import sum_in_rank_order

T = TypeVar("T")


class _Board:
    """Where the threads of one fake world leave their values for each other."""

    def __init__(self, size: int, timeout: float) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)


class ThreadWorld:
    """One learner of a fake world; made by `run_world`.

    A learner that fails breaks the barrier, so that the others raise BrokenBarrierError in place of waiting.
    """

    def __init__(self, rank: int, size: int, board: _Board) -> None:
        self.rank = rank
        self.size = size
        self._board = board

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        self._board.values[self.rank] = value
        self._board.barrier.wait()
        values = list(self._board.values)
        self._board.barrier.wait()
        return values

    def sum_(self, buffer: NDArray[np.float32]) -> None:
        """Replace `buffer` by its sum over ranks, in rank order."""
        pieces = self.gather(buffer.copy())
        buffer[:] = sum_in_rank_order(pieces)

    def sum_float64(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over ranks, in rank order."""
        pieces = self.gather(np.array(values, np.float64))
        return np.asarray(sum(pieces[1:], pieces[0].copy()), np.float64)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value)[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._board.barrier.wait()

    def abort(self, status: int) -> NoReturn:
        """Break the barrier for all and end this learner."""
        self._board.barrier.abort()
        raise SystemExit(status)


def run_world(size: int, learner: Callable[[ThreadWorld], T], timeout: float = 60.0) -> list[T]:
    """Run `learner` on `size` threads, each with its world, and return what each returned.

    Raises:
        BaseException: what the first failing learner raised.
    """
    board = _Board(size, timeout)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = learner(ThreadWorld(rank, size, board))
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            failures.append(error)
            board.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"learner-{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failures:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if failures:
        raise failures[0]
    return results
