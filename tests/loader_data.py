"""Archives for the loader's tests, written and decoded here by plain NumPy after the format's description."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

KINDS = ("FM", "DM", "CM", "CM2", "CM3")


def full_matrix(values: NDArray[np.float64], token: str) -> bytes:
    """``FM`` or ``DM``."""
    dtype = np.float32 if token == "FM" else np.float64
    rows, cols = values.shape
    head = f"{token} ".encode() + b"\x04" + struct.pack("<i", rows) + b"\x04" + struct.pack("<i", cols)
    return b"\0B" + head + values.astype(dtype).tobytes()


def compressed_matrix(codes: NDArray[np.integer], token: str, minimum: float, spread: float) -> bytes:
    """``CM`` (with percentiles in order, drawn from the codes), ``CM2`` or ``CM3`` of given integer codes."""
    rows, cols = codes.shape
    head = f"{token} ".encode() + struct.pack("<ffii", minimum, spread, rows, cols)
    if token == "CM":
        return b"\0B" + head + percentiles(cols).tobytes() + codes.astype(np.uint8).T.tobytes()
    dtype = np.uint16 if token == "CM2" else np.uint8
    return b"\0B" + head + codes.astype(dtype).tobytes()


def percentiles(cols: int) -> NDArray[np.uint16]:
    """Some percentiles for `cols` columns: (cols, 4), increasing, different in each column."""
    start = (np.arange(cols) * 131 % 9000).astype(np.uint16)
    return np.stack([start, start + 11000, start + 30017, start + 56000], axis=1).astype(np.uint16)


def decode(codes: NDArray[np.integer], token: str, minimum: float, spread: float) -> NDArray[np.float32]:
    """What Kaldi decodes, operation by operation in its precisions."""
    low, extent = np.float32(minimum), np.float32(spread)
    if token != "CM":
        top = 65535.0 if token == "CM2" else 255.0
        return low + codes.astype(np.float32) * np.float32(np.float64(extent) * (1.0 / top))
    scale = extent * np.float32(1.52590218966964e-05)
    points = low + scale * percentiles(codes.shape[1]).astype(np.float32)
    out = np.empty(codes.shape, dtype=np.float32)
    for (row, col), code in np.ndenumerate(codes):
        piece, start, unit = (0, 0, 1 / 64) if code <= 64 else (1, 64, 1 / 128) if code <= 192 else (2, 192, 1 / 63)
        rise = (points[col, piece + 1] - points[col, piece]) * np.float32(code - start)
        out[row, col] = np.float64(points[col, piece]) + np.float64(rise) * unit
    return out


def random_matrix(rng: np.random.Generator, kind: str, rows: int, cols: int) -> tuple[bytes, NDArray[np.float32]]:
    """A matrix object as bytes, and the floats in it."""
    if kind in ("FM", "DM"):
        values = rng.normal(size=(rows, cols)) * 10
        return full_matrix(values, kind), values.astype(np.float32)
    minimum, spread = float(np.float32(rng.normal() * 10)), float(np.float32(rng.uniform(0.1, 100)))
    codes = rng.integers(0, 65536 if kind == "CM2" else 256, size=(rows, cols))
    return compressed_matrix(codes, kind, minimum, spread), decode(codes, kind, minimum, spread)


def int_vector(values: NDArray[np.int32]) -> bytes:
    """An int32 vector as a binary archive holds it."""
    return b"\0B\x04" + struct.pack("<i", len(values)) + b"".join(b"\x04" + struct.pack("<i", v) for v in values)


@dataclass
class Written:
    """A corpus on disk, and what is in it."""

    scp: Path
    feats: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    labels: dict[str, NDArray[np.int32]] = field(default_factory=dict)


def write_archive(directory: Path, name: str, objects: Mapping[str, bytes]) -> Path:
    """``name.ark`` and ``name.scp`` with the given objects; returns the script file."""
    archive, scp = directory / f"{name}.ark", directory / f"{name}.scp"
    lines, data = [], b""
    for key, value in objects.items():
        data += key.encode() + b" "
        lines.append(f"{key} {archive}:{len(data)}\n")
        data += value
    archive.write_bytes(data)
    scp.write_text("".join(lines))
    return scp


def write_corpus(
    directory: Path, lengths: list[int], *, dim: int = 3, kind: str | None = None, seed: int = 0
) -> Written:
    """Utterances u000, u001, ... of the given lengths (all kinds in turn, or one), with unique labels.

    The label of each frame is its position in the whole corpus, so that a frame is known by its label.
    """
    rng = np.random.default_rng(seed)
    written, objects, total = Written(directory / "feats.scp"), {}, 0
    for i, length in enumerate(lengths):
        key = f"u{i:03d}"
        objects[key], written.feats[key] = random_matrix(rng, kind or KINDS[i % len(KINDS)], length, dim)
        written.labels[key] = np.arange(total, total + length, dtype=np.int32)
        total += length
    write_archive(directory, "feats", objects)
    return written
