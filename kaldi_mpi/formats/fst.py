"""OpenFst files of the tropical semiring, in memory: vector, const and compact_acceptor, binary and text.

Layouts are OpenFst's: vector (Kaldi's den.fst, phone LMs, lang directories), const (HCLG.fst) and
compact_acceptor (the supervision of chain examples). Numbers are little endian.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write

MAGIC = 2125659606
_HAS_SYMBOLS = 1 | 2  # flag bits: an input, an output symbol table follows the header
_IS_ALIGNED = 4
_ALIGNMENT = 16
# Property bits that hold for every FST of a type. Others are hints that OpenFst works out where they are missing.
_PROPERTIES = {"vector": 0x3, "compact_acceptor": 0x10001}  # expanded 1, mutable 2, acceptor 0x10000

_ARC = np.dtype([("ilabel", "<i4"), ("olabel", "<i4"), ("cost", "<f4"), ("next", "<i4")])
_VECTOR_STATE = struct.Struct("<fq")  # final cost, number of arcs
_CONST_STATE = np.dtype(
    [("final", "<f4"), ("first_arc", "<u4"), ("num_arcs", "<u4"), ("in_eps", "<u4"), ("out_eps", "<u4")]
)
_ELEMENT = np.dtype([("label", "<i4"), ("cost", "<f4"), ("next", "<i4")])
_FINAL = -1  # label and next state of the element that is a state's final cost
_SPARSE, _FEW = 10, 1000  # a text has fewer states than ten a line and a thousand: a wrong number must not fill memory


@dataclass(frozen=True, eq=False)
class Fst:
    """An FST over the tropical semiring; S states, N arcs, those of state s at first_arc[s] .. first_arc[s + 1] - 1."""

    start: int  # -1: empty
    finals: NDArray[np.float32]  # (S,) costs, inf: not final
    first_arc: NDArray[np.int64]  # (S + 1,)
    ilabels: NDArray[np.int32]  # (N,)
    olabels: NDArray[np.int32]  # (N,)
    costs: NDArray[np.float32]  # (N,)
    nexts: NDArray[np.int32]  # (N,)
    properties: int = 0  # the property bits of its file; 0: nothing is known

    @property
    def num_states(self) -> int:
        """S."""
        return len(self.finals)

    @property
    def num_arcs(self) -> int:
        """N."""
        return len(self.nexts)

    def sources(self) -> NDArray[np.int32]:
        """(N,) the state that each arc leaves."""
        return np.repeat(np.arange(self.num_states, dtype=np.int32), np.diff(self.first_arc))


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


def parse_fst(
    data: bytes | memoryview, offset: int = 0, *, file: str, key: str | None = None, whole: bool = False
) -> tuple[Fst, int]:
    """Read an FST at `offset` of `data`, of type vector, const or compact_acceptor with arc type standard.

    Args:
        data: a whole file or archive.
        offset: where the FST begins.
        file: named in errors.
        key: named in errors.
        whole: nothing may follow it.

    Returns:
        The FST and the offset of the first byte after it. A vector FST whose header does not know the number of
        states (-1: it was written to a pipe) reaches to the end of `data`.

    Raises:
        DataError: another type, truncated, or damaged: labels below 0, costs that are not numbers (+inf is one),
            arcs into states that are not there.
    """
    header = read_header(data, offset, file=file, key=key)
    parse = {"vector": _parse_vector, "const": _parse_const, "compact_acceptor": _parse_compact}.get(header.fst_type)
    source = _Source(data, file, key)
    if parse is None or header.arc_type != "standard":
        raise source.error(f"cannot read an FST of type {header.fst_type}, {header.arc_type}", offset)
    if header.version not in (1, 2) or (header.fst_type == "vector" and header.version == 1):
        raise source.error(f"cannot read version {header.version} of FST type {header.fst_type}", offset)
    fst, end = parse(source, header)
    if not -1 <= fst.start < fst.num_states:
        raise source.error(f"the FST starts in state {fst.start} of {fst.num_states}", header.end - 24)
    if whole and end != len(data):
        raise source.error(f"{len(data) - end} bytes too many after the FST", end)
    return fst, end


def read_fst(path: str | os.PathLike[str]) -> Fst:
    """Read a file that is one FST, as `parse_fst` does.

    Raises:
        DataError: no such file, or what `parse_fst` finds.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=str(path)) from error
    return parse_fst(data, file=str(path), whole=True)[0]


