"""Who trains on what, when learners do not wait for each other: tickets, handed out by rank 0.

A ticket is the number of a minibatch in the shuffled order of the epochs. Rank 0's communication thread hands
them out in order, so a learner that is slow takes fewer and the others take over its data; every minibatch is
trained on exactly once. A learner's loader reads two of its tickets: the one that is in work and the next. It holds
more, unread, for some seconds, so that the others go on while rank 0 stands still.

Near the end there are fewer to hold, and who has run out is given what others have not read yet: these are asked to
return it. A learner may also be refused a ticket that it would finish only after the others had finished everything:
one step of a learner 100 times slower would otherwise hold up all of them. The one that would be done first is never
refused.

The tickets of a learner that is lost go to others. So nobody is through before all tickets are done: who has none left
is told to wait (it leaves the strategy as long as it has nothing to do), and may get a lost one's.

Between tickets rank 0 has all learners begin an iteration, or save their state, each at its next step. Where the run is
asked to stop, what is not read yet is returned, and stands in the checkpoint.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.world import Messages

IN_HAND = 2  # tickets that a learner's loader is asked for: one in work, one being read
STOCK_SECONDS = 10.0  # of work that a learner holds; as long as rank 0 may stand still without anybody else noticing
_STOCK_PART = 4  # of what is left, all learners together hold one in so many
_AT_A_TIME = 2  # tickets for one report: a stock is not filled at once, so that neighbours in the order are shared out

_REPORT, _SAVED, _RETURNED = 0, 1, 2  # to the server
_TICKET, _WAIT, _END, _ITERATION, _SAVE, _RETURN = 10, 11, 12, 13, 14, 15  # from it


class TicketServer:
    """Hands out the tickets; lives on rank 0's communication thread.

    Attributes:
        stopped: whether the segment ends before all of its tickets are handed out.

    Args:
        messages: messages between the learners (super-learners).
        num_learners: how many of the messages' ranks, from 0, take tickets.
        on_begun: called with the last ticket that learners have come to, whenever they have come further: all before it
            (less those that are to be done again) are done, in work or being read.
    """

    def __init__(self, messages: Messages, num_learners: int, on_begun: Callable[[int], None]) -> None:
        self._messages, self._num_learners, self._on_begun = messages, num_learners, on_begun
        self._next = self._end = 0
        self._again: list[int] = []  # of lost learners, and returned ones; a heap
        self._begun = 0  # the tickets before this one
        self.stopped = False
        self._segment = 0  # the one that is open, counted from 1
        self._early: deque[tuple[int, int, int, int]] = deque()  # reports before their segment was opened
        self._present: set[int] = set()  # who has reported in this segment
        self._idle: set[int] = set()  # who has been told to wait
        self._ended: set[int] = set()  # who has been told that there are no more
        self._refused: set[int] = set()
        self._returning: set[int] = set()  # who has been asked to return what it has not read
        self._given: dict[int, list[int]] = {}  # to each learner, in this segment (or since it is back)
        self._done: dict[int, int] = {}  # how many of these it has finished
        self._saved: dict[int, int] = {}  # how many it had when it saved
        self._step_us: dict[int, int] = {}  # by rank, of those that have finished a step
        self._gone: set[int] = set()

    def open(self, first: int, end: int, again: Sequence[int] = ()) -> None:
        """Begin a segment: hand out `again`, then `first` .. `end` - 1; on the communication thread."""
        self._next, self._end, self._again = first, end, sorted(again)
        self._segment += 1
        self._begun, self.stopped = 0, False
        for those in (self._present, self._idle, self._ended, self._refused, self._returning):
            those.clear()
        self._given = {rank: [] for rank in range(self._num_learners)}
        self._done = dict.fromkeys(range(self._num_learners), 0)
        self._saved = {}
        early, self._early = self._early, deque()
        for report in early:
            self.reported(*report)

    def stop(self) -> None:
        """Have the segment end here: no ticket is handed out any more; on the communication thread."""
        self.stopped = True

    def reported(self, source: int, segment: int, done: int, step_us: int) -> None:
        """`source` has finished `done` tickets, with steps of `step_us` (0: unknown)."""
        if segment > self._segment:
            self._early.append((source, segment, done, step_us))
            return
        self._done[source] = done
        if step_us:
            self._step_us[source] = step_us
        self._present.add(source)
        self._show_begun()
        self._serve((source,))

    def returned(self, source: int, done: int, kept: int) -> None:
        """`source`, which has finished `done` tickets, has kept the `kept` after them alone."""
        self._returning.discard(source)
        self._done[source] = done
        given = self._given[source]
        for ticket in given[done + kept :]:
            heapq.heappush(self._again, ticket)
        del given[done + kept :]
        self._refused.clear()
        self._serve()

    def lost(self, rank: int) -> None:
        """A learner is gone: what it had is done by others."""
        self._gone.add(rank)
        for those in (self._present, self._ended, self._returning):
            those.discard(rank)
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

    def not_done(self) -> dict[str, Any]:
        """The same of the learners as they are now, when a segment has been stopped and all have come to its end."""
        return {"again": sorted(self._again), "next": self._next}

    def _tell_all(self, kind: int, number: int) -> None:
        for rank in range(self._num_learners):
            if rank not in self._gone:
                self._messages.send(Channel.TICKETS, rank, (kind, number), None)

    def _in_hand(self, rank: int) -> list[int]:
        return self._given.get(rank, [])[self._done.get(rank, 0) :]

    def _holds(self, rank: int) -> int:
        return len(self._given.get(rank, ())) - self._done.get(rank, 0)

    def _remaining(self) -> int:
        return 0 if self.stopped else self._end - self._next + len(self._again)

    def _show_begun(self) -> None:
        """Say how far the learners have come, if it is further than before."""
        unread = sum(max(0, self._holds(rank) - IN_HAND) for rank in self._given)
        begun = self._next - len(self._again) - unread
        if begun > self._begun:
            self._begun = begun
            self._on_begun(begun - 1)

    def _serve(self, first: Sequence[int] = ()) -> None:
        """Give what there is: to `first` up to their stock, to all what they lack; say what they are to do else."""
        for rank in first:
            self._fill(rank, self._stock(rank))
        for rank in sorted(self._present):
            self._fill(rank, IN_HAND)
        if not self._remaining() and not any(self._holds(rank) for rank in self._given):
            for rank in sorted(self._present - self._ended):
                self._messages.send(Channel.TICKETS, rank, (_END, 0), None)
            self._ended |= self._present
            return
        lack = {rank for rank in self._present if self._holds(rank) < IN_HAND}
        for rank in sorted(lack - self._idle):
            self._idle.add(rank)
            self._messages.send(Channel.TICKETS, rank, (_WAIT, 0), None)
        if self.stopped or (not self._remaining() and lack - self._refused):
            for rank in sorted(self._present - self._returning):
                if self._holds(rank) > IN_HAND:
                    self._returning.add(rank)
                    self._messages.send(Channel.TICKETS, rank, (_RETURN, 0), None)

    def _fill(self, rank: int, wanted: int) -> None:
        """Have `rank` hold `wanted` tickets, as far as it may have more."""
        # What it is given after it was asked to return tickets, it would not know of when it answers.
        if rank in self._returning or rank in self._refused:
            return
        for _ in range(min(wanted - self._holds(rank), _AT_A_TIME)):
            if not self._remaining():
                return
            if self._too_slow(rank):
                self._refused.add(rank)
                return
            self._idle.discard(rank)
            if self._again:
                ticket = heapq.heappop(self._again)
            else:
                ticket, self._next = self._next, self._next + 1
            self._given[rank].append(ticket)
            self._show_begun()
            self._messages.send(Channel.TICKETS, rank, (_TICKET, ticket), None)

    def _stock(self, rank: int) -> int:
        """How many tickets `rank` may hold."""
        if rank not in self._step_us:
            return IN_HAND
        rate = sum(1.0 / us for other, us in self._step_us.items() if other in self._present)
        work_us = min(STOCK_SECONDS * 1e6, self._remaining() / rate / _STOCK_PART)
        return max(IN_HAND, int(work_us / self._step_us[rank]))

    def _too_slow(self, source: int) -> bool:
        """Whether the others would be through with everything else before `source` was with one more."""
        active = set(range(self._num_learners)) - self._gone - self._refused
        known = {rank: us for rank, us in self._step_us.items() if rank in active}
        if source not in known or len(known) < len(active) or len(known) < 2:
            return False
        done_after = {rank: (self._holds(rank) + 1) * us for rank, us in known.items()}
        if done_after[source] <= min(done_after.values()):
            return False
        others = [rank for rank in known if rank != source]
        work = self._remaining() + sum(self._holds(rank) for rank in others)
        return done_after[source] > work / sum(1.0 / known[rank] for rank in others)


class TicketClient:
    """One learner's side.

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
        self._tickets: deque[int] = deque()  # that the loader was asked for and the learner has not begun
        self._stock: deque[int] = deque()  # after them
        self._iterations: deque[int] = deque()  # that have begun, and of which the learner does not know
        self._saves: deque[int] = deque()
        self._segment = 0
        self._in_hand = self._done = 0
        self._ended, self._forgotten = False, False
        self._told_to_wait = self._resting = False
        self._step_us = 0.0

    def attach(self, server: TicketServer | None) -> None:
        """Listen for tickets, and on rank 0 for the others' reports; on any thread."""
        self._server = server
        self._messages.on_message(Channel.TICKETS, self._receive)

    def detach(self) -> None:
        """Stop listening; the segment must have ended."""
        self._messages.on_message(Channel.TICKETS, None)

    def start(self) -> None:
        """Ask for the first tickets of a segment."""

        def begin() -> None:
            self._segment += 1
            self._begin()

        self._messages.post(begin)

    def start_again(self) -> None:
        """Ask for the first tickets after `forget`."""
        self._messages.post(self._begin)

    def forget(self) -> None:
        """On the communication thread: this learner's tickets are others' now; it has none until `start_again`."""
        for those in (self._tickets, self._stock, self._iterations, self._saves):
            those.clear()
        self._forgotten = True

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
        return self._ended and not self._tickets

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

        def report() -> None:
            if self._forgotten:
                return
            microseconds = max(1.0, seconds * 1e6)
            self._step_us = 0.7 * self._step_us + 0.3 * microseconds if self._step_us else microseconds
            self._in_hand -= 1
            self._done += 1
            if self._stock:
                self._take(self._stock.popleft())
            self._rest()
            self._report()

        self._messages.post(report)

    def _begin(self) -> None:
        self._ended = self._forgotten = self._told_to_wait = self._resting = False
        self._in_hand = self._done = 0
        self._report()

    def _report(self) -> None:
        numbers = (_REPORT, self._segment, self._done, round(self._step_us))
        self._messages.send(Channel.TICKETS, 0, numbers, None)

    def _take(self, ticket: int) -> None:
        self._in_hand += 1
        self._request(ticket)
        self._tickets.append(ticket)

    def _rest(self) -> None:
        """Leave, or come back, as there is something to do or not."""
        resting = self._told_to_wait and not self._in_hand
        if resting != self._resting:
            self._resting = resting
            self._rests(resting)

    def _receive(self, source: int, numbers: tuple[int, ...], _: Any) -> None:
        kind, first = numbers[:2]
        if kind in (_REPORT, _SAVED, _RETURNED):
            assert self._server is not None, "rank 0 alone hands out tickets"
            if kind == _REPORT:
                self._server.reported(source, *numbers[1:])
            elif kind == _SAVED:
                self._server.has_saved(source, first)
            else:
                self._server.returned(source, *numbers[1:])
        elif kind == _ITERATION:
            self._iterations.append(first)
        elif kind == _SAVE:
            self._saves.append(first)
        elif kind == _WAIT:
            self._told_to_wait = True
            self._rest()
        elif kind == _RETURN:
            self._stock.clear()
            self._messages.send(Channel.TICKETS, 0, (_RETURNED, self._done, self._in_hand), None)
        elif kind == _END:
            self._ended = True
        else:
            self._told_to_wait = False
            if self._in_hand < IN_HAND:
                self._take(first)
                self._rest()
            else:
                self._stock.append(first)
