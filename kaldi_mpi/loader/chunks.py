"""How utterances are cut into chunks, and how many chunks make a minibatch."""

from __future__ import annotations

import dataclasses
from typing import Any

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.loader.native import ffi, lib

_LIMIT = 2**24  # rows, and chunks of a minibatch


@dataclasses.dataclass(frozen=True)
class ChunkShape:
    """The shape of a chunk.

    With labels at t = s .. s+width-1 it has the input rows s-left+label_delay .. s+width-1+right+label_delay;
    rows before the first and after the last frame repeat that frame, as nnet3-get-egs does. Where the output has fewer
    frames than the input, as in chain training, its labels are at t = s, s+subsampling, ..., and the rows around them
    the same.

    Attributes:
        width: labelled frames.
        left: context rows before the first label's.
        right: context rows after the last label's.
        label_delay: frames by which the input runs ahead of the labels.
        subsampling: frames from one label to the next (``frame_subsampling_factor``).
        sequences: of merged chain examples: how many chunks of this shape one has, and which come together.

    Raises:
        ConfigError: one of them is out of its range.
    """

    width: int
    left: int
    right: int
    label_delay: int = 0
    subsampling: int = 1
    sequences: int = 1

    def __post_init__(self) -> None:
        least_of = {"width": 1, "left": 0, "right": 0, "label_delay": 0, "subsampling": 1, "sequences": 1}
        for name, least in least_of.items():
            if not least <= getattr(self, name) < _LIMIT:
                raise ConfigError(f"chunk {name} is {getattr(self, name)}, and must be at least {least}")

    @property
    def rows(self) -> int:
        """Input rows of a chunk; nnet3 calls it the size of an example."""
        return self.left + (self.width - 1) * self.subsampling + 1 + self.right

    def fields(self) -> tuple[int, ...]:
        """Those of a ``km_shape``."""
        return dataclasses.astuple(self)


@dataclasses.dataclass(frozen=True)
class Chunking:
    """Chunks of several widths, with contexts of their own at the ends of an utterance.

    An utterance is covered by chunks of the first width and at most two of others, such that the fewest frames are
    covered twice (csrc/split.h has the whole rule). Each frame is labelled in exactly one chunk.

    Attributes:
        widths: labelled frames of a chunk, the principal width first (``--egs.chunk-width``).
        left, right: context rows before and after a chunk.
        left_initial: context rows before an utterance's first chunk; None: `left`
            (``--egs.chunk-left-context-initial``).
        right_final: context rows after its last one; None: `right` (``--egs.chunk-right-context-final``).
        label_delay: frames by which the input runs ahead of the labels.

    Raises:
        ConfigError: no width, one that comes twice, more than 16, or a number out of its range.
    """

    widths: tuple[int, ...]
    left: int
    right: int
    left_initial: int | None = None
    right_final: int | None = None
    label_delay: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.widths) <= lib.KM_MAX_WIDTHS:
            raise ConfigError(f"{len(self.widths)} chunk widths: 1 to {lib.KM_MAX_WIDTHS} can be given")
        if len(set(self.widths)) < len(self.widths):
            raise ConfigError(f"chunk widths {','.join(map(str, self.widths))}: one comes twice")
        self.shapes()

    @classmethod
    def of(cls, shape: ChunkShape) -> Chunking:
        """Chunks of one shape."""
        return cls((shape.width,), shape.left, shape.right, label_delay=shape.label_delay)

    def _ordered(self) -> list[int]:
        return [self.widths[0], *sorted(self.widths[1:], reverse=True)]

    def _shape(self, width: int, is_first: bool, is_last: bool) -> ChunkShape:
        left = self.left_initial if is_first and self.left_initial is not None else self.left
        right = self.right_final if is_last and self.right_final is not None else self.right
        return ChunkShape(width, left, right, self.label_delay)

    def shapes(self) -> list[ChunkShape]:
        """All shapes that chunks may have: those of the principal width first."""
        ends = [(first, last) for first in (False, True) for last in (False, True)]
        return list(dict.fromkeys(self._shape(width, *end) for width in self._ordered() for end in ends))

    def fill(self, config: Any) -> None:
        """Write widths and shapes into a ``km_plan_config``."""
        number = {shape: i for i, shape in enumerate(self.shapes())}
        config.split.num_widths = len(self.widths)
        for i, width in enumerate(self._ordered()):
            config.split.widths[i] = width
            for first in (0, 1):
                for last in (0, 1):
                    config.shape_at[i][first][last] = number[self._shape(width, bool(first), bool(last))]

    def num_chunks(self, frames: int) -> int:
        """Chunks of an utterance of so many frames (at least 1)."""
        config = ffi.new("km_plan_config *")
        self.fill(config)
        return int(lib.km_split_count(ffi.addressof(config, "split"), frames))


@dataclasses.dataclass(frozen=True)
class MinibatchRule:
    """How many chunks make a minibatch, as nnet3-merge-egs' ``--minibatch-size`` says.

    ``128`` or ``64,128`` or ``64:128`` is for chunks of all sizes; ``128=64:128/256=32,64`` for chunks of 128 input
    rows and of 256, and for others the nearest of these. As in Kaldi a minibatch has the largest size named while there
    are chunks for it. The smaller ones say there what may be made of the rest, and all else is discarded; here
    the rest is a minibatch whatever its size, so they are only checked.

    Attributes:
        largest_by_size: pairs (input rows, largest minibatch), in the order written; one pair with 0 rows is for all.
    """

    largest_by_size: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> MinibatchRule:
        """Raises ConfigError where Kaldi would not take it."""
        parts = text.split("/")
        if len(parts) == 1 and "=" not in text:
            return cls(((0, _largest(text, text)),))
        pairs: list[tuple[int, int]] = []
        for part in parts:
            size, equals, sizes = part.partition("=")
            if not equals:
                raise ConfigError(f"minibatch size '{text}': '{part}' has no '=', as in 128=64:128/256=32,64")
            pairs.append((_number(size, text), _largest(sizes, text)))
        if len({size for size, _ in pairs}) < len(pairs):
            raise ConfigError(f"minibatch size '{text}': a size of chunks comes twice")
        return cls(tuple(pairs))

    @classmethod
    def of(cls, chunks: int) -> MinibatchRule:
        """The same number of chunks for all sizes."""
        if not 1 <= chunks < _LIMIT:
            raise ConfigError(f"chunks per minibatch is {chunks}, and must be at least 1 and below {_LIMIT}")
        return cls(((0, chunks),))

    def largest(self, rows: int) -> int:
        """Chunks of a minibatch of chunks with so many input rows."""
        return min(self.largest_by_size, key=lambda pair: abs(pair[0] - rows))[1]


def _largest(sizes: str, text: str) -> int:
    ends = []
    for part in sizes.split(","):
        low, colon, high = part.partition(":")
        first = _number(low, text)
        last = _number(high, text) if colon else first
        if last < first:
            raise ConfigError(f"minibatch size '{text}': the range {part} ends before it begins")
        ends.append(last)
    return max(ends)


def _number(digits: str, text: str) -> int:
    if not (digits.isascii() and digits.isdecimal()) or not 1 <= int(digits) < _LIMIT:
        raise ConfigError(f"minibatch size '{text}': '{digits}' is not a number from 1 to {_LIMIT - 1}")
    return int(digits)
