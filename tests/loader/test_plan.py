"""Pools, several shapes, minibatch rules, positions to go on from: every labelled frame exactly once, in any case."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.loader import (
    Chunking,
    ChunkPlan,
    ChunkShape,
    Corpus,
    MinibatchReader,
    MinibatchRule,
    NumpyMinibatch,
    Position,
)
from tests.loader_data import Written, write_corpus

SETTINGS = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
CHUNKINGS = st.builds(
    Chunking,
    st.lists(st.integers(1, 20), min_size=1, max_size=4, unique=True).map(tuple),
    st.integers(0, 4),
    st.integers(0, 4),
    st.none() | st.integers(0, 6),
    st.none() | st.integers(0, 6),
    st.integers(0, 3),
)
MEMORY = st.sampled_from([1, 300, 800, 10**6])  # bytes; an utterance of one frame has 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def open_corpus(folder: Path, lengths: list[int], kind: str | None = None) -> tuple[Written, Corpus]:
    written = write_corpus(folder, lengths, dim=2, kind=kind)
    return written, Corpus.open(written.scp, written.labels)


def copies(reader: MinibatchReader) -> Iterator[NumpyMinibatch]:
    """Minibatches that stay valid."""
    with reader:
        for m in reader:
            yield dataclasses.replace(m, feats=m.feats.copy(), labels=m.labels.copy())


def labels_of(minibatches: list[NumpyMinibatch]) -> Counter[int]:
    """How often each labelled frame comes: in these corpora each frame has a label of its own."""
    return Counter(int(label) for m in minibatches for label in m.labels[m.labels >= 0])


def once(lengths: list[int]) -> Counter[int]:
    return Counter(range(sum(lengths)))


def expected_rows(written: Written, shape: ChunkShape, labels: np.ndarray) -> np.ndarray:
    """The input of a chunk, found through the labels."""
    i = int(np.flatnonzero(labels >= 0)[0])
    key = next(key for key, values in written.labels.items() if labels[i] in values)
    start = int(labels[i] - written.labels[key][0]) - i
    rows = start - shape.left + shape.label_delay + np.arange(shape.rows)
    return written.feats[key][np.clip(rows, 0, len(written.feats[key]) - 1)]


@SETTINGS
@given(
    lengths=LENGTHS, chunking=CHUNKINGS, memory=MEMORY, size=st.integers(1, 4), chunks=st.integers(1, 5),
    threads=st.integers(1, 3), shuffle=st.booleans(), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_each_frame_once_an_epoch_whatever_the_shapes_and_pools(
    folder: Path, lengths: list[int], chunking: Chunking, memory: int, size: int, chunks: int, threads: int,
    shuffle: bool, seed: int,
) -> None:  # fmt: skip
    written, corpus = open_corpus(folder, lengths)
    rule = MinibatchRule.parse(f"{chunking.left + 1}={chunks}/{chunking.left + 12}={chunks + 2}")
    ranks = [
        list(
            copies(
                MinibatchReader(
                    corpus, chunking, rule, seed=seed, rank=rank, size=size, threads=threads, num_epochs=2,
                    memory=memory, shuffle=shuffle,
                )
            )
        )
        for rank in range(size)
    ]  # fmt: skip
    plan = ChunkPlan(corpus, chunking, rule, size=size, seed=seed, memory=memory, shuffle=shuffle)
    assert plan.num_chunks == sum(chunking.num_chunks(length) for length in lengths)
    for epoch in range(2):
        assert labels_of([m for rank in ranks for m in rank if m.epoch == epoch]) == once(lengths)
        of_ranks = [sum(len(m.labels) > 0 for m in rank if m.epoch == epoch) for rank in ranks]
        assert max(of_ranks) - min(of_ranks) <= 1
    for step, at_step in enumerate(zip(*ranks, strict=True)):
        first = at_step[0]
        assert {m.step for m in at_step} == {step}
        assert plan.frames_of_step(step) == first.global_frames == sum(m.frames for m in at_step)
        assert plan.chunks_of_step(step) == sum(len(m.labels) for m in at_step)
        for m in at_step:
            assert m.shape == first.shape
            assert len(m.labels) <= rule.largest(m.shape.rows)
            for feats, labels in zip(m.feats, m.labels, strict=True):
                np.testing.assert_array_equal(feats, expected_rows(written, m.shape, labels))


@SETTINGS
@given(
    lengths=LENGTHS, chunking=CHUNKINGS, memory=MEMORY, seed=st.integers(0, 99),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=4),
)  # fmt: skip
def test_going_on_with_another_number_of_ranks(
    folder: Path, lengths: list[int], chunking: Chunking, memory: int, seed: int, sizes: list[tuple[int, int, int]]
) -> None:
    """Several stretches, each with its own N and minibatch; the last goes to the end of the second epoch."""
    _, corpus = open_corpus(folder, lengths)
    position: Position | None = None
    seen: list[NumpyMinibatch] = []
    for number, (size, chunks, steps) in enumerate(sizes):
        plan = ChunkPlan(corpus, chunking, chunks, size=size, seed=seed, memory=memory, start=position)
        last = number == len(sizes) - 1
        for rank in range(size):
            reader = MinibatchReader(
                corpus, chunking, chunks, seed=seed, rank=rank, size=size, num_epochs=2, memory=memory, start=position
            )
            seen += [m for m in copies(reader) if last or m.step < steps]
        here = min(steps, plan.end_of_epochs(2))
        assert plan.position(0) == position or position is None or position.epoch < plan.position(0).epoch
        position = plan.position(here)
        assert 0 <= position.epoch <= 2
    assert labels_of([m for m in seen if m.epoch == 0]) == once(lengths)
    assert labels_of([m for m in seen if m.epoch == 1]) == once(lengths)


@SETTINGS
@given(lengths=LENGTHS, chunking=CHUNKINGS, memory=MEMORY, first=st.integers(0, 20), threads=st.integers(1, 4))
def test_a_position_goes_on_with_the_same_minibatches(
    folder: Path, lengths: list[int], chunking: Chunking, memory: int, first: int, threads: int
) -> None:
    _, corpus = open_corpus(folder, lengths)
    whole = list(copies(MinibatchReader(corpus, chunking, 3, seed=4, num_epochs=3, memory=memory)))
    first = min(first, len(whole))
    position = ChunkPlan(corpus, chunking, 3, size=1, seed=4, memory=memory).position(first)
    rest = list(
        copies(
            MinibatchReader(corpus, chunking, 3, seed=4, num_epochs=3, memory=memory, start=position, threads=threads)
        )
    )
    assert len(rest) == len(whole) - first
    for a, b in zip(whole[first:], rest, strict=True):
        assert (a.step - first, a.epoch, a.shape, a.frames) == (b.step, b.epoch, b.shape, b.frames)
        np.testing.assert_array_equal(a.feats, b.feats)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_a_position_in_another_order_is_refused(folder: Path) -> None:
    _, corpus = open_corpus(folder, [20, 30])
    position = ChunkPlan(corpus, ChunkShape(4, 0, 0), 2, size=1, seed=1).position(3)
    assert position.epoch == 0 and position.taken == (6,)
    for change in ({"seed": 2}, {"shuffle": False}, {"memory": 100}):
        with pytest.raises(ConfigError, match="another order of the data"):
            ChunkPlan(corpus, ChunkShape(4, 0, 0), 2, **{"size": 1, "seed": 1, **change, "start": position})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="another order of the data"):
        ChunkPlan(corpus, ChunkShape(5, 0, 0), 2, size=1, seed=1, start=position)


def test_pools_mix_what_fits_into_memory_and_are_drawn_anew(folder: Path) -> None:
    """Chunks of a pool are mixed and pools come one after the other, of other utterances in each epoch."""
    lengths = [10] * 40
    _, corpus = open_corpus(folder, lengths, "CM3")
    memory = 2 * 10 * int(corpus.unit_bytes[0])
    with MinibatchReader(corpus, ChunkShape(1, 0, 0), 100, seed=3, num_epochs=2, memory=memory) as reader:
        pools = [frozenset((m.labels[:, 0] // 10).tolist()) for m in reader]
    assert len(pools) == 8 and all(len(pool) == 10 for pool in pools)
    assert frozenset.union(*pools[:4]) == frozenset.union(*pools[4:]) == frozenset(range(40))
    assert set(pools[:4]) != set(pools[4:])


def test_memory_is_that_of_two_pools(folder: Path) -> None:
    written = write_corpus(folder, [300] * 100, dim=40, kind="CM3")
    corpus = Corpus.open(written.scp, written.labels)
    whole = int(corpus.unit_bytes.sum())
    with MinibatchReader(corpus, ChunkShape(25, 0, 0), 10, seed=3, num_epochs=2, memory=whole // 5) as reader:
        frames = sum(m.frames for m in reader)
        counters = reader.counters()
    assert frames == counters.frames == 2 * 300 * 100
    buffers = 4 * 10 * 25 * (40 * 4 + 8)
    assert whole // 10 < counters.memory - buffers - 4 * 2**20 < whole // 5 + 100_000  # orders, and a block of 4 MiB
    # Each pool once in each epoch, and less than as much again of gaps; more may have been read ahead.
    assert 2 * whole <= counters.bytes_read <= 4 * whole + whole // 5


def test_a_small_corpus_is_read_once(folder: Path) -> None:
    lengths = [30] * 20
    _, corpus = open_corpus(folder, lengths, "CM3")
    with MinibatchReader(corpus, ChunkShape(5, 3, 3), 10, seed=3, num_epochs=5) as reader:
        assert sum(m.frames for m in reader) == 5 * sum(lengths)
        assert reader.counters().bytes_read <= Path(corpus.paths[0]).stat().st_size


def test_without_shuffling_minibatches_are_those_of_merging_in_order(folder: Path) -> None:
    """Groups of one shape come when they are full, and what is left in the order of shapes: nnet3-merge-egs' rule."""
    _, corpus = open_corpus(folder, [8, 3, 8, 3, 4])
    chunking = Chunking((4, 3), 0, 0)
    with MinibatchReader(corpus, chunking, 2, seed=0, num_epochs=1, shuffle=False) as reader:
        got = [(m.shape.width, m.labels[:, 0].tolist()) for m in reader]
    assert got == [(4, [0, 4]), (4, [11, 15]), (3, [8, 19]), (4, [22])]


