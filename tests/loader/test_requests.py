"""The reader on request: any steps in any order hold what the reader of consecutive steps finds in them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader, NumpyMinibatch
from tests.loader.test_order import LENGTHS, SETTINGS, copies, folder, open_corpus
from tests.loader_data import write_corpus

__all__ = ["folder"]  # a fixture

SHAPE = ChunkShape(4, 2, 1)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    written = write_corpus(tmp_path, [23, 5, 40, 1])
    return Corpus.open(written.scp, written.labels)


def assert_same(a: NumpyMinibatch, b: NumpyMinibatch) -> None:
    assert (a.step, a.epoch, a.frames, a.global_frames) == (b.step, b.epoch, b.frames, b.global_frames)
    np.testing.assert_array_equal(a.feats, b.feats)
    np.testing.assert_array_equal(a.labels, b.labels)


@SETTINGS
@given(
    lengths=LENGTHS,
    size=st.integers(1, 3),
    threads=st.integers(1, 4),
    depth=st.integers(1, 5),
    data=st.data(),
)
def test_requested_steps_are_those_of_the_consecutive_reader(
    folder: Path, lengths: list[int], size: int, threads: int, depth: int, data: st.DataObject
) -> None:
    """Also to and fro over the borders of epochs, more of them at once than the plan keeps orders of."""
    _, corpus = open_corpus(folder, lengths)
    epochs, rank = 5, data.draw(st.integers(0, size - 1))
    share: dict[str, Any] = {"seed": 5, "rank": rank, "size": size}
    plain = list(copies(MinibatchReader(corpus, SHAPE, 3, num_epochs=epochs, **share)))
    steps = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=30))
    left, asked = deque(steps), 0
    with MinibatchReader(corpus, SHAPE, 3, threads=threads, depth=depth, on_request=True, **share) as reader:
        for number, step in enumerate(steps):
            most = data.draw(st.integers(1, depth), label="outstanding")
            while left and asked - number < most:
                reader.request(left.popleft())
                asked += 1
            assert_same(next(reader), plain[step])
        reader.finish()
        assert list(reader) == []
        assert reader.counters().frames == sum(plain[step].frames for step in steps)
        assert [reader.plan.frames_of_step(s) for s in steps] == [plain[s].global_frames for s in steps]


def test_waits_for_a_request_from_another_thread(corpus: Corpus) -> None:
    plain = list(copies(MinibatchReader(corpus, SHAPE, 5, seed=0, num_epochs=2)))
    with MinibatchReader(corpus, SHAPE, 5, seed=0, threads=2, depth=2, on_request=True) as reader:

        def ask() -> None:
            for step in (3, 7, 0, 4, 4):
                while True:
                    time.sleep(0.01)
                    try:
                        reader.request(step)
                        break
                    except ValueError:  # both buffers wait for the consumer
                        continue
            reader.finish()

        other = threading.Thread(target=ask)
        other.start()
        got = [(m.step, m.feats.copy()) for m in reader]
        other.join()
    assert [step for step, _ in got] == [3, 7, 0, 4, 4]
    for step, feats in got:
        np.testing.assert_array_equal(feats, plain[step].feats)


def test_requests_of_several_threads_are_all_delivered_each_threads_in_its_order(corpus: Corpus) -> None:
    plain = list(copies(MinibatchReader(corpus, SHAPE, 2, seed=0, num_epochs=4)))
    turns = threading.Semaphore(6)
    with MinibatchReader(corpus, SHAPE, 2, seed=0, threads=3, depth=6, on_request=True) as reader:

        def ask(first: int) -> None:
            for step in range(first, len(plain), 3):
                turns.acquire()
                reader.request(step)

        others = [threading.Thread(target=ask, args=(first,)) for first in range(3)]
        for other in others:
            other.start()
        got = []
        for _ in plain:
            minibatch = next(reader)
            turns.release()
            assert_same(minibatch, plain[minibatch.step])
            got.append(minibatch.step)
        for other in others:
            other.join()
    assert sorted(got) == list(range(len(plain)))
    assert all([s for s in got if s % 3 == r] == list(range(r, len(plain), 3)) for r in range(3))


def test_a_delivered_minibatch_stays_while_all_buffers_are_requested(corpus: Corpus) -> None:
    with MinibatchReader(corpus, SHAPE, 5, seed=0, depth=2, threads=2, on_request=True) as reader:
        reader.request(0)
        minibatch = next(reader)
        kept = minibatch.feats.copy()
        reader.request(1)
        reader.request(2)
        with pytest.raises(ValueError, match="all 2 buffers of the minibatch reader wait to be delivered"):
            reader.request(3)
        time.sleep(0.05)
        np.testing.assert_array_equal(minibatch.feats, kept)
        assert [next(reader).step, next(reader).step] == [1, 2]


def test_finish_with_requests_left_and_while_the_consumer_waits(corpus: Corpus) -> None:
    with MinibatchReader(corpus, SHAPE, 5, seed=0, depth=3, on_request=True) as reader:
        reader.request(6)
        reader.request(1)
        timer = threading.Timer(0.05, reader.finish)
        timer.start()
        assert [m.step for m in reader] == [6, 1]
        timer.join()
        reader.finish()
        with pytest.raises(StopIteration):
            next(reader)
        with pytest.raises(ValueError, match="no more requests"):
            reader.request(0)


def test_close_while_the_consumer_waits_for_a_request(corpus: Corpus) -> None:
    reader = MinibatchReader(corpus, SHAPE, 5, seed=0, threads=2, on_request=True)
    timer = threading.Timer(0.05, reader.close)
    timer.start()
    with pytest.raises(ValueError, match="closed"):
        next(reader)
    timer.join()
    for use in (lambda: reader.request(0), reader.finish, lambda: next(reader)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_close_while_others_ask(corpus: Corpus) -> None:
    """Neither deadlock nor use of what is freed: a request finds the reader open or closed."""
    for _ in range(20):
        reader = MinibatchReader(corpus, SHAPE, 5, seed=0, threads=2, depth=2, on_request=True)
        ends: list[str] = []

        def ask(reader: MinibatchReader = reader, ends: list[str] = ends) -> None:
            while True:
                try:
                    reader.request(1)
                except ValueError as error:
                    if "closed" in str(error):
                        ends.append("closed")
                        return

        others = [threading.Thread(target=ask) for _ in range(2)]
        for other in others:
            other.start()
        assert next(reader).step == 1
        reader.close()
        for other in others:
            other.join()
        assert ends == ["closed", "closed"]


def test_an_error_surfaces_at_its_step_and_stays(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [8, 8, 8, 8], kind="FM")
    corpus = Corpus.open(written.scp, written.labels)
    archive = tmp_path / "feats.ark"
    archive.write_bytes(archive.read_bytes()[:-20])
    # Without shuffling, step s holds the utterance u00s.
    with MinibatchReader(corpus, SHAPE, 2, seed=0, shuffle=False, threads=3, depth=4, on_request=True) as reader:
        for step in (2, 0, 3, 1):
            reader.request(step)
        assert [next(reader).step, next(reader).step] == [2, 0]
        for _ in range(2):
            with pytest.raises(DataError, match="u003"):
                next(reader)


def test_what_cannot_be_asked_for(corpus: Corpus) -> None:
    with (
        MinibatchReader(corpus, SHAPE, 5, seed=0, on_request=True) as reader,
        pytest.raises(ConfigError, match="step is -1"),
    ):
        reader.request(-1)
    with MinibatchReader(corpus, SHAPE, 5, seed=0) as reader:
        uses: list[Callable[[], None]] = [lambda: reader.request(0), reader.finish]
        for use in uses:
            with pytest.raises(ValueError, match="does not read on request"):
                use()
    together: list[dict[str, Any]] = [{"first_step": 3}, {"num_epochs": 1}]
    for options in together:
        with pytest.raises(ConfigError, match="on request has neither a first step nor a number of epochs"):
            MinibatchReader(corpus, SHAPE, 5, seed=0, on_request=True, **options)
