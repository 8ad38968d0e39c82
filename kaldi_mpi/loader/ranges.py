"""Where in their archives the values of many matrices lie."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.loader.native import lib


def byte_ranges(
    matrices: NDArray[np.void], first_row: NDArray[np.int32], num_rows: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Byte offsets of the first value and behind the last one, for some rows of each matrix.

    Headers are not counted: they are in memory. Of a matrix that is stored row by row only the rows asked for
    count; CM is stored column by column, and counts whole, with its percentiles.

    Args:
        matrices: (n,) of km_matrix.
        first_row: (n,) the first row of each.
        num_rows: (n,) how many.
    """
    value_bytes = np.ones(lib.KM_ROWS8 + 1, dtype=np.int64)
    value_bytes[lib.KM_FLOAT], value_bytes[lib.KM_DOUBLE], value_bytes[lib.KM_ROWS16] = 4, 8, 2
    columns = matrices["cols"].astype(np.int64)
    row_bytes = columns * value_bytes[matrices["kind"]]
    by_column = matrices["kind"] == lib.KM_COLUMNS8
    begin = matrices["data"] + np.where(by_column, 0, first_row * row_bytes)
    size = np.where(by_column, 8 * columns + matrices["rows"] * row_bytes, num_rows * row_bytes)
    return begin, begin + size
