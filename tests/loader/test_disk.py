"""Disks that fail, and files that change, while a reader is at work: an error at its step, with file, key and offset.

The corpus is larger than what is in memory, so that most of it is yet to be read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from tests.loader_data import write_corpus

UTTERANCES, FRAMES, DIM = 60, 50, 10


@pytest.fixture(params=["FM", "CM"])
def reading(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Corpus, MinibatchReader]]:
    """An archive of which a reader has read a little."""
    written = write_corpus(tmp_path, [FRAMES] * UTTERANCES, kind=request.param, dim=DIM)
    corpus = Corpus.open(written.scp, written.labels)
    memory = int(corpus.unit_bytes[:8].sum())
    with MinibatchReader(
        corpus, ChunkShape(FRAMES, 2, 2), 2, seed=0, shuffle=False, depth=2, threads=2, num_epochs=1, memory=memory
    ) as reader:
        first = next(reader)
        assert first.frames == 2 * FRAMES
        yield tmp_path / "feats.ark", corpus, reader


def first_error(reader: MinibatchReader) -> tuple[int, DataError]:
    """How many more steps are delivered, and the error that ends them."""
    for steps in range(UTTERANCES):
        try:
            minibatch = next(reader)
        except DataError as error:
            with pytest.raises(DataError, match="byte offset"):
                next(reader)  # it stays so
            return steps, error
        assert np.isfinite(minibatch.feats).all()
    raise AssertionError("there was no error")


def test_an_archive_cut_while_it_is_read(reading: tuple[Path, Corpus, MinibatchReader]) -> None:
    path, corpus, reader = reading
    middle = int(corpus.begin[40]) + 100
    os.truncate(path, middle)
    steps, error = first_error(reader)
    assert steps == 40 // 2 - 1  # all before are delivered, whatever was read ahead
    assert (error.file, error.key) == (str(path), "u040")
    assert error.offset is not None and corpus.begin[40] <= error.offset <= middle
    assert error.cause.startswith("truncated: ")


def test_a_disk_that_cannot_be_read(reading: tuple[Path, Corpus, MinibatchReader]) -> None:
    """The archive's descriptor becomes one of which every read fails."""
    path, corpus, reader = reading
    directory = os.open(path.parent, os.O_RDONLY)
    os.dup2(directory, corpus.c_corpus.files[0].fd)
    os.close(directory)
    _, error = first_error(reader)
    assert error.cause == "cannot read: Is a directory"
    assert error.file == str(path)
    unit = corpus.utterances.index(str(error.key))
    assert error.offset is not None and corpus.begin[unit] <= error.offset < corpus.end[unit]


def test_an_archive_overwritten_while_it_is_read(reading: tuple[Path, Corpus, MinibatchReader]) -> None:
    """With bytes that are neither finite floats nor percentiles in order."""
    path, corpus, reader = reading
    with path.open("r+b") as file:
        file.seek(int(corpus.begin[30]))
        file.write(b"\xff\xff\xff\x7f" * int(np.ceil(corpus.unit_bytes[30:].sum() / 4)))
    _, error = first_error(reader)
    assert (error.file, error.key) == (str(path), "u030")
    assert error.offset is not None and corpus.begin[30] <= error.offset < corpus.end[30]


def test_good_steps_around_what_cannot_be_read(tmp_path: Path) -> None:
    """With skip_bad, the utterances in the part that is gone are left out, and all others are delivered."""
    written = write_corpus(tmp_path, [10] * 20, kind="CM", dim=3)
    corpus = Corpus.open(written.scp, written.labels)
    os.truncate(tmp_path / "feats.ark", int(corpus.begin[17]) + 1)
    with MinibatchReader(corpus, ChunkShape(10, 0, 0), 3, seed=3, num_epochs=1, skip_bad=3) as reader:
        labels = np.concatenate([minibatch.labels.ravel().copy() for minibatch in reader])
    assert sorted(labels[labels >= 0]) == list(range(170))
    with (
        MinibatchReader(corpus, ChunkShape(10, 0, 0), 3, seed=3, num_epochs=1, skip_bad=2) as reader,
        pytest.raises(DataError, match="truncated: "),
    ):
        list(reader)
