"""The reader as an object: its buffers, its end, its counters, and how it goes away."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.loader import Buffer, ChunkPlan, ChunkShape, Corpus, Minibatch, MinibatchReader
from tests.loader_data import write_corpus
from tests.paths import REPO

SHAPE = ChunkShape(4, 2, 1)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    written = write_corpus(tmp_path, [23, 5, 40, 1])
    return Corpus.open(written.scp, written.labels)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def settles_at(threads: int) -> bool:
    """Whether the process soon has so many: a joined thread is seen in /proc for a moment after pthread_join."""
    end = time.monotonic() + 10.0
    while num_threads() != threads and time.monotonic() < end:
        time.sleep(0.001)
    return num_threads() == threads


def test_callers_buffers_are_the_ones_that_are_filled(corpus: Corpus) -> None:
    buffers = [Buffer(np.full((5, 7, 3), np.nan, np.float32), np.full((5, 4), -9, np.int64)) for _ in range(3)]
    with MinibatchReader(corpus, SHAPE, 5, seed=0, num_epochs=1, buffers=buffers) as reader:
        for i, minibatch in enumerate(reader):
            feats, labels, *_ = buffers[i % 3]
            assert np.shares_memory(minibatch.feats, feats)
            assert np.shares_memory(minibatch.labels, labels)
            assert np.isfinite(minibatch.feats).all()
        assert i == 3


def test_minibatch_stays_as_it_is_until_the_next_one(corpus: Corpus) -> None:
    """The threads run ahead into the other buffers only, however long the consumer takes."""
    with MinibatchReader(corpus, SHAPE, 2, seed=0, threads=3, depth=2) as reader:
        for _ in range(10):
            minibatch = next(reader)
            feats, labels = minibatch.feats.copy(), minibatch.labels.copy()
            time.sleep(0.01)
            np.testing.assert_array_equal(minibatch.feats, feats)
            np.testing.assert_array_equal(minibatch.labels, labels)


@pytest.mark.parametrize(
    "buffer",
    [
        (np.zeros((5, 7, 2), np.float32), np.zeros((5, 4), np.int64)),
        (np.zeros((5, 7, 3), np.float64), np.zeros((5, 4), np.int64)),
        (np.zeros((5, 7, 3), np.float32), np.zeros((5, 4), np.int32)),
        (np.zeros((5, 7, 6), np.float32)[:, :, ::2], np.zeros((5, 4), np.int64)),
    ],
)
def test_buffers_that_do_not_fit(corpus: Corpus, buffer: tuple[NDArray[Any], NDArray[Any]]) -> None:
    with pytest.raises(ConfigError, match=r"a minibatch buffer's .* with .* elements, and must be a writeable"):
        MinibatchReader(corpus, SHAPE, 5, seed=0, buffers=[Buffer(*buffer)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "size": 2}, "rank is 2, and must be at least 0 and below 2"),
        ({"size": 0}, "number of ranks is 0"),
        ({"threads": 0}, "number of reader threads is 0"),
        ({"depth": 0}, "depth of the reader's queue is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"first_step": -1}, "first step is -1"),
        ({"buffers": []}, "number of buffers is 0"),
    ],
)
def test_arguments_out_of_range(corpus: Corpus, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MinibatchReader(corpus, SHAPE, 5, **{"seed": 0, **options})  # type: ignore[arg-type]


def test_readers_share_a_plan(corpus: Corpus) -> None:
    plan = ChunkPlan(corpus, SHAPE, 3, size=2, seed=1)
    own, shared = (
        [MinibatchReader(corpus, SHAPE, 3, seed=1, rank=rank, size=2, num_epochs=2, plan=p) for rank in range(2)]
        for p in (None, plan)
    )
    assert all(reader.plan is plan for reader in shared)
    for one, two in zip(own, shared, strict=True):
        with one, two:
            assert [m.labels.tolist() for m in one] == [m.labels.tolist() for m in two]
    for other in ({"seed": 2}, {"size": 1}, {"shuffle": False}, {"memory": 1000}):
        with pytest.raises(ConfigError, match="the plan is of another source, or was made with other arguments"):
            MinibatchReader(corpus, SHAPE, 3, **{"seed": 1, "size": 2, "plan": plan, **other})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the plan is of another source"):
        MinibatchReader(corpus, SHAPE, 4, seed=1, size=2, plan=plan)


def test_a_minibatch_with_other_arrays(corpus: Corpus) -> None:
    with MinibatchReader(corpus, SHAPE, 5, seed=0) as reader:
        minibatch = next(reader)
        lists: Minibatch[list[object]] = minibatch.map(lambda name, array: [name, array.shape])
        assert lists.feats == ["feats", minibatch.feats.shape]
        assert (lists.weights, lists.ivectors, lists.first) == (None, None, -2)
        assert (lists.step, lists.frames, lists.weight) == (minibatch.step, minibatch.frames, float(minibatch.frames))


def test_shapes_out_of_range() -> None:
    with pytest.raises(ConfigError, match="chunk width is 0, and must be at least 1"):
        ChunkShape(0, 1, 1)
    with pytest.raises(ConfigError, match="chunk left is -1, and must be at least 0"):
        ChunkShape(1, -1, 1)


def test_more_ranks_than_chunks_leave_some_without(corpus: Corpus) -> None:
    total = 0
    for rank in range(30):
        with MinibatchReader(corpus, SHAPE, 2, seed=0, rank=rank, size=30, num_epochs=1) as reader:
            (minibatch,) = reader
            assert minibatch.feats.shape == (len(minibatch.labels), 7, 3)
            assert minibatch.global_frames == corpus.total_frames
            total += minibatch.frames
    assert total == corpus.total_frames


def test_the_end_and_a_closed_reader(corpus: Corpus) -> None:
    with MinibatchReader(corpus, SHAPE, 5, seed=0, num_epochs=1) as reader:
        assert len(list(reader)) == reader.steps_per_epoch == 4
        with pytest.raises(StopIteration):
            next(reader)
        frames = reader.counters().frames
    reader.close()
    assert reader.counters().frames == frames == corpus.total_frames
    with pytest.raises(ValueError, match="closed"):
        next(reader)


def test_no_epochs_and_a_start_behind_the_end(corpus: Corpus) -> None:
    assert list(MinibatchReader(corpus, SHAPE, 5, seed=0, num_epochs=0)) == []
    assert list(MinibatchReader(corpus, SHAPE, 5, seed=0, num_epochs=1, first_step=9)) == []


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_threads_end_with_the_reader_in_the_middle(corpus: Corpus, taken: int) -> None:
    time.sleep(0.05)  # threads of an earlier test
    before = num_threads()
    closed = MinibatchReader(corpus, SHAPE, 5, seed=0, threads=3)
    for _ in range(taken):
        next(closed)
    assert settles_at(before + 3 + 1)  # one reads ahead
    closed.close()
    assert settles_at(before)

    collected = MinibatchReader(corpus, SHAPE, 5, seed=0, threads=3)
    minibatch = next(collected)
    kept = minibatch.feats.copy()
    del collected
    gc.collect()
    assert settles_at(before)
    np.testing.assert_array_equal(minibatch.feats, kept)  # its memory outlives the reader


def test_reader_keeps_the_corpus_alive(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [23, 5])
    reader = MinibatchReader(Corpus.open(written.scp, written.labels), SHAPE, 2, seed=0, num_epochs=20)
    gc.collect()
    assert sum(m.frames for m in reader) == 20 * 28
    reader.close()


def test_closing_from_another_thread_ends_the_iteration(corpus: Corpus) -> None:
    reader = MinibatchReader(corpus, SHAPE, 2, seed=0)
    timer = threading.Timer(0.05, reader.close)
    timer.start()
    with pytest.raises(ValueError, match="closed"):
        for _ in reader:
            pass
    timer.join()


def test_counters(corpus: Corpus) -> None:
    with MinibatchReader(corpus, SHAPE, 5, seed=0, threads=1, depth=2) as reader:
        frames, deadline = 0, time.monotonic() + 60
        while reader.counters().readers_waited == 0 and time.monotonic() < deadline:
            time.sleep(0.02)  # the thread fills what it may and then waits for space
            frames += next(reader).frames
        counters = reader.counters()
    assert counters.frames == frames > 0
    assert counters.bytes_read > 0
    assert counters.memory > 0
    assert 0 < counters.readers_waited < counters.seconds
    assert 0 <= counters.consumer_waited < counters.seconds
    assert counters.frames_per_second == pytest.approx(frames / counters.seconds)


EXITS = """
import os, sys
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from tests.loader.test_reader import *
written = write_corpus(Path(sys.argv[1]), [50, 60])
reader = MinibatchReader(Corpus.open(written.scp, written.labels), SHAPE, 2, seed=0, threads=2)
next(reader)
if os.fork() == 0:
    sys.exit(3)  # runs the finalizers in a process that has none of the threads
assert os.waitstatus_to_exitcode(os.wait()[1]) == 3
next(reader)
"""


def test_interpreter_ends_with_a_reader_open_and_so_does_a_forked_child(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXITS, str(tmp_path)], cwd=REPO, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
