"""The archives that a corpus reads from: each opened once, and shared by all threads."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error


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
