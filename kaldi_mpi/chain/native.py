"""The C of the objective seen from Python: its memory is lent to it, its errors become ours."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.chain._csrc import ffi, lib

__all__ = ["Memory", "array", "each_range", "ffi", "lib", "number_of_threads", "numbers"]

_C_TYPES = {
    torch.float32: "float *", torch.float64: "double *", torch.int32: "int32_t *", torch.int64: "int64_t *",
}  # fmt: skip
_C_OF = {"f4": "float[]", "f8": "double[]", "i4": "int32_t[]", "i8": "int64_t[]"}


def array(values: NDArray[Any]) -> Any:
    """A C array over the memory of a NumPy array, which must live as long as that is used.

    Raises:
        TypeError: it is not contiguous, or not of 32 or 64 bits.
    """
    if not values.flags.c_contiguous or values.dtype.str[1:] not in _C_OF:
        raise TypeError(f"contiguous array of numbers expected, not {values.dtype}")
    return ffi.from_buffer(_C_OF[values.dtype.str[1:]], values)


def numbers(tensor: Tensor | None) -> Any:
    """The address of a tensor's first number, of its type in C; NULL for None."""
    return ffi.NULL if tensor is None else ffi.cast(_C_TYPES[tensor.dtype], tensor.data_ptr())


class Memory:
    """What calls into C work in, kept from one call to the next: a large one would be cleared anew each time.

    Args:
        dtype: of its numbers.
    """

    def __init__(self, dtype: type[np.float32] | type[np.float64]) -> None:
        self._dtype = np.dtype(dtype)
        self._free: list[NDArray[Any]] = []

    def take(self, size: int) -> NDArray[Any]:
        """At least `size` numbers of any value, until they are given back. Begins on a line of the cache."""
        while self._free:
            kept = self._free.pop()
            if len(kept) >= size:
                return kept
        line = 64 // self._dtype.itemsize
        whole = np.empty(size + line, dtype=self._dtype)
        begin = -(whole.ctypes.data // self._dtype.itemsize) % line
        return whole[begin : begin + size]

    def give_back(self, values: NDArray[Any]) -> None:
        """Have the next `take` find it."""
        self._free.append(values)


def number_of_threads(parts: int) -> int:
    """How many threads so many independent parts are given: as many as the learner has for PyTorch."""
    return max(1, min(torch.get_num_threads(), parts))


def each_range(parts: int, work: Callable[[int, int], None]) -> None:
    """Call `work(begin, end)` for consecutive ranges that cover 0 .. parts - 1, on the learner's threads.

    What an exception of `work` says is raised here.
    """
    threads = number_of_threads(parts)
    if threads == 1:
        work(0, parts)
        return
    bounds = [parts * number // threads for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, bounds[:-1], bounds[1:]):
            pass
