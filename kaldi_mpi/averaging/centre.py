"""A centre besides the learners' models: what elastic averaging and a parameter server have in common.

The centre costs no rank of its own: it is spread over the learners' communication threads by pieces. Piece p is
kept by owner p mod M of M owners, all learners; or by a last rank that learns nothing (`dedicated_server`). An
exchange goes through all pieces of the model in order, each a transaction between the learner and the piece's
owner (often the learner itself), as in `kaldi_mpi.averaging.exchange`; only what is answered differs:

    learner i sends what its rule says of its piece;   the owner changes c and answers from it, in its own time

Where an owner is lost, so is its part of the centre: the next rank that never was takes the piece over, and has it go
on from what it knows itself (`first_centre`). An owner that comes back is none any more.

An owner knows, for each of its pieces, how many updates c has had (its version) and at which version each
learner last saw it. The *staleness* of an update is the number of updates by others in between.

A learner that has no more data says so to all owners (LEAVE, answered by LEFT, so that nothing is on its way
when all are quiet), and that it goes on after a pause that all learners make (JOIN). Pauses are counted: with the
first JOIN of a round the LEAVEs of all earlier rounds are void, whatever the order in which they come. A learner that
gets data again while others are at work says RETURN, which is about itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.journal import Journal, JournalEvent
from kaldi_mpi.averaging.published import Flat, PublishedModel
from kaldi_mpi.averaging.strategy import Asynchronous, Payload, Send
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.number_formats import Wire, to_wire
from kaldi_mpi.transport.world import Collective

LEAVE, LEFT, JOIN, RETURN = (
    10,
    11,
    12,
    13,
)  # kinds of messages besides those of exchanges; the second number is the round


class Centred(Exchanging):
    """Base of the strategies with a centre; subclasses say what an owner does.

    Attributes:
        centre: by piece, float32: what this rank keeps of the centre.
        max_staleness: the largest staleness of an update to a piece kept here.
        sends_rest: whether a learner that leaves makes a last exchange for its last frames.

    Args:
        world: the learners, and the server, if there is one, as the last.
        frames_per_average: see `Exchanging`.
        dedicated_server: whether the last rank keeps the whole centre and learns nothing.

    Raises:
        ConfigError: a dedicated server without learners.
    """

    sends_rest: ClassVar[bool] = False
    on_device: ClassVar[bool] = False  # the centre is in main memory

    def __init__(
        self, world: Collective, frames_per_average: int | None = None, dedicated_server: bool = False
    ) -> None:
        super().__init__(world, frames_per_average)
        if dedicated_server and world.size < 2:
            raise ConfigError("--dedicated-server: needs a rank besides the learners; start one more")
        self._num_learners = world.size - dedicated_server
        self.owners = [world.size - 1] if dedicated_server else list(range(world.size))
        self.centre: dict[int, Flat] = {}
        self._updates: dict[int, int] = {}  # by piece: the version of the centre
        self._seen: dict[int, list[int]] = {}  # by piece and learner: the version that it was last given
        self._round = 0  # of this learner
        self._owner_round = 0  # the latest heard of
        self._left_in = [-1] * self._num_learners  # the round in which each learner last left
        self._unconfirmed: list[int] = []  # owners that have not answered this learner's LEAVE
        self._retired: set[int] = set()  # that have been lost once: what they kept has another owner for good
        self._to_say = False  # LEAVE, once nothing is under way
        self.max_staleness = 0

    @property
    def num_learners(self) -> int:
        """N, without the server."""
        return self._num_learners

    @property
    def learns(self) -> bool:
        """Whether this rank is a learner."""
        return self.rank < self._num_learners

    def connect(self, model: PublishedModel, send: Send, journal: Journal) -> None:
        """See `Asynchronous.connect`; unless it goes on from a state, the centre is the model as it is now."""
        super().connect(model, send, journal)
        if self.size == 1 or self._updates:
            return
        for piece in range(model.num_pieces):
            if self.target(piece) == self.rank:
                with model.lock(piece):
                    self.centre[piece] = model.read(piece)
                self._updates[piece] = 0
                self._seen[piece] = [0] * self._num_learners

    def partners(self, round_number: int) -> Sequence[int]:
        """One exchange, with all owners; the first stands for them."""
        return [self.owners[0]]

    def target(self, piece: int) -> int:
        """The piece's owner."""
        number = piece % len(self.owners)
        return next(
            (owner for owner in (*self.owners[number:], *self.owners[:number]) if owner not in self._retired),
            self.owners[number],
        )

    def _alone(self) -> bool:
        """A learner whose others are all lost still has the centre."""
        return self.size == 1

    # What subclasses say.

    def update_centre(self, piece: int, source: int, number: int, theirs: Wire) -> Wire | None:
        """At the owner: change the centre by what `source` has sent; returns the answer, or None: not yet."""
        raise NotImplementedError

    def first_centre(self, piece: int) -> Flat:
        """Where a piece of the centre goes on from whose owner is lost: this rank's own model."""
        with self.model.lock(piece):
            return self.model.read(piece)

    def has_left(self, learner: int) -> bool:
        """Whether a learner takes no part for now, as far as is known here."""
        return learner in self.gone or self._left_in[learner] >= self._owner_round

    def somebody_left(self) -> None:
        """At an owner: called when a learner has left, or is lost."""

    def comes_back(self, learner: int) -> None:
        """At an owner: called when a learner goes on that had left, or was lost."""

    def all_return(self) -> None:
        """At an owner: called when the first learner goes on after a pause, before it has sent anything else."""

    # Events.

    def answer(self, source: int, number: int, piece: int, their_steps: int, theirs: Wire) -> tuple[int, Wire] | None:
        """At the owner: a learner's exchange; what is given back tells the version of the centre, too."""
        if piece not in self.centre:  # `source` has heard before this rank that the owner is lost
            self._take_over(piece)
        stale = self._updates[piece] - self._seen[piece][source]
        self.max_staleness = max(self.max_staleness, stale)
        version = self._updates[piece]
        self.journal.record(
            JournalEvent.CENTRE, piece, number, source, own_steps=version, their_steps=their_steps, age=stale
        )  # fmt: skip
        self._updates[piece] = version + 1
        reply = self.update_centre(piece, source, number, theirs)
        if reply is None:
            return None
        self._seen[piece][source] = version + 1
        return version, reply

    def receive(self, source: int, numbers: Sequence[int], payload: Payload) -> None:
        """See `Asynchronous.receive`; here also of learners that leave and come back."""
        kind, number = numbers[:2]
        if kind == LEAVE:
            self._left_in[source] = number
            self.send(source, (LEFT, number, 0, 0), None)
            self.somebody_left()
        elif kind == LEFT:
            self._confirmed(source)
        elif kind == RETURN:
            self._left_in[source] = -1
            self.comes_back(source)
        elif kind == JOIN:
            if number > self._owner_round:
                self._owner_round = number
                self.all_return()
        else:
            super().receive(source, numbers, payload)
            self._say_leave()

    def leave(self) -> None:
        """See `Asynchronous.leave`; the owners hear of it when nothing is under way any more."""
        if self._leaving:  # it has had nothing to do for a while
            return
        rest = self.sends_rest and (self._frames > 0 or bool(self._due))
        super().leave()
        if self.size == 1 or not self.learns:
            return
        self._to_say = True
        if rest:
            self._frames = 0
            self._due.append(self.owners[0])
            self._go_on()
        self._say_leave()

    def _say_leave(self) -> None:
        if self._to_say and super().quiet():
            self._to_say = False
            self._unconfirmed = [owner for owner in self.owners if owner not in self.gone]
            for owner in list(self._unconfirmed):
                self.send(owner, (LEAVE, self._round, 0, 0), None)

    def _confirmed(self, owner: int) -> None:
        if owner in self._unconfirmed:
            self._unconfirmed.remove(owner)

    def rejoin(self) -> None:
        """See `Asynchronous.rejoin`; for use after all learners have paused."""
        if self._leaving and self.size > 1 and self.learns:
            self._round += 1
            for owner in self.owners:
                if owner not in self.gone:
                    self.send(owner, (JOIN, self._round, 0, 0), None)
        super().rejoin()

    def drop(self, rank: int) -> None:
        """See `Asynchronous.drop`; what `rank` kept of the centre has another owner, who is asked from now on."""
        Asynchronous.drop(self, rank)
        self._retired.add(rank)
        self._confirmed(rank)
        for piece in range(self.model.num_pieces):
            if piece not in self.centre and self.target(piece) == self.rank:
                self._take_over(piece)
        self.somebody_left()
        for piece in [piece for piece, one in self._open.items() if one.partner == rank]:
            del self._open[piece]
            self._request(piece)

    def admit(self, rank: int) -> None:
        super().admit(rank)
        self._retired.add(rank)
        if rank < self._num_learners:
            self._left_in[rank] = -1
            self.comes_back(rank)

    def rest(self, resting: bool) -> None:
        """See `Asynchronous.rest`; owners are told."""
        super().rest(resting)
        if not resting and self.learns:
            self._to_say = False
            for owner in self.owners:
                if owner not in self.gone:
                    self.send(owner, (RETURN, self._round, 0, 0), None)

    def forget_exchanges(self) -> None:
        super().forget_exchanges()
        self._to_say, self._unconfirmed = False, []

    def abandon(self) -> None:
        super().abandon()
        self._retired.add(self.rank)
        self.centre.clear()

    def _take_over(self, piece: int) -> None:
        self.centre[piece] = self.first_centre(piece)
        self._updates[piece] = 0
        self._seen[piece] = [0] * self._num_learners

    def quiet(self) -> bool:
        """Whether nothing that this rank started is under way, its leaving included."""
        return super().quiet() and not self._to_say and not self._unconfirmed

    def centre_wire(self, piece: int) -> Wire:
        """A copy of the centre's piece as it travels."""
        out = np.empty(self.centre[piece].size, self.model.wire)
        to_wire(self.centre[piece], out)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Adds this rank's part of the centre with its versions, and who takes part."""
        return super().state_dict() | {
            "centre": {piece: values.copy() for piece, values in self.centre.items()},
            "updates": dict(self._updates),
            "seen": {piece: list(versions) for piece, versions in self._seen.items()},
            "round": self._round,
            "owner_round": self._owner_round,
            "left_in": list(self._left_in),
            "to_say": self._to_say,
            "unconfirmed": list(self._unconfirmed),
            "max_staleness": self.max_staleness,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.centre = {piece: values.copy() for piece, values in state["centre"].items()}
        self._updates = dict(state["updates"])
        self._seen = {piece: list(versions) for piece, versions in state["seen"].items()}
        self._round, self._owner_round = state["round"], state["owner_round"]
        self._left_in = list(state["left_in"])
        self._to_say, self._unconfirmed = state["to_say"], list(state["unconfirmed"])
        self.max_staleness = state["max_staleness"]