@dataclass(frozen=True)
class _Source:
    data: bytes | memoryview
    file: str
    key: str | None

    def error(self, cause: str, offset: int) -> DataError:
        return DataError(cause, file=self.file, key=self.key, offset=offset)

    def require(self, end: int) -> None:
        """The data reaches to `end`."""
        if end > len(self.data):
            raise self.error(f"truncated: {len(self.data)} bytes", len(self.data))

    def records(self, dtype: np.dtype[Any], at: int, count: int) -> NDArray[Any]:
        self.require(at + count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, at)


def _parse_vector(source: _Source, header: FstHeader) -> tuple[Fst, int]:
    data, at, known = source.data, header.end, header.num_states
    if known < -1:
        raise source.error(f"an FST of {known} states", header.end - 16)
    source.require(at + max(known, 0) * _VECTOR_STATE.size)
    finals: list[float] = []
    counts: list[int] = []
    pieces: list[bytes | memoryview] = []
    offsets: list[int] = []
    while len(finals) < known or (known == -1 and at < len(data)):
        source.require(at + _VECTOR_STATE.size)
        final, count = _VECTOR_STATE.unpack_from(data, at)
        if count < 0:
            raise source.error(f"state {len(finals)} has {count} arcs", at + 4)
        if math.isnan(final) or final == -math.inf:
            raise source.error(f"the final cost of state {len(finals)} is {final}", at)
        at += _VECTOR_STATE.size
        finals.append(final)
        counts.append(count)
        offsets.append(at)
        if count:
            source.require(at + count * _ARC.itemsize)
            pieces.append(data[at : at + count * _ARC.itemsize])
            at += count * _ARC.itemsize
    arcs = np.frombuffer(b"".join(pieces), _ARC)
    first_arc = _first_arc(counts)

    def arc_at(number: int) -> int:
        state = int(np.searchsorted(first_arc, number, side="right")) - 1
        return offsets[state] + (number - int(first_arc[state])) * _ARC.itemsize

    _check_arcs(source, arcs, len(finals), arc_at)
    return _fst(header, np.array(finals, np.float32), first_arc, arcs), at


def _parse_const(source: _Source, header: FstHeader) -> tuple[Fst, int]:
    if min(header.num_states, header.num_arcs) < 0:
        raise source.error(f"an FST of {header.num_states} states, {header.num_arcs} arcs", header.end - 16)
    states_at = _aligned(header.end, header)
    arcs_at = _aligned(states_at + header.num_states * _CONST_STATE.itemsize, header)
    end = arcs_at + header.num_arcs * _ARC.itemsize
    source.require(end)
    states = source.records(_CONST_STATE, states_at, header.num_states)
    first_arc = _first_arc(states["num_arcs"])
    wrong = np.flatnonzero(states["first_arc"] != first_arc[:-1])
    if len(wrong) or first_arc[-1] != header.num_arcs:
        state = int(wrong[0]) if len(wrong) else 0
        raise source.error("the states' arcs do not add up", states_at + state * _CONST_STATE.itemsize)
    wrong = np.flatnonzero(~(states["final"] > -np.inf))
    if len(wrong):
        offset = states_at + int(wrong[0]) * _CONST_STATE.itemsize
        raise source.error(f"the final cost of state {wrong[0]} is {states['final'][wrong[0]]}", offset)
    arcs = source.records(_ARC, arcs_at, header.num_arcs)
    _check_arcs(source, arcs, header.num_states, lambda number: arcs_at + number * _ARC.itemsize)
    return _fst(header, states["final"].astype(np.float32), first_arc, arcs), end


