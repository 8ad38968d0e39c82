"""Matrices that cannot be read at random where they come from, copied once to a temporary file.

What a command prints and what is written in text is read when a corpus is opened, by a few threads at a time, and
lies in the scratch file from then on as binary Kaldi objects, so that the C library reads it like any archive.
"""

from __future__ import annotations

import concurrent.futures
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.scp import Location
from kaldi_mpi.formats.stream import InputStream
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error
from kaldi_mpi.log import logger

HEADER_BYTES = 2 + 4 + 16  # the longest header, of CM2 and CM3
TEXT_LIMIT = 1 << 30  # bytes; a text matrix of that size is none
MOST_BYTES = 1 << 40  # so that offsets stay far from the limits of 64 bits
_GZIP_MAGIC = b"\x1f\x8b"
MOST_THREADS = 8
PATIENCE = 60.0  # seconds after which the log says what is waited for


class ScratchFile:
    """An unlinked temporary file, which the operating system removes with the last descriptor of it.

    Objects may be added by several threads at a time; their regions never overlap.

    Args:
        directory: where to put the file; by default TMPDIR, or what Python's tempfile takes without it.

    Attributes:
        directory: where it is.
        size: bytes in it.

    Raises:
        DataError: no file can be made there.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.size = 0
        self._lock = threading.Lock()
        try:
            self.directory = os.fspath(directory) if directory is not None else tempfile.gettempdir()
            self._fd, name = tempfile.mkstemp(prefix="kaldi_mpi-scratch-", dir=self.directory)
            os.unlink(name)
        except OSError as error:
            raise DataError(
                f"cannot make the temporary file for commands and text: {error.strerror or error}",
                file=os.fspath(directory) if directory is not None else None,
            ) from error

    def add(self, parts: Iterable[bytes], size: int, *, file: str, key: str, offset: int) -> int:
        """Write an object of `size` bytes; returns its byte offset.

        Args:
            parts: its bytes.
            size: how many they are.
            file: where they come from, for messages.
            key: whose they are, for messages.
            offset: byte offset of the object in `file`, for messages.

        Raises:
            DataError: the disk is full, or fails; or the parts are shorter: the object is truncated.
        """
        start = self._reserve(size)
        done = 0
        for part in parts:
            self._write(start + done, part, file=file, key=key)
            done += len(part)
        if done != size:
            self._give_back(start, size)
            cause = f"truncated: the matrix has {size} bytes, and {done} of them are there"
            raise DataError(cause, file=file, key=key, offset=offset)
        return start

    def _reserve(self, size: int) -> int:
        with self._lock:
            start = self.size
            self.size += size
        return start

    def _give_back(self, start: int, size: int) -> None:
        """Forget a region, if it is still the last one; else it stays as a hole, which takes no space."""
        with self._lock:
            if self.size == start + size:
                self.size = start

    def _write(self, at: int, data: bytes, *, file: str, key: str) -> None:
        view = memoryview(data)
        try:
            while len(view):
                done = os.pwrite(self._fd, view, at)
                view, at = view[done:], at + done
        except OSError as error:
            raise DataError(
                f"cannot write to the temporary file in {self.directory}, which is for {self.size} bytes of "
                f"commands' output and text: {error.strerror or error}; set TMPDIR to a directory with more space",
                file=file,
                key=key,
            ) from error

    def descriptor(self) -> int:
        """A descriptor of the file for the caller to own."""
        return os.dup(self._fd)

    def close(self) -> None:
        """Close this object's own descriptor; those given away stay open."""
        os.close(self._fd)


class Header(NamedTuple):
    """What precedes a binary matrix's values.

    Attributes:
        rows: of the matrix, > 0.
        cols: of the matrix, > 0.
        bytes: of the whole object, from its ``\\0B`` on.
    """

    rows: int
    cols: int
    bytes: int


