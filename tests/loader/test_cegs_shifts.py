"""The frame shifts of chain training: which ones Kaldi makes, each example once with each, and positions among them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader.chain_examples import ChainExamples, frame_shift, shifted
from kaldi_mpi.loader.chunks import ChunkShape
from kaldi_mpi.loader.minibatch import NumpyMinibatch
from kaldi_mpi.loader.plan import ChunkPlan, Position
from kaldi_mpi.loader.reader import MinibatchReader
from tests.cegs_data import random_chain, write_cegs

Seen = tuple[int, int, int]  # pass of the epoch's, unit, left


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_shifts_are_kaldis(archives: int, factor: int, first: int) -> None:
    """By the words of steps/nnet3/chain/train.py for job k; in f * A jobs each archive has each shift once."""
    made = []
    for k in range(first, first + factor * archives):
        archive = k % archives + 1
        made.append((archive, frame_shift(archive, k // archives, factor)))
        assert made[-1][1] == ((k % archives + 1) + k // archives) % factor
    if first % archives == 0:
        assert Counter(made) == Counter((a, n) for a in range(1, archives + 1) for n in range(factor))


@given(st.integers(1, 6), st.integers(0, 5), st.integers(5, 9), st.integers(5, 9), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_shifted_times(factor: int, shift: int, left: int, right: int, width: int) -> None:
    shift %= factor
    shape = ChunkShape(width, left, right, subsampling=factor)
    inputs = [t + shift for t in range(-left, (width - 1) * factor + right + 1)]
    outputs = [t * factor + factor * int(np.floor(shift / factor + 0.5)) for t in range(width)]
    found = shifted(shape, shift)
    assert (found.left, found.right) == (outputs[0] - inputs[0], inputs[-1] - outputs[-1])
    assert found.rows == len(inputs) == shape.rows


def write_dir(folder: Path, archives: int, *, each: int = 5, seed: int = 0) -> Path:
    """An egs directory; the first feature of an example is its number over all archives. Widths are 3 and 5."""
    rng, number = np.random.default_rng(seed), 0
    folder.mkdir()
    for archive in range(1, archives + 1):
        examples = []
        for _ in range(each + archive % 2):
            data = random_chain(rng, frames=3 + 2 * (number % 3 == 0))
            data.feats[0, 0, 0] = number
            examples.append((f"u-{number}", data))
            number += 1
        write_cegs(folder / f"cegs.{archive}.ark", examples)
    return folder


def seen(minibatch: NumpyMinibatch) -> list[tuple[int, int]]:
    """Unit and left context of the chunks of a minibatch."""
    return [(int(number), minibatch.shape.left) for number in minibatch.feats[:, 0, 0]]


@pytest.mark.parametrize("archives", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2])
def test_an_epoch_has_each_example_with_each_shift(archives: int, size: int, tmp_path: Path) -> None:
    examples = ChainExamples.open(write_dir(tmp_path / "egs", archives))
    assert examples.passes == 3
    assert examples.total_frames == 3 * int(examples.num_frames.sum())
    lefts = [shifted(ChunkShape(3, 3, 4, subsampling=3), shift).left for shift in range(3)]
    assert sorted(lefts) == [2, 3, 4]
    plan = ChunkPlan(examples, None, 4, size=size, seed=5)
    assert plan.num_chunks == 3 * examples.num_units
    per_pass = plan.steps_per_epoch // 3
    found: Counter[tuple[int, int, int]] = Counter()
    frames = 0
    for rank in range(size):
        with MinibatchReader(examples, None, 4, seed=5, rank=rank, size=size, num_epochs=2, plan=plan) as reader:
            for minibatch in reader:
                number = minibatch.step // per_pass  # of the pass
                assert minibatch.epoch == number // 3
                for unit, left in seen(minibatch):
                    archive = int(examples.file_of[unit]) + 1
                    assert left == lefts[(archive + number) % 3]
                    found[minibatch.epoch, unit, left] += 1
                frames += minibatch.frames
    assert found == Counter(
        (e, unit, left) for e in range(2) for unit in range(examples.num_units) for left in (2, 3, 4)
    )
    assert frames == 2 * examples.total_frames
    assert sum(plan.frames_of_step(step) for step in range(plan.steps_per_epoch)) == examples.total_frames


def test_without_shifts_an_epoch_is_one_pass(tmp_path: Path) -> None:
    examples = ChainExamples.open(write_dir(tmp_path / "egs", 3), shifts=False)
    with MinibatchReader(examples, None, 4, seed=5, num_epochs=2) as reader:
        found = Counter((batch.epoch, *chunk) for batch in reader for chunk in seen(batch))
    assert found == Counter((epoch, unit, 3) for epoch in range(2) for unit in range(examples.num_units))


def test_minibatches_are_of_one_size_and_shift(tmp_path: Path) -> None:
    examples = ChainExamples.open(write_dir(tmp_path / "egs", 4))
    # Two widths, and archives that are shifted alike: 1 and 4; 2; 3.
    assert len(examples.shapes) == 6
    for memory in (2**20, 3000):
        with MinibatchReader(examples, None, 64, seed=1, memory=memory, num_epochs=1) as reader:
            batches = [(batch.shape, {examples.shape_of[unit] for unit, _ in seen(batch)}) for batch in reader]
        assert len(batches) == 3 * 6
        assert all(len(groups) == 1 for _, groups in batches)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("memory", [2**20, 3000])
def test_any_position_has_the_rest(size: int, memory: int, tmp_path: Path) -> None:
    """Reading goes on after each step of an epoch, in one process or in two: what is left comes, once."""
    examples = ChainExamples.open(write_dir(tmp_path / "egs", 2, each=4))
    plan = ChunkPlan(examples, None, 3, size=1, seed=2, memory=memory)
    steps = plan.steps_per_epoch

    def read(start: Position | None) -> list[tuple[int, int, int]]:
        found = []
        for rank in range(size):
            with MinibatchReader(
                examples, None, 3, seed=2, rank=rank, size=size, memory=memory, start=start, num_epochs=2
            ) as reader:
                found += [(batch.epoch, *chunk) for batch in reader for chunk in seen(batch)]
        return found

    with MinibatchReader(examples, None, 3, seed=2, memory=memory, num_epochs=2) as reader:
        whole = [[(batch.epoch, *chunk) for chunk in seen(batch)] for batch in reader]
    assert len(whole) == 2 * steps
    for step in range(steps + 2):
        position = plan.position(step)
        assert position.epoch == step // steps
        rest = read(position)
        assert Counter(rest) == Counter(chunk for batch in whole[step:] for chunk in batch)
        later = ChunkPlan(examples, None, 3, size=1, seed=2, memory=memory, start=position)
        assert later.position(0) == position
        assert later.first_epoch == position.epoch
        assert later.steps_of_first_epoch == steps - step % steps
        assert later.end_of_epochs(2) == 2 * steps - step
        if size == 1:
            assert [chunk for batch in whole[step:] for chunk in batch] == rest


def test_steps_on_request_are_the_same(tmp_path: Path) -> None:
    examples = ChainExamples.open(write_dir(tmp_path / "egs", 3))
    with MinibatchReader(examples, None, 4, seed=7, num_epochs=2) as reader:
        steps = {batch.step: (batch.epoch, batch.shape, seen(batch)) for batch in reader}
    wanted = [max(steps), 0, len(steps) // 2, 1]
    with MinibatchReader(examples, None, 4, seed=7, on_request=True, threads=2) as reader:
        for step in wanted:
            reader.request(step)
        reader.finish()
        assert [(batch.epoch, batch.shape, seen(batch)) for batch in reader] == [steps[step] for step in wanted]


def test_a_position_is_of_its_shifts(tmp_path: Path) -> None:
    folder = write_dir(tmp_path / "egs", 3)
    shifts, none = ChainExamples.open(folder), ChainExamples.open(folder, shifts=False)
    position = ChunkPlan(shifts, None, 4, size=1, seed=0).position(5)
    with pytest.raises(ConfigError, match="the position to go on from is in another order"):
        ChunkPlan(none, None, 4, size=1, seed=0, start=position)


def test_shifts_need_context(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for left, right, shift in ((0, 9, 1), (9, 0, 2)):
        path = write_cegs(
            tmp_path / "cegs.1.ark", [("a", random_chain(rng)), ("b", random_chain(rng, left=left, right=right))]
        )
        assert ChainExamples.open(path, shifts=False).num_units == 2
        with pytest.raises(
            DataError, match=f"{left} rows before .* {right} after the last: too few for a shift of {shift}"
        ) as caught:
            ChainExamples.open(path)
        assert (caught.value.file, caught.value.key) == (str(path), "b")


def test_chain_examples_take_no_chunking(tmp_path: Path) -> None:
    examples = ChainExamples.open(write_dir(tmp_path / "egs", 1))
    with pytest.raises(ConfigError, match="chain examples are cut already"):
        ChunkPlan(examples, ChunkShape(1, 0, 0), 4, size=1, seed=0)
