"""The journal of one learner: every event on its published model, in order, in 32 bytes each.

With the journals of all learners the whole asynchronous run can be repeated in float64 (`kaldi_mpi.testing.replay`,
and `replay_centre` for strategies with a centre): each event is written while its piece is locked, so the order of
the events of a piece is the order in which they changed it. `main` says in a line for each learner what its journal
has: its steps, the exchanges that it took part in, how many per own step, and how old the models were that it mixed
(own steps between a snapshot and its mixing).
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.options import Parser


class JournalEvent(enum.IntEnum):
    """What happened to a piece of the published model (or of the centre that this rank keeps)."""

    STEP = 0  # the learner added its own change and took a copy
    SNAPSHOT = 1  # a copy was taken for the exchange `number`, which this rank starts with `partner`
    ANSWER = 2  # `partner`'s exchange `number`: a copy was taken for the reply and the difference added
    MIX = 3  # the reply to this rank's exchange `number` was added
    CROSS = 4  # `partner`'s request `theirs` met this rank's request `number`: one exchange, no replies
    CENTRE = 5  # the centre kept here took in `partner`'s exchange `number`; age: updates by others since its last
    FETCH = 6  # a copy of the centre kept here was sent to `partner` as the answer to its exchange `number`


RECORD = np.dtype(
    [
        ("seconds", "<f4"),  # since the journal began
        ("event", "u1"),
        ("unused", "u1"),
        ("partner", "<i2"),  # -1 for STEP
        ("piece", "<i4"),
        ("number", "<i4"),  # of the exchange, counted by the rank that started it; of the step for STEP
        ("theirs", "<i4"),  # CROSS: the number of the other's request; else -1
        ("own_steps", "<i4"),  # the learner's own steps in its side's snapshot
        ("their_steps", "<i4"),  # and in the other side's; -1 where not known yet
        ("age", "<i4"),  # own steps taken between the snapshot and the mixing: how old the mixed model is
    ]
)

Records = NDArray[np.void]
_FLUSH = 4096  # events kept in memory when there is a file


class Journal:
    """Takes events from any thread.

    Args:
        path: where to write them; None keeps them in memory (`records`).
        wanted: False takes nothing down.
    """

    def __init__(self, path: Path | None = None, wanted: bool = True) -> None:
        self._wanted = wanted
        self._start = time.monotonic()
        self._events: list[tuple[float, int, int, int, int, int, int, int, int, int]] = []
        self._lock = threading.Lock()
        self._stream: BinaryIO | None = open(path, "ab") if path is not None else None  # noqa: SIM115

    def record(
        self,
        event: JournalEvent,
        piece: int,
        number: int,
        partner: int = -1,
        *,
        theirs: int = -1,
        own_steps: int = 0,
        their_steps: int = -1,
        age: int = 0,
    ) -> None:
        """Take down one event; call it while the piece is locked."""
        if not self._wanted:
            return
        seconds = time.monotonic() - self._start
        row = (seconds, int(event), 0, partner, piece, number, theirs, own_steps, their_steps, age)
        with self._lock:
            self._events.append(row)
            if self._stream is not None and len(self._events) >= _FLUSH:
                self._flush()

    def records(self) -> Records:
        """The events in memory, oldest first."""
        with self._lock:
            return np.array(self._events, RECORD)

    def _flush(self) -> None:
        assert self._stream is not None
        self._stream.write(np.array(self._events, RECORD).tobytes())
        self._stream.flush()
        self._events.clear()

    def close(self) -> None:
        """Write what is left."""
        with self._lock:
            if self._stream is not None:
                self._flush()
                self._stream.close()
                self._stream = None


def read_journal(path: Path) -> Records:
    """The events of one learner's journal file."""
    return np.fromfile(path, RECORD)


_MIXING = (JournalEvent.ANSWER, JournalEvent.MIX, JournalEvent.CROSS)


def describe(records: Records, rank: int) -> str:
    """One line for one learner's journal.

    Args:
        records: as `read_journal` gives them; at least one.
        rank: of the learner.
    """
    first = records[records["piece"] == 0]
    count = {event: int((first["event"] == event).sum()) for event in JournalEvent}
    mixed = sum(count[event] for event in _MIXING)
    ages = first["age"][np.isin(first["event"], (JournalEvent.MIX, JournalEvent.CROSS))]
    steps, seconds = count[JournalEvent.STEP], float(records["seconds"][-1])
    age = f"mean {ages.mean():.2f}, most {ages.max()}" if len(ages) else "none"
    served = f", {count[JournalEvent.CENTRE]} served from the centre kept here" if count[JournalEvent.CENTRE] else ""
    return (
        f"learner {rank}: {steps} steps, {mixed} exchanges ({mixed / max(1, steps):.2f} per step, "
        f"{mixed / max(seconds, 1e-9):.1f}/s; {count[JournalEvent.MIX]} started, "
        f"{count[JournalEvent.ANSWER]} answered, "
        f"{count[JournalEvent.CROSS]} crossed){served}; age of what it mixed, in own steps: {age}"
    )


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi journal``: for each learner its steps, its exchanges, and how old the models were that it mixed."""
    parser = Parser(prog="kaldi-mpi journal", description="What the journals of a training say of its exchanges.")
    parser.add_argument("dir", type=Path, help="the training's directory")
    folder = parser.parse_args(arguments).dir / "journal"
    paths = sorted(folder.glob("learner.*"), key=lambda path: int(path.suffix[1:]))
    if not paths:
        raise DataError("no journals (of an asynchronous strategy, without --journal=false)", file=str(folder))
    for path in paths:
        records = read_journal(path)
        if len(records):
            print(describe(records, int(path.suffix[1:])))
