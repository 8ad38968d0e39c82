"""The way from the C library's errors to Python's, and how arrays are lent to it."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader._csrc import ffi, lib

__all__ = ["borrow", "ffi", "lib", "new_error", "raise_data_error", "struct_dtype"]


def new_error() -> Any:
    """An empty ``km_error`` for a call into C."""
    return ffi.new("km_error *")


def raise_data_error(error: Any, *, file: str | None = None, key: str | None = None) -> NoReturn:
    """Raise what C has put into `error`.

    Raises:
        DataError: always; names `file` and `key` as given, and the byte offset where C knows one.
    """
    cause = ffi.string(error.cause).decode("utf-8", "replace")
    raise DataError(cause, file=file, key=key, offset=error.offset if error.offset >= 0 else None)


def borrow(array: NDArray[Any], ctype: str, dtype: type[np.generic]) -> Any:
    """A C array over the memory of a NumPy array; the array lives at least as long as the result.

    Args:
        array: C-contiguous, of exactly `dtype`.
        ctype: the element type in C, for example ``"int32_t"``.
        dtype: the same in NumPy.
    """
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise TypeError(f"{ctype} array expected, not {array.dtype} (or not contiguous)")
    return ffi.from_buffer(f"{ctype}[]", array)


def struct_dtype(name: str) -> np.dtype[np.void]:
    """The NumPy type of a C struct of plain numbers, for arrays of them; taken from the C declaration."""
    ctype = ffi.typeof(name)
    kinds = {"int32_t": np.int32, "int64_t": np.int64, "float": np.float32, "double": np.float64}
    fields = [(field, what.offset, kinds[what.type.cname]) for field, what in ctype.fields]
    names, offsets, formats = zip(*fields, strict=True)
    return np.dtype(
        {"names": list(names), "formats": list(formats), "offsets": list(offsets), "itemsize": ffi.sizeof(ctype)}
    )
