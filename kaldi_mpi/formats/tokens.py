"""Kaldi's basic encodings, binary and text: tokens, numbers, vectors and matrices.

Binary (little endian): a token is followed by one space; a number by its size in bytes (one byte) first;
``FV``/``DV`` and ``FM``/``DM`` are float and double vectors and matrices. Text: everything is separated by white
space, floats have 7 significant digits.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write

_SPACES = re.compile(rb"\s*")
_WORD = re.compile(rb"\s*(\S+)\s?")
_LONGEST_TOKEN = 200
_DTYPES: dict[str, np.dtype[Any]] = {"F": np.dtype("<f4"), "D": np.dtype("<f8")}

FloatArray = NDArray[np.float32]


class Reader:
    """Reads Kaldi objects out of a file held in memory.

    Args:
        path: the file; whether it is binary is seen from its first two bytes.

    Raises (all methods):
        DataError: naming the file and the byte offset at which the malformed item begins.
    """

    def __init__(self, path: str | os.PathLike[str], data: bytes | None = None) -> None:
        self.file = str(path)
        if data is None:
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise DataError(f"cannot read: {error.strerror or error}", file=self.file) from error
        self.data = data
        self.binary = data[:2] == b"\0B"
        self.position = 2 if self.binary else 0
        self.key: str | None = None

    def error(self, cause: str, offset: int | None = None) -> DataError:
        return DataError(cause, file=self.file, key=self.key, offset=self.position if offset is None else offset)

    def token(self) -> str:
        """The next token."""
        match = _WORD.match(self.data, self.position, self.position + 4 * _LONGEST_TOKEN)
        word = match.group(1) if match else b""
        if not match or not word.isascii() or len(word) > _LONGEST_TOKEN:
            cause = "token expected" if self.position < len(self.data) else "file ends where a token is expected"
            raise self.error(cause)
        if self.binary and (match.start(1) != self.position or match.end() == match.end(1)):
            raise self.error(f"token expected, found {word[:20]!r}")
        self.position = match.end()
        return word.decode("ascii")

    def peek(self) -> str:
        """The next token, left where it is; '' if there is none."""
        before = self.position
        try:
            return self.token()
        except DataError:
            return ""
        finally:
            self.position = before

    def expect(self, *wanted: str) -> str:
        """The next token, which must be one of `wanted`."""
        before = self.position
        found = self.token()
        if found not in wanted:
            raise self.error(f"{' or '.join(wanted)} expected, found {found[:40]}", before)
        return found

    def accept(self, token: str) -> bool:
        """Take the next token if it is `token`."""
        if self.peek() != token:
            return False
        self.token()
        return True

    def line(self) -> str:
        """The rest of the line, as in the config section of a network, without its end."""
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise self.error("file ends in the middle of a line")
        try:
            text = self.data[self.position : end].decode("utf-8").rstrip("\r")
        except UnicodeDecodeError:
            raise self.error("config line is not text") from None
        self.position = end + 1
        return text

    def _take(self, size: int) -> bytes:
        if size < 0 or self.position + size > len(self.data):
            raise self.error(f"file ends: {size} bytes expected, {len(self.data) - self.position} left")
        self.position += size
        return self.data[self.position - size : self.position]

    def _word(self) -> bytes:
        match = _WORD.match(self.data, self.position)
        if not match:
            raise self.error("file ends where a number is expected")
        self.position = match.end()
        return match.group(1)

    def integer(self) -> int:
        """An int32."""
        before = self.position
        if self.binary:
            size = self._take(1)
            if size != b"\4":
                raise self.error(f"int32 expected, found size byte {size[0]}", before)
            return int(struct.unpack("<i", self._take(4))[0])
        return self._int(self._word(), before)

    def number(self) -> float:
        """A float or double; binary files may have either."""
        before = self.position
        if self.binary:
            size = self._take(1)
            if size not in (b"\4", b"\10"):
                raise self.error(f"float expected, found size byte {size[0]}", before)
            return float(struct.unpack("<f" if size == b"\4" else "<d", self._take(size[0]))[0])
        word = self._word()
        try:
            return float(word)
        except ValueError:
            raise self.error(f"number expected, found {word[:40]!r}", before) from None

    def boolean(self) -> bool:
        """``T`` or ``F``."""
        before = self.position
        word = self._take(1) if self.binary else self._word()
        if word not in (b"T", b"F"):
            raise self.error(f"T or F expected, found {word[:40]!r}", before)
        return word == b"T"

    def integers(self, width: int = 1) -> list[int]:
        """A vector of int32, or of tuples of `width` of them, flat."""
        before = self.position
        if not self.binary:
            return [self._int(word, before) for word in self._bracketed().replace(b",", b" ").split()]
        if self._take(1) != b"\4":
            raise self.error("vector of int32 expected", before)
        count = struct.unpack("<i", self._take(4))[0]
        if count < 0:
            raise self.error(f"vector of {count} elements", before)
        return [int(value) for value in np.frombuffer(self._take(4 * width * count), dtype="<i4")]

    def _int(self, word: bytes, before: int) -> int:
        try:
            value = int(word)
        except ValueError:
            raise self.error(f"integer expected, found {word[:40]!r}", before) from None
        if not -(2**31) <= value < 2**31:
            raise self.error(f"integer {value} has more than 32 bits", before)
        return value

    def vector(self, double: bool = False) -> NDArray[Any]:
        """A vector, as float32, or float64 if `double` (of a binary file that has it so)."""
        before = self.position
        if not self.binary:
            return self._floats(self._bracketed(), before)
        kind = self.token()
        if kind not in ("FV", "DV"):
            raise self.error(f"vector expected, found {kind[:40]}", before)
        dtype = _DTYPES[kind[0]]
        dim = self.integer()
        if dim < 0:
            raise self.error(f"vector of {dim} elements", before)
        return np.frombuffer(self._take(dim * dtype.itemsize), dtype).astype(np.float64 if double else np.float32)

    def matrix(self, double: bool = False) -> NDArray[Any]:
        """A matrix (rows, columns), as float32, or float64 if `double`; no compressed ones are expected here."""
        before = self.position
        if not self.binary:
            rows = [row for row in self._bracketed().split(b"\n") if row.strip()]
            if not rows:
                return np.zeros((0, 0), dtype=np.float32)
            values = [self._floats(row, before) for row in rows]
            if any(len(value) != len(values[0]) for value in values):
                raise self.error("matrix with rows of different lengths", before)
            return np.stack(values)
        kind = self.token()
        if kind not in ("FM", "DM"):
            raise self.error(f"matrix expected, found {kind[:40]}", before)
        dtype = _DTYPES[kind[0]]
        shape = self.integer(), self.integer()
        if min(shape) < 0:
            raise self.error(f"matrix of shape {shape}", before)
        raw = self._take(shape[0] * shape[1] * dtype.itemsize)
        return np.frombuffer(raw, dtype).astype(np.float64 if double else np.float32).reshape(shape)

    def _bracketed(self) -> bytes:
        """What stands between ``[`` and ``]`` in a text file."""
        before = self.position
        begin = _SPACES.match(self.data, self.position)
        assert begin is not None
        end = self.data.find(b"]", begin.end())
        if self.data[begin.end() : begin.end() + 1] != b"[":
            raise self.error("[ expected", before)
        if end < 0:
            raise self.error("] is missing", before)
        spaces = _SPACES.match(self.data, end + 1)
        assert spaces is not None
        self.position = spaces.end()
        return self.data[begin.end() + 1 : end]

    def _floats(self, text: bytes, before: int) -> FloatArray:
        try:
            return np.array([float(word) for word in text.split()], dtype=np.float64).astype(np.float32)
        except ValueError as error:
            raise self.error(str(error), before) from None


def _text(value: float) -> bytes:
    return b"%.7g" % value


class Writer:
    """Writes Kaldi objects to a stream; begins with the mark of a binary file if `binary`."""

    def __init__(self, stream: IO[bytes], binary: bool = True) -> None:
        self.stream, self.binary = stream, binary
        if binary:
            stream.write(b"\0B")

    def token(self, token: str) -> None:
        self.stream.write(token.encode("ascii") + b" ")

    def newline(self) -> None:
        """A line end, in text only."""
        if not self.binary:
            self.stream.write(b"\n")

    def line(self, text: str) -> None:
        """A line, in both modes."""
        self.stream.write(text.encode("utf-8") + b"\n")

    def integer(self, value: int) -> None:
        self.stream.write(struct.pack("<bi", 4, value) if self.binary else b"%d " % value)

    def number(self, value: float) -> None:
        """A float32."""
        text = _text(float(np.float32(value))) + b" "
        self.stream.write(struct.pack("<bf", 4, value) if self.binary else text)

    def double(self, value: float) -> None:
        self.stream.write(struct.pack("<bd", 8, value) if self.binary else _text(value) + b" ")

    def boolean(self, value: bool) -> None:
        self.stream.write((b"T" if value else b"F") + (b"" if self.binary else b" "))

    def integers(self, values: list[int], width: int = 1) -> None:
        if self.binary:
            count = len(values) // width
            self.stream.write(struct.pack("<bi", 4, count) + np.array(values, "<i4").tobytes())
            return
        groups = (values[begin : begin + width] for begin in range(0, len(values), width))
        self.stream.write(b"[ " + b"".join(b",".join(b"%d" % v for v in group) + b" " for group in groups))
        self.stream.write(b"]\n")

    def vector(self, values: NDArray[Any], double: bool = False) -> None:
        array = np.asarray(values, dtype="<f8" if double else "<f4")
        if self.binary:
            self.stream.write((b"DV " if double else b"FV ") + struct.pack("<bi", 4, len(array)) + array.tobytes())
        else:
            self.stream.write(b" [ " + b"".join(_text(value) + b" " for value in array.tolist()) + b"]\n")

    def matrix(self, values: NDArray[Any], double: bool = False) -> None:
        array = np.asarray(values, dtype="<f8" if double else "<f4")
        if self.binary:
            self.stream.write(
                (b"DM " if double else b"FM ") + struct.pack("<bibi", 4, array.shape[0], 4, array.shape[1])
            )
            self.stream.write(array.tobytes())
            return
        if not array.size:
            self.stream.write(b" [ ]\n")
            return
        self.stream.write(b" [")
        for row in array.tolist():
            self.stream.write(b"\n  " + b"".join(_text(value) + b" " for value in row))
        self.stream.write(b"]\n")


def read_matrix(path: str | os.PathLike[str]) -> FloatArray:
    """A matrix from a file of its own, for example lda.mat.

    Raises:
        DataError: names the file and the byte offset.
    """
    return Reader(path).matrix()


def read_vector(path: str | os.PathLike[str]) -> FloatArray:
    """A vector from a file of its own, for example presoftmax_prior_scale.vec.

    Raises:
        DataError: names the file and the byte offset.
    """
    return Reader(path).vector()


def write_matrix(path: str | os.PathLike[str], matrix: NDArray[Any], binary: bool = True) -> None:
    """Write a matrix to a file of its own, for example lda.mat."""
    with atomic_write(path) as stream:
        Writer(stream, binary).matrix(matrix)
