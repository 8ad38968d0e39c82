"""What a world must be able to do with arrays: start sending one, start receiving one, look for a header.

Everything else, collectives and messages, is built on these three (`collectives`, `messages`), once for MPI and
for threads of one process, so that tests over threads hold for MPI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from kaldi_mpi.transport.thread import Transfer

# Streams between two ranks of a world; the arrays of one stream arrive in the order sent.
HEADERS, PAYLOADS, COLLECTIVES, CLOSING = range(4)
NUM_STREAMS = 8


class PointToPoint(Protocol):
    """Point-to-point transfers among the ranks of one world; used on the communication thread only.

    Attributes:
        rank, size: of this world.
        bytes_sent: by this rank in this world, all streams.
        next_context: a number that no world of this process (and communicator) has used yet.
    """

    rank: int
    size: int
    bytes_sent: int

    @property
    def next_context(self) -> int: ...

    def send(self, array: NDArray[Any], to: int, stream: int) -> Transfer:
        """Start sending a contiguous array, which must stay as it is until the transfer is done."""

    def receive(self, array: NDArray[Any], source: int, stream: int) -> Transfer:
        """Start receiving into a contiguous array of the very size that `source` sends."""

    def probe(self, header: NDArray[Any]) -> tuple[int, Transfer] | None:
        """Begin receiving a header that has come from anyone; its source, or None."""

    def narrow(self, ranks: Sequence[int], context: int) -> PointToPoint:
        """Transfers among these ranks of this world only, apart from all others."""
