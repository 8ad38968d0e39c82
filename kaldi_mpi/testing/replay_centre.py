"""Runs with a centre again, in float64, all learners and the centre in one process, from their journals.

Nothing here shares code with the strategies. The journals say what happened to each piece of each learner's
model and of the centre, and in which order; this module does it again by the rules as their papers write
them, x_i being a learner's model, c the centre, u the learner's own step at its copy w_i:

                                 easgd                                        asgd
    STEP      at learner i       x_i <- x_i + u(w_i);   w_i <- x_i            the same
    SNAPSHOT  of exchange e      s <- x_i                                     s <- x_i;   p <- x_i - b_i
    CENTRE    takes in (i, e)    r <- c;   c <- c + alpha (s - c)             c <- c + p / N
    FETCH     for (i, e)                                                      r <- c
    MIX       of e               x_i <- x_i + alpha (r - s)                   x_i <- x_i + r - s;   b_i <- r

With momentum (EAMSGD), STEP is Nesterov's in its usual form: v <- delta v + u; x <- x + v, with u taken at
x + delta v, which is the point that was published and mixed; and u with the factor 1 - delta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kaldi_mpi.averaging.journal import JournalEvent, Records
from kaldi_mpi.errors import DataError
from kaldi_mpi.testing.replay import Change, Key, Vector, pieces, play


@dataclasses.dataclass
class ReplayedCentre:
    """What a run ended with.

    Attributes:
        models: (ranks, P), the published models.
        centre: (P,).
        steps: own steps of each learner.
        staleness: of each update of the centre, in no particular order: updates of the same piece by others since
            the learner was last given it.
    """

    models: Vector
    centre: Vector
    steps: list[int]
    staleness: list[int]


class _Replay:
    """The state of all learners and the centre."""

    def __init__(
        self,
        num_ranks: int,
        start: Vector,
        change: Change,
        alpha: float | None,
        momentum: float,
        num_learners: int,
        piece_size: int | None,
    ) -> None:
        self.where = pieces(start.size, piece_size)
        self.x = np.tile(np.asarray(start, np.float64), (num_ranks, 1))
        self.copies, self.base = self.x.copy(), self.x.copy()
        self.velocity, self.u = np.zeros_like(self.x), np.zeros_like(self.x)
        self.centre = np.array(start, np.float64)
        self.change, self.alpha, self.momentum, self.num_learners = change, alpha, momentum, num_learners
        self.steps = [0] * num_ranks
        self.sent: dict[Key, Vector] = {}  # s
        self.pushed: dict[Key, Vector] = {}  # what the owner awaits: s or p
        self.given: dict[Key, Vector] = {}  # r
        self.updates = [0] * len(self.where)
        self.seen: dict[tuple[int, int], int] = {}  # (learner, piece): updates when it was last given
        self.staleness: list[int] = []

    def happen(self, rank: int, event: JournalEvent, piece: int, number: int, partner: int, _theirs: int) -> bool:
        """Do it, or return that it must wait for another rank's event."""
        part = self.where[piece]
        mine, theirs = (rank, number, piece), (partner, number, piece)
        x, c = self.x[rank, part], self.centre[part]
        if event == JournalEvent.STEP:
            self._step(rank, number, part)
        elif event == JournalEvent.SNAPSHOT:
            self.sent[mine] = x.copy()
            self.pushed[mine] = x.copy() if self.alpha is not None else x - self.base[rank, part]
        elif event == JournalEvent.CENTRE:
            if theirs not in self.pushed:
                return False
            self._take_in(theirs, c)
        elif event == JournalEvent.FETCH:
            self._give(theirs, c)
        elif event == JournalEvent.MIX:
            if mine not in self.given:
                return False
            given, sent = self.given.pop(mine), self.sent.pop(mine)
            x += (given - sent) * (1.0 if self.alpha is None else self.alpha)
            self.base[rank, part] = given
        else:
            raise DataError(f"the journal of rank {rank} has an event {event.name}, which is not of a centre")
        return True

    def _step(self, rank: int, number: int, part: slice) -> None:
        if number == self.steps[rank]:  # its first piece
            self.u[rank] = self.change(rank, number, self.copies[rank].copy())
            self.steps[rank] += 1
        delta, ahead = self.momentum, self.x[rank, part]
        before = ahead - delta * self.velocity[rank, part]
        self.velocity[rank, part] = delta * self.velocity[rank, part] + (1 - delta) * self.u[rank, part]
        after = before + self.velocity[rank, part]
        self.x[rank, part] = after + delta * self.velocity[rank, part]
        self.copies[rank, part] = self.x[rank, part]

    def _take_in(self, key: Key, c: Vector) -> None:
        learner, _, piece = key
        self.staleness.append(self.updates[piece] - self.seen.get((learner, piece), 0))
        self.updates[piece] += 1
        if self.alpha is None:
            c += self.pushed.pop(key) / self.num_learners
        else:
            self._give(key, c)
            c += self.alpha * (self.pushed.pop(key) - c)

    def _give(self, key: Key, c: Vector) -> None:
        learner, _, piece = key
        self.given[key] = c.copy()
        self.seen[learner, piece] = self.updates[piece]


def replay_centre(
    journals: Sequence[Records],
    start: Vector,
    change: Change,
    num_learners: int,
    *,
    alpha: float | None,
    momentum: float = 0.0,
    piece_size: int | None = None,
) -> ReplayedCentre:
    """Repeat a run.

    Args:
        journals: for each rank its events, from the start of the run; a dedicated server's come last.
        start: (P,), the model that all learners and the centre start from.
        change: ``change(rank, step, w)``, a learner's own step, (P,), at its copy w; called once for each step of
            a learner, in order.
        num_learners: N.
        alpha: of ``easgd``; None: the run is one of ``asgd``.
        momentum: delta of ``easgd``.
        piece_size: parameters of a piece; None: the model is one piece.

    Raises:
        DataError: the journals do not fit together (an exchange's other side is missing).
    """
    run = _Replay(len(journals), start, change, alpha, momentum, num_learners, piece_size)
    play(journals, run.happen)
    return ReplayedCentre(run.x, run.centre, run.steps, run.staleness)
