"""An asynchronous run of gossip again, in float64, all learners in one process, from their journals.

Nothing here shares code with `kaldi_mpi.averaging.exchange`: the journals say what happened to each piece of
each published model and in which order, and this module does it again by the rule as it is written down:

    STEP                       x_i <- x_i + change(w_i);   w_i <- x_i
    SNAPSHOT   of exchange e   s_i <- x_i
    ANSWER     to (i, e)       s_j <- x_j;   x_j <- x_j + a (s_i - s_j)
    MIX        of e            x_i <- x_i + a (s_j - s_i)
    CROSS      of e and f      x_i <- x_i + w (s_j - s_i), with s_j the snapshot of the other's request f

a is the busy weight if the answering rank has a request of its own under way for that piece, else w. An event
waits for the snapshots that it needs, so the journals' clocks are not looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.averaging.journal import JournalEvent, Records
from kaldi_mpi.errors import DataError

Vector = NDArray[np.float64]
Change = Callable[[int, int, Vector], Vector]
Key = tuple[int, int, int]  # rank that started the exchange, its number, piece


@dataclasses.dataclass
class Replayed:
    """What the learners ended with.

    Attributes:
        models: (N, P), the published models.
        copies: (N, P), the copies with which the learners would take their next steps.
        total: (P,), the sum of the starting models and all changes: what the sum of `models` must be.
        steps: own steps of each learner.
    """

    models: Vector
    copies: Vector
    total: Vector
    steps: list[int]


def pieces(size: int, piece_size: int | None) -> list[slice]:
    """Where the pieces of a model of `size` parameters lie; one piece for None."""
    step = piece_size or max(1, size)
    return [slice(first, min(first + step, size)) for first in range(0, max(1, size), step)]


def play(journals: Sequence[Records], happen: Callable[[int, JournalEvent, int, int, int, int], bool]) -> None:
    """Let the events of all journals happen, each journal's in its order.

    Args:
        journals: for each rank its events.
        happen: ``happen(rank, event, piece, number, partner, theirs)`` does one event, or returns that it must wait
            for another rank's.

    Raises:
        DataError: the journals do not fit together: what is left waits for events that there are not.
    """
    at = [0] * len(journals)
    moved = True
    while moved:
        moved = False
        for rank, records in enumerate(journals):
            while at[rank] < len(records):
                row = records[at[rank]]
                fields = (int(row[name]) for name in ("piece", "number", "partner", "theirs"))
                if not happen(rank, JournalEvent(int(row["event"])), *fields):
                    break
                at[rank] += 1
                moved = True
    for rank, records in enumerate(journals):
        if at[rank] < len(records):
            row = records[at[rank]]
            raise DataError(
                f"journals do not fit together: event {at[rank]} of rank {rank} "
                f"({JournalEvent(int(row['event'])).name}, "
                f"exchange {int(row['number'])} with rank {int(row['partner'])}) has no other side"
            )


def replay(
    journals: Sequence[Records],
    start: Vector,
    change: Change,
    weight: float,
    busy_weight: float | None = None,
    piece_size: int | None = None,
) -> Replayed:
    """Repeat a run.

    Args:
        journals: for each rank its events, from the start of the run.
        start: (P,), the model that all learners start from.
        change: ``change(rank, step, w)``, a learner's own step, (P,), at its copy w; called once for each step of
            a learner, in order, so that it may keep an optimiser's state by rank.
        weight: w of the strategy.
        busy_weight: the weight of an answer while a request of one's own is under way; None: `weight`.
        piece_size: parameters of a piece; None: the model is one piece.

    Raises:
        DataError: the journals do not fit together (an exchange's other side is missing).
    """
    where = pieces(start.size, piece_size)
    models = np.tile(np.asarray(start, np.float64), (len(journals), 1))
    copies = models.copy()
    total = models.sum(0)
    changes = np.zeros_like(models)
    last_step = [-1] * len(journals)
    requests: dict[Key, Vector] = {}
    replies: dict[Key, tuple[Vector, float]] = {}
    sent: dict[Key, Vector] = {}  # the same snapshots, for the side that took them
    under_way: set[tuple[int, int]] = set()  # (rank, piece)

    def happen(rank: int, event: JournalEvent, piece: int, number: int, partner: int, theirs: int) -> bool:
        """Do it, or return that it must wait."""
        x = models[rank, where[piece]]
        mine = (rank, number, piece)
        if event == JournalEvent.STEP:
            if number != last_step[rank]:
                changes[rank] = change(rank, number, copies[rank].copy())
                total[:] += changes[rank]
                last_step[rank] = number
            x += changes[rank, where[piece]]
            copies[rank, where[piece]] = x
        elif event == JournalEvent.SNAPSHOT:
            requests[mine] = sent[mine] = x.copy()
            under_way.add((rank, piece))
        elif event == JournalEvent.ANSWER:
            asked = (partner, number, piece)
            if asked not in requests:
                return False
            busy = busy_weight is not None and (rank, piece) in under_way
            a = busy_weight if busy and busy_weight is not None else weight
            replies[asked] = x.copy(), a
            x += a * (requests.pop(asked) - x)
        elif event == JournalEvent.MIX:
            if mine not in replies:
                return False
            other, a = replies.pop(mine)
            x += a * (other - sent.pop(mine))
            under_way.discard((rank, piece))
        elif event == JournalEvent.CROSS:
            other_key = (partner, theirs, piece)
            if other_key not in requests:
                return False
            x += weight * (requests.pop(other_key) - sent.pop(mine))
            under_way.discard((rank, piece))
        else:
            raise DataError(f"the journal of rank {rank} has an event {event.name}, which gossip does not")
        return True

    play(journals, happen)
    return Replayed(models, copies, total, [step + 1 for step in last_step])
