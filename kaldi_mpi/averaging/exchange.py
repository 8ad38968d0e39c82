"""Exchanges between pairs of learners, as transactions: what all asynchronous strategies are made of.

Learner i sends a snapshot s_i of its published model to a partner, whose communication thread answers at
once, whatever its learner is doing:

    partner, atomically:    s_j <- x_j;   x_j <- x_j + w (s_i - s_j);   reply s_j                         (1)
    i, on the reply:        x_i <- x_i + w (s_j - s_i)                                                    (2)

(1) and (2) add exact opposites, so the sum of all models is unchanged whoever is late, and local steps that
land in between are kept. As an equation (X), W = I - w (e_i - e_j)(e_i - e_j)', applied to snapshots.

Two requests of the same pair that cross on the way would, each answered, exchange the models in place of
averaging them when w = 1/2. A strategy may have them *merged*: each side takes the other's request as the
answer to its own. Messages of a pair arrive in order, so if one side sees them cross the other does too: were
j's request sent before i's came, then j's reply to i, if any, would be behind it on the way.

Whoever answers while a request of its own is under way is about to take in a third model. A strategy may set
a smaller weight for such an answer (`busy_weight`); it is the answering side that knows, so its reply says so.

The model goes in pieces, each a transaction of its own, at most `WINDOW` of them under way; a strategy starts
exchanges after the learner's own steps, never more than one at a time, and lets those go that it had no time
for. Nothing here waits: `step_taken` and `receive` are events, called one at a time on the
communication thread (or by a simulation).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from kaldi_mpi.averaging.journal import JournalEvent
from kaldi_mpi.averaging.strategy import Asynchronous, Payload
from kaldi_mpi.transport.number_formats import Wire
from kaldi_mpi.transport.world import Collective

WINDOW = 2  # pieces under way in one exchange

REQUEST, REPLY, BUSY_REPLY = 0, 1, 2  # the last: a reply by `busy_weight`


@dataclasses.dataclass
class _Open:
    """One piece on its way: what was sent, and when."""

    partner: int
    number: int
    snapshot: Wire
    own_steps: int


class Exchanging(Asynchronous):
    """Base of the asynchronous strategies: the transactions; subclasses choose partners and weight.

    Attributes:
        weight: w of (1) and (2).
        busy_weight: w of an answer that is given while a request of one's own is under way; None: no difference.
        merges: whether crossing requests of a pair are one exchange.

    Args:
        world: the learners.
        frames_per_average: exchange when a learner has trained on this many frames divided by the number of
            learners; None: after each of its steps.
    """

    merges: ClassVar[bool] = False
    busy_weight: ClassVar[float | None] = None
    weight: float

    def __init__(self, world: Collective, frames_per_average: int | None = None) -> None:
        super().__init__(world)
        self.frames_per_average = frames_per_average
        self.own_steps = 0
        self._frames = 0  # of own steps since the last round of exchanges
        self._rounds = 0
        self._number = 0  # of the next exchange that this rank starts
        self._due: deque[int] = deque()  # partners of exchanges to start
        self._partner = -1  # of the exchange under way, -1 for none
        self._next_piece = 0
        self._open: dict[int, _Open] = {}  # by piece
        self._leaving = False

    # What subclasses say.

    def partners(self, round_number: int) -> Sequence[int]:
        """With whom to exchange now. Rounds count from 0; without `frames_per_average` each own step is one."""
        raise NotImplementedError

    def target(self, piece: int) -> int:
        """Where this piece of the exchange under way goes: to its partner, unless pieces live apart."""
        return self._partner

    def outgoing(self, piece: int) -> tuple[Wire, Wire]:
        """What is sent of a piece (its lock is held), and what the reply is then compared with in (2)."""
        snapshot = self.model.snapshot(piece)
        return snapshot, snapshot

    def answer(self, source: int, number: int, piece: int, their_steps: int, theirs: Wire) -> tuple[int, Wire] | None:
        """Carry out (1) on `piece`; returns the own steps in the snapshot and the snapshot, or None: not yet."""
        with self.model.lock(piece):
            mine, steps = self.model.snapshot(piece), self.model.steps[piece]
            self.model.mix(piece, mine, theirs, self._weight(self._busy(piece)))
            self.journal.record(JournalEvent.ANSWER, piece, number, source, own_steps=steps, their_steps=their_steps)
        return steps, mine

    # Events.

    def step_taken(self, frames: int) -> None:
        """Start this step's exchanges, or let them go if there is no time."""
        self.own_steps += 1
        self._frames += frames
        if self._alone() or self._leaving:
            return
        if self.frames_per_average is not None and self._frames * self.num_learners < self.frames_per_average:
            return
        self._frames = 0
        self._due.clear()
        self._due.extend(self.partners(self._rounds))
        self._rounds += 1
        self._go_on()

    def receive(self, source: int, numbers: Sequence[int], payload: Payload) -> None:
        kind, number, piece, their_steps = numbers
        theirs = self.model.received(payload)
        mine = self._open.get(piece)
        if kind == REQUEST and self.merges and mine is not None and mine.partner == source:
            self._apply(JournalEvent.CROSS, piece, number, their_steps, theirs, self.weight)
        elif kind == REQUEST:
            reply = self.answer(source, number, piece, their_steps, theirs)
            if reply is not None:
                kind = BUSY_REPLY if self._busy(piece) else REPLY
                self._send_piece(source, (kind, number, piece, reply[0]), reply[1])
        else:
            assert mine is not None and mine.number == number, "a reply to no request"
            self._apply(JournalEvent.MIX, piece, -1, their_steps, theirs, self._weight(kind == BUSY_REPLY))

    def leave(self) -> None:
        self._leaving = True
        self._due.clear()

    def rejoin(self) -> None:
        self._leaving = False

    def quiet(self) -> bool:
        return self._partner < 0 and not self._due

    def drop(self, rank: int) -> None:
        """See `Asynchronous.drop`: its half of an exchange may or may not have been done; its model is lost anyway."""
        super().drop(rank)
        self._due = deque(partner for partner in self._due if partner != rank)
        if self._partner == rank:
            self._open.clear()
            self._partner = -1
            self._go_on()

    def forget_exchanges(self) -> None:
        self._due.clear()
        self._open.clear()
        self._partner = -1

    def abandon(self) -> None:
        self.forget_exchanges()
        self._leaving, self._frames = True, 0

    def adopt(self) -> None:
        self._leaving = False

    def rest(self, resting: bool) -> None:
        if resting:
            self.leave()
        else:
            self._leaving = False

    # The machinery.

    def _alone(self) -> bool:
        return self.size - len(self.gone) == 1

    def _neighbour(self, choose: Callable[[int, int], int]) -> int:
        """Who stands at choose(place, number) in the circle of those present, in which this rank has `place`."""
        circle = self.present
        return circle[choose(circle.index(self.rank), len(circle))]

    def _busy(self, piece: int) -> bool:
        return self.busy_weight is not None and piece in self._open

    def _weight(self, busy: bool) -> float:
        return self.busy_weight if busy and self.busy_weight is not None else self.weight

    def _go_on(self) -> None:
        while len(self._open) < WINDOW:
            if self._partner < 0:
                if not self._due:
                    return
                self._partner, self._next_piece = self._due.popleft(), 0
                self._number += 1
            if self._next_piece == self.model.num_pieces:
                return  # the last pieces are on their way
            self._request(self._next_piece)
            self._next_piece += 1

    def _request(self, piece: int) -> None:
        number, partner = self._number - 1, self.target(piece)
        with self.model.lock(piece):
            (sent, mine), steps = self.outgoing(piece), self.model.steps[piece]
            self.journal.record(JournalEvent.SNAPSHOT, piece, number, partner, own_steps=steps)
        self._open[piece] = _Open(partner, number, mine, steps)
        self._send_piece(partner, (REQUEST, number, piece, steps), sent)

    def _apply(
        self, event: JournalEvent, piece: int, number: int, their_steps: int, theirs: Wire, weight: float
    ) -> None:
        """Carry out (2), and go on to the next piece or exchange."""
        mine = self._open.pop(piece)
        with self.model.lock(piece):
            self.model.mix(piece, mine.snapshot, theirs, weight)
            self.journal.record(
                event, piece, mine.number, mine.partner, theirs=number, own_steps=mine.own_steps,
                their_steps=their_steps, age=self.model.steps[piece] - mine.own_steps,
            )  # fmt: skip
        if not self._open and self._next_piece == self.model.num_pieces:
            self._partner = -1
            self.num_averages += 1
        self._go_on()

    def _send_piece(self, to: int, numbers: Sequence[int], payload: Wire) -> None:
        self.bytes_sent += payload.nbytes * (to != self.rank)
        self.send(to, numbers, payload)

    def state_dict(self) -> dict[str, Any]:
        """Adds what is under way: snapshots that await their answer, and the exchanges still to start."""
        return super().state_dict() | {
            "own_steps": self.own_steps,
            "frames": self._frames,
            "rounds": self._rounds,
            "leaving": self._leaving,
            "number": self._number,
            "due": list(self._due),
            "partner": self._partner,
            "next_piece": self._next_piece,
            "open": {piece: dataclasses.asdict(o) for piece, o in self._open.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.own_steps, self._number = state["own_steps"], state["number"]
        self._frames, self._rounds, self._leaving = state["frames"], state["rounds"], state["leaving"]
        self._due = deque(state["due"])
        self._partner, self._next_piece = state["partner"], state["next_piece"]
        self._open = {piece: _Open(**o) for piece, o in state["open"].items()}
