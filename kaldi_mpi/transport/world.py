"""The world of learners: what a rank may ask of the others, and the world of one.

`World` is all that the learner knows of communication. `MpiWorld` carries it over MPI, `ThreadWorld` over
threads of one process (in tests), `SoloWorld` is a learner alone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_NUMBERS = 8  # in a message

# (source, numbers, payload as bytes)
Handler = Callable[[int, tuple[int, ...], NDArray[np.uint8]], None]
Allocate = Callable[[int], Any]  # where a payload of so many bytes is to arrive


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Return when it is done; the buffer then holds the result."""


class Collective(Protocol):
    """What a strategy of averaging may ask of the other learners; all make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This learner's number, from 0."""

    @property
    def size(self) -> int:
        """The number of learners, N."""

    def sum_(self, buffer: NDArray[np.float32], wire: str = "float32") -> None:
        """Replace a contiguous 1-dim float32 `buffer` by its sum over ranks, taken in rank order in float64.

        The same bits on every rank and in every run, whatever the MPI library and the timing.

        Args:
            wire: ``float32``, ``float16`` or ``bfloat16``: how the contributions travel. Results are float32.
        """

    def start_mean(self, source: NDArray[np.float32], into: NDArray[np.float32], wire: str = "float32") -> Pending:
        """`World.mean_into` in the background: what it would make of `source` is put into `into`, of the same size.

        Both are lent until `Pending.wait` returns; `source` stays as it is (unless it is `into` itself).
        """


