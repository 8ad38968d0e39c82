"""Which chunks of an utterance become chain examples: nnet3-chain-get-egs' rule, with a seed.

An utterance is covered by chunks of the first width and at most two of others, such that their sum is nearest to its
length; frames left out count twice as much as frames covered twice. Among covers that differ by less than two frames
one is drawn. Kaldi draws where gaps and overlaps lie without a seed; here all that is drawn comes from one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError

_ALIKE = 2  # covers whose costs differ by less are equally good


@dataclass(frozen=True, eq=False)
class Chunk:
    """Frames of an utterance.

    Attributes:
        first: its first input frame, a multiple of the subsampling factor.
        frames: input frames, a multiple as well.
        weights: (T,) float32, of output frames: 1 / the number of the utterance's chunks that hold the frame.
        is_first, is_last: whether it is the utterance's first or last chunk.
    """

    first: int
    frames: int
    weights: NDArray[np.float32]
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class ChunkWidths:
    """The widths of chunks.

    Attributes:
        widths: input frames, the principal width first; none: a chunk is a whole utterance.
        factor: the frame subsampling factor, of which they are multiples.
    """

    widths: tuple[int, ...]
    factor: int

    @classmethod
    def parse(cls, text: str, factor: int) -> ChunkWidths:
        """Read ``--frames-per-eg``: ``140,100,160``, rounded up to multiples of `factor`; or ``-1``.

        Raises:
            ConfigError: something else.
        """
        if factor < 1:
            raise ConfigError(f"--frame-subsampling-factor {factor} must be at least 1")
        if text.strip() == "-1":
            return cls((), factor)
        words = [word.strip() for word in text.split(",")]
        if not all(word.isascii() and word.isdecimal() and 0 < int(word) < 2**24 for word in words):
            raise ConfigError(f"--frames-per-eg {text}: widths like 140,100,160 are expected, or -1: whole utterances")
        return cls(tuple(dict.fromkeys(-(-int(word) // factor) * factor for word in words)), factor)

    def chunks(self, frames: int, rng: np.random.Generator) -> list[Chunk]:
        """The chunks of an utterance of so many input frames; none if it is shorter than all widths.

        Args:
            frames: at least 0.
            rng: what is drawn.
        """
        factor = self.factor
        if not self.widths:
            # Kaldi's output frames of a whole utterance are rounded down.
            total = frames // factor
            return [Chunk(0, total * factor, np.ones(total, np.float32), True, True)] if total else []
        covers = self._nearest(frames)
        if not covers:
            return []
        widths = sorted(covers[int(rng.integers(len(covers)))], reverse=bool(rng.integers(2)))
        total = -(-frames // factor)
        sizes = [width // factor for width in widths]
        return chunks_at([start * factor for start in _placed(sizes, total, rng)], widths, frames, factor)

    def _nearest(self, frames: int) -> list[tuple[int, ...]]:
        """The best covers, in a fixed order."""
        costs = {cover: _cost(sum(cover), frames) for cover in self._covers(frames) if max(cover) <= frames}
        least = min(costs.values(), default=0)
        return sorted(cover for cover, cost in costs.items() if cost < least + _ALIKE)

    def _covers(self, frames: int) -> Iterator[tuple[int, ...]]:
        """Those that can be best; widths in falling order."""
        principal, *others = self.widths
        some: list[tuple[int, ...]] = [(), *((one,) for one in others)]
        some += [(one, two) for number, one in enumerate(others) for two in others[number:]]
        for few in some:
            fitting = max(0, frames - sum(few)) // principal
            # Any other number costs a whole width more than one of these.
            for number in (fitting, fitting + 1):
                cover = (*few, *(principal,) * number)
                if cover:
                    yield tuple(sorted(cover, reverse=True))


def chunks_at(starts: Sequence[int], widths: Sequence[int], frames: int, factor: int) -> list[Chunk]:
    """Chunks of an utterance of so many input frames.

    Args:
        starts, widths: input frames, multiples of `factor`; in the order of time, and within the utterance.
        frames: of the utterance.
        factor: the frame subsampling factor.
    """
    places = [slice(start // factor, (start + width) // factor) for start, width in zip(starts, widths, strict=True)]
    count = np.zeros(-(-frames // factor), np.int64)
    for place in places:
        count[place] += 1
    last = len(places) - 1
    return [
        Chunk(start, width, (1.0 / count[place]).astype(np.float32), n == 0, n == last)
        for n, (start, width, place) in enumerate(zip(starts, widths, places, strict=True))
    ]


def _cost(covered: int, frames: int) -> int:
    return covered - frames if covered > frames else 2 * (frames - covered)


def _placed(sizes: Sequence[int], total: int, rng: np.random.Generator) -> list[int]:
    """The starts of consecutive chunks in `total` output frames.

    Gaps are as even as can be, before, between and after them; overlaps are between neighbours, in proportion to the
    smaller one. What does not divide is drawn.
    """
    spare = total - sum(sizes)
    if spare >= 0:
        each, rest = divmod(spare, len(sizes) + 1)
        gaps = each + (rng.permutation(len(sizes) + 1) < rest)[:-1]
    else:
        smaller = np.minimum(sizes[:-1], sizes[1:])
        shares = -spare * smaller / smaller.sum()
        overlaps = np.floor(shares).astype(np.int64)
        order = rng.permutation(len(overlaps))
        furthest = order[np.argsort(-(shares - overlaps)[order], kind="stable")]
        overlaps[furthest[: -spare - int(overlaps.sum())]] += 1
        gaps = np.concatenate([[0], -overlaps])
    ends = np.cumsum(gaps + np.array(sizes))
    starts: list[int] = (ends - np.array(sizes)).tolist()
    return starts
