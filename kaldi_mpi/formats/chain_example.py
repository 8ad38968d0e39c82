"""Kaldi's ``<Nnet3ChainEg>``: the inputs of a chunk, and the supervision of its output frames."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.formats.compressed_matrix import CompressedMatrix, compressed_matrix_bytes
from kaldi_mpi.formats.supervision import Supervision, supervision_bytes
from kaldi_mpi.formats.tokens import Writer

_LARGEST_STEP = 124  # of time in an index list; others are written in full, after this mark
_IN_FULL = 127


@dataclass(frozen=True, eq=False)
class ChainExample:
    """A chunk of one utterance.

    Attributes:
        feats: (rows, D) float32, the input ``input``; or compressed already, as it will be written.
        left_context: rows before the first output frame.
        supervision: of the output ``output``; of one sequence.
        weights: (T,) float32, by which the derivatives of the output frames are multiplied.
        frame_subsampling_factor: input frames an output frame.
        ivector: (I,) float32, the input ``ivector``; None: there is none.
    """

    feats: NDArray[np.float32] | CompressedMatrix
    left_context: int
    supervision: Supervision
    weights: NDArray[np.float32]
    frame_subsampling_factor: int = 3
    ivector: NDArray[np.float32] | None = None


def chain_example_bytes(key: str, example: ChainExample, *, compress: bool = True) -> bytes:
    """The entry of an archive, in binary form, from its key on.

    Args:
        key: without white space.
        example: what is in it.
        compress: write the other inputs as compressed matrices (nnet3-chain-get-egs ``--compress=true``).

    Raises:
        ValueError: weights or supervision of another number of frames or sequences, or an input that cannot be
            compressed (`compressed_matrix_bytes`).
    """
    supervision, frames = example.supervision, len(example.weights)
    if supervision.num_sequences != 1 or supervision.frames_per_sequence != frames:
        raise ValueError(
            f"{supervision.num_sequences} sequences of {supervision.frames_per_sequence} frames and {frames} weights"
        )
    stream = io.BytesIO()
    stream.write(key.encode() + b" ")
    writer = Writer(stream)
    writer.token("<Nnet3ChainEg>")
    writer.token("<NumInputs>")
    writer.integer(1 if example.ivector is None else 2)
    times = range(-example.left_context, len(example.feats) - example.left_context)
    _write_input(writer, "input", times, example.feats, compress)
    if example.ivector is not None:
        _write_input(writer, "ivector", range(1), example.ivector[None], compress)
    writer.token("<NumOutputs>")
    writer.integer(1)
    writer.token("<NnetChainSup>")
    writer.token("output")
    factor = example.frame_subsampling_factor
    _write_times(writer, range(0, frames * factor, factor))
    stream.write(supervision_bytes(supervision))
    writer.token("<DW2>")
    writer.vector(example.weights)
    writer.token("</NnetChainSup>")
    writer.token("</Nnet3ChainEg>")
    return stream.getvalue()


def _write_input(
    writer: Writer, name: str, times: Sequence[int], matrix: NDArray[np.float32] | CompressedMatrix, compress: bool
) -> None:
    writer.token("<NnetIo>")
    writer.token(name)
    _write_times(writer, times)
    if isinstance(matrix, CompressedMatrix):
        writer.stream.write(matrix.tobytes())
    elif compress:
        writer.stream.write(compressed_matrix_bytes(matrix))
    else:
        writer.matrix(matrix)
    writer.token("</NnetIo>")


def _write_times(writer: Writer, times: Sequence[int]) -> None:
    """An index list of one sequence: the first time, then a byte for each step."""
    writer.token("<I1V>")
    writer.integer(len(times))
    before = 0
    for time in times:
        step, before = time - before, time
        if abs(step) <= _LARGEST_STEP:
            writer.stream.write(struct.pack("b", step))
            continue
        writer.stream.write(struct.pack("b", _IN_FULL))
        for value in (0, time, 0):  # n, t, x
            writer.integer(value)
