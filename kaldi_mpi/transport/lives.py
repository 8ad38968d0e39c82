"""Messages among ranks that may be lost and come back: nothing of a former life is taken for one of the present.

Each rank has a number of lives, which goes up when the others give it up. A message says in which life its sender is,
and in which it takes its receiver to be; whoever is in another by now drops it. What a rank that was stopped has sent
before, what was on its way to it, and its answers to questions that nobody asks any more are all dropped in this way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from kaldi_mpi.transport.world import Allocate, Handler, Messages


class LivingMessages:
    """`Messages` with lives; they carry two numbers less.

    Attributes:
        lives: of each rank, as far as is known here; on the communication thread.
        gone: ranks that are lost, to which nothing is sent.

    Args:
        messages: that carry them.
        returned: told, before the message is handed over, of a rank that was lost, as was known here or not, and whose
            first message of another life is here before anybody has said so.
    """

    def __init__(self, messages: Messages, returned: Callable[[int, int], None]) -> None:
        self.rank, self.size = messages.rank, messages.size
        self.lives = [0] * messages.size
        self.gone: set[int] = set()
        self._messages, self._returned = messages, returned

    def post(self, action: Callable[[], None]) -> None:
        self._messages.post(action)

    def every(self, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        return self._messages.every(seconds, action)

    def wait(self, ready: Callable[[], bool]) -> float:
        return self._messages.wait(ready)

    def send(self, channel: int, to: int, numbers: Sequence[int], payload: Any) -> None:
        """See `Messages.send`; to a rank that is lost, nothing."""
        if to not in self.gone:
            self._messages.send(channel, to, (self.lives[self.rank], self.lives[to], *numbers), payload)

    def on_message(self, channel: int, handler: Handler | None, allocate: Allocate | None = None) -> None:
        taken = None if handler is None else functools.partial(self._take, handler)
        self._messages.on_message(channel, taken, allocate)

    def _take(self, handler: Handler, source: int, numbers: tuple[int, ...], payload: Any) -> None:
        theirs, mine = numbers[:2]
        if mine != self.lives[self.rank] or theirs < self.lives[source]:
            return
        if theirs > self.lives[source] or source in self.gone:
            self._returned(source, theirs)
        handler(source, numbers[2:], payload)
