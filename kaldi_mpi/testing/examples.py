"""nnet3 examples one by one, whole, binary or in text: what the loader's way of reading them is checked with.

The loader itself decodes single chunks of examples, in C (see `kaldi_mpi.loader.Examples`).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.egs_index import MAX_KEY, printable_key
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error

_BLOCK = 4 << 20
_WORD = re.compile(rb"\S+")


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
                yield from _text_examples(name, os.pread(descriptor, window.size, 0), window.entry)
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
        if end - self.at < min(MAX_KEY + 2, self.size - self.at):
            self._load(self.at, max(_BLOCK, MAX_KEY + 2))
        head = self._data[self.at - self._begin : self.at - self._begin + MAX_KEY]
        key = printable_key(head)
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


def _text_examples(name: str, data: bytes, at: int) -> Iterator[tuple[str, Example]]:
    """Go through a text archive from byte `at` on.

    Args:
        name: the file, for messages.
        data: all of it.
        at: where the next key stands.

    Raises:
        DataError: malformed; names file, key and byte offset.
    """
    words = _Words(name, data, at)
    while words.more():
        words.key = None
        words.key = words.take("a key").decode("utf-8", "replace")
        words.expect(b"<Nnet3Eg>", b"<NumIo>")
        count = words.integer("the number of inputs and outputs", 1)
        ios = [_nnet_io(words) for _ in range(count)]
        words.expect(b"</Nnet3Eg>")
        yield words.key, Example(ios)


class _Words:
    """The words of a text archive, one after the other."""

    def __init__(self, name: str, data: bytes, at: int) -> None:
        self._name, self._data = name, data
        self._next = _WORD.search(data, at)
        self._last = at
        self.key: str | None = None

    def more(self) -> bool:
        return self._next is not None

    def error(self, cause: str) -> DataError:
        """An error about the word taken last."""
        return DataError(cause, file=self._name, key=self.key, offset=self._last)

    def take(self, what: str) -> bytes:
        found = self._next
        if found is None:
            self._last = len(self._data)
            raise self.error(f"truncated: the archive ends where {what} is expected")
        self._last = found.start()
        self._next = _WORD.search(self._data, found.end())
        return found.group()

    def peek(self) -> bytes:
        return self._next.group() if self._next is not None else b""

    def expect(self, *wanted: bytes) -> None:
        for word in wanted:
            if (found := self.take(word.decode())) != word:
                raise self.error(f"'{word.decode()}' is expected here, not '{found[:20].decode('utf-8', 'replace')}'")

    def integer(self, what: str, least: int, prefix: bytes = b"") -> int:
        word = self.take(what)
        if re.fullmatch(re.escape(prefix) + rb"-?[0-9]{1,10}", word):
            value = int(word[len(prefix) :])
            if least <= value < 2**31:
                return value
        raise self.error(f"{what} is expected here, not '{word[:20].decode('utf-8', 'replace')}'")

    def number(self) -> float:
        word = self.take("a number")
        try:
            value = float(word)
        except ValueError:
            raise self.error(f"a number is expected here, not '{word[:20].decode('utf-8', 'replace')}'") from None
        if not np.isfinite(np.float32(value)):
            raise self.error(f"not a finite number: {value}")
        return value


def _nnet_io(words: _Words) -> NnetIo:
    words.expect(b"<NnetIo>")
    name = words.take("a name").decode("utf-8", "replace")
    words.expect(b"<I1V>")
    count = words.integer("the number of indexes", 1)
    indexes = []
    for _ in range(count):
        words.expect(b"<I1>")
        indexes.append([words.integer(f"an index's {what}", -(2**31)) for what in ("n", "t", "x")])
    matrix = _sparse(words, count) if words.peek().startswith(b"rows=") else _full(words, count)
    words.expect(b"</NnetIo>")
    return NnetIo(name, np.array(indexes, dtype=np.int32), matrix)


def _full(words: _Words, rows: int) -> NDArray[np.float32]:
    words.expect(b"[")
    values = []
    while words.peek() != b"]":
        values.append(words.number())
    words.take("']'")
    if not values or len(values) % rows:
        raise words.error(f"{len(values)} values in a matrix for {rows} indexes")
    return np.array(values, dtype=np.float32).reshape(rows, -1)


def _sparse(words: _Words, rows: int) -> SparseRows:
    if words.integer("a number of rows", 0, b"rows=") != rows:
        raise words.error(f"a sparse matrix of another size for {rows} indexes")
    first, columns, values, dims = [0], [], [], set()
    for _ in range(rows):
        dim = words.integer("the dimension of a sparse row", 1, b"dim=")
        dims.add(dim)
        if len(dims) > 1:
            raise words.error(f"sparse rows of different dimensions: {sorted(dims)}")
        words.expect(b"[")
        while words.peek() != b"]":
            columns.append(words.integer("a column of a sparse row", 0))
            if columns[-1] >= dim:
                raise words.error(f"column {columns[-1]} of a sparse row of dimension {dim}")
            values.append(words.number())
        words.take("']'")
        first.append(len(columns))
    return SparseRows(
        dims.pop(),
        np.array(first, dtype=np.int64),
        np.array(columns, dtype=np.int32),
        np.array(values, dtype=np.float32),
    )
