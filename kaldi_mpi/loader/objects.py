"""One matrix in a stream, binary or text: how long it is, and its way into the spool."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.stream import InputStream
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error
from kaldi_mpi.loader.spool import Spool

HEADER_BYTES = 2 + 4 + 16  # the longest header, of CM2 and CM3
TEXT_LIMIT = 1 << 30  # bytes; a text matrix of that size is none
MOST_BYTES = 1 << 40  # so that offsets stay far from the limits of 64 bits
_GZIP_MAGIC = b"\x1f\x8b"


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


def copy_object(stream: InputStream, spool: Spool, *, key: str, doubles: bool = False) -> int:
    """Copy the matrix at the stream's place to the spool; returns its byte offset there.

    Binary objects are copied byte for byte, text is parsed.

    Args:
        stream: stands at the ``\\0B``, or at the text.
        spool: takes it as a binary object.
        key: whose it is, for messages.
        doubles: text is stored as DM rather than FM.

    Raises:
        DataError: there is no matrix, or not all of it; names the stream, the key and the byte offset.
    """
    if stream.peek(2) == b"\0B":
        head = stream.peek(HEADER_BYTES)
        header = read_header(head, file=stream.name, key=key, offset=stream.at)
        return spool.add(stream.blocks(header.bytes), header.bytes, file=stream.name, key=key, offset=stream.at)
    return _copy_text(stream, spool, key=key, doubles=doubles)


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


def _copy_text(stream: InputStream, spool: Spool, *, key: str, doubles: bool) -> int:
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
    return add_full(spool, values, file=stream_name, key=key, offset=at)


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


def add_full(
    spool: Spool, values: np.ndarray[tuple[int, int], np.dtype[np.floating]], *, file: str, key: str, offset: int
) -> int:
    """Store a matrix of float32 or float64, (rows, cols), as FM or DM; returns its byte offset.

    Raises:
        DataError: the spool's disk is full.
    """
    token = b"FM " if values.dtype == np.float32 else b"DM "
    head = b"\0B" + token + struct.pack("<bibi", 4, values.shape[0], 4, values.shape[1])
    data = head + values.tobytes()
    return spool.add([data], len(data), file=file, key=key, offset=offset)
