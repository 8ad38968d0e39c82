"""OpenFst files: what the embedded wheels cannot read or write by themselves.

kaldifst reads and writes FSTs of type ``vector`` only, while Kaldi's graphs are of type ``const``; here a
const FST is rewritten as a vector FST with the same states, arcs and weights.
"""

from __future__ import annotations

import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kaldi_mpi.embedded import wheels
from kaldi_mpi.errors import DataError

MAGIC = 2125659606
_HAS_SYMBOLS = 1 | 2  # flag bits: an input, an output symbol table follows the header
_IS_ALIGNED = 4
_ALIGNMENT = 16
_EXPANDED_AND_MUTABLE = 3  # property bits that every vector FST has

_CONST_STATE = np.dtype(
    [("final", "<f4"), ("first_arc", "<u4"), ("num_arcs", "<u4"), ("in_eps", "<u4"), ("out_eps", "<u4")]
)
_STANDARD_ARC_BYTES = 16


@dataclass(frozen=True)
class FstHeader:
    """The header of an OpenFst file; `end` is the offset of the first byte after it."""

    fst_type: str
    arc_type: str
    version: int
    flags: int
    properties: int
    start: int
    num_states: int
    num_arcs: int
    end: int


def read_header(data: bytes | memoryview, offset: int = 0, *, file: str, key: str | None = None) -> FstHeader:
    """Read the header at `offset` of `data`.

    Args:
        data: a whole file or archive.
        offset: where the FST begins.
        file: named in errors.
        key: named in errors.

    Raises:
        DataError: no OpenFst magic number there, the data ends, or symbol tables are stored with the FST.
    """
    try:
        (magic,) = struct.unpack_from("<i", data, offset)
        if magic != MAGIC:
            raise DataError("not an OpenFst file (bad magic number)", file=file, key=key, offset=offset)
        at = offset + 4
        strings = []
        for _ in range(2):
            (length,) = struct.unpack_from("<i", data, at)
            if not 0 <= length <= 64:
                raise DataError("not an OpenFst file (bad type name)", file=file, key=key, offset=at)
            strings.append(bytes(data[at + 4 : at + 4 + length]).decode("ascii", "replace"))
            at += 4 + length
        version, flags, properties, start, num_states, num_arcs = struct.unpack_from("<iiQqqq", data, at)
    except struct.error as error:
        raise DataError("the file ends inside an FST header", file=file, key=key, offset=offset) from error
    if flags & _HAS_SYMBOLS:
        raise DataError("symbol tables inside an FST are not supported", file=file, key=key, offset=offset)
    return FstHeader(strings[0], strings[1], version, flags, properties, start, num_states, num_arcs, at + 40)


def vector_header(arc_type: str, properties: int, start: int, num_states: int) -> bytes:
    """The header bytes of a vector FST without symbol tables."""
    names = b"".join(struct.pack("<i", len(name)) + name for name in (b"vector", arc_type.encode("ascii")))
    return struct.pack("<i", MAGIC) + names + struct.pack("<iiQqqq", 2, 0, properties, start, num_states, 0)


def const_to_vector(data: bytes, *, file: str) -> bytes:
    """Rewrite the bytes of a const FST (arc type standard) as those of a vector FST.

    Raises:
        DataError: another type, or the file is shorter than its header says.
    """
    header = read_header(data, file=file)
    if (header.fst_type, header.arc_type) != ("const", "standard"):
        raise DataError(f"cannot read an FST of type {header.fst_type}, {header.arc_type}", file=file)
    aligned = bool(header.flags & _IS_ALIGNED) or header.version == 1

    def align(position: int) -> int:
        return -(-position // _ALIGNMENT) * _ALIGNMENT if aligned else position

    states_at = align(header.end)
    arcs_at = align(states_at + header.num_states * _CONST_STATE.itemsize)
    if len(data) < arcs_at + header.num_arcs * _STANDARD_ARC_BYTES:
        raise DataError(f"truncated: {len(data)} bytes", file=file, offset=len(data))
    states = np.frombuffer(data, _CONST_STATE, header.num_states, states_at)
    pieces = [vector_header("standard", header.properties | _EXPANDED_AND_MUTABLE, header.start, header.num_states)]
    for final, first, count in zip(
        states["final"].tolist(), states["first_arc"].tolist(), states["num_arcs"].tolist(), strict=True
    ):
        begin = arcs_at + first * _STANDARD_ARC_BYTES
        pieces.append(struct.pack("<fq", final, count))
        pieces.append(data[begin : begin + count * _STANDARD_ARC_BYTES])
    return b"".join(pieces)


def read_fst(path: str | Path) -> Any:
    """Read an FST of type vector or const (arc type standard) as a ``kaldifst.StdVectorFst``.

    Raises:
        DataError: no such file, not an FST, or truncated.
    """
    kaldifst = wheels.load().kaldifst
    file = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=file) from error
    header = read_header(data, file=file)
    if header.fst_type == "const":
        with tempfile.NamedTemporaryFile(suffix=".fst") as temporary:
            temporary.write(const_to_vector(data, file=file))
            temporary.flush()
            fst = kaldifst.StdVectorFst.read(temporary.name)
    elif (header.fst_type, header.arc_type) == ("vector", "standard"):
        fst = kaldifst.StdVectorFst.read(file)
    else:
        raise DataError(f"cannot read an FST of type {header.fst_type}, {header.arc_type}", file=file)
    if fst is None:
        raise DataError("truncated or damaged FST", file=file)
    return fst


def write_fst(fst: Any, path: str | Path) -> None:
    """Write an FST of the wheels under its final name only when it is complete.

    Raises:
        DataError: it could not be written.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.tmp")
    if not fst.write(str(temporary)):
        temporary.unlink(missing_ok=True)
        raise DataError("cannot write the FST (disk full or no permission?)", file=str(final))
    temporary.replace(final)
