"""The denominator graph, den.fst, as the forward-backward wants it: arcs in both directions, initial probabilities.

Arcs that lead to a state are in groups of the same pdf. An output's probability is a factor of a group's sum, and in
the graph of a left-biphone tree a state has about two groups: the sums over arcs then read one number an arc.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst

# Steps from the start over which Kaldi takes the mean distribution of states.
INITIAL_STEPS = 100


@dataclass(frozen=True, eq=False)
class DenominatorGraph:
    """S states, N arcs in G groups; the arcs into a state stand together, and of these those of a pdf.

    Attributes:
        num_states, num_pdfs: S and P; pdfs may be missing from the graph.
        initial: (S,) float32, > 0 where a path from the start has come to within 100 frames.
        first_group: (S + 1,) int32: the groups of arcs into state s are first_group[s] .. first_group[s + 1] - 1.
        group_pdfs: (G,) int32.
        first_in: (G + 1,) int64: the arcs of group g are first_in[g] .. first_in[g + 1] - 1.
        sources: (N,) int32: the states that these arcs leave.
        in_probs: (N,) float32: exp(-cost) of these arcs.
        first_out: (S + 1,) int64: the arcs that leave state s, in another order.
        out_groups: (N,) int32: the groups that these are in.
        out_probs: (N,) float32: exp(-cost) of these.
    """

    num_states: int
    num_pdfs: int
    initial: NDArray[np.float32]
    first_group: NDArray[np.int32]
    group_pdfs: NDArray[np.int32]
    first_in: NDArray[np.int64]
    sources: NDArray[np.int32]
    in_probs: NDArray[np.float32]
    first_out: NDArray[np.int64]
    out_groups: NDArray[np.int32]
    out_probs: NDArray[np.float32]

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.group_pdfs)

    @property
    def num_arcs(self) -> int:
        """N."""
        return len(self.sources)

    @cached_property
    def group_states(self) -> NDArray[np.int32]:
        """(G,): the state that a group's arcs lead to."""
        return np.repeat(np.arange(self.num_states, dtype=np.int32), np.diff(self.first_group))

    @cached_property
    def arc_groups(self) -> NDArray[np.int32]:
        """(N,): the group of each arc, in the order of `sources`."""
        return np.repeat(np.arange(self.num_groups, dtype=np.int32), np.diff(self.first_in))


def denominator_graph(fst: Fst, num_pdfs: int, file: str | None = None) -> DenominatorGraph:
    """What the forward-backward needs of a den.fst; labels are pdfs counted from 1, olabels are not looked at.

    Args:
        num_pdfs: the network's outputs.
        file: for messages.

    Raises:
        DataError: the graph is empty or cannot go on for ever, an arc has no label, a label is beyond the network's
            outputs (the graph was made with another tree), or a cost is not a finite number.
    """
    states, labels = len(fst.finals), fst.ilabels
    _check(fst, num_pdfs, file)
    pdfs = labels - 1
    probs = np.exp(-fst.costs.astype(np.float64)).astype(np.float32)
    sources = np.repeat(np.arange(states, dtype=np.int32), np.diff(fst.first_arc))
    order = np.lexsort((sources, pdfs, fst.nexts))
    ends, of_group = fst.nexts[order], pdfs[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (ends[1:] != ends[:-1]) | (of_group[1:] != of_group[:-1])
    at = np.flatnonzero(begins)
    group_of_arc = np.empty(len(order), dtype=np.int32)
    group_of_arc[order] = np.cumsum(begins) - 1
    return DenominatorGraph(
        states,
        num_pdfs,
        initial_probabilities(fst, file).astype(np.float32),
        np.searchsorted(ends[at], np.arange(states + 1)).astype(np.int32),
        np.ascontiguousarray(of_group[at], dtype=np.int32),
        np.append(at, len(order)).astype(np.int64),
        np.ascontiguousarray(sources[order]),
        np.ascontiguousarray(probs[order]),
        np.ascontiguousarray(fst.first_arc, dtype=np.int64),
        group_of_arc,
        probs,
    )


def initial_probabilities(fst: Fst, file: str | None = None) -> NDArray[np.float64]:
    """The mean distribution over states of steps 0 .. 99 from the start state, (S,), as Kaldi's denominator has it.

    A state's arcs and final probability are made to sum to 1, and so is the whole after each step: what ends goes on
    in proportion elsewhere.

    Raises:
        DataError: the graph ends before that.
    """
    states = len(fst.finals)
    sources = np.repeat(np.arange(states), np.diff(fst.first_arc))
    probs = np.exp(-fst.costs.astype(np.float64))
    sums = np.bincount(sources, probs, states) + np.exp(-fst.finals.astype(np.float64))
    probs /= sums[sources]
    now: NDArray[np.float64] = np.zeros(states)
    now[fst.start] = 1.0
    mean = np.zeros(states)
    for _ in range(INITIAL_STEPS):
        mean += now / INITIAL_STEPS
        now = np.bincount(fst.nexts, now[sources] * probs, states).astype(np.float64, copy=False)
        if not (total := now.sum()) > 0.0:
            raise DataError("denominator graph of which no path has 100 frames", file=file)
        now /= total
    return mean


def _check(fst: Fst, num_pdfs: int, file: str | None) -> None:
    if fst.start < 0 or not len(fst.ilabels):
        raise DataError("denominator graph without arcs", file=file)
    if (low := int(fst.ilabels.min())) < 1:
        raise DataError(f"denominator graph with label {low}: labels are pdf-ids + 1, and none is empty", file=file)
    if (high := int(fst.ilabels.max())) > num_pdfs:
        raise DataError(
            f"denominator graph with pdf-id {high - 1}, of a network with {num_pdfs} outputs: it is of another tree",
            file=file,
        )
    if not np.isfinite(fst.costs).all() or np.isnan(fst.finals).any():
        raise DataError("denominator graph with a cost that is not a finite number", file=file)
