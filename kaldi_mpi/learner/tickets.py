"""Who trains on what, when learners do not wait for each other: tickets, handed out one at a time.

A ticket is the number of a minibatch in the shuffled order of the epochs. Rank 0's communication thread hands
them out in order to whoever asks, so a learner that is slow takes fewer and the others take over its data;
every minibatch is trained on exactly once. Each learner holds two: the one that it works on and the next,
which its loader reads meanwhile.

The tickets of a learner that is lost go to others. So nobody is through before all tickets are done: who asks when
none is left is told to wait (it leaves the strategy as long as it has nothing to do), and may get a lost one's.

Near the end a slow learner is refused a ticket that it would finish only after the others had finished
everything: one step of a learner 100 times slower would otherwise hold up all of them. The one that would be
done first is never refused.

Between tickets rank 0 has all learners begin an iteration, or save their state, each at its next step.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.world import Messages

IN_HAND = 2  # tickets of a learner: one in work, one being read

_ASK, _SAVED = 0, 1  # to the server
_TICKET, _WAIT, _END, _ITERATION, _SAVE = 10, 11, 12, 13, 14  # from it


class TicketServer:
    """Hands out the tickets; lives on rank 0's communication thread.

    Args:
        messages: messages between the learners (super-learners).
        num_learners: how many of the messages' ranks, from 0, take tickets.
        on_ticket: called with each ticket before it is handed out for the first time.
    """

    def __init__(self, messages: Messages, num_learners: int, on_ticket: Callable[[int], None]) -> None:
        self._messages, self._num_learners, self._on_ticket = messages, num_learners, on_ticket
        self._next = self._end = 0
        self._again: list[int] = []  # of lost learners; a heap
        self._segment = 0  # the one that is open, counted from 1
        self._early: deque[tuple[int, int, int, int]] = deque()  # asked before their segment was opened
        self._waiting: list[int] = []  # who has asked and was given nothing yet, once for each ask
        self._idle: set[int] = set()  # who has been told to wait
        self._refused: set[int] = set()
        self._given: dict[int, list[int]] = {}  # to each learner, in this segment (or since it is back)
        self._done: dict[int, int] = {}  # how many of these it has finished
        self._saved: dict[int, int] = {}  # how many it had when it saved
        self._step_us: dict[int, int] = {}  # by rank, of those that have finished a step
        self._gone: set[int] = set()

    def open(self, first: int, end: int, again: Sequence[int] = ()) -> None:
        """Begin a segment: hand out `again`, then `first` .. `end` - 1; on the communication thread."""
        self._next, self._end, self._again = first, end, sorted(again)
        self._segment += 1
        self._refused.clear()
        self._idle.clear()
        self._given = {rank: [] for rank in range(self._num_learners)}
        self._done = dict.fromkeys(range(self._num_learners), 0)
        self._saved = {}
        early, self._early = self._early, deque()
        for ask in early:
            self.asked(*ask)

    def end_at(self, end: int) -> None:
        """Have the segment end sooner, at a ticket that has not been handed out; on the communication thread."""
        assert self._next <= end <= self._end
        self._end = end

    def asked(self, source: int, segment: int, done: int, step_us: int) -> None:
        """`source`, which has finished `done` tickets, with steps of `step_us` (0: unknown), wants another."""
        if segment > self._segment:
            self._early.append((source, segment, done, step_us))
            return
        self._done[source] = done
        if step_us:
            self._step_us[source] = step_us
        self._waiting.append(source)
        self._serve()

    def lost(self, rank: int) -> None:
        """A learner is gone: what it had in hand is done by others."""
        self._gone.add(rank)
        self._waiting = [source for source in self._waiting if source != rank]
        self._step_us.pop(rank, None)
        for ticket in self._in_hand(rank):
            heapq.heappush(self._again, ticket)
        self._given[rank], self._done[rank] = [], 0
        self._saved.pop(rank, None)
        self._refused.clear()
        self._serve()

    def back(self, rank: int) -> None:
        """It takes tickets again."""
        self._gone.discard(rank)
        self._idle.discard(rank)

    def begin_iteration(self, number: int) -> None:
        """Have all learners begin an iteration."""
        self._tell_all(_ITERATION, number)

    def save(self, step: int) -> None:
        """Have all learners save their state, as that of `step`."""
        self._saved = {}
        self._tell_all(_SAVE, step)

    def has_saved(self, source: int, done: int) -> None:
        """`source` has saved its state after `done` tickets."""
        self._saved[source] = done

    def left(self) -> dict[str, Any]:
        """What is not in the states that were saved last: ``again``, and all from ``next`` on."""
        again = list(self._again)
        for rank, given in self._given.items():
            again += given[self._saved.get(rank, self._done[rank]) :]
        return {"again": sorted(again), "next": self._next}

    def _tell_all(self, kind: int, number: int) -> None:
        for rank in range(self._num_learners):
            if rank not in self._gone:
                self._messages.send(Channel.TICKETS, rank, (kind, number), None)

    def _in_hand(self, rank: int) -> list[int]:
        return self._given.get(rank, [])[self._done.get(rank, 0) :]

    def _is_empty(self) -> bool:
        return not self._again and self._next >= self._end

    def _serve(self) -> None:
        """Give what there is to those who wait; say what they are to do if there is nothing."""
        for source in list(self._waiting):
            if self._is_empty():
                break
            if source in self._refused:
                continue
            if self._too_slow(source):
                self._refused.add(source)
                continue
            self._waiting.remove(source)
            self._idle.discard(source)
            fresh = not self._again
            ticket = self._next if fresh else heapq.heappop(self._again)
            if fresh:
                self._next += 1
                self._on_ticket(ticket)
            self._given[source].append(ticket)
            self._messages.send(Channel.TICKETS, source, (_TICKET, ticket), None)
        if self._is_empty() and not any(self._in_hand(rank) for rank in self._given):
            for source in self._waiting:
                self._messages.send(Channel.TICKETS, source, (_END, 0), None)
            self._waiting.clear()
            return
        for source in self._waiting:
            if source not in self._idle:
                self._idle.add(source)
                self._messages.send(Channel.TICKETS, source, (_WAIT, 0), None)

    def _too_slow(self, source: int) -> bool:
        """Whether the others would be through with all remaining tickets before `source` was with one more."""
        active = set(range(self._num_learners)) - self._gone - self._refused
        known = {rank: us for rank, us in self._step_us.items() if rank in active}
        if source not in known or len(known) < len(active) or len(known) < 2:
            return False
        done_after = {rank: (len(self._in_hand(rank)) + 1) * us for rank, us in known.items()}
        if done_after[source] <= min(done_after.values()):
            return False
        others_rate = sum(1.0 / us for rank, us in known.items() if rank != source)
        remaining = self._end - self._next + len(self._again)
        return done_after[source] > remaining / others_rate + 2 * min(known.values())


class TicketClient:
    """One learner's side: keeps `IN_HAND` tickets.

    Args:
        messages: as the server's.
        request: tells the loader to read a minibatch; called on the communication thread.
        rests: told there whether this learner has nothing to do for now.
    """

    def __init__(
        self,
        messages: Messages,
        request: Callable[[int], None],
        rests: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._messages, self._request, self._rests = messages, request, rests
        self._server: TicketServer | None = None
        self._tickets: deque[int] = deque()
        self._iterations: deque[int] = deque()  # that have begun, and of which the learner does not know
        self._saves: deque[int] = deque()
        self._segment = 0
        self._in_hand = self._done = 0
        self._asking = 0  # asks without an answer yet
        self._ended, self._forgotten = False, False
        self._told_to_wait = self._resting = False
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
            self._begin()

        self._messages.post(ask)

    def start_again(self) -> None:
        """Ask for the first tickets after `forget`."""
        self._messages.post(self._begin)

    def forget(self) -> None:
        """On the communication thread: this learner's tickets are others' now; it has none until `start_again`."""
        self._tickets.clear()
        self._iterations.clear()
        self._saves.clear()
        self._forgotten, self._asking = True, 0

    def next(self) -> int | None:
        """The next ticket, for which the loader has been asked already.

        None: there is none; because none will come (`ended`), or because there is something else to do (`to_save`,
        or `forget` was called).
        """
        self._messages.wait(lambda: bool(self._tickets or self._saves) or self.ended or self._forgotten)
        if self._saves or not self._tickets:
            return None
        return self._tickets.popleft()

    @property
    def ended(self) -> bool:
        """Whether there are no more tickets in this segment."""
        return self._ended and self._asking == 0 and not self._tickets

    def peek(self) -> int | None:
        """The ticket after the one given by `next`, if it is there already."""
        return self._tickets[0] if self._tickets else None

    def begun(self) -> int | None:
        """The next iteration that has begun, each once."""
        return self._iterations.popleft() if self._iterations else None

    def to_save(self) -> int | None:
        """As which step this learner's state is to be saved now; None: it is not. The state must be saved then."""
        return self._saves.popleft() if self._saves else None

    def say_saved(self) -> None:
        """On the communication thread: the state has been taken with the tickets finished so far."""
        self._messages.send(Channel.TICKETS, 0, (_SAVED, self._done), None)

    def done(self, seconds: float) -> None:
        """The learner has finished a ticket, in `seconds`."""

        def ask() -> None:
            if self._forgotten:
                return
            microseconds = max(1.0, seconds * 1e6)
            self._step_us = 0.7 * self._step_us + 0.3 * microseconds if self._step_us else microseconds
            self._in_hand -= 1
            self._done += 1
            self._rest()
            if not self._ended:
                self._ask()

        self._messages.post(ask)

    def _begin(self) -> None:
        self._ended = self._forgotten = self._told_to_wait = self._resting = False
        self._in_hand = self._done = 0
        for _ in range(IN_HAND):
            self._ask()

    def _ask(self) -> None:
        self._asking += 1
        numbers = (_ASK, self._segment, self._done, round(self._step_us))
        self._messages.send(Channel.TICKETS, 0, numbers, None)

    def _rest(self) -> None:
        """Leave, or come back, as there is something to do or not."""
        resting = self._told_to_wait and not self._in_hand
        if resting != self._resting:
            self._resting = resting
            self._rests(resting)

    def _receive(self, source: int, numbers: tuple[int, ...], _: Any) -> None:
        kind, first = numbers[:2]
        if kind == _ASK:
            assert self._server is not None, "rank 0 alone is asked for tickets"
            self._server.asked(source, *numbers[1:])
        elif kind == _SAVED:
            assert self._server is not None
            self._server.has_saved(source, first)
        elif kind == _ITERATION:
            self._iterations.append(first)
        elif kind == _SAVE:
            self._saves.append(first)
        elif kind == _WAIT:
            self._told_to_wait = True
            self._rest()
        else:
            self._asking -= 1
            self._ended = self._ended or kind == _END
            if kind == _TICKET:
                self._told_to_wait = False
                self._in_hand += 1
                self._rest()
                self._request(first)
                self._tickets.append(first)
