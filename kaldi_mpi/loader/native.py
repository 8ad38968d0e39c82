"""The C library seen from Python: its errors, and the arrays and archives that are lent to it."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader._csrc import ffi, lib

__all__ = ["Archives", "borrow", "byte_ranges", "ffi", "lib", "new_error", "raise_data_error", "struct_dtype"]


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


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


class Archives:
    """Opened archive files; closed when the object is collected.

    Attributes:
        paths: the archives, in the order of their indices.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._index: dict[str, int] = {}
        self._files: list[Any] = []
        self._descriptors: list[int] = []
        weakref.finalize(self, _close_all, self._descriptors)

    def open(self, path: str, *, named_in: str, key: str) -> int:
        """The index of the archive `path`, opening it if it is new.

        Raises:
            DataError: it cannot be opened or is not a regular file; names it, the key and where it was named.
        """
        index = self._index.get(path)
        if index is not None:
            return index
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            cause = f"cannot open: {error.strerror or error} (named in {named_in})"
            if error.errno == errno.EMFILE:
                cause += f"; {len(self.paths)} archives are open, raise the limit with ulimit -n"
            raise DataError(cause, file=path, key=key) from error
        except ValueError as error:  # a NUL byte in the name
            raise DataError(f"cannot open: {error} (named in {named_in})", file=path, key=key) from error
        self._descriptors.append(descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"not a regular file (named in {named_in})", file=path, key=key)
        index = len(self.paths)
        self.paths.append(path)
        self._index[path] = index
        self._files.append(ffi.new("km_file *", {"fd": descriptor, "size": status.st_size}))
        return index

    def adopt(self, name: str, descriptor: int) -> int:
        """The index of a file that is open already and is ours from now on; it has no bytes until `resize`."""
        self._descriptors.append(descriptor)
        index = len(self.paths)
        self.paths.append(name)
        self._files.append(ffi.new("km_file *", {"fd": descriptor, "size": 0}))
        return index

    def alias(self, path: str, index: int) -> None:
        """Have `open` find archive `index` by another name as well."""
        self._index[path] = index

    def resize(self, index: int, size: int) -> None:
        """Set the size of an adopted file, in bytes, when more has been written to it."""
        self._files[index].size = size

    def peek(self, index: int, offset: int, count: int) -> bytes:
        """Some bytes of archive `index`; fewer where it ends or cannot be read."""
        try:
            return os.pread(self._files[index].fd, count, offset)
        except OSError:  # what is read in earnest at this place will say so
            return b""

    def block(self, index: int, matrix: Any, block: Any, values: NDArray[np.float32], *, key: str) -> None:
        """Decode the ``km_block *`` of a matrix to (rows, cols) floats.

        Raises:
            DataError: the file cannot be read, or a value is not finite.
        """
        error, out = new_error(), borrow(values.reshape(-1), "float", np.float32)
        if lib.km_matrix_block(self._files[index], matrix, block, out, error) != lib.KM_OK:
            raise_data_error(error, file=self.paths[index], key=key)

    def open_matrix(self, index: int, offset: int, matrix: Any, *, key: str) -> None:
        """Read the matrix header at `offset` of archive `index` into the ``km_matrix *`` given.

        Raises:
            DataError: there is no matrix of a known kind, or the archive ends before it does.
        """
        error = new_error()
        if lib.km_matrix_open(self._files[index], offset, matrix, error) != lib.KM_OK:
            raise_data_error(error, file=self.paths[index], key=key)

    def doubles(self, index: int, matrix: Any, *, key: str) -> NDArray[np.float64]:
        """All values of a full matrix (DM or FM), (rows, cols).

        Raises:
            DataError: the matrix is compressed, or the file cannot be read.
        """
        values = np.empty((matrix.rows, matrix.cols), dtype=np.float64)
        error = new_error()
        if lib.km_matrix_doubles(self._files[index], matrix, borrow(values, "double", np.float64), error):
            raise_data_error(error, file=self.paths[index], key=key)
        return values

    def table(self) -> Any:
        """The opened files as a C array of ``km_file``, valid for as long as this object lives."""
        table = ffi.new("km_file[]", max(1, len(self._files)))
        for index, file in enumerate(self._files):
            table[index] = file[0]
        return table


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
