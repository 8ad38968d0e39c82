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
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.averaging.journal import Event, Journal
from kaldi_mpi.averaging.published import Shared
from kaldi_mpi.averaging.strategy import Flat, Strategy
from kaldi_mpi.transport.number_formats import Wire
from kaldi_mpi.transport.world import Collective

WINDOW = 2  # pieces under way in one exchange

REQUEST, REPLY, BUSY_REPLY = 0, 1, 2  # the last: a reply by `busy_weight`

Payload = NDArray[np.uint8]


class Post(Protocol):
    """Sends a message without waiting; messages of one sender to one receiver arrive in order."""

    def __call__(self, to: int, numbers: Sequence[int], payload: NDArray[Any] | None) -> None:
        """Send a few whole numbers and an array, which must not change until it has arrived."""


@dataclasses.dataclass
class _Open:
    """One piece on its way: what was sent, and when."""

    partner: int
    number: int
    snapshot: Wire
    own_steps: int


class Exchanging(Strategy):
    """Base of the asynchronous strategies: the transactions; subclasses choose partners and weight.

    Attributes:
        weight: w of (1) and (2).
        busy_weight: w of an answer that is given while a request of one's own is under way; None: no difference.
        merges: whether crossing requests of a pair are one exchange.
        may_block: whether `blocked` can ever say so; the learner then asks after each step.
        on_device: whether what travels may stay in a device's memory.
        filters_change: whether `filter_change` does anything.

    Args:
        world: the learners.
        frames_per_average: exchange when a learner has trained on this many frames divided by the number of
            learners; None: after each of its steps.
    """

    asynchronous: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    may_block: ClassVar[bool] = False
    on_device: ClassVar[bool] = True
    filters_change: bool = False
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

    def connect(self, shared: Shared, post: Post, journal: Journal) -> None:
        """Give the strategy the model that it mixes, its way to the others, and its journal."""
        self.shared, self.post, self.journal = shared, post, journal

    # What subclasses say.

    def partners(self, round_number: int) -> Sequence[int]:
        """With whom to exchange now. Rounds count from 0; without `frames_per_average` each own step is one."""
        raise NotImplementedError

    def target(self, piece: int) -> int:
        """Where this piece of the exchange under way goes: to its partner, unless pieces live apart."""
        return self._partner

    def outgoing(self, piece: int) -> tuple[Wire, Wire]:
        """What is sent of a piece (its lock is held), and what the reply is then compared with in (2)."""
        snapshot = self.shared.snapshot(piece)
        return snapshot, snapshot

    def answer(self, source: int, number: int, piece: int, their_steps: int, theirs: Wire) -> tuple[int, Wire] | None:
        """Carry out (1) on `piece`; returns the own steps in the snapshot and the snapshot, or None: not yet."""
        with self.shared.lock(piece):
            mine, steps = self.shared.snapshot(piece), self.shared.steps[piece]
            self.shared.mix(piece, mine, theirs, self._weight(self._busy(piece)))
            self.journal.record(Event.ANSWER, piece, number, source, own_steps=steps, their_steps=their_steps)
        return steps, mine

    def blocked(self) -> bool:
        """Whether the learner must wait before its next step; never, but for bounded staleness."""
        return False

    def filter_change(self, change: Flat) -> None:
        """Change a learner's own step in place before it is published (momentum of its own); on its thread."""

    # Events.

    def step_taken(self, frames: int = 0) -> None:
        """The learner has published a step: start this step's exchanges, or leave them if there is no time.

        Args:
            frames: labelled frames of the step's minibatch.
        """
        self.own_steps += 1
        self._frames += frames
        if self.world.size == 1 or self._leaving:
            return
        if self.frames_per_average is not None and self._frames * self.num_learners < self.frames_per_average:
            return
        self._frames = 0
        self._due.clear()
        self._due.extend(self.partners(self._rounds))
        self._rounds += 1
        self._go_on()

    def receive(self, source: int, numbers: Sequence[int], payload: Payload) -> None:
        """A message of this strategy has come from `source`."""
        kind, number, piece, their_steps = numbers
        theirs = self.shared.received(payload)
        mine = self._open.get(piece)
        if kind == REQUEST and self.merges and mine is not None and mine.partner == source:
            self._apply(Event.CROSS, piece, number, their_steps, theirs, self.weight)
        elif kind == REQUEST:
            reply = self.answer(source, number, piece, their_steps, theirs)
            if reply is not None:
                kind = BUSY_REPLY if self._busy(piece) else REPLY
                self._send(source, (kind, number, piece, reply[0]), reply[1])
        else:
            assert mine is not None and mine.number == number, "a reply to no request"
            self._apply(Event.MIX, piece, -1, their_steps, theirs, self._weight(kind == BUSY_REPLY))

    def leave(self) -> None:
        """The learner takes no more steps for now: start nothing new, go on answering."""
        self._leaving = True
        self._due.clear()

    def stay(self) -> None:
        """The learner goes on after `leave`."""
        self._leaving = False

    def quiet(self) -> bool:
        """Whether nothing that this rank started is under way."""
        return self._partner < 0 and not self._due

    # The final model, and the mean that is validated.

    @property
    def num_learners(self) -> int:
        """Ranks that learn, which come first; any others only answer."""
        return self.world.size

    def share(self, parameters: Flat) -> Flat:
        """This rank's share, (P,) float32, new: their sum over the ranks by `num_shares` is the final model."""
        return parameters.copy() if self.world.rank < self.num_learners else np.zeros_like(parameters)

    @property
    def num_shares(self) -> int:
        """See `share`."""
        return self.num_learners

    def mean_model(self, parameters: Flat) -> Flat:
        """The model of all learners, as a new array; a collective, for when no learner is at work."""
        model = self.share(parameters)
        if self.world.size > 1:
            self.world.sum_(model)
            model /= np.float32(self.num_shares)
        return model

    def finish(self, parameters: Flat) -> None:
        """Make `parameters` the final model; a collective, after `leave`, `quiet` and a barrier of all."""
        parameters[:] = self.mean_model(parameters)

    # The machinery.

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
            if self._next_piece == self.shared.num_pieces:
                return  # the last pieces are on their way
            self._request(self._next_piece)
            self._next_piece += 1

    def _request(self, piece: int) -> None:
        number, partner = self._number - 1, self.target(piece)
        with self.shared.lock(piece):
            (sent, mine), steps = self.outgoing(piece), self.shared.steps[piece]
            self.journal.record(Event.SNAPSHOT, piece, number, partner, own_steps=steps)
        self._open[piece] = _Open(partner, number, mine, steps)
        self._send(partner, (REQUEST, number, piece, steps), sent)

    def _apply(self, event: Event, piece: int, number: int, their_steps: int, theirs: Wire, weight: float) -> None:
        """Carry out (2), and go on to the next piece or exchange."""
        mine = self._open.pop(piece)
        with self.shared.lock(piece):
            self.shared.mix(piece, mine.snapshot, theirs, weight)
            self.journal.record(
                event, piece, mine.number, mine.partner, theirs=number, own_steps=mine.own_steps,
                their_steps=their_steps, age=self.shared.steps[piece] - mine.own_steps,
            )  # fmt: skip
        if not self._open and self._next_piece == self.shared.num_pieces:
            self._partner = -1
            self.num_averages += 1
        self._go_on()

    def _send(self, to: int, numbers: Sequence[int], payload: Wire) -> None:
        self.bytes_sent += payload.nbytes * (to != self.world.rank)
        self.post(to, numbers, payload)

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
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self.own_steps, self._number = state["own_steps"], state["number"]
        self._frames, self._rounds, self._leaving = state["frames"], state["rounds"], state["leaving"]
        self._due = deque(state["due"])
        self._partner, self._next_piece = state["partner"], state["next_piece"]
        self._open = {piece: _Open(**o) for piece, o in state["open"].items()}
