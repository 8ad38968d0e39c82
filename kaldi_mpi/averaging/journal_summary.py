"""What the journals of a training say: ``python -m kaldi_mpi.averaging.journal_summary DIR``.

For each learner: its steps, the exchanges that it took part in, how many per own step, and how old the models were
that it mixed (own steps between a snapshot and its mixing).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kaldi_mpi.averaging.journal import JournalEvent, Records, read_journal
from kaldi_mpi.errors import DataError
from kaldi_mpi.options import Parser

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
    """``kaldi-mpi journal``; see the module's text."""
    parser = Parser(prog="kaldi-mpi journal", description=__doc__)
    parser.add_argument("dir", type=Path, help="the training's directory")
    folder = parser.parse_args(arguments).dir / "journal"
    paths = sorted(folder.glob("learner.*"), key=lambda path: int(path.suffix[1:]))
    if not paths:
        raise DataError("no journals (of an asynchronous strategy, without --journal=false)", file=str(folder))
    for path in paths:
        records = read_journal(path)
        if len(records):
            print(describe(records, int(path.suffix[1:])))
