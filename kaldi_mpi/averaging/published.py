"""The published model of one learner: what others mix with while the learner computes on its own copy.

The learner computes its gradient on a copy w; the published x is where its changes and the exchanges with
other learners come together. x is cut into pieces, each with a lock of its own, so that a large model travels
in pieces and neither side waits for the other longer than one piece takes.

Numbers travel in a *wire* type (`kaldi_mpi.transport.number_formats`). An exchange adds
weight * (theirs - mine) on one side and weight * (mine - theirs) on the other, both in float32 of the numbers
as they travelled: exact opposites, so that narrow types cost precision, never the mean.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.transport.number_formats import WIRE_TYPES, Wire, blocks, from_wire, to_wire
from kaldi_mpi.transport.world import Allocate

Flat = NDArray[np.float32]

DEFAULT_PIECE = 4 * 2**20  # parameters; 16 MB in float32


class PublishedModel(Protocol):
    """A published model, wherever it lives. All but the attributes need the piece's lock, unless they say otherwise."""

    num_pieces: int
    where: list[slice]  # of each piece
    wire: np.dtype[Any]  # of what travels
    steps: list[int]  # for each piece, the learner's own steps that are in it
    allocate: Allocate | None  # where messages with pieces are to arrive; None: in main memory

    def lock(self, piece: int) -> contextlib.AbstractContextManager[None]:
        """Hold the piece."""

    def snapshot(self, piece: int) -> Wire:
        """A copy of the piece as it would travel; a new array."""

    def read(self, piece: int) -> Flat:
        """A float32 copy of the piece; a new array."""

    def mix(self, piece: int, mine: Wire, theirs: Wire, weight: float) -> None:
        """x <- x + weight * (theirs - mine); either may be float32 whatever the wire type."""

    def write(self, piece: int, values: Flat) -> None:
        """Set a piece to float32 `values`."""

    def received(self, payload: NDArray[np.uint8]) -> Wire:
        """The numbers in the bytes of a message; needs no lock."""

    def push_pull(self, piece: int, change: Any, copy: Any) -> None:
        """The learner's step on one piece: x <- x + change; copy <- x. Both (P,), on the learner's device."""

    def to_numpy(self) -> Flat:
        """A copy of all of x, (P,), each piece as it is when its turn comes; takes the locks itself."""

    def load(self, values: Flat) -> None:
        """Set all of x, (P,); nobody may be at work on it."""


class PiecewiseModel:
    """What published models have in common wherever they live: pieces, each with a lock and a count of steps.

    Args:
        size: parameters of the model.
        piece_size: parameters of a piece (the last one may be smaller).
        wire: ``float32``, ``float16`` or ``bfloat16``.
    """

    def __init__(self, size: int, piece_size: int, wire: str) -> None:
        self.wire = np.dtype(WIRE_TYPES[wire])
        starts = range(0, max(1, size), piece_size)
        self.where = [slice(start, min(start + piece_size, size)) for start in starts]
        self.num_pieces = len(self.where)
        self.steps = [0] * self.num_pieces
        self._locks = [threading.Lock() for _ in self.where]

    @contextlib.contextmanager
    def lock(self, piece: int) -> Iterator[None]:
        """Hold the piece."""
        with self._locks[piece]:
            yield


class HostPublishedModel(PiecewiseModel):
    """A `PublishedModel` in main memory.

    Args:
        values: (P,) float32, the model at the start; copied.
        piece_size: parameters of a piece (the last one may be smaller).
        wire: ``float32``, ``float16`` or ``bfloat16``.
    """

    def __init__(self, values: Flat, piece_size: int = DEFAULT_PIECE, wire: str = "float32") -> None:
        super().__init__(values.size, piece_size, wire)
        self.values = values.copy()
        self.allocate: Allocate | None = None

    def snapshot(self, piece: int) -> Wire:
        values = self.values[self.where[piece]]
        out = np.empty(values.size, self.wire)
        to_wire(values, out)
        return out

    def read(self, piece: int) -> Flat:
        return self.values[self.where[piece]].copy()

    def mix(self, piece: int, mine: Wire, theirs: Wire, weight: float) -> None:
        values = self.values[self.where[piece]]
        for block in blocks(values.size):
            difference = from_wire(theirs[block]) - from_wire(mine[block])
            difference *= np.float32(weight)
            values[block] += difference

    def write(self, piece: int, values: Flat) -> None:
        self.values[self.where[piece]] = values

    def received(self, payload: NDArray[np.uint8]) -> Wire:
        return payload.view(self.wire)

    def to_numpy(self) -> Flat:
        out = np.empty_like(self.values)
        for piece, where in enumerate(self.where):
            with self.lock(piece):
                out[where] = self.values[where]
        return out

    def load(self, values: Flat) -> None:
        self.values[:] = values

    def push_pull(self, piece: int, change: Any, copy: Any) -> None:
        """See `PublishedModel.push_pull`; takes arrays, and tensors in main memory."""
        where = self.where[piece]
        self.values[where] += np.asarray(change)[where]
        np.asarray(copy)[where] = self.values[where]
        self.steps[piece] += 1
