"""Messages between the ranks of one world: `Messages` on a communication thread.

A message is a header of fixed size (channel, size of the payload, up to eight whole numbers) and, where there is
one, the payload as a transfer of its own, so that nothing is copied together. Headers of one sender arrive in
the order sent; payloads are received in the order of their headers; a message is handed over when all earlier
ones of its sender have been. So the order holds whatever the sizes.
"""

from __future__ import annotations

import enum
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.transport.point_to_point import HEADERS, PAYLOADS, PointToPoint
from kaldi_mpi.transport.thread import CommThread
from kaldi_mpi.transport.world import MAX_NUMBERS, Allocate, Handler


class Channel(enum.IntEnum):
    """Who a message is for: each user of messages has a channel of its own."""

    STRATEGY = 1  # exchanges of an asynchronous strategy
    TICKETS = 2
    SNAPSHOTS = 3
    MEMBERS = 4  # who takes part
    CHECKPOINTS = 5
    SERVER = 6  # commands to a dedicated server


_HEADER = 3 + MAX_NUMBERS  # channel, bytes of payload, count of numbers, numbers
_MOST_AT_ONCE = 16  # messages taken in before the thread looks at its other work


class _Incoming:
    """One message as it arrives."""

    __slots__ = ("headed", "header", "here", "payload")

    def __init__(self) -> None:
        self.header = np.zeros(_HEADER, np.int64)
        self.headed = False
        self.here = False
        self.payload: Any = np.empty(0, np.uint8)


class CommMessages:
    """See `kaldi_mpi.transport.world.Messages`.

    Args:
        wait: how the world waits for a completion, counting the time.
    """

    def __init__(self, thread: CommThread, p2p: PointToPoint, wait: Callable[[Any], float]) -> None:
        self.rank, self.size = p2p.rank, p2p.size
        self._thread, self._p2p, self._wait = thread, p2p, wait
        self._handlers: dict[int, Handler] = {}
        self._allocators: dict[int, Allocate] = {}
        self._kept: dict[int, deque[tuple[int, tuple[int, ...], NDArray[np.uint8]]]] = {}
        self._coming: list[deque[_Incoming]] = [deque() for _ in range(self.size)]
        self._next = _Incoming()
        self._draining = False
        self.sending = 0  # transfers of messages under way from here

    def post(self, action: Callable[[], None]) -> None:
        self._thread.post(action)

    def on_message(self, channel: int, handler: Handler | None, allocate: Allocate | None = None) -> None:
        if allocate is not None:
            self._allocators[channel] = allocate
        elif handler is None:
            self._allocators.pop(channel, None)
        if self._thread.is_current():
            self._attach(channel, handler)
        else:
            self._thread.post(lambda: self._attach(channel, handler))

    def send(self, channel: int, to: int, numbers: Sequence[int], payload: Any) -> None:
        if not self._thread.is_current():
            raise RuntimeError("messages are sent on the communication thread: use post")
        if not 0 <= to < self.size:
            raise ValueError(f"no rank {to} in a world of {self.size}")
        if len(numbers) > MAX_NUMBERS:
            raise ValueError(f"{len(numbers)} numbers in a message: at most {MAX_NUMBERS} go")
        data = _bytes_of(payload)
        if to == self.rank:
            self._thread.post(functools.partial(self._hand_over, channel, to, tuple(map(int, numbers)), _copy(data)))
            return
        header = np.zeros(_HEADER, np.int64)
        header[:3] = channel, data.nbytes, len(numbers)
        header[3 : 3 + len(numbers)] = numbers
        self.sending += 1
        self._thread.track(self._p2p.send(header, to, HEADERS), functools.partial(self._sent, header))
        if data.nbytes:
            self.sending += 1
            self._thread.track(self._p2p.send(data, to, PAYLOADS), functools.partial(self._sent, data))

    def every(self, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        return self._thread.every(seconds, action)

    def wait(self, ready: Callable[[], bool]) -> float:
        return self._wait(self._thread.when(ready, "a condition on messages"))

    def drain(self) -> None:
        """Take in messages from now on even where nobody listens, so that their senders can end."""
        self._draining = True
        self._thread.listen(self, True)

    def poll(self) -> bool:
        """Take in what has come; see `thread.Listener`."""
        for count in range(_MOST_AT_ONCE):
            found = self._p2p.probe(self._next.header)
            if found is None:
                return count > 0
            source, transfer = found
            incoming, self._next = self._next, _Incoming()
            self._coming[source].append(incoming)
            self._thread.track(transfer, functools.partial(self._headed, source, incoming))
        return True

    def forget(self) -> None:
        """Listen no more."""
        self._thread.listen(self, False)

    def _attach(self, channel: int, handler: Handler | None) -> None:
        if handler is None:
            self._handlers.pop(channel, None)
        else:
            self._handlers[channel] = handler
            kept = self._kept.get(channel, deque())
            while kept and channel in self._handlers:
                self._handlers[channel](*kept.popleft())
        self._thread.listen(self, bool(self._handlers) or self._draining)

    def _sent(self, _array: Any) -> None:
        self.sending -= 1

    def _headed(self, source: int, incoming: _Incoming) -> None:
        incoming.headed = True
        # Payloads are received in the order of headers, though headers may be noticed in another.
        for one in list(self._coming[source]):
            if not one.headed:
                break
            if one.payload.nbytes or one.here:
                continue
            size = int(one.header[1])
            if size:
                one.payload = self._allocators.get(int(one.header[0]), _main_memory)(size)
                transfer = self._p2p.receive(one.payload, source, PAYLOADS)
                self._thread.track(transfer, functools.partial(self._arrived, source, one))
            else:
                one.here = True
        self._deliver(source)

    def _arrived(self, source: int, incoming: _Incoming) -> None:
        incoming.here = True
        self._deliver(source)

    def _deliver(self, source: int) -> None:
        coming = self._coming[source]
        while coming and coming[0].here:
            one = coming.popleft()
            channel, _, count = (int(number) for number in one.header[:3])
            self._hand_over(channel, source, tuple(one.header[3 : 3 + count].tolist()), one.payload)

    def _hand_over(self, channel: int, source: int, numbers: tuple[int, ...], payload: NDArray[np.uint8]) -> None:
        handler = self._handlers.get(channel)
        if handler is None:
            self._kept.setdefault(channel, deque()).append((source, numbers, payload))
        else:
            handler(source, numbers, payload)


def _main_memory(size: int) -> NDArray[np.uint8]:
    return np.empty(size, np.uint8)


def _bytes_of(payload: Any) -> Any:
    """The bytes of an array, or of a tensor in a device's memory, as a flat view."""
    if payload is None:
        return np.empty(0, np.uint8)
    if isinstance(payload, np.ndarray):
        return np.ascontiguousarray(payload).reshape(-1).view(np.uint8)
    import torch

    return payload.reshape(-1).view(torch.uint8)


def _copy(data: Any) -> Any:
    return data.copy() if isinstance(data, np.ndarray) else data.clone()
