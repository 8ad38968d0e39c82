"""Who trains on what, when learners do not wait for each other: tickets, handed out one at a time.

A ticket is the number of a minibatch in the shuffled order of the epochs. Rank 0's communication thread hands
them out in order to whoever asks, so a learner that is slow takes fewer and the others take over its data;
every minibatch is trained on exactly once. Each learner holds two: the one that it works on and the next,
which its loader reads meanwhile.

Near the end a slow learner is refused a ticket that it would finish only after the others had finished
everything: one step of a learner 100 times slower would otherwise hold up all of them. The one that would be
done first is never refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.world import Messages

IN_HAND = 2  # tickets of a learner: one in work, one being read

_ASK, _TICKET, _END = 0, 1, 2


class TicketServer:
    """Hands out the tickets; lives on rank 0's communication thread.

    Args:
        messages: messages between the learners (super-learners).
        num_learners: how many of the messages' ranks, from 0, take tickets.
        on_ticket: called with each ticket before it is handed out.
    """

    def __init__(self, messages: Messages, num_learners: int, on_ticket: Callable[[int], None]) -> None:
        self._messages, self._num_learners, self._on_ticket = messages, num_learners, on_ticket
        self._next = self._end = 0
        self._segment = 0  # the one that is open, counted from 1
        self._early: deque[tuple[int, int, int, int]] = deque()  # asked before their segment was opened
        self._active: set[int] = set()
        self._in_hand: dict[int, int] = {}
        self._step_us: dict[int, int] = {}  # by rank, of those that have finished a step

    def open(self, first: int, end: int) -> None:
        """Begin a segment: hand out `first` .. `end` - 1; on the communication thread."""
        self._next, self._end = first, end
        self._segment += 1
        self._active = set(range(self._num_learners))
        early, self._early = self._early, deque()
        for ask in early:
            self.asked(*ask)

    def end_at(self, end: int) -> None:
        """Have the segment end sooner, at a ticket that has not been handed out; on the communication thread."""
        assert self._next <= end <= self._end
        self._end = end

    def asked(self, source: int, segment: int, in_hand: int, step_us: int) -> None:
        """`source`, with `in_hand` tickets left to finish and steps of `step_us` (0: unknown), wants another."""
        if segment > self._segment:
            self._early.append((source, segment, in_hand, step_us))
            return
        self._in_hand[source] = in_hand
        if step_us:
            self._step_us[source] = step_us
        if self._next >= self._end or self._too_slow(source):
            self._active.discard(source)
            self._messages.send(Channel.TICKETS, source, (_END, 0, 0, 0), None)
            return
        ticket = self._next
        self._next += 1
        self._on_ticket(ticket)
        self._messages.send(Channel.TICKETS, source, (_TICKET, ticket, 0, 0), None)

    def _too_slow(self, source: int) -> bool:
        """Whether the others would be through with all remaining tickets before `source` was with one more."""
        known = {rank: us for rank, us in self._step_us.items() if rank in self._active}
        if source not in known or len(known) < len(self._active) or len(known) < 2:
            return False
        done_after = {rank: (self._in_hand.get(rank, 0) + 1) * us for rank, us in known.items()}
        if done_after[source] <= min(done_after.values()):
            return False
        others_rate = sum(1.0 / us for rank, us in known.items() if rank != source)
        return done_after[source] > (self._end - self._next) / others_rate + 2 * min(known.values())


class TicketClient:
    """One learner's side: keeps `IN_HAND` tickets.

    Args:
        messages: as the server's.
        request: tells the loader to read a minibatch; called on the communication thread.
    """

    def __init__(self, messages: Messages, request: Callable[[int], None]) -> None:
        self._messages, self._request = messages, request
        self._server: TicketServer | None = None
        self._tickets: deque[int] = deque()
        self._segment = 0
        self._in_hand = 0
        self._asking = 0  # asks without an answer yet
        self._ended = False
        self._step_us = 0.0

    def attach(self, server: TicketServer | None) -> None:
        """Listen for tickets, and on rank 0 for those who ask; on any thread."""
        self._server = server
        self._messages.on_message(Channel.TICKETS, self._receive)

    def detach(self) -> None:
        """Stop listening; every ask must have been answered."""
        self._messages.on_message(Channel.TICKETS, None)

    def start(self) -> None:
        """Ask for the first tickets of a segment."""

        def ask() -> None:
            self._segment += 1
            self._ended, self._in_hand = False, 0
            for _ in range(IN_HAND):
                self._ask()

        self._messages.post(ask)

    def next(self) -> int | None:
        """The next ticket, for which the loader has been asked already, or None when there are no more."""
        self._messages.wait(lambda: bool(self._tickets) or (self._ended and self._asking == 0))
        return self._tickets.popleft() if self._tickets else None

    def peek(self) -> int | None:
        """The ticket after the one given by `next`, if it is there already."""
        return self._tickets[0] if self._tickets else None

    def done(self, seconds: float) -> None:
        """The learner has finished a ticket, in `seconds`."""

        def ask() -> None:
            microseconds = max(1.0, seconds * 1e6)
            self._step_us = 0.7 * self._step_us + 0.3 * microseconds if self._step_us else microseconds
            self._in_hand -= 1
            if not self._ended:
                self._ask()

        self._messages.post(ask)

    def _ask(self) -> None:
        self._asking += 1
        self._messages.send(Channel.TICKETS, 0, (_ASK, self._segment, self._in_hand, round(self._step_us)), None)

    def _receive(self, source: int, numbers: tuple[int, ...], _: Any) -> None:
        kind, first, in_hand, step_us = numbers
        if kind == _ASK:
            assert self._server is not None, "rank 0 alone is asked for tickets"
            self._server.asked(source, first, in_hand, step_us)
            return
        self._asking -= 1
        if kind == _END:
            self._ended = True
            return
        self._in_hand += 1
        self._request(first)
        self._tickets.append(first)
