"""Chain examples for the loader's tests: a writer and a reader of our own, after the format's description."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.loader.minibatch import ChainSupervision
from tests.egs_data import Index, float_matrix, int32, nnet_io
from tests.loader_data import random_matrix

Arc = tuple[int, int, float, int]  # from, label, cost, to


@dataclass
class FstData:
    """An FST as it stands in a file.

    Attributes:
        states: how many.
        finals: costs of final states.
        arcs: in order of their states.
    """

    states: int
    finals: dict[int, float]
    arcs: list[Arc]

    def encoded(self) -> bytes:
        """OpenFst's compact_acceptor."""
        elements, first = b"", [0]
        for state in range(self.states):
            if state in self.finals:
                elements += struct.pack("<ifi", -1, self.finals[state], -1)
            for _, label, cost, to in (arc for arc in self.arcs if arc[0] == state):
                elements += struct.pack("<ifi", label, cost, to)
            first.append(len(elements) // 12)
        head = struct.pack("<ii16si8s", 2125659606, 16, b"compact_acceptor", 8, b"standard")
        head += struct.pack("<iiQqqq", 2, 0, 0, 0, self.states, len(self.arcs))
        return head + struct.pack(f"<{len(first)}I", *first) + elements


def kaldi_float(value: float) -> bytes:
    """Size byte and value."""
    return b"\x04" + struct.pack("<f", value)


def line(rng: np.random.Generator, frames: int, labels: int) -> FstData:
    """A constrained FST with one or two states a frame, deterministic as Kaldi's are."""
    layers = [[0]]
    for _ in range(frames):
        first = layers[-1][-1] + 1
        layers.append(list(range(first, first + int(rng.integers(1, 3)))))
    layers[-1] = layers[-1][:1]
    arcs: list[Arc] = []
    for now, then in itertools.pairwise(layers):
        for i, state in enumerate(now):
            targets = then if i == 0 else then[:1]
            chosen = rng.permutation(labels)[: len(targets)] + 1
            costs = rng.uniform(0, 20, len(targets)).astype(np.float32)
            arcs += [(state, *arc) for arc in zip(chosen.tolist(), costs.tolist(), targets, strict=True)]
    return FstData(layers[-1][0] + 1, {layers[-1][0]: 0.0}, arcs)


LOOP = FstData(3, {1: 0.5, 2: 0.0}, [(0, 1, 0.25, 1), (1, 2, 0.0, 1), (1, 3, 1.5, 2), (2, 1, 0.0, 0)])


@dataclass
class ChainData:
    """What an example is made of: one sequence, or, merged, several."""

    feats: NDArray[np.float32]  # (sequences, rows, dim)
    fsts: list[FstData]
    frames: int
    left: int
    subsampling: int = 3
    labels: int = 7
    weight: float = 1.0
    end2end: bool = False
    deriv_weights: NDArray[np.float32] | None = None  # (sequences, frames)
    ivectors: NDArray[np.float32] | None = None  # (sequences, dim)
    matrix: bytes | None = None  # `input` as it stands in the file, where that is no FM
    old_weights: bool = False
    alignment: bool = False
    more: list[bytes] = field(default_factory=list)  # other outputs

    def encoded(self) -> bytes:
        """The object of an archive."""
        sequences, rows, dim = self.feats.shape
        times: list[Index] = [(n, t - self.left, 0) for n in range(sequences) for t in range(rows)]
        ios = [nnet_io("input", times, self.matrix or float_matrix(self.feats.reshape(-1, dim)))]
        if self.ivectors is not None:
            ios.append(nnet_io("ivector", [(n, 0, 0) for n in range(sequences)], float_matrix(self.ivectors)))
        outputs = [*self.more, self.output("output")]
        data = b"\0B<Nnet3ChainEg> <NumInputs> " + int32(len(ios)) + b"".join(ios)
        return data + b"<NumOutputs> " + int32(len(outputs)) + b"".join(outputs) + b"</Nnet3ChainEg> "

    def output(self, name: str) -> bytes:
        """``<NnetChainSup>``."""
        sequences = len(self.feats)
        indexes: list[Index] = [(n, t * self.subsampling, 0) for t in range(self.frames) for n in range(sequences)]
        # nnet_io writes the list of indexes: what stands between its tokens is the same.
        listed = nnet_io(name, indexes, b"")[len("<NnetIo> ") : -len("</NnetIo> ")]
        data = b"<NnetChainSup> " + listed + b"<Supervision> <Weight> " + kaldi_float(self.weight)
        data += b"<NumSequences> " + int32(sequences) + b"<FramesPerSeq> " + int32(self.frames)
        data += b"<LabelDim> " + int32(self.labels) + b"<End2End> " + (b"T<Fsts> " if self.end2end else b"F")
        data += b"".join(fst.encoded() for fst in self.fsts) + (b"</Fsts> " if self.end2end else b"")
        if self.alignment:
            count = sequences * self.frames
            data += (
                b"<AlignmentPdfs> " + int32(count) + struct.pack(f"<{count}i", *(i % self.labels for i in range(count)))
            )
        return data + b"</Supervision> " + self._weights() + b"</NnetChainSup> "

    def _weights(self) -> bytes:
        if self.deriv_weights is None:
            return b""
        by_frame = self.deriv_weights.T.reshape(-1)
        if self.old_weights:
            return b"<DW> \x01" + struct.pack("<i", by_frame.size) + np.round(255 * by_frame).astype("u1").tobytes()
        return b"<DW2> FV " + int32(by_frame.size) + by_frame.astype("<f4").tobytes()


def random_chain(
    rng: np.random.Generator,
    *,
    frames: int = 4,
    left: int = 3,
    right: int = 4,
    dim: int = 3,
    sequences: int = 1,
    subsampling: int = 3,
    kind: str | None = None,
    ivector: int = 0,
    **more: object,
) -> ChainData:
    """A constrained example with random contents; `kind`: of its matrix, where it is one sequence."""
    rows = left + subsampling * (frames - 1) + 1 + right
    matrix = None
    if kind is None:
        feats = rng.normal(size=(sequences, rows, dim)).astype(np.float32)
    else:
        data, values = random_matrix(rng, kind, rows, dim)
        matrix, feats = data[2:], values[None]
    data_of = ChainData(feats, [line(rng, sequences * frames, 7)], frames, left, subsampling, matrix=matrix)
    if ivector:
        data_of.ivectors = rng.normal(size=(sequences, ivector)).astype(np.float32)
    for name, value in more.items():
        setattr(data_of, name, value)
    return data_of


def loops(rng: np.random.Generator, *, sequences: int = 1, **more: object) -> ChainData:
    """An end-to-end example."""
    data = random_chain(rng, sequences=sequences, **more)  # type: ignore[arg-type]
    data.fsts, data.end2end, data.alignment = [LOOP] * sequences, True, True
    return data


@dataclass
class ReadFst:
    """An FST read from a file: OpenFst's arrays."""

    first: NDArray[np.uint32]
    labels: NDArray[np.int32]
    costs: NDArray[np.float32]
    nexts: NDArray[np.int32]


@dataclass
class ReadExample:
    """An example's output, read from a file: its first index list, supervision and derivative weights."""

    key: str
    weight: float
    sequences: int
    frames: int
    label_dim: int
    end2end: bool
    fsts: list[ReadFst]
    deriv_weights: NDArray[np.float32]  # (sequences, frames)


class _Bytes:
    """Goes through bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> tuple[int | float, ...]:
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def array(self, dtype: str | np.dtype[np.void], count: int) -> NDArray[np.void]:
        found: NDArray[np.void] = np.frombuffer(self.data, dtype, count, self.at)
        self.at += found.nbytes
        return found

    def goto(self, token: bytes) -> None:
        self.at = self.data.index(token, self.at) + len(token)


def _read_fst(source: _Bytes) -> ReadFst:
    source.goto(b"compact_acceptor")
    source.goto(b"standard")
    _, _, _, _, states, _ = source.take("iiQqqq")
    first = source.array("<u4", int(states) + 1)
    elements = source.array(np.dtype([("label", "<i4"), ("cost", "<f4"), ("next", "<i4")]), int(first[-1]))
    return ReadFst(first.astype(np.uint32), elements["label"], elements["cost"], elements["next"])


def read_cegs(path: Path) -> Iterator[ReadExample]:
    """The examples of a binary archive; only for files that are known to be right."""
    source = _Bytes(path.read_bytes())
    while source.at < len(source.data):
        start = source.at
        source.goto(b" \0B<Nnet3ChainEg> ")
        key = source.data[start : source.data.index(b" ", start)].decode()
        source.goto(b"<NnetChainSup> output ")
        values: list[int | float] = []
        for token, form in (("Weight", "xf"), ("NumSequences", "xi"), ("FramesPerSeq", "xi"), ("LabelDim", "xi")):
            source.goto(f"<{token}> ".encode())
            values += source.take(form)
        weight, sequences, frames, labels = float(values[0]), *map(int, values[1:])
        source.goto(b"<End2End> ")
        end2end = source.array("S1", 1)[0] == b"T"
        fsts = [_read_fst(source) for _ in range(sequences if end2end else 1)]
        source.goto(b"<DW2> FV \x04")
        (count,) = source.take("i")
        by_frame = source.array("<f4", int(count)).astype(np.float32)
        source.goto(b"</Nnet3ChainEg> ")
        found = by_frame.reshape(frames, sequences).T
        yield ReadExample(key, weight, sequences, frames, labels, end2end, fsts, found)


def write_cegs(path: Path, examples: Sequence[tuple[str, ChainData]]) -> Path:
    """An archive."""
    path.write_bytes(b"".join(key.encode() + b" " + data.encoded() for key, data in examples))
    return path


Supervision = ChainSupervision[NDArray[Any]]
Canonical = list[tuple[int, float, int]]


def canonical(supervision: Supervision) -> list[Canonical]:
    """The arcs (pdf, cost, next state) of each state of FSTs of one final state each, which costs nothing, one FST
    after the other: the final state of one is the start of the next. States are numbered as they are met, with arcs
    in order of their pdf-ids, of which no state has one twice; so FSTs that differ in numbers alone are the same."""
    starts = supervision.first_state.tolist()
    numbers, order = {starts[0]: 0}, [starts[0]]
    found: list[Canonical] = []
    for state in order:
        if np.isfinite(supervision.finals[state]):
            assert supervision.finals[state] == 0.0
            then = starts[int(np.searchsorted(starts, state, "right"))]
            if then == starts[-1]:
                found.append([])
                continue
            state = then  # the same one, of the next FST
        span = slice(supervision.first_arc[state], supervision.first_arc[state + 1])
        columns = supervision.pdfs[span], supervision.costs[span], supervision.nexts[span]
        arcs = sorted(zip(*(column.tolist() for column in columns), strict=True))
        assert len({pdf for pdf, _, _ in arcs}) == len(arcs)
        for _, _, to in arcs:
            if to not in numbers:
                numbers[to] = len(order)
                order.append(to)
        found.append([(pdf, cost, numbers[to]) for pdf, cost, to in arcs])
    return found


def weights_of(supervision: Supervision, frames: int) -> NDArray[np.float32]:
    found = supervision.deriv_weights
    return np.ones((supervision.first_sequence[-1], frames), np.float32) if found is None else found