def read_header(head: bytes, *, file: str, key: str, offset: int) -> Header:
    """The header of a binary matrix, given its first `HEADER_BYTES` bytes (or all that there are).

    Args:
        head: from the ``\\0B`` on.
        file: where it comes from, for messages.
        key: whose it is, for messages.
        offset: byte offset of the ``\\0B`` in `file`, for messages.

    Raises:
        DataError: an unknown token, a size that is none, or a header that is cut off.
    """

    def fail(cause: str, at: int) -> DataError:
        return DataError(cause, file=file, key=key, offset=offset + at)

    token = head[2:6].split(b" ")[0]
    at = 2 + len(token) + 1
    try:
        if token in (b"FM", b"DM"):
            size_byte, rows, other, cols = struct.unpack_from("<bibi", head, at)
            if (size_byte, other) != (4, 4):
                raise fail("a size byte of the matrix's numbers of rows and columns is not 4", at)
            per_value, per_column, at = (4 if token == b"FM" else 8), 0, at + 10
        elif token in (b"CM", b"CM2", b"CM3"):
            rows, cols = struct.unpack_from("<ii", head, at + 8)
            per_value, per_column, at = (2 if token == b"CM2" else 1), (8 if token == b"CM" else 0), at + 16
        elif len(head) < 6:
            raise fail("truncated: it ends in the header of a matrix", 0)
        else:
            raise fail(f"unknown token {ascii(token)[1:]}: FM, DM, CM, CM2 or CM3 expected", 2)
    except struct.error:
        raise fail("truncated: it ends in the header of a matrix", 0) from None
    if rows <= 0 or cols <= 0:
        raise fail(f"empty matrix or wrong size: {rows} rows, {cols} columns", at - 8)
    size = at + cols * per_column + rows * cols * per_value
    if size > MOST_BYTES:
        raise fail(f"wrong size: {rows} rows x {cols} columns are more than any matrix has", at - 8)
    return Header(rows, cols, size)


def copy_object(stream: InputStream, scratch: ScratchFile, *, key: str, doubles: bool = False) -> int:
    """Copy the matrix at the stream's place to the scratch file; returns its byte offset there.

    Binary objects are copied byte for byte, text is parsed.

    Args:
        stream: stands at the ``\\0B``, or at the text.
        scratch: takes it as a binary object.
        key: whose it is, for messages.
        doubles: text is stored as DM rather than FM.

    Raises:
        DataError: there is no matrix, or not all of it; names the stream, the key and the byte offset.
    """
    if stream.peek(2) == b"\0B":
        head = stream.peek(HEADER_BYTES)
        header = read_header(head, file=stream.name, key=key, offset=stream.at)
        return scratch.add(stream.blocks(header.bytes), header.bytes, file=stream.name, key=key, offset=stream.at)
    return _copy_text(stream, scratch, key=key, doubles=doubles)


def skip_object(stream: InputStream, *, key: str) -> None:
    """Go past the matrix at the stream's place.

    Raises:
        DataError: there is no matrix, or not all of it; names the stream, the key and the byte offset.
    """
    if stream.peek(2) != b"\0B":
        _text_object(stream, key=key)
        return
    start, size = stream.at, stream.size
    header = read_header(stream.peek(HEADER_BYTES), file=stream.name, key=key, offset=start)
    if size is not None:
        stream.skip(header.bytes)
        left = size - start
    else:
        left = sum(len(block) for block in stream.blocks(header.bytes))
    if left < header.bytes:
        raise DataError(
            f"truncated: a matrix of {header.rows} rows x {header.cols} columns takes {header.bytes} bytes, and "
            f"{left} are there",
            file=stream.name,
            key=key,
            offset=start,
        )


def _copy_text(stream: InputStream, scratch: ScratchFile, *, key: str, doubles: bool) -> int:
    data = _text_object(stream, key=key)
    at, stream_name = stream.at - len(data) - 1, stream.name
    text, error = ffi.from_buffer("unsigned char[]", data), new_error()
    rows, cols = ffi.new("int32_t *"), ffi.new("int32_t *")
    status = lib.km_text_matrix_size(text, len(data), rows, cols, error)
    if status == lib.KM_OK:
        values = np.empty((rows[0], cols[0]), dtype=np.float64 if doubles else np.float32)
        if doubles:
            status = lib.km_text_matrix_values(text, len(data), ffi.NULL, borrow(values, "double", np.float64), error)
        else:
            status = lib.km_text_matrix_values(text, len(data), borrow(values, "float", np.float32), ffi.NULL, error)
    if status != lib.KM_OK:
        error.offset += at
        raise_data_error(error, file=stream_name, key=key)
    return add_full(scratch, values, file=stream_name, key=key, offset=at)


