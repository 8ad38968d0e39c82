"""OpenFst files: what the embedded wheels cannot read or write by themselves.

kaldifst reads and writes FSTs of type ``vector`` only, while Kaldi's graphs are of type ``const``; here a
const FST is rewritten as a vector FST with the same states, arcs and weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kaldi_mpi.embedded import wheels
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import parse_fst, read_header, vector_bytes


def const_to_vector(data: bytes, *, file: str) -> bytes:
    """Rewrite the bytes of a const FST (arc type standard) as those of a vector FST.

    Raises:
        DataError: another type, or the file is damaged or shorter than its header says.
    """
    header = read_header(data, file=file)
    if (header.fst_type, header.arc_type) != ("const", "standard"):
        raise DataError(f"cannot read an FST of type {header.fst_type}, {header.arc_type}", file=file)
    return vector_bytes(parse_fst(data, file=file)[0])


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
