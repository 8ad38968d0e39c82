"""An nnet3 example in Python."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class SparseRows:
    """A sparse matrix: for each row its pairs (column, value), for an output (pdf-id, weight).

    Attributes:
        dim: columns.
        first: int64 (rows + 1,): the pairs of row i are first[i] .. first[i + 1] - 1.
        columns: int32 (pairs,), each at least 0 and below `dim`.
        values: float32 (pairs,).
    """

    dim: int
    first: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def rows(self) -> list[list[tuple[int, float]]]:
        """The pairs of each row."""
        pairs = list(zip(self.columns.tolist(), self.values.tolist(), strict=True))
        bounds = self.first.tolist()
        return [pairs[begin:end] for begin, end in itertools.pairwise(bounds)]


@dataclass
class NnetIo:
    """One input or output of an example.

    Attributes:
        name: ``input``, ``ivector``, ``output``, ...
        indexes: int32 (rows, 3): n, t and x of each row.
        matrix: float32 (rows, columns), or sparse.
    """

    name: str
    indexes: NDArray[np.int32]
    matrix: NDArray[np.float32] | SparseRows


@dataclass
class Example:
    """An nnet3 example.

    Attributes:
        ios: its inputs and outputs, in the order of the file.
    """

    ios: list[NnetIo]

    def __getitem__(self, name: str) -> NnetIo:
        """The input or output of this name (the first one); KeyError if there is none."""
        for io in self.ios:
            if io.name == name:
                return io
        raise KeyError(name)
