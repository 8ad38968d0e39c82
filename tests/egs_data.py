"""nnet3 examples for the loader's tests, written here after the format's description."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.loader_data import random_matrix

Pairs = list[tuple[int, float]]
Index = tuple[int, int, int]


def int32(value: int) -> bytes:
    """Size byte and value."""
    return b"\x04" + struct.pack("<i", value)


def encode_indexes(indexes: Sequence[Index], *, full: bool = False) -> bytes:
    """``<I1V>`` and the list, in one byte each where that is possible, unless `full`."""
    data, last = b"<I1V> " + int32(len(indexes)), (0, 0, 0)
    for n, t, x in indexes:
        if not full and (n, x) == (last[0], last[2]) and abs(t - last[1]) < 125:
            data += struct.pack("b", t - last[1])
        else:
            data += b"\x7f" + int32(n) + int32(t) + int32(x)
        last = (n, t, x)
    return data


def sparse_matrix(rows: Sequence[Pairs], dim: int, *, double: bool = False) -> bytes:
    """``SM``, with values in 4 bytes or in 8."""
    data = b"SM " + int32(len(rows))
    for row in rows:
        data += b"SV " + int32(dim) + int32(len(row))
        for column, value in row:
            data += int32(column) + (
                b"\x08" + struct.pack("<d", value) if double else b"\x04" + struct.pack("<f", value)
            )
    return data


def nnet_io(name: str, indexes: Sequence[Index], matrix: bytes, *, full: bool = False) -> bytes:
    """``<NnetIo>``; `matrix` as it stands in the file, without ``\\0B``."""
    return b"<NnetIo> " + name.encode() + b" " + encode_indexes(indexes, full=full) + matrix + b"</NnetIo> "


def example(*ios: bytes) -> bytes:
    """The object of an archive."""
    return b"\0B<Nnet3Eg> <NumIo> " + int32(len(ios)) + b"".join(ios) + b"</Nnet3Eg> "


def write_egs(path: Path, examples: Mapping[str, bytes]) -> Path:
    """An archive."""
    path.write_bytes(b"".join(key.encode() + b" " + data for key, data in examples.items()))
    return path


@dataclass
class Chunk:
    """What one sub-example is made of: output times 0 .. width-1."""

    feats: NDArray[np.float32]
    left: int
    posteriors: list[Pairs]
    ivector: NDArray[np.float32] | None = None
    first: int = 0  # t of the first output row
    matrices: dict[str, bytes] = field(default_factory=dict)

    @property
    def times(self) -> dict[str, range]:
        start = self.first - self.left
        return {
            "input": range(start, start + len(self.feats)),
            "output": range(self.first, self.first + len(self.posteriors)),
        }


def random_chunk(
    rng: np.random.Generator,
    *,
    kind: str = "CM",
    width: int = 4,
    left: int = 3,
    right: int = 2,
    dim: int = 3,
    ivector: int = 0,
    num_pdfs: int = 9,
    pairs: int = 1,
    weights: bool = False,
    first: int = 0,
) -> Chunk:
    """A chunk with random contents, its feature matrix in one of the five kinds."""
    data, feats = random_matrix(rng, kind, left + width + right, dim)
    posteriors = []
    for _ in range(width):
        columns = sorted(rng.choice(num_pdfs, size=pairs, replace=False).tolist())
        posteriors.append([(pdf, float(np.float32(rng.uniform(0.1, 1)) if weights else 1.0)) for pdf in columns])
    chunk = Chunk(feats, left, posteriors, first=first, matrices={"input": data[2:]})
    if ivector:
        data, vector = random_matrix(rng, "CM2", 1, ivector)
        chunk.ivector, chunk.matrices["ivector"] = vector[0], data[2:]
    return chunk


def chunk_example(chunk: Chunk, *, num_pdfs: int = 9, more: Sequence[bytes] = ()) -> bytes:
    """An example of one chunk; `more` are other inputs and outputs."""
    ios = [nnet_io("input", [(0, t, 0) for t in chunk.times["input"]], chunk.matrices["input"])]
    if chunk.ivector is not None:
        ios.append(nnet_io("ivector", [(0, 0, 0)], chunk.matrices["ivector"]))
    output = sparse_matrix(chunk.posteriors, num_pdfs)
    return example(*ios, nnet_io("output", [(0, t, 0) for t in chunk.times["output"]], output), *more)


def float_matrix(values: NDArray[np.float32]) -> bytes:
    """``FM``, as it stands in an example."""
    return b"FM " + int32(values.shape[0]) + int32(values.shape[1]) + values.astype("<f4").tobytes()


def merged_example(chunks: Sequence[Chunk], *, num_pdfs: int = 9, interleaved: bool = False) -> bytes:
    """One example of several chunks, as nnet3-merge-egs makes it: n is the chunk's number.

    With `interleaved` the rows go by time first and by n second.
    """
    ios = []
    for name in ("input", "ivector", "output"):
        rows: list[tuple[Index, Any]] = []
        for n, chunk in enumerate(chunks):
            of_chunk: dict[str, Any] = {"input": chunk.feats, "ivector": [chunk.ivector], "output": chunk.posteriors}
            values = of_chunk[name]
            times = chunk.times.get(name, range(1))
            rows += [((n, t, 0), value) for t, value in zip(times, values, strict=True) if value is not None]
        if not rows:
            continue
        if interleaved:
            rows.sort(key=lambda row: (row[0][1], row[0][0]))
        contents = [value for _, value in rows]
        matrix = sparse_matrix(contents, num_pdfs) if name == "output" else float_matrix(np.array(contents))
        ios.append(nnet_io(name, [index for index, _ in rows], matrix))
    return example(*ios)
