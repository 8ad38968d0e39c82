"""Kaldi's ``<Supervision>``: the numerator FSTs of a chain (LF-MMI) example, of one sequence or a merged minibatch."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst, compact_acceptor_bytes, parse_fst


@dataclass(frozen=True, eq=False)
class Supervision:
    """<Supervision> of a chain example.

    Attributes:
        weight: scales objective and derivatives.
        num_sequences: how many sequences, all of the same length.
        frames_per_sequence: output frames of each.
        label_dim: labels are 1 .. label_dim: pdf-ids + 1, or transition-ids where they have not been mapped yet.
        end2end: each sequence has an FST of its own, which may have cycles; so have unconstrained examples.
        fsts: one, all sequences one after the other, unless end2end: then one a sequence.
        alignment_pdfs: (num_sequences * frames_per_sequence,) a path's pdf-ids, where a file has them.
    """

    weight: float
    num_sequences: int
    frames_per_sequence: int
    label_dim: int
    end2end: bool
    fsts: tuple[Fst, ...]
    alignment_pdfs: NDArray[np.int32] | None = None


@dataclass
class _Cursor:
    data: bytes | memoryview
    at: int
    file: str
    key: str | None

    def error(self, cause: str, offset: int | None = None) -> DataError:
        return DataError(cause, file=self.file, key=self.key, offset=self.at if offset is None else offset)

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.error(f"truncated: {len(self.data)} bytes", len(self.data))
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def accept(self, token: bytes) -> bool:
        if bytes(self.data[self.at : self.at + len(token)]) != token:
            return False
        self.at += len(token)
        return True

    def expect(self, token: bytes) -> None:
        if not self.accept(token):
            left = bytes(self.data[self.at :][: len(token)])
            if token.startswith(left):
                self.take(len(token))  # truncated
            raise self.error(f"{token.decode().strip()} expected, found {left[:20]!r}")

    def number(self, kind: str) -> float:
        size, value = struct.unpack(f"<b{kind}", self.take(5))
        if size != 4:
            raise self.error(f"a number of 4 bytes expected, found size byte {size}", self.at - 5)
        return value

    def positive(self, what: str) -> int:
        value = int(self.number("i"))
        if value < 1:
            raise self.error(f"{value} {what}", self.at - 5)
        return value


def parse_supervision(
    data: bytes | memoryview, offset: int = 0, *, file: str, key: str | None = None
) -> tuple[Supervision, int]:
    """Read the binary form, which begins with the token ``<Supervision>``, at `offset` of `data`.

    Returns:
        It, and the offset of the first byte after ``</Supervision> ``.

    Raises:
        DataError: truncated or damaged; an FST that is empty, or has labels beyond label_dim.
    """
    cursor = _Cursor(data, offset, file, key)
    cursor.expect(b"<Supervision> ")
    cursor.expect(b"<Weight> ")
    weight = cursor.number("f")
    if not math.isfinite(weight):
        raise cursor.error(f"the weight is {weight}", cursor.at - 5)
    cursor.expect(b"<NumSequences> ")
    sequences = cursor.positive("sequences")
    cursor.expect(b"<FramesPerSeq> ")
    frames = cursor.positive("frames a sequence")
    cursor.expect(b"<LabelDim> ")
    label_dim = cursor.positive("labels")
    cursor.expect(b"<End2End> ")
    flag = cursor.take(1)
    if flag not in (b"T", b"F"):
        raise cursor.error(f"T or F expected, found {flag!r}", cursor.at - 1)
    end2end = flag == b"T"
    if end2end:
        cursor.expect(b"<Fsts> ")
        fsts = tuple(_take_fst(cursor, label_dim) for _ in range(sequences))
        cursor.expect(b"</Fsts> ")
    else:
        fsts = (_take_fst(cursor, label_dim),)
    pdfs = None
    if cursor.accept(b"<AlignmentPdfs> "):
        before, count = cursor.at, int(cursor.number("i"))
        if count < 0:
            raise cursor.error(f"a vector of {count} elements", before)
        pdfs = np.frombuffer(cursor.take(4 * count), "<i4").astype(np.int32)
    cursor.expect(b"</Supervision> ")
    return Supervision(weight, sequences, frames, label_dim, end2end, fsts, pdfs), cursor.at


def _take_fst(cursor: _Cursor, label_dim: int) -> Fst:
    before = cursor.at
    fst, cursor.at = parse_fst(cursor.data, before, file=cursor.file, key=cursor.key)
    if fst.start < 0:
        raise cursor.error("the FST is empty", before)
    if fst.num_arcs and int(max(fst.ilabels.max(), fst.olabels.max())) > label_dim:
        raise cursor.error(f"the FST has label {int(fst.ilabels.max())}, beyond {label_dim}", before)
    return fst


def supervision_bytes(supervision: Supervision) -> bytes:
    """The binary form, from ``<Supervision> `` to ``</Supervision> ``."""
    pieces = [
        b"<Supervision> <Weight> ",
        struct.pack("<bf", 4, supervision.weight),
        b"<NumSequences> ",
        struct.pack("<bi", 4, supervision.num_sequences),
        b"<FramesPerSeq> ",
        struct.pack("<bi", 4, supervision.frames_per_sequence),
        b"<LabelDim> ",
        struct.pack("<bi", 4, supervision.label_dim),
        b"<End2End> T<Fsts> " if supervision.end2end else b"<End2End> F",
        *(compact_acceptor_bytes(fst) for fst in supervision.fsts),
    ]
    if supervision.end2end:
        pieces.append(b"</Fsts> ")
    if supervision.alignment_pdfs is not None:
        pdfs = supervision.alignment_pdfs.astype("<i4")
        pieces += [b"<AlignmentPdfs> ", struct.pack("<bi", 4, len(pdfs)), pdfs.tobytes()]
    return b"".join([*pieces, b"</Supervision> "])
