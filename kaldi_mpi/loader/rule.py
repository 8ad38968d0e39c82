"""Minibatch sizes in Kaldi's syntax."""

from __future__ import annotations

import dataclasses

from kaldi_mpi.errors import ConfigError

_LIMIT = 2**24


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
