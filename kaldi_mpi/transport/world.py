"""The world of learners: what a rank may ask of the others, and the world of one.

`World` is all that the learner knows of communication. `MpiWorld` carries it over MPI, `ThreadWorld` over
threads of one process for tests, `SoloWorld` is a learner alone.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray


class World(Protocol):
    """N learners. Collective methods are called by all ranks in the same order."""

    @property
    def rank(self) -> int:
        """This learner's number, from 0."""

    @property
    def size(self) -> int:
        """The number of learners, N."""

    def sum_(self, buffer: NDArray[np.float32]) -> None:
        """Replace a contiguous 1-dim float32 `buffer` by its sum over ranks, taken in rank order in float64.

        The same bits on every rank and in every run, whatever the MPI library and the timing.
        """

    def sum_float64(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over ranks of a small or large float64 array, in rank order; a new array of its shape."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank (picklable, small)."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank (picklable)."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def abort(self, status: int) -> NoReturn:
        """End the whole run, all ranks, at once, with this exit status."""


class SoloWorld:
    """A learner alone: every collective is the identity."""

    rank = 0
    size = 1

    def sum_(self, buffer: NDArray[np.float32]) -> None:
        """Nothing to add."""

    def sum_float64(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """A copy."""
        return np.array(values, dtype=np.float64)

    def gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The value."""
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""

    def abort(self, status: int) -> NoReturn:
        """End the process without clean-up, as an MPI abort does."""
        sys.stderr.flush()
        os._exit(status)


def sum_in_rank_order(pieces: NDArray[np.float32] | list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Sum float32 arrays in the order given, with float64 accumulation; one rounding at the end."""
    total = np.array(pieces[0], dtype=np.float64)
    for piece in pieces[1:]:
        total += piece
    return total.astype(np.float32)


def split_evenly(length: int, parts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut 0..length into `parts` runs that differ by at most one; returns their sizes and their starts."""
    edges = np.arange(parts + 1, dtype=np.int64) * length // parts
    return np.diff(edges), edges[:-1]
