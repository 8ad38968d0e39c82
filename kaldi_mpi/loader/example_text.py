"""nnet3 examples in text, as ``nnet3-copy-egs ark:... ark,t:...`` writes them: for looking at, not for training."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.nnet_io import Example, NnetIo, SparseRows

_WORD = re.compile(rb"\S+")


def parse_text_examples(name: str, data: bytes, at: int) -> Iterator[tuple[str, Example]]:
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
