"""Collectives as tasks of the communication thread: generators over the transfers of a `PointToPoint`.

Sums are taken in rank order in float64 and rounded once, so they are the same, bit for bit, on all ranks, in all
runs, under any MPI library and over threads. A large buffer goes piece by piece: of each piece, rank j receives
the j-th part from everybody, adds, and sends the result to everybody; that moves 2 (N-1)/N of the buffer per
rank, as a ring allreduce does. The parts of the next piece travel while the results of the last one do.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.transport.number_formats import from_wire, quantized
from kaldi_mpi.transport.point_to_point import PointToPoint
from kaldi_mpi.transport.thread import Task, Transfer
from kaldi_mpi.transport.world import split_evenly, sum_in_rank_order

PIECE = 4 * 2**20  # numbers of a piece; temporary memory of a sum is about four times this in float32
SMALL = 65536  # bytes that a rank may send to have a sum in one round, everything to everybody, in place of two

Numbers = NDArray[Any]


class _Part:
    """One piece of a sum under way: what goes out, and the parts of the others that this rank adds."""

    def __init__(self, p2p: PointToPoint, stream: int, out: Numbers) -> None:
        self.p2p, self.stream, self.out = p2p, stream, out
        size, rank = p2p.size, p2p.rank
        self.whole = out.nbytes * (size - 1) <= SMALL
        if self.whole:
            self.where = [slice(0, out.size)] * size
        else:
            counts, starts = split_evenly(out.size, size)
            self.where = [slice(int(a), int(a + n)) for a, n in zip(starts, counts, strict=True)]
        mine = self.where[rank]
        self.received = np.empty((size, mine.stop - mine.start), out.dtype)
        self.received[rank] = out[mine]
        others = [(rank + k) % size for k in range(1, size)]
        self.transfers = [p2p.receive(self.received[i], i, stream) for i in others]
        self.transfers += [p2p.send(out[self.where[i]], i, stream) for i in others]

    def add(self, finish: Callable[[Numbers], Numbers]) -> Numbers:
        """The sum, in rank order, of the part that this rank adds."""
        return finish(self.received)

    def spread(self, mine: Numbers, into: Numbers) -> list[Transfer]:
        """Give the sum of this rank's part to all and take theirs, into an array of the whole piece."""
        rank, size = self.p2p.rank, self.p2p.size
        into[self.where[rank]] = mine
        if self.whole:
            return []
        others = [(rank + k) % size for k in range(1, size)]
        receive = [self.p2p.receive(into[self.where[i]], i, self.stream) for i in others]
        return receive + [self.p2p.send(mine, i, self.stream) for i in others]


def _by_pieces(
    p2p: PointToPoint,
    stream: int,
    buffer: Numbers,
    outgoing: Callable[[Numbers], Numbers],
    finish: Callable[[Numbers], Numbers],
    store: Callable[[Numbers, Numbers, Numbers], None] | None,
    piece: int,
    source: Numbers | None = None,
) -> Task:
    """The common course of all sums.

    Args:
        outgoing: what travels of a piece of the buffer.
        finish: from (N, n) contributions in rank order to the (n,) result that is given to all.
        store: called with (piece of the buffer, what travelled of it, result); None receives results in place.
        source: what is added up, of the buffer's size and not changed; None: the buffer itself. `store` then finds
            its values in the buffer.
    """
    source = buffer if source is None else source
    where = [slice(start, min(start + piece, buffer.size)) for start in range(0, buffer.size, piece)]
    if not where or p2p.size == 1:
        if source is not buffer:
            buffer[:] = source
        return
    ahead = _Part(p2p, stream, outgoing(source[where[0]]))
    for number, here in enumerate(where):
        part = ahead
        yield part.transfers
        if number + 1 < len(where):
            ahead = _Part(p2p, stream, outgoing(source[where[number + 1]]))
        mine = part.add(finish)
        values = buffer[here]
        result = values if store is None else np.empty_like(values)
        yield part.spread(mine, result)
        if store is not None:
            if source is not buffer:
                values[:] = source[here]
            store(values, part.out, result)


