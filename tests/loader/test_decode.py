"""Compressed columns decoded by tiles: the same floats, bit for bit, as one value at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kaldi_mpi.loader.native import ffi, lib
from tests.loader_data import decode, percentiles

Points = NDArray[np.uint16]


def decode_columns(
    codes: NDArray[np.uint8], points: Points, minimum: float, spread: float, first: int, count: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], bool]:
    """Some rows of codes (rows, cols): by the fast way, by the plain one, and whether all are finite."""
    rows, cols = codes.shape
    # A copy of exactly the bytes needed, so that a sanitizer sees any read beyond them.
    by_column = np.ascontiguousarray(codes.T).reshape(-1)[first : (cols - 1) * rows + first + count].copy()
    columns = ffi.new(
        "km_columns *",
        {
            "min": minimum,
            "range": spread,
            "percentiles": ffi.from_buffer("unsigned char[]", points),
            "codes": ffi.from_buffer("unsigned char[]", by_column),
            "stride": rows,
            "rows": count,
            "cols": cols,
        },
    )
    fast, plain = np.full((2, count, cols), 7.25, np.float32)
    finite = lib.km_decode_columns(columns, ffi.from_buffer("float[]", fast))
    assert finite == lib.km_decode_columns_plainly(columns, ffi.from_buffer("float[]", plain))
    return fast, plain, bool(finite)


def assert_same_bits(one: NDArray[np.float32], other: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 15, 16, 40, 43])
def test_every_size(cols: int) -> None:
    """All remainders of the tiles in both directions, at all places of the matrix."""
    rng = np.random.default_rng(cols)
    rows = 60
    codes = rng.integers(0, 256, (rows, cols)).astype(np.uint8)
    points = percentiles(cols)
    expected = decode(codes, "CM", -20.5, 41.25)
    for count in range(1, 40):
        for first in (0, 3, rows - count):
            fast, plain, finite = decode_columns(codes, points, -20.5, 41.25, first, count)
            assert finite
            assert_same_bits(fast, plain)
            assert_same_bits(fast, expected[first : first + count])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    minimum=st.floats(-(2.0**100), 2.0**100, width=32),
    spread=st.floats(-(2.0**100), 2.0**100, width=32),
    equal=st.sampled_from([0.0, 0.3, 1.0]),
)
@example(seed=1, minimum=0.0, spread=1e-38, equal=0.3)  # subnormal rises
@example(seed=2, minimum=1e-45, spread=1e-30, equal=0.0)
@example(seed=3, minimum=-50.0, spread=100.0, equal=0.3)
@example(seed=4, minimum=1.0, spread=0.0, equal=0.0)
def test_every_code_of_any_curve(seed: int, minimum: float, spread: float, equal: float) -> None:
    """`equal`: the share of percentiles that repeat the one before, as in columns that hardly vary."""
    rng = np.random.default_rng(seed)
    cols = 11
    points = np.sort(rng.integers(0, 65536, (cols, 4)), axis=1)
    for i in range(1, 4):
        points[:, i] = np.where(rng.random(cols) < equal, points[:, i - 1], points[:, i])
    codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], cols, axis=1)
    fast, plain, _ = decode_columns(codes, np.sort(points).astype(np.uint16), minimum, spread, 0, 256)
    assert_same_bits(fast, plain)


def test_values_that_overflow_are_told() -> None:
    """The range is finite, and the product of a difference and a code is not, as in Kaldi."""
    codes = np.full((20, 9), 10, np.uint8)
    points = np.tile(np.array([0, 65533, 65534, 65535], np.uint16), (9, 1))
    assert decode_columns(codes, points, 0.0, 1e37, 0, 20)[2]
    codes[17, 8] = 64
    fast, plain, finite = decode_columns(codes, points, 0.0, 1e37, 0, 20)
    assert not finite
    assert np.isinf(fast[17, 8])
    assert_same_bits(fast, plain)
