"""Kaldi's CompressedMatrix as its automatic method writes it: a byte an element, or two where there are few rows."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.stream import InputStream

_MARK = b"CM "
_HEADER = struct.Struct("<ffii")  # the least element, their extent, rows, columns

_FEW_ROWS = 8  # up to so many, two bytes an element: column statistics would take more than they save
_STEP = np.float32(1.52590218966964e-05)  # 1 / 65535, as Kaldi's reader has it
_HALF = 0.499  # Kaldi's rounding to 16 bits; to 8 bits it adds 0.5
# The bytes of a column's values between its 0th, 25th, 75th and 100th percentile: first, and how many steps.
_SEGMENTS = ((0, 64), (64, 128), (192, 63))


@dataclass(frozen=True, eq=False)
class CompressedMatrix:
    """A matrix of a byte an element, as a file has it: rows can be taken out of it without another rounding.

    Attributes:
        low, extent: what the percentiles are counted from, and in parts of.
        percentiles: (columns, 4) uint16.
        elements: (columns, rows) uint8.
    """

    low: float
    extent: float
    percentiles: NDArray[np.uint16]
    elements: NDArray[np.uint8]

    @classmethod
    def read(cls, path: str, offset: int = 0, *, key: str | None = None) -> CompressedMatrix | None:
        """Read the matrix at a byte of a file (``\\0B`` comes first); None if it is of another kind.

        Raises:
            DataError: the file cannot be read, or is truncated or damaged there.
        """
        mark = b"\0B" + _MARK

        def taken(size: int) -> bytes:
            data = stream.read(size)
            if len(data) < size:
                raise DataError("truncated in a compressed matrix", file=path, key=key, offset=stream.at)
            return data

        with InputStream(path, offset=offset, key=key) as stream:
            if stream.peek(len(mark)) != mark:
                return None
            taken(len(mark))
            low, extent, rows, columns = _HEADER.unpack(taken(_HEADER.size))
            if min(rows, columns) < 1 or not np.isfinite(low + extent):
                cause = f"a compressed matrix of {rows} x {columns}, elements from {low} to {low + extent}"
                raise DataError(cause, file=path, key=key, offset=offset)
            percentiles = np.frombuffer(taken(8 * columns), "<u2").reshape(columns, 4)
            elements = np.frombuffer(taken(rows * columns), "u1").reshape(columns, rows)
        return cls(low, extent, percentiles, elements)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        columns, rows = self.elements.shape
        return rows, columns

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: NDArray[np.int64]) -> CompressedMatrix:
        """These rows, in this order."""
        return CompressedMatrix(self.low, self.extent, self.percentiles, self.elements[:, rows])

    def tobytes(self) -> bytes:
        """The binary form, from ``CM `` on."""
        header = _MARK + _HEADER.pack(self.low, self.extent, *self.shape)
        return header + self.percentiles.tobytes() + self.elements.tobytes()


def compressed_matrix_bytes(matrix: NDArray[np.float32]) -> bytes:
    """The binary form, from ``CM `` or ``CM2 `` on.

    Args:
        matrix: (rows, columns), neither 0, of finite elements.

    Raises:
        ValueError: an element that is not finite, or none at all (Kaldi reads an empty one wrongly).
    """
    values = np.asarray(matrix, np.float32)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("a matrix that is empty, or has elements that are not finite")
    low, high = np.float32(values.min()), np.float32(values.max())
    if high == low:
        high = np.float32(low + (np.float32(1) + abs(low)))
    extent = np.float32(high - low)
    header = _HEADER.pack(low, extent, *values.shape)
    if len(values) <= _FEW_ROWS:
        return b"CM2 " + header + _sixteen_bits(values, low, extent).astype("<u2").tobytes()
    ordered = np.sort(values, axis=0)
    quarter = len(values) // 4
    percentiles = _sixteen_bits(ordered[[0, quarter, 3 * quarter, -1]], low, extent)
    # Kept apart, so that no segment is empty.
    percentiles[0] = np.minimum(percentiles[0], 65532)
    percentiles[1] = np.clip(percentiles[1], percentiles[0] + 1, 65533)
    percentiles[2] = np.clip(percentiles[2], percentiles[1] + 1, 65534)
    percentiles[3] = np.maximum(percentiles[3], percentiles[2] + 1)
    bounds = low + (extent * _STEP) * percentiles.astype(np.float32)
    found = np.zeros(values.shape, np.int64)
    begins = (np.full(values.shape[1], -np.inf, np.float32), bounds[1], bounds[2])
    for (first, steps), begin, left, right in zip(_SEGMENTS, begins, bounds[:-1], bounds[1:], strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):  # so narrow a segment that float32 cannot tell its ends
            place = np.nan_to_num((values - left) / (right - left))
        scaled = (place * np.float32(steps)).astype(np.float64) + 0.5
        found = np.where(values >= begin, first + np.clip(scaled, 0, steps).astype(np.int64), found)
    return _MARK + header + percentiles.T.astype("<u2").tobytes() + found.T.astype("u1").tobytes()


def _sixteen_bits(values: NDArray[Any], low: np.float32, extent: np.float32) -> NDArray[np.int64]:
    place = np.clip((values - low) / extent, np.float32(0), np.float32(1))
    return ((place * np.float32(65535)).astype(np.float64) + _HALF).astype(np.int64)
