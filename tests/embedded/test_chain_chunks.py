"""Which chunks of an utterance become examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kaldi_mpi.embedded.chain_chunks import ChunkWidths
from kaldi_mpi.errors import ConfigError


def cheapest(widths: tuple[int, ...], frames: int) -> float:
    """The least cost of a cover, by trying all; frames left out count twice."""
    best = np.inf
    for few in range(3):
        for others in itertools.combinations_with_replacement(widths[1:], few):
            for number in range(frames // widths[0] + 2):
                cover = (*others, *(widths[0],) * number)
                if cover and max(cover) <= frames:
                    more = sum(cover) - frames
                    best = min(best, more if more > 0 else -2 * more)
    return best


@pytest.mark.parametrize("text, factor", [("140,100,60", 3), ("140,100,160", 3), ("60", 3), ("25", 1), ("50,31", 2)])
def test_covers(text: str, factor: int) -> None:
    """Of each length: the cost is the least or alike, starts are multiples, chunks lie within the utterance."""
    widths, rng = ChunkWidths.parse(text, factor), np.random.default_rng(1)
    assert all(width % factor == 0 for width in widths.widths)
    orders = set()
    for frames in range(1, 700):
        chunks = widths.chunks(frames, rng)
        if not chunks:
            assert frames < min(widths.widths)
            continue
        covered = sum(chunk.frames for chunk in chunks)
        cost = covered - frames if covered > frames else 2 * (frames - covered)
        assert cost < cheapest(widths.widths, frames) + 2
        starts, ends = [chunk.first for chunk in chunks], [chunk.first + chunk.frames for chunk in chunks]
        assert all(start % factor == 0 for start in starts) and starts == sorted(starts) and starts[0] >= 0
        assert ends == sorted(ends) and ends[-1] - frames < factor
        assert [chunk.is_first for chunk in chunks] == [True, *[False] * (len(chunks) - 1)]
        assert [chunk.is_last for chunk in chunks] == [*[False] * (len(chunks) - 1), True]
        sizes = [chunk.frames for chunk in chunks]
        orders.add(sizes == sorted(sizes))
        # Neither gap nor overlap reaches a width; nothing is left out where something is covered twice.
        between = [start - end for start, end in zip(starts[1:], ends[:-1], strict=True)]
        least = [min(pair) for pair in itertools.pairwise(sizes)]
        assert all(-size < gap < min(widths.widths) for size, gap in zip(least, between, strict=True))
        assert covered <= frames + factor or (starts[0], ends[-1] >= frames, max(between) <= 0) == (0, True, True)
    assert orders == ({True, False} if len(widths.widths) > 1 else {True})


def test_weights_add_up_to_one() -> None:
    """Of each output frame that a chunk holds, over the chunks that hold it."""
    widths, rng, shared = ChunkWidths.parse("140,100,60", 3), np.random.default_rng(2), 0
    for frames in range(60, 500, 7):
        total = np.zeros(-(-frames // 3))
        for chunk in widths.chunks(frames, rng):
            assert len(chunk.weights) == chunk.frames // 3
            total[chunk.first // 3 : (chunk.first + chunk.frames) // 3] += chunk.weights
            shared += int((chunk.weights < 1).sum())
        assert np.isin(np.round(total, 6), (0.0, 1.0)).all()
    assert shared > 50


def test_gaps_are_even_and_drawn() -> None:
    """8 of 68 output frames are left out: 2 or 3 of them in each of three places, another one each time."""
    widths, rng = ChunkWidths.parse("90", 3), np.random.default_rng(3)
    found = {tuple(chunk.first // 3 for chunk in widths.chunks(3 * 68, rng)) for _ in range(50)}
    gaps = {(first, second - first - 30, 68 - second - 30) for first, second in found}
    assert gaps == {(3, 3, 2), (3, 2, 3), (2, 3, 3)}


def test_whole_utterances() -> None:
    widths = ChunkWidths.parse("-1", 3)
    (chunk,) = widths.chunks(101, np.random.default_rng(0))
    assert (chunk.first, chunk.frames, len(chunk.weights), chunk.is_first, chunk.is_last) == (0, 99, 33, True, True)
    assert widths.chunks(2, np.random.default_rng(0)) == []


@pytest.mark.parametrize("text", ["", "0", "140,", "140,-1", "a", "1e3", str(2**24)])
def test_widths_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="widths like 140,100,160 are expected"):
        ChunkWidths.parse(text, 3)


def test_widths_are_rounded_up_once() -> None:
    assert ChunkWidths.parse("140, 141,100", 3).widths == (141, 102)
    with pytest.raises(ConfigError, match="--frame-subsampling-factor 0"):
        ChunkWidths.parse("140", 0)