class Messages(Protocol):
    """Messages between the ranks of one world, carried and answered by the ranks' communication threads.

    Messages of one sender to one receiver are handed over in the order sent, whatever their sizes. What runs
    on the communication thread (actions, handlers, `done`) must not block; an exception in it ends the run.
    """

    @property
    def rank(self) -> int:
        """This rank's number in the world."""

    @property
    def size(self) -> int:
        """The number of ranks in the world."""

    def post(self, action: Callable[[], None]) -> None:
        """From any thread: run `action` on the communication thread soon, in the order posted."""

    def on_message(self, channel: int, handler: Handler | None, allocate: Allocate | None = None) -> None:
        """Have messages of `channel` handed to handler(source, numbers, payload) on the communication thread.

        Those that came before there was a handler are kept and handed over now. None detaches. In order with
        `post`, when called from another thread. Payloads arrive in main memory, or, under an MPI library that
        takes device addresses, where `allocate(bytes)` says (a uint8 tensor in a device's memory).
        """

    def send(self, channel: int, to: int, numbers: Sequence[int], payload: Any) -> None:
        """On the communication thread: send up to 8 whole numbers and an array of any type, without waiting.

        With an MPI library that takes device addresses it may be a contiguous tensor in a device's memory. None
        sends the numbers alone.

        The payload must stay as it is until it has arrived; it arrives as bytes (uint8). A message to oneself
        is handed over later, never inside this call.

        Raises:
            RuntimeError: called on another thread.
            ValueError: no such rank, or too many numbers.
        """

    def every(self, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        """Run `action` on the communication thread every so many seconds, until what is returned is called."""

    def wait(self, ready: Callable[[], bool]) -> float:
        """On the learner's thread: let all that was posted so far run, then wait until `ready()` is true.

        It is asked on the communication thread, after everything that happens there; what it raises is raised
        here. Returns the seconds waited.
        """


class World(Collective, Protocol):
    """N learners. Collective methods are called by all ranks in the same order."""

    @property
    def messages(self) -> Messages:
        """Messages among these learners."""

    @property
    def seconds_waited(self) -> float:
        """How long this rank has waited in `sum_`, `mean_into`, `Pending.wait` and `Messages.wait`."""

    @property
    def bytes_sent(self) -> int:
        """What this rank has sent to others of this world, in collectives and messages."""

    def start_sum(self, buffer: NDArray[np.float32], wire: str = "float32") -> Pending:
        """`sum_` in the background: `buffer` is lent until `Pending.wait` returns. Several complete in order."""

    def mean_into(self, buffer: NDArray[np.float32], wire: str = "float32") -> None:
        """x_i <- x_i + mean(q(x)) - q(x_i), in place, where q rounds to `wire`.

        The mean over ranks stays what it was, to float32 rounding; each rank keeps what q lost of its own x_i.
        With ``float32`` all ranks hold the mean afterwards, the same bits. Alone, nothing changes.
        """

    def sum_float64(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over ranks of a small or large float64 array, in rank order; a new array of its shape."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank (picklable, small)."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank (picklable)."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def split(self, color: int) -> World:
        """The ranks that give one `color` form a world of their own, in the order of their ranks here.

        It shares this process's communication thread, and ends with this world.
        """

    def shrink(self, ranks: Sequence[int]) -> None:
        """From here on collectives are of these ranks alone, which all call this, in their order; messages stay.

        The others are lost: they are not told, and this world cannot be closed.
        """

    @property
    def lost(self) -> list[int]:
        """The ranks, as they were numbered at the start, that `shrink` has left out."""

    def waits(self) -> str:
        """What this rank waits for, as "waiting for sum of 5 (from rank 1)"; "": for nothing. From any thread."""

    def last_exchanges(self) -> list[str]:
        """What was sent and received last, and is under way; lines for the log of a hang. From any thread."""

    def abort(self, status: int) -> NoReturn:
        """End the whole run, all ranks, at once, with this exit status; from any thread."""

    def close(self) -> None:
        """End the communication, when all ranks have come here. Afterwards the world is of no more use."""


class SoloMessages:
    """Messages of a learner alone, to itself: all actions run in the thread that posts them."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._actions: deque[Callable[[], None]] = deque()
        self._running = threading.Lock()
        self._handlers: dict[int, Handler] = {}
        self._kept: dict[int, list[tuple[tuple[int, ...], NDArray[np.uint8]]]] = {}

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` now, or after the one that is running."""
        self._actions.append(action)
        while self._actions and self._running.acquire(blocking=False):
            try:
                while self._actions:
                    self._actions.popleft()()
            finally:
                self._running.release()

    def on_message(self, channel: int, handler: Handler | None, allocate: Allocate | None = None) -> None:
        self._handlers.pop(channel, None)
        if handler is not None:
            self._handlers[channel] = handler
            for numbers, data in self._kept.pop(channel, []):
                self.post(lambda numbers=numbers, data=data: self._hand_over(channel, numbers, data))  # type: ignore[misc]

    def send(self, channel: int, to: int, numbers: Sequence[int], payload: NDArray[Any] | None) -> None:
        if to != 0:
            raise ValueError(f"no rank {to} in a world of 1")
        data = np.empty(0, np.uint8) if payload is None else payload.reshape(-1).view(np.uint8).copy()
        self.post(lambda: self._hand_over(channel, tuple(map(int, numbers)), data))

    def every(self, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        """Nobody is there for whom it would be done."""
        return lambda: None

    def wait(self, ready: Callable[[], bool]) -> float:
        """Nobody else can make it true."""
        if not ready():
            raise RuntimeError("a learner alone waits for what nobody will do")
        return 0.0

    def _hand_over(self, channel: int, numbers: tuple[int, ...], data: NDArray[np.uint8]) -> None:
        if channel in self._handlers:
            self._handlers[channel](0, numbers, data)
        else:
            self._kept.setdefault(channel, []).append((numbers, data))


class _Done:
    """A sum that is done."""

    def wait(self) -> None:
        """Return at once."""


class SoloWorld:
    """A learner alone: every collective is the identity."""

    rank = 0
    size = 1
    seconds_waited = 0.0
    bytes_sent = 0

    def __init__(self) -> None:
        self.messages = SoloMessages()

    def sum_(self, buffer: NDArray[np.float32], wire: str = "float32") -> None:
        """Nothing to add."""

    def start_sum(self, buffer: NDArray[np.float32], wire: str = "float32") -> Pending:
        """Nothing to add."""
        return _Done()

    def mean_into(self, buffer: NDArray[np.float32], wire: str = "float32") -> None:
        """Its own mean."""

    def start_mean(self, source: NDArray[np.float32], into: NDArray[np.float32], wire: str = "float32") -> Pending:
        """Its own mean."""
        into[:] = source
        return _Done()

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

    def split(self, color: int) -> SoloWorld:
        """Another world of one."""
        return SoloWorld()

    def shrink(self, ranks: Sequence[int]) -> None:
        """Nobody is left out."""

    @property
    def lost(self) -> list[int]:
        """None."""
        return []

    def waits(self) -> str:
        return ""

    def last_exchanges(self) -> list[str]:
        return []

    def abort(self, status: int) -> NoReturn:
        """End the process without clean-up, as an MPI abort does."""
        sys.stderr.flush()
        os._exit(status)

    def close(self) -> None:
        """Nothing to end."""


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