def _text_object(stream: InputStream, *, key: str) -> bytes:
    """Take a matrix in text; returns what stands between the brackets."""

    def fail(cause: str) -> DataError:
        return DataError(cause, file=stream.name, key=key, offset=stream.at)

    while stream.peek(1).isspace():
        stream.read(1)
    first = stream.peek(2)
    if not first:
        raise fail("no matrix here: nothing follows")
    if first == _GZIP_MAGIC:
        raise fail(f"gzip data where a matrix is expected; Kaldi reads it by a command: gunzip -c {stream.name} |")
    if first[:1] != b"[":
        shown = ascii(stream.peek(20))[1:]
        raise fail(f"no matrix here: neither \\0B nor '[', but {shown}")
    stream.read(1)
    text = stream.until(b"]", TEXT_LIMIT)
    if text is None:
        raise fail(f"truncated: a matrix in text without its ']' (within {TEXT_LIMIT} bytes)")
    return text


def add_full(scratch: ScratchFile, values: NDArray[np.floating], *, file: str, key: str, offset: int) -> int:
    """Store a matrix of float32 or float64, (rows, cols), as FM or DM; returns its byte offset.

    Raises:
        DataError: its disk is full.
    """
    token = b"FM " if values.dtype == np.float32 else b"DM "
    head = b"\0B" + token + struct.pack("<bibi", 4, values.shape[0], 4, values.shape[1])
    data = head + values.tobytes()
    return scratch.add([data], len(data), file=file, key=key, offset=offset)


def run_commands(
    jobs: Mapping[str, tuple[Location, str]],
    read: Callable[[InputStream, str], int],
    *,
    named_in: str,
    threads: int | None = None,
) -> Iterator[tuple[str, int | DataError]]:
    """Read one object of each of some streams, several at a time.

    A command that prints more than the object is ended, as Kaldi ends it by closing the pipe. Where Kaldi
    only warns of a command that fails behind a whole object, it is an error here: gunzip tells of a wrong
    checksum in this way.

    Args:
        jobs: name -> (where to read, the key that needs it).
        read: takes the object from the stream; called by the threads, with stream and key.
        named_in: the script file, for messages.
        threads: how many; by default as many as there are cores, at most `MOST_THREADS`.

    Returns:
        (name, what `read` returned, or the error), in the order of the jobs. When the iteration is abandoned,
        the commands that still run are ended.
    """
    running = _Running(read, named_in)
    pool = ThreadPoolExecutor(threads or min(MOST_THREADS, len(os.sched_getaffinity(0))), "kaldi_mpi-commands")
    try:
        futures = {name: pool.submit(running.one, *job) for name, job in jobs.items()}
        for name, future in futures.items():
            yield name, _result(future, name)
    finally:
        running.abort()
        pool.shutdown(cancel_futures=True)


def _result(future: Future[int], name: str) -> int | DataError:
    while True:
        try:
            return future.result(timeout=PATIENCE)
        except DataError as error:
            return error
        except concurrent.futures.TimeoutError:
            logger.info("still waiting for '%s'", name)


class _Running:
    """The streams that are being read, so that they can be ended all at once."""

    def __init__(self, read: Callable[[InputStream, str], int], named_in: str) -> None:
        self._read, self._named_in = read, named_in
        self._lock = threading.Lock()
        self._streams: set[InputStream] = set()
        self._aborted = False

    def one(self, location: Location, key: str) -> int:
        try:
            with InputStream(location.path, offset=location.offset, key=key) as stream:
                with self._lock:
                    self._streams.add(stream)
                    if self._aborted:
                        stream.abort()
                try:
                    return self._object(stream, key)
                finally:
                    with self._lock:
                        self._streams.remove(stream)
        except DataError as error:
            cause = f"{error.cause} (named in {self._named_in})"
            raise DataError(cause, file=error.file, key=key, offset=error.offset) from error

    def _object(self, stream: InputStream, key: str) -> int:
        with stream.status_first():
            value = self._read(stream, key)
        if not stream.is_command:
            return value
        if stream.at_end():
            stream.check_status()
        else:
            logger.warning("%s, key %s: the command prints more than a matrix; the rest is not read", stream.name, key)
        return value

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            for stream in self._streams:
                stream.abort()
