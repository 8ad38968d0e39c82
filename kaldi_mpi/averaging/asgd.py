"""``asgd``: a parameter server, spread over all ranks, with bounded and measured staleness.

Rule (Downpour SGD of Dean et al., NIPS 2012, with the bound of SSP, Ho et al., NIPS 2013). Learner i works on
its model x_i and keeps b_i, what the centre last gave it; after each K/N frames of its own it *pushes*

    p = x_i - b_i;     at the owner: c <- c + p / N                                                      (1)

and, when the owner answers c' , the centre as it then is, it *fetches*

    x_i <- x_i + c' - (b_i + p);     b_i <- c'                                                           (2)

Steps that it took meanwhile are in x_i - b_i and go with the next push, as does what rounding to 16 bits took
from p. (1) divides by N since each learner's rate is N times the effective one: the centre then moves
as plain SGD does that takes all minibatches one by one. What is mixed is not of mean zero: the centre is the
model, and the final one. In equation (X): x_i is overwritten by the centre's column; its age is bounded by s below.

*Bound.* A learner's clock at a piece is the number of its pushes there. The owner holds back its answer while
the learner's clock is more than s above the lowest one of the learners that have not left. A learner whose
answers are not in does not begin its next exchange, and waits when that is due (`blocked`): until then it
computes. Between learner i's fetch at clock k and its next push, the lowest clock is at most k, so another
learner gets from no less than k - s to no more than k + s + 1: an update is never staler than

    (N - 1) (2 s + 1)     updates by others.                                                             (3)

Learners that have left hold nobody back. After a pause of all (a checkpoint) all clocks are set to the highest, and
what others did after a learner had left for it counts in its first staleness on top of (3).

*No deadlock.* Every exchange pushes the pieces in the same order. Of the learners that wait for answers take
the one that is least far: lowest number of the exchange, then fewest pieces pushed. Each piece that it has
pushed has been pushed as often by all others that wait; and those that do not wait will push or leave. So no
clock there is below its own once they have, and it is answered. For s = 0 learners go in step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from kaldi_mpi.averaging.centre import Centred
from kaldi_mpi.averaging.exchange import REPLY
from kaldi_mpi.averaging.journal import Journal, JournalEvent
from kaldi_mpi.averaging.published import Flat, PublishedModel
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.averaging.strategy import Hook, Send
from kaldi_mpi.transport.number_formats import Wire, from_wire, to_wire
from kaldi_mpi.transport.world import Collective


class Asgd(Centred):
    """Equations (1) to (3).

    Args:
        world, frames_per_average, dedicated_server: see `Centred`.
        staleness_bound: s.
    """

    name: ClassVar[str] = "asgd"
    hooks = Hook.BLOCKED | Hook.SHARE
    sends_rest: ClassVar[bool] = True

    def __init__(
        self,
        world: Collective,
        frames_per_average: int | None = None,
        staleness_bound: int = 16,
        dedicated_server: bool = False,
    ) -> None:
        super().__init__(world, frames_per_average, dedicated_server)
        self.weight = 1.0
        self.staleness_bound = staleness_bound
        self._base: dict[int, Flat] = {}  # b_i by piece
        self._clock: dict[int, list[int]] = {}  # by piece kept here and learner
        self._held: dict[int, list[tuple[int, int]]] = {}  # by piece: (learner, exchange) not yet answered

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> Asgd:
        return cls(world, settings.frames_per_average, settings.staleness_bound, settings.dedicated_server)

    def connect(self, model: PublishedModel, send: Send, journal: Journal) -> None:
        super().connect(model, send, journal)
        if self.size == 1 or self._base:
            return
        for piece in range(model.num_pieces):
            with model.lock(piece):
                self._base[piece] = model.read(piece)
        self._clock = {piece: [0] * self.num_learners for piece in self.centre}
        self._held = {piece: [] for piece in self.centre}

    def outgoing(self, piece: int) -> tuple[Wire, Wire]:
        """p of (1) as it travels, and b + p."""
        change = self.model.read(piece) - self._base[piece]
        sent = np.empty(change.size, self.model.wire)
        to_wire(change, sent)
        return sent, self._base[piece] + from_wire(sent)

    def update_centre(self, piece: int, source: int, number: int, theirs: Wire) -> None:
        """The owner's half of (1); who may be answered by now is."""
        self.centre[piece] += from_wire(theirs) / np.float32(self.num_learners)
        self._clock[piece][source] += 1
        self._held[piece].append((source, number))
        self._release(piece)

    def first_centre(self, piece: int) -> Flat:
        """What the lost owner last gave this learner."""
        return self._base[piece].copy()

    def _take_over(self, piece: int) -> None:
        super()._take_over(piece)
        self._clock[piece] = [0] * self.num_learners
        self._held[piece] = []

    def drop(self, rank: int) -> None:
        """See `Centred.drop`; what it had asked for is not answered any more."""
        for piece, held in self._held.items():
            self._held[piece] = [(learner, number) for learner, number in held if learner != rank]
        super().drop(rank)

    def comes_back(self, learner: int) -> None:
        """It need not catch up with the others."""
        for clock in self._clock.values():
            clock[learner] = max(clock)

    def forget_exchanges(self) -> None:
        super().forget_exchanges()
        for held in self._held.values():
            held.clear()

    def abandon(self) -> None:
        super().abandon()
        self._clock.clear()
        self._held.clear()

    def adopt(self) -> None:
        """b is what has come; the centre's own values come with the first answer, by (2)."""
        super().adopt()
        for piece in range(self.model.num_pieces):
            with self.model.lock(piece):
                self._base[piece] = self.model.read(piece)

    def somebody_left(self) -> None:
        """The lowest clock may have risen."""
        for piece in self._held:
            self._release(piece)

    def all_return(self) -> None:
        """Who left early is not waited for to catch up."""
        for clock in self._clock.values():
            clock[:] = [max(clock)] * len(clock)

    def _release(self, piece: int) -> None:
        """Answer those that are not more than s ahead."""
        clock = self._clock[piece]
        present = [clock[learner] for learner in range(self.num_learners) if not self.has_left(learner)]
        highest = min(present) + self.staleness_bound if present else max(clock)
        ready = [(learner, number) for learner, number in self._held[piece] if clock[learner] <= highest]
        self._held[piece] = [(learner, number) for learner, number in self._held[piece] if clock[learner] > highest]
        for learner, number in ready:
            version = self._updates[piece]
            self._seen[piece][learner] = version
            self.journal.record(JournalEvent.FETCH, piece, number, learner, own_steps=version)
            self._send_piece(learner, (REPLY, number, piece, version), self.centre_wire(piece))

    def _apply(
        self, event: JournalEvent, piece: int, number: int, their_steps: int, theirs: Wire, weight: float
    ) -> None:
        """(2)."""
        self._base[piece] = from_wire(theirs).copy()
        super()._apply(event, piece, number, their_steps, theirs, weight)

    def blocked(self) -> bool:
        """Whether the next exchange is due while the last one is under way."""
        return bool(self._due)

    def share(self, parameters: Flat) -> Flat:
        """The part of the centre that is kept here: together they are the final model."""
        if self.size == 1:
            return parameters.copy()
        out = np.zeros_like(parameters)
        for piece, values in self.centre.items():
            out[self.model.where[piece]] = values
        return out

    @property
    def num_shares(self) -> int:
        """The centre is one model."""
        return 1

    def sources(self, piece: int) -> list[int]:
        """The piece's owner."""
        return [self.target(piece)]

    def piece_of_share(self, piece: int) -> Flat:
        """The centre's; who has been told too late that it keeps a piece no more has its own model's."""
        return self.centre[piece].copy() if piece in self.centre else super().piece_of_share(piece)

    def state_dict(self) -> dict[str, Any]:
        """Adds b, the clocks and who waits for an answer."""
        return super().state_dict() | {
            "base": {piece: values.copy() for piece, values in self._base.items()},
            "clock": {piece: list(clock) for piece, clock in self._clock.items()},
            "held": {piece: list(held) for piece, held in self._held.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._base = {piece: values.copy() for piece, values in state["base"].items()}
        self._clock = {piece: list(clock) for piece, clock in state["clock"].items()}
        self._held = {piece: list(held) for piece, held in state["held"].items()}
