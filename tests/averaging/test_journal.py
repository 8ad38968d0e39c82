"""The journal's report: what it counts, and what it says of a directory without journals."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaldi_mpi.averaging.journal import Journal, JournalEvent, read_journal
from kaldi_mpi.cli import main


def test_it_counts_steps_exchanges_and_ages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal").mkdir()
    path = tmp_path / "journal" / "learner.0"
    journal = Journal(path)
    for step in range(4):
        for piece in (0, 1):
            journal.record(JournalEvent.STEP, piece, step, own_steps=step + 1)
    for piece in (0, 1):
        journal.record(JournalEvent.SNAPSHOT, piece, 0, 1, own_steps=2)
        journal.record(JournalEvent.MIX, piece, 0, 1, own_steps=2, their_steps=5, age=3)
        journal.record(JournalEvent.ANSWER, piece, 7, 1, own_steps=4, their_steps=5)
        journal.record(JournalEvent.CROSS, piece, 1, 1, theirs=8, own_steps=4, their_steps=6, age=1)
    journal.close()
    records = read_journal(path)
    assert records.dtype.itemsize == 32 and len(records) == 16
    assert main(["journal", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "learner 0: 4 steps, 3 exchanges (0.75 per step" in said
    assert "1 started, 1 answered, 1 crossed" in said
    assert "age of what it mixed, in own steps: mean 2.00, most 3" in said


def test_a_directory_without_journals_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["journal", str(tmp_path)]) == 1
    assert f"{tmp_path}/journal: no journals" in capsys.readouterr().err


def test_a_journal_that_nobody_wants_keeps_nothing() -> None:
    journal = Journal(wanted=False)
    for step in range(10):
        journal.record(JournalEvent.STEP, 0, step)
    assert len(journal.records()) == 0
