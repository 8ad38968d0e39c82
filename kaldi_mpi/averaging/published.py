"""The published model of one learner: what others mix with while the learner computes on its own copy.

The learner computes its gradient on a copy w; the published x is where its changes and the exchanges with
other learners come together. x is cut into pieces, each with a lock of its own, so that a large model travels
in pieces and neither side waits for the other longer than one piece takes.

Numbers travel in a *wire* type: float32, float16, or bfloat16 (kept as uint16). An exchange adds
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

from kaldi_mpi.averaging.strategy import Flat
from kaldi_mpi.transport.number_formats import WIRE_TYPES, Wire, blocks, from_wire, to_wire

DEFAULT_PIECE = 4 * 2**20  # parameters; 16 MB in float32


class Shared(Protocol):
    """What strategies do with a published model. All but the attributes need the piece's lock."""

    num_pieces: int
    where: list[slice]  # of each piece
    wire: np.dtype[Any]  # of what travels
    steps: list[int]  # for each piece, the learner's own steps that are in it

    def lock(self, piece: int) -> contextlib.AbstractContextManager[None]:
        """Hold the piece."""

    def snapshot(self, piece: int) -> Wire:
        """A copy of the piece as it would travel; a new array."""

    def read(self, piece: int) -> Flat:
        """A float32 copy of the piece; a new array."""

    def mix(self, piece: int, mine: Wire, theirs: Wire, weight: float) -> None:
        """x <- x + weight * (theirs - mine); either may be float32 whatever the wire type."""

    def received(self, payload: NDArray[np.uint8]) -> Wire:
        """The numbers in the bytes of a message; needs no lock."""

    def to_numpy(self) -> Flat:
        """A copy of all of x, (P,), each piece as it is when its turn comes; takes the locks itself."""


class Pieces:
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


class HostPublishedModel(Pieces):
    """A published model in main memory.

    Args:
        values: (P,) float32, the model at the start; copied.
        piece_size: parameters of a piece (the last one may be smaller).
        wire: ``float32``, ``float16`` or ``bfloat16``.
    """

    def __init__(self, values: Flat, piece_size: int = DEFAULT_PIECE, wire: str = "float32") -> None:
        super().__init__(values.size, piece_size, wire)
        self.values = values.copy()

    def snapshot(self, piece: int) -> Wire:
        """See `Shared.snapshot`."""
        values = self.values[self.where[piece]]
        out = np.empty(values.size, self.wire)
        to_wire(values, out)
        return out

    def read(self, piece: int) -> Flat:
        """See `Shared.read`."""
        return self.values[self.where[piece]].copy()

    def mix(self, piece: int, mine: Wire, theirs: Wire, weight: float) -> None:
        """See `Shared.mix`."""
        values = self.values[self.where[piece]]
        for block in blocks(values.size):
            difference = from_wire(theirs[block]) - from_wire(mine[block])
            difference *= np.float32(weight)
            values[block] += difference

    def received(self, payload: NDArray[np.uint8]) -> Wire:
        """See `Shared.received`."""
        return payload.view(self.wire)

    def to_numpy(self) -> Flat:
        """See `Shared.to_numpy`."""
        out = np.empty_like(self.values)
        for piece, where in enumerate(self.where):
            with self.lock(piece):
                out[where] = self.values[where]
        return out

    def load(self, values: Flat) -> None:
        """Set all of x, (P,); nobody may be at work on it."""
        self.values[:] = values

    def push_pull(self, piece: int, change: Flat, copy: Flat) -> None:
        """The learner's step on one piece: x <- x + change; copy <- x. Both (P,), of which the piece is used."""
        where = self.where[piece]
        self.values[where] += change[where]
        copy[where] = self.values[where]
        self.steps[piece] += 1
