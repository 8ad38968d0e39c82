"""Kaldi's compact lattices in memory: an arc has a word (or phone) and the transition-ids of its frames."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import read_header

COMPACT_TYPE = "compactlattice44"
_FINAL = struct.Struct("<ffi")  # graph and acoustic cost, number of transition-ids, which follow
_COUNT = struct.Struct("<q")
_ARC = struct.Struct("<iiffi")  # labels, costs, number of transition-ids; these and the next state follow


@dataclass(frozen=True, eq=False)
class CompactLattice:
    """N arcs between S states, which come first in the order of states; after them one for each final state.

    Attributes:
        start: -1 if it is empty.
        num_states: S; final arcs lead to the state S, which is in no file.
        sources, nexts: (N,) int32.
        labels: (N,) int32; 0 where an arc has none, as final ones.
        graph, acoustic: (N,) float32 costs; acoustic ones are not scaled.
        frames: (N,) int32, how many transition-ids.
    """

    start: int
    num_states: int
    sources: NDArray[np.int32]
    nexts: NDArray[np.int32]
    labels: NDArray[np.int32]
    graph: NDArray[np.float32]
    acoustic: NDArray[np.float32]
    frames: NDArray[np.int32]


def parse_compact_lattice(
    data: bytes | memoryview, offset: int = 0, *, file: str, key: str | None = None
) -> tuple[CompactLattice, int]:
    """Read the binary form at `offset` of `data`, as it follows the key and a space in an archive.

    Returns:
        The lattice, and the offset of the first byte after it.

    Raises:
        DataError: another type of FST, truncated or damaged.
    """

    def error(cause: str, at: int) -> DataError:
        return DataError(cause, file=file, key=key, offset=at)

    header = read_header(data, offset, file=file, key=key)
    if (header.fst_type, header.arc_type) != ("vector", COMPACT_TYPE):
        raise error(f"not a compact lattice but {header.fst_type}, {header.arc_type}", offset)
    states = header.num_states
    # Each state takes 20 bytes or more.
    if not 0 <= states <= (len(data) - header.end) // (_FINAL.size + _COUNT.size):
        raise error(f"truncated or damaged: {states} states are expected", len(data) if states > 0 else header.end - 16)
    if not -1 <= header.start < states:
        raise error(f"the lattice starts in state {header.start} of {states}", header.end - 24)
    at = header.end
    rows: list[tuple[int, int, int, float, float, int]] = []
    finals: list[tuple[int, int, int, float, float, int]] = []
    try:
        for state in range(states):
            graph, acoustic, length = _FINAL.unpack_from(data, at)
            if length < 0 or math.isnan(graph + acoustic):
                raise error(f"the final costs of state {state} are damaged", at)
            at += _FINAL.size + 4 * length
            if graph != math.inf:
                finals.append((state, states, 0, graph, acoustic, length))
            (count,) = _COUNT.unpack_from(data, at)
            if not 0 <= count <= (len(data) - at) // _ARC.size:
                raise error(f"state {state} has {count} arcs", at)
            at += _COUNT.size
            for _ in range(count):
                label, word, graph, acoustic, length = _ARC.unpack_from(data, at)
                if length < 0 or min(label, word) < 0 or math.isnan(graph + acoustic):
                    raise error(f"an arc of state {state} is damaged", at)
                begin, at = at, at + _ARC.size + 4 * length
                (to,) = struct.unpack_from("<i", data, at)
                if not 0 <= to < states:
                    raise error(f"an arc leads to state {to} of {states}", begin)
                at += 4
                rows.append((state, to, word, graph, acoustic, length))
    except struct.error:
        raise error(f"truncated or damaged: {len(data)} bytes", len(data)) from None
    columns = list(zip(*(rows + finals), strict=True)) or [()] * 6
    return CompactLattice(
        header.start,
        states,
        np.array(columns[0], np.int32),
        np.array(columns[1], np.int32),
        np.array(columns[2], np.int32),
        np.array(columns[3], np.float32),
        np.array(columns[4], np.float32),
        np.array(columns[5], np.int32),
    ), at