@pytest.mark.parametrize(
    ("frames", "widths", "chunks"),
    [
        (47, (20, 15), [(20, 0), (15, 20), (15, 32)]),
        (33, (20, 15), [(20, 0), (15, 18)]),
        (40, (20, 15), [(20, 0), (20, 20)]),
        (12, (20, 15), [(15, 0)]),
        (12, (20, 15, 12), [(12, 0)]),
        (100, (20,), [(20, 0), (20, 20), (20, 40), (20, 60), (20, 80)]),
        (7, (20,), [(20, 0)]),
    ],
)
def test_how_utterances_are_covered(
    folder: Path, frames: int, widths: tuple[int, ...], chunks: list[tuple[int, int]]
) -> None:
    """Widths and starts; the last one moved back to end with the utterance."""
    _, corpus = open_corpus(folder, [frames])
    got = []
    with MinibatchReader(corpus, Chunking(widths, 0, 0), 1, seed=0, num_epochs=1, shuffle=False) as reader:
        for m in reader:
            labels = m.labels[0]
            i = int(np.flatnonzero(labels >= 0)[0])
            got.append((m.shape.width, int(labels[i]) - i))
    assert sorted(got, key=lambda chunk: chunk[1]) == chunks


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("128", {1: 128, 9: 128}),
        ("64,128", {5: 128}),
        ("64:128,256", {5: 256}),
        ("128=64:128/256=32,64", {128: 128, 256: 64, 10: 128, 1000: 64, 190: 128, 200: 64}),
    ],
)
def test_minibatch_rules(text: str, sizes: dict[int, int]) -> None:
    rule = MinibatchRule.parse(text)
    assert {rows: rule.largest(rows) for rows in sizes} == sizes


@pytest.mark.parametrize("text", ["", "0", "a", "64:32", "1,,2", "128=", "=64", "128=64/64", "5=1/5=2", "1=2=3", "-1"])
def test_minibatch_rules_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="minibatch size"):
        MinibatchRule.parse(text)


@pytest.mark.parametrize("widths", [(), (3, 3), (0,), tuple(range(1, 19))])
def test_widths_that_are_none(widths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="width"):
        Chunking(widths, 0, 0)
