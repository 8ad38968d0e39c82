"""Lattice archives (``lat.JOB.gz``): writing the wheels' raw lattices, reading raw and compact ones.

In an archive a lattice follows its key and one space, without Kaldi's binary mark: an OpenFst vector FST
whose arcs carry transition-id, word and the two costs (arc type ``lattice4``), or, as Kaldi's decoders
write it, word, word and the costs with a string of transition-ids (``compactlattice44``).
"""

from __future__ import annotations

import gzip
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import FstHeader, read_header
from kaldi_mpi.formats.lattice import COMPACT_TYPE, parse_compact_lattice

_RAW_TYPE = "lattice4"
_RAW_ARC = np.dtype([("ilabel", "<i4"), ("olabel", "<i4"), ("graph", "<f4"), ("acoustic", "<f4"), ("target", "<i4")])
_RAW_STATE = struct.Struct("<ffq")  # final costs, number of arcs


@dataclass(frozen=True)
class Lattice:
    """The arcs of an acyclic lattice; final costs are arcs without word into the state `num_states`.

    Attributes:
        start: first state; -1 if the lattice is empty.
        num_states: number of states, without the one that final arcs lead to.
        source: (A,) int32.
        target: (A,) int32.
        word: (A,) int32, 0 where an arc has no word.
        graph: (A,) float32, language-model and transition costs.
        acoustic: (A,) float32, acoustic costs, not scaled.
    """

    start: int
    num_states: int
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    word: NDArray[np.int32]
    graph: NDArray[np.float32]
    acoustic: NDArray[np.float32]


class LatticeWriter:
    """Writes an archive of raw lattices, gzipped if its name ends in ``.gz``; a context manager.

    The archive gets its name when it is complete.

    Raises:
        DataError: it cannot be written (disk full, no permission).
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._temporary = self._path.with_name(f".{self._path.name}.tmp")
        self._scratch = tempfile.TemporaryDirectory()
        self._file = f"{self._scratch.name}/lat"
        self._raw: IO[bytes] | None = None
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> LatticeWriter:
        try:
            self._raw = open(self._temporary, "wb")
        except OSError as error:
            raise self._error(error) from error
        self._stream = self._raw
        if self._path.suffix == ".gz":
            # Raw lattices are bulky; the lowest level does nearly all there is to gain.
            self._stream = gzip.GzipFile(  # type: ignore[assignment]
                filename="", mode="wb", fileobj=self._raw, mtime=0, compresslevel=1
            )
        return self

    def write(self, key: str, lattice: Any) -> None:
        """Append a ``kaldifst.Lattice``; its class writes files only, hence the detour."""
        assert self._stream is not None
        if not lattice.write(self._file):
            raise DataError("cannot write a lattice", file=self._file, key=key)
        try:
            self._stream.write(key.encode() + b" " + Path(self._file).read_bytes())
        except OSError as error:
            raise self._error(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scratch.cleanup()
        assert self._raw is not None and self._stream is not None
        try:
            self._stream.close()
            self._raw.close()
            if kind is None:
                self._temporary.replace(self._path)
        except OSError as failure:
            raise self._error(failure) from failure
        finally:
            self._temporary.unlink(missing_ok=True)

    def _error(self, error: OSError) -> DataError:
        return DataError(f"cannot write: {error.strerror or error}", file=str(self._path))


def read_lattices(path: str | Path) -> Iterator[tuple[str, Lattice]]:
    """Yield (key, lattice) of an archive, raw or compact, gzipped if its name ends in ``.gz``.

    Raises:
        DataError: no such file, truncated, or no archive of lattices; names the key and the byte offset.
    """
    file = str(path)
    try:
        data = Path(path).read_bytes()
        if file.endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read: {error}", file=file) from error
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 4096)
        if space <= at:
            raise DataError("no key of a lattice here", file=file, offset=at)
        key = data[at:space].decode("utf-8", "replace")
        header = read_header(data, space + 1, file=file, key=key)
        if header.fst_type != "vector" or header.arc_type not in (_RAW_TYPE, COMPACT_TYPE):
            raise DataError(f"not a lattice but {header.fst_type}, {header.arc_type}", file=file, key=key, offset=at)
        if header.arc_type == COMPACT_TYPE:
            lattice, at = _parse_compact(data, space + 1, file, key)
        else:
            try:
                lattice, at = _parse_raw(data, header)
            except (struct.error, ValueError) as error:
                raise DataError("the lattice is truncated or damaged", file=file, key=key, offset=at) from error
        yield key, lattice


def _parse_raw(data: bytes, header: FstHeader) -> tuple[Lattice, int]:
    at, counts, finals, pieces = header.end, [], [], []
    for state in range(header.num_states):
        graph, acoustic, count = _RAW_STATE.unpack_from(data, at)
        at += _RAW_STATE.size
        counts.append(count)
        if graph != np.inf:
            finals.append((state, header.num_states, 0, graph, acoustic))
        if count:
            end = at + count * _RAW_ARC.itemsize
            if count < 0 or end > len(data):
                raise ValueError("arcs beyond the end")
            pieces.append(data[at:end])
            at = end
    arcs = np.frombuffer(b"".join(pieces), _RAW_ARC)
    last = np.array(finals, dtype=np.float64).reshape(-1, 5)
    return _lattice(
        header,
        np.concatenate([np.repeat(np.arange(header.num_states), counts), last[:, 0]]),
        np.concatenate([arcs["target"], last[:, 1]]),
        np.concatenate([arcs["olabel"], last[:, 2]]),
        np.concatenate([arcs["graph"], last[:, 3]]),
        np.concatenate([arcs["acoustic"], last[:, 4]]),
    ), at


def _parse_compact(data: bytes, offset: int, file: str, key: str) -> tuple[Lattice, int]:
    found, end = parse_compact_lattice(data, offset, file=file, key=key)
    return Lattice(
        found.start, found.num_states, found.sources, found.nexts, found.labels, found.graph, found.acoustic
    ), end


def _lattice(header: FstHeader, *columns: NDArray[Any]) -> Lattice:
    source, target, word, graph, acoustic = columns
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) <= header.num_states:
        raise ValueError("an arc leads to a state that is not there")
    return Lattice(
        header.start,
        header.num_states,
        source.astype(np.int32),
        target.astype(np.int32),
        word.astype(np.int32),
        graph.astype(np.float32),
        acoustic.astype(np.float32),
    )
