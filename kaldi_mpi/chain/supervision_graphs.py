"""The graphs of a minibatch's supervision as arrays, one graph after the other.

A minibatch may have been merged from examples, each of one sequence or of several: a constrained graph has all
sequences of its example, one after the other, a cyclic one (unconstrained, or end to end) has one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.supervision import Supervision


@dataclass(frozen=True)
class SupervisionGraphs:
    """G graphs of S states and N arcs together, for B sequences of T frames.

    Attributes:
        weight: of the supervision; the same for all sequences.
        frames: T.
        num_pdfs: of the tree (``<LabelDim>``).
        cyclic: whether a graph is gone through in T steps from its first state, to end in any final one; else its
            states have a time each, are in that order, and only those at the end are final.
        first_state: (G + 1,) int32; each graph starts in its first state.
        first_sequence: (G + 1,) int32.
        first_arc: (S + 1,) int64: by the state that arcs leave.
        finals: (S,) float32, costs; inf where a state is not final.
        pdfs: (N,) int32.
        costs: (N,) float32.
        nexts: (N,) int32, counted through all graphs.
    """

    weight: float
    frames: int
    num_pdfs: int
    cyclic: bool
    first_state: NDArray[np.int32]
    first_sequence: NDArray[np.int32]
    first_arc: NDArray[np.int64]
    finals: NDArray[np.float32]
    pdfs: NDArray[np.int32]
    costs: NDArray[np.float32]
    nexts: NDArray[np.int32]

    @property
    def num_graphs(self) -> int:
        """G."""
        return len(self.first_state) - 1

    @property
    def num_sequences(self) -> int:
        """B."""
        return int(self.first_sequence[-1])


def supervision_graphs(supervisions: Sequence[Supervision], keys: Sequence[str] | None = None) -> SupervisionGraphs:
    """The graphs of some supervisions as those of one minibatch, in this order.

    Args:
        keys: of the examples, for messages.

    Raises:
        DataError: weights, frames, trees or kinds differ, as they may not in a minibatch; or a graph is empty.
    """
    first = supervisions[0]
    names = [f"example {number}" for number in range(len(supervisions))] if keys is None else keys
    for name, supervision in zip(names, supervisions, strict=True):
        for what, ours, other in (
            ("weight", first.weight, supervision.weight),
            ("number of frames", first.frames_per_sequence, supervision.frames_per_sequence),
            ("number of pdfs", first.label_dim, supervision.label_dim),
            ("kind (end to end or not)", first.end2end, supervision.end2end),
        ):
            if ours != other:
                raise DataError(
                    f"its supervision's {what} is {other}, and that of {names[0]} is {ours}: they cannot be merged",
                    key=name,
                )
        if any(fst.start != 0 for fst in supervision.fsts):
            raise DataError("a supervision without a path", key=name)
    fsts = [fst for supervision in supervisions for fst in supervision.fsts]
    sequences = [
        supervision.num_sequences // len(supervision.fsts)
        for supervision in supervisions for _ in supervision.fsts
    ]  # fmt: skip
    first_state = np.cumsum([0, *(len(fst.finals) for fst in fsts)]).astype(np.int32)
    first_arc = np.cumsum([0, *(degree for fst in fsts for degree in np.diff(fst.first_arc))])
    return SupervisionGraphs(
        first.weight,
        first.frames_per_sequence,
        first.label_dim,
        first.end2end,
        first_state,
        np.cumsum([0, *sequences]).astype(np.int32),
        first_arc.astype(np.int64),
        np.concatenate([fst.finals for fst in fsts]).astype(np.float32),
        np.concatenate([fst.ilabels for fst in fsts]).astype(np.int32) - 1,
        np.concatenate([fst.costs for fst in fsts]).astype(np.float32),
        np.concatenate([fst.nexts + begin for fst, begin in zip(fsts, first_state[:-1], strict=True)]).astype(np.int32),
    )