def _parse_compact(source: _Source, header: FstHeader) -> tuple[Fst, int]:
    count = header.num_states
    if count < 0:
        raise source.error(f"an FST of {count} states", header.end - 16)
    first_at = _aligned(header.end, header)
    first = source.records(np.dtype("<u4"), first_at, count + 1).astype(np.int64)
    wrong = np.flatnonzero(np.diff(first) < 0)
    if len(wrong) or first[0] != 0:
        state = int(wrong[0]) + 1 if len(wrong) else 0
        raise source.error(f"the arcs of state {state} begin before those of the one before", first_at + 4 * state)
    at = _aligned(first_at + 4 * (count + 1), header)
    elements = source.records(_ELEMENT, at, int(first[-1]))
    is_final = elements["label"] == _FINAL
    misplaced = is_final & (elements["next"] != _FINAL)
    begins = np.zeros(len(elements), bool)
    begins[first[:-1][np.diff(first) > 0]] = True
    wrong = np.flatnonzero(misplaced | (is_final & ~begins))
    if len(wrong):
        raise source.error("a final cost that is not the first of its state", at + int(wrong[0]) * _ELEMENT.itemsize)
    states = np.repeat(np.arange(count), np.diff(first))
    finals = np.full(count, np.inf, np.float32)
    finals[states[is_final]] = elements["cost"][is_final]
    wrong = np.flatnonzero(~(finals > -np.inf))
    if len(wrong):
        offset = at + int(first[wrong[0]]) * _ELEMENT.itemsize
        raise source.error(f"the final cost of state {wrong[0]} is {finals[wrong[0]]}", offset)
    arcs = np.empty(int((~is_final).sum()), _ARC)
    for name, column in (("ilabel", "label"), ("olabel", "label"), ("cost", "cost"), ("next", "next")):
        arcs[name] = elements[column][~is_final]
    if header.num_arcs != len(arcs):
        raise source.error(f"{len(arcs)} arcs, and the header says {header.num_arcs}", header.end - 8)
    numbers = np.flatnonzero(~is_final)
    _check_arcs(source, arcs, count, lambda number: at + int(numbers[number]) * _ELEMENT.itemsize)
    first_arc = _first_arc(np.bincount(states[~is_final], minlength=count))
    return _fst(header, finals, first_arc, arcs), at + len(elements) * _ELEMENT.itemsize


