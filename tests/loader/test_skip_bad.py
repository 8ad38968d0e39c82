"""Utterances that turn out to be unreadable while training: named, and left out up to the number allowed."""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from kaldi_mpi.log import logger
from tests.loader_data import write_corpus

LENGTHS = [12, 9, 20, 5, 14]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """The second and the fourth utterance have a value that is not a number, in their last row."""
    written = write_corpus(tmp_path, LENGTHS, dim=2, kind="FM")
    corpus = Corpus.open(written.scp, written.labels)
    with open(corpus.paths[0], "r+b") as stream:
        for unit in (1, 3):
            stream.seek(int(corpus.end[unit]) - 4)
            stream.write(struct.pack("<f", np.nan))
    return corpus


def labels_of(corpus: Corpus, skip_bad: int, threads: int) -> tuple[list[int], int, int]:
    """All labels of an epoch, the labelled frames as counted, and the bad utterances as counted."""
    seen: list[int] = []
    with MinibatchReader(corpus, ChunkShape(4, 1, 1), 3, seed=0, num_epochs=1, threads=threads, skip_bad=skip_bad) as r:
        for m in r:
            assert np.isfinite(m.feats).all()
            assert m.frames == (m.labels >= 0).sum()
            seen += m.labels[m.labels >= 0].tolist()
        return seen, r.counters().frames, r.counters().bad


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("skip_bad", [2, 10])
def test_bad_utterances_are_left_out_and_told(
    corpus: Corpus, skip_bad: int, threads: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="kaldi_mpi"):
        seen, frames, bad = labels_of(corpus, skip_bad, threads)
    # Only chunks that have the bad row are lost: it is in the last one of the utterance, and in the context of the one
    # before it, where the last one is short.
    firsts = np.cumsum([0, *LENGTHS])
    good = {label for unit in (0, 2, 4) for label in range(firsts[unit], firsts[unit + 1])}
    assert good <= set(seen) < set(range(sum(LENGTHS)))
    assert len(seen) == len(set(seen)) == frames
    assert bad == 2
    told = sorted(message for message in caplog.messages if message.startswith("left out: "))
    assert [f"key u{unit:03d}, byte offset {corpus.end[unit] - 4}: not a finite number: nan in column 1" in message
            for unit, message in zip((1, 3), told, strict=True)] == [True, True]  # fmt: skip


@pytest.mark.parametrize("skip_bad", [0, 1])
def test_one_more_than_allowed_ends_the_reading(corpus: Corpus, skip_bad: int) -> None:
    with pytest.raises(DataError, match=r"key u00[13], byte offset \d+: not a finite number"):
        labels_of(corpus, skip_bad, threads=2)


def test_an_archive_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    """The bytes are not in memory then, and whoever needs them is told what is missing."""
    written = write_corpus(tmp_path, LENGTHS, dim=2, kind="FM")
    corpus = Corpus.open(written.scp, written.labels)
    os.truncate(corpus.paths[0], int(corpus.begin[4]) + 11)
    seen, frames, bad = labels_of(corpus, 1, threads=1)
    assert bad == 1 and frames == len(seen)
    assert set(range(sum(LENGTHS[:4]))) <= set(seen)
    with pytest.raises(DataError, match=r"key u004, byte offset \d+: truncated: \d+ bytes are needed here"):
        labels_of(corpus, 0, threads=1)