def _add_wire(received: Numbers) -> NDArray[np.float32]:
    return sum_in_rank_order([from_wire(piece) for piece in received])


def sum_float32(p2p: PointToPoint, stream: int, buffer: NDArray[np.float32], wire: str = "float32") -> Task:
    """Replace a (P,) float32 buffer by its sum over ranks; contributions travel in `wire`, results in float32."""

    def outgoing(values: Numbers) -> Numbers:
        return values if wire == "float32" else quantized(values, wire)

    return _by_pieces(p2p, stream, buffer, outgoing, _add_wire, None, PIECE)


def mean_into(
    p2p: PointToPoint,
    stream: int,
    buffer: NDArray[np.float32],
    wire: str = "float32",
    source: NDArray[np.float32] | None = None,
) -> Task:
    """x_i + mean(q(x)) - q(x_i) into the buffer, where q rounds to `wire`: the mean over ranks is conserved.

    x is `source`, which is not changed, or the buffer itself where that is None.
    In float32 q is the identity and all ranks get the mean itself, the same bits.
    """
    size = p2p.size

    def outgoing(values: Numbers) -> Numbers:
        return values if wire == "float32" else quantized(values, wire)

    def finish(received: Numbers) -> Numbers:
        total = np.array(from_wire(received[0]), np.float64)
        for one in received[1:]:
            total += from_wire(one)
        total /= size
        return total.astype(np.float32)

    def store(values: Numbers, sent: Numbers, mean: Numbers) -> None:
        mean -= from_wire(sent)
        values += mean

    return _by_pieces(p2p, stream, buffer, outgoing, finish, None if wire == "float32" else store, PIECE, source)


def sum_float64(p2p: PointToPoint, stream: int, values: NDArray[np.float64]) -> Task:
    """Replace a flat float64 array by its sum over ranks, in rank order."""

    def finish(received: Numbers) -> Numbers:
        total = received[0].copy()
        for one in received[1:]:
            total += one
        return total

    return _by_pieces(p2p, stream, values, lambda part: part, finish, None, PIECE // 2)


def barrier(p2p: PointToPoint, stream: int) -> Task:
    """Return when all ranks have come: in round k each hears from the rank 2^k before it (dissemination)."""
    token, heard = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
    step = 1
    while step < p2p.size:
        yield [
            p2p.receive(heard, (p2p.rank - step) % p2p.size, stream),
            p2p.send(token, (p2p.rank + step) % p2p.size, stream),
        ]
        step *= 2


def gather(p2p: PointToPoint, stream: int, value: Any) -> Task:
    """The values of all ranks, pickled on the way, in rank order."""
    size, rank = p2p.size, p2p.rank
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = np.zeros((size, 1), np.int64)
    lengths[rank] = own.size
    others = [(rank + k) % size for k in range(1, size)]
    yield [p2p.receive(lengths[i], i, stream) for i in others] + [p2p.send(lengths[rank], i, stream) for i in others]
    pickled = [np.empty(int(n), np.uint8) for n in lengths[:, 0]]
    pickled[rank] = own
    yield [p2p.receive(pickled[i], i, stream) for i in others] + [p2p.send(own, i, stream) for i in others]
    return [pickle.loads(data.data) for data in pickled]


def broadcast(p2p: PointToPoint, stream: int, value: Any) -> Task:
    """Rank 0's value, pickled on the way, down a binomial tree."""
    rank, size = p2p.rank, p2p.size
    length = np.zeros(1, np.int64)
    data = np.zeros(0, np.uint8)
    reach = 1
    if rank == 0:
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        length[0] = data.size
    else:
        while 2 * reach <= rank:
            reach *= 2
        parent = rank - reach  # a rank's parent is itself without its highest bit
        yield [p2p.receive(length, parent, stream)]
        data = np.empty(int(length[0]), np.uint8)
        yield [p2p.receive(data, parent, stream)]
        reach *= 2
    children = []
    while rank + reach < size:
        children.append(rank + reach)
        reach *= 2
    yield [p2p.send(length, child, stream) for child in children] + [
        p2p.send(data, child, stream) for child in children
    ]
    return pickle.loads(data.data)
