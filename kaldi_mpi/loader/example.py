"""nnet3 examples one by one, whole: every input and output, with its indexes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.example_text import parse_text_examples
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error
from kaldi_mpi.loader.nnet_io import Example, NnetIo, SparseRows

__all__ = ["Example", "NnetIo", "SparseRows", "key_at", "key_before", "read_examples"]

_BLOCK = 4 << 20
_MAX_KEY = 4096


def read_examples(path: str | os.PathLike[str]) -> Iterator[tuple[str, Example]]:
    """Go through an archive of nnet3 examples (``egs.1.ark``), binary or text; merged ones come as they are.

    At most a block of 4 MiB of a binary archive is in memory, or one example if that is larger; a text archive
    is read whole.

    Raises:
        DataError: it cannot be read or is malformed; names file, key and byte offset.
    """
    name = os.fspath(path)
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot open: {error.strerror or error}", file=name) from error
    try:
        window = _Window(name, descriptor)
        while window.at < window.size:
            key = window.key()
            if window.text():
                yield from parse_text_examples(name, os.pread(descriptor, window.size, 0), window.entry)
                return
            yield key, window.example(key)
    finally:
        os.close(descriptor)


class _Window:
    """The part of an archive that is in memory, and the place that has been reached."""

    def __init__(self, name: str, descriptor: int) -> None:
        self._name, self._descriptor = name, descriptor
        try:
            self.size = os.fstat(descriptor).st_size
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=name) from error
        self.entry = self.at = self._begin = 0
        self._data = b""

    def _load(self, begin: int, size: int) -> None:
        """Have `size` bytes from `begin` on in memory, or what there are to the end of the file."""
        wanted = min(size, self.size - begin)
        try:
            self._data = os.pread(self._descriptor, wanted, begin)
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=self._name, offset=begin) from error
        self._begin = begin
        if len(self._data) < wanted:
            raise DataError("the file has become shorter", file=self._name, offset=begin + len(self._data))

    def key(self) -> str:
        """The key of the next entry; moves on to what follows its space."""
        self.entry = self.at
        end = self._begin + len(self._data)
        if end - self.at < min(_MAX_KEY + 2, self.size - self.at):
            self._load(self.at, max(_BLOCK, _MAX_KEY + 2))
        head = self._data[self.at - self._begin : self.at - self._begin + _MAX_KEY]
        key = _printable_key(head)
        if key is None or head[len(key.encode()) : len(key.encode()) + 1] != b" ":
            raise DataError("a key and a space are expected here", file=self._name, offset=self.at)
        self.at += len(key.encode()) + 1
        return key

    def text(self) -> bool:
        """Whether an example in text stands after the key."""
        return self._data[self.at - self._begin : self.at - self._begin + 1] == b"<"

    def example(self, key: str) -> Example:
        """The example that stands here."""
        error = new_error()
        start = self.at
        while True:
            buffer = ffi.from_buffer("unsigned char[]", self._data)
            end = self._begin + len(self._data)
            cursor = ffi.new("km_cursor *", (buffer, self._begin, end, self.size, start, 0))
            example = _parse(cursor, error)
            if example is not None:
                self.at = cursor.at
                return example
            if not end < cursor.wanted <= self.size:
                raise_data_error(error, file=self._name, key=key)
            self._load(start, max(_BLOCK, cursor.wanted - start, 2 * (end - start)))


def _parse(cursor: Any, error: Any) -> Example | None:
    """The example at the cursor, or None with the error filled in."""
    count, io = ffi.new("int32_t *"), ffi.new("km_nnet_io *")
    if lib.km_example_open(cursor, count, error) != lib.KM_OK:
        return None
    ios = []
    for _ in range(count[0]):
        if lib.km_example_io(cursor, io, error) != lib.KM_OK:
            return None
        found = _decode(cursor, io, error)
        if found is None:
            return None
        ios.append(found)
    return None if lib.km_example_close(cursor, error) != lib.KM_OK else Example(ios)


def _decode(cursor: Any, io: Any, error: Any) -> NnetIo | None:
    indexes = np.empty((io.rows, 3), dtype=np.int32)
    lib.km_io_indexes(cursor, io, ffi.cast("km_index *", borrow(indexes, "int32_t", np.int32)))
    name = ffi.buffer(cursor.data + (io.name - cursor.begin), io.name_length)[:].decode("utf-8", "replace")
    if not io.sparse:
        dense = np.empty((io.rows, io.cols), dtype=np.float32)
        status = lib.km_io_matrix(cursor, io, borrow(dense, "float", np.float32), error)
        return None if status != lib.KM_OK else NnetIo(name, indexes, dense)
    sparse = SparseRows(
        int(io.cols),
        np.empty(io.rows + 1, dtype=np.int64),
        np.empty(io.pairs, dtype=np.int32),
        np.empty(io.pairs, dtype=np.float32),
    )
    lib.km_io_pairs(
        cursor,
        io,
        borrow(sparse.first, "int64_t", np.int64),
        borrow(sparse.columns, "int32_t", np.int32),
        borrow(sparse.values, "float", np.float32),
    )
    return NnetIo(name, indexes, sparse)


def _printable_key(head: bytes) -> str | None:
    """The key that some bytes begin with, if it is one that can be shown."""
    length = next((i for i, byte in enumerate(head) if byte <= 32 or byte == 127), len(head))
    try:
        return head[:length].decode("utf-8") or None
    except UnicodeDecodeError:
        return None


def key_at(path: str, offset: int) -> str | None:
    """The key at a byte of an archive, for messages; None where there is none to show."""
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            return _printable_key(stream.read(_MAX_KEY))
    except OSError:
        return None


def key_before(path: str, offset: int) -> str:
    """The key of the example whose ``\\0B`` stands at a byte of an archive, for messages."""
    start = max(0, offset - _MAX_KEY)
    try:
        with open(path, "rb") as stream:
            stream.seek(start)
            words = stream.read(offset - start).split()
    except OSError:
        words = []
    return words[-1].decode("utf-8", "replace") if words else "?"