def _aligned(position: int, header: FstHeader) -> int:
    aligned = bool(header.flags & _IS_ALIGNED) or header.version == 1
    return -(-position // _ALIGNMENT) * _ALIGNMENT if aligned else position


def _first_arc(counts: NDArray[Any] | list[int]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _check_arcs(source: _Source, arcs: NDArray[Any], num_states: int, offset_of: Callable[[int], int]) -> None:
    fits = (arcs["next"] >= 0) & (arcs["next"] < num_states)
    for good, what in (
        (fits, "leads to state {next} of " + str(num_states)),
        ((arcs["ilabel"] >= 0) & (arcs["olabel"] >= 0), "has labels {ilabel}, {olabel}"),
        (arcs["cost"] > -np.inf, "costs {cost}"),
    ):
        wrong = np.flatnonzero(~good)
        if len(wrong):
            number = int(wrong[0])
            values = {name: arcs[number][name] for name in _ARC.names or ()}
            raise source.error(f"an arc {what.format(**values)}", offset_of(number))


def _fst(header: FstHeader, finals: NDArray[np.float32], first_arc: NDArray[np.int64], arcs: NDArray[Any]) -> Fst:
    return Fst(
        header.start,
        finals,
        first_arc,
        arcs["ilabel"].astype(np.int32),
        arcs["olabel"].astype(np.int32),
        arcs["cost"].astype(np.float32),
        arcs["next"].astype(np.int32),
        header.properties,
    )


def vector_header(arc_type: str, properties: int, start: int, num_states: int) -> bytes:
    """The header bytes of a vector FST without symbol tables."""
    # Kaldi writes 0 arcs there, as OpenFst does for this type: they are counted state by state.
    return _header_bytes("vector", arc_type, properties, start, num_states, 0)


def _header_bytes(fst_type: str, arc_type: str, properties: int, start: int, states: int, arcs: int) -> bytes:
    names = b"".join(struct.pack("<i", len(name)) + name for name in (fst_type.encode(), arc_type.encode("ascii")))
    return struct.pack("<i", MAGIC) + names + struct.pack("<iiQqqq", 2, 0, properties, start, states, arcs)


def vector_bytes(fst: Fst) -> bytes:
    """The bytes of a file of type vector."""
    properties = fst.properties | _PROPERTIES["vector"]
    pieces = [vector_header("standard", properties, fst.start, fst.num_states)]
    arcs = np.empty(fst.num_arcs, _ARC)
    arcs["ilabel"], arcs["olabel"], arcs["cost"], arcs["next"] = fst.ilabels, fst.olabels, fst.costs, fst.nexts
    data = arcs.tobytes()
    bounds = (fst.first_arc * _ARC.itemsize).tolist()
    counts = np.diff(fst.first_arc).tolist()
    for state, (final, count) in enumerate(zip(fst.finals.tolist(), counts, strict=True)):
        pieces.append(_VECTOR_STATE.pack(final, count))
        pieces.append(data[bounds[state] : bounds[state + 1]])
    return b"".join(pieces)


def compact_acceptor_bytes(fst: Fst) -> bytes:
    """The bytes of an FST of type compact_acceptor, as a chain example holds it; input labels are written."""
    final = fst.finals != np.inf
    counts = np.diff(fst.first_arc) + final
    first = _first_arc(counts)
    elements = np.empty(int(first[-1]), _ELEMENT)
    elements[first[:-1][final]] = np.array(
        [(_FINAL, cost, _FINAL) for cost in fst.finals[final].tolist()], dtype=_ELEMENT
    )
    # Arcs come after the final costs of their own and all earlier states.
    places = np.arange(fst.num_arcs) + np.cumsum(final)[fst.sources()]
    elements["label"][places], elements["cost"][places], elements["next"][places] = fst.ilabels, fst.costs, fst.nexts
    properties = fst.properties & ~2 | _PROPERTIES["compact_acceptor"]
    header = _header_bytes("compact_acceptor", "standard", properties, fst.start, fst.num_states, fst.num_arcs)
    return header + first.astype("<u4").tobytes() + elements.tobytes()


def write_fst(path: str | os.PathLike[str], fst: Fst) -> None:
    """Write a file of type vector.

    Raises:
        DataError: it cannot be written.
    """
    with atomic_write(path) as stream:
        stream.write(vector_bytes(fst))


def fst_text(fst: Fst, digits: int = 9) -> str:
    """Lines ``from to ilabel olabel [cost]`` and ``state [cost]``, separated by tabs, those of the start state first.

    Costs of 0 are left out. OpenFst's fstprint writes 9 significant digits, Kaldi's tables and examples 7.
    """
    if fst.start < 0:
        return ""
    lines = []
    bounds = fst.first_arc.tolist()
    columns = (fst.nexts.tolist(), fst.ilabels.tolist(), fst.olabels.tolist(), fst.costs.tolist())
    finals = fst.finals.tolist()

    def cost_text(cost: float) -> str:
        return "\tInfinity" if cost == math.inf else f"\t{cost:.{digits}g}" if cost else ""

    for state in (fst.start, *(state for state in range(fst.num_states) if state != fst.start)):
        for arc in range(bounds[state], bounds[state + 1]):
            to, ilabel, olabel, cost = (column[arc] for column in columns)
            lines.append(f"{state}\t{to}\t{ilabel}\t{olabel}{cost_text(cost)}\n")
        if finals[state] != math.inf or bounds[state] == bounds[state + 1]:
            # A state without anything would be lost: OpenFst names it with an infinite cost.
            lines.append(f"{state}{cost_text(finals[state])}\n")
    return "".join(lines)


def parse_fst_text(text: str, *, file: str, key: str | None = None) -> Fst:
    """Read the text form; the first line is of the start state, and states keep their numbers.

    Raises:
        DataError: a line that is neither an arc nor a final cost; names its number.
    """
    arcs: list[tuple[int, int, int, float, int]] = []
    finals: dict[int, float] = {}
    start, most = -1, -1
    lines = text.splitlines()
    limit = _SPARSE * len(lines) + _FEW
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        try:
            whole = [int(field) for field in fields[: 4 if len(fields) >= 4 else 1]]
            costs = [float(field) for field in fields[len(whole) :]]
        except ValueError:
            raise DataError(f"line {number} is no arc or final cost: {line[:60]!r}", file=file, key=key) from None
        cost = costs[0] if costs else 0.0
        states = whole[:2]
        wrong = len(costs) > 1 or min(whole) < 0 or max(whole) >= 2**31 or max(states) >= limit
        if wrong or not cost > -math.inf:
            raise DataError(f"line {number} is no arc or final cost: {line[:60]!r}", file=file, key=key)
        start = states[0] if start < 0 else start
        most = max(most, *states)
        if len(whole) == 1:
            finals[whole[0]] = cost
        else:
            arcs.append((whole[0], whole[2], whole[3], cost, whole[1]))
    return build_fst(start, most + 1, arcs, finals)


def build_fst(
    start: int, num_states: int, arcs: list[tuple[int, int, int, float, int]], finals: dict[int, float]
) -> Fst:
    """An FST from its arcs (from, ilabel, olabel, cost, to), in any order of states, and the costs of final states.

    Arcs of one state keep their order.
    """
    columns = list(zip(*arcs, strict=True)) or [()] * 5
    sources = np.array(columns[0], np.int64)
    order = np.argsort(sources, kind="stable")
    costs = np.full(num_states, np.inf, np.float32)
    costs[list(finals)] = list(finals.values())
    return Fst(
        start,
        costs,
        _first_arc(np.bincount(sources, minlength=num_states)),
        np.array(columns[1], np.int32)[order],
        np.array(columns[2], np.int32)[order],
        np.array(columns[3], np.float32)[order],
        np.array(columns[4], np.int32)[order],
    )
