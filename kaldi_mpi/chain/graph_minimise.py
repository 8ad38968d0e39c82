"""A large acceptor made smaller while its paths keep their probabilities nearly, as Kaldi does it for den.fst.

All functions take acceptors (input labels count) with costs -log p, and return new ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst, build_fst

_NOT_FINAL = np.iinfo(np.int64).max
_PUSH_TOLERANCE = 1e-6  # the relative difference of states' sums; Kaldi's is 1e-3, so that it merges fewer states
_MOST_ITERATIONS = 5000  # then sums are left less equal


def arcs_sorted(
    start: int,
    finals: NDArray[np.float32],
    sources: NDArray[Any],
    labels: NDArray[Any],
    costs: NDArray[Any],
    nexts: NDArray[Any],
    by_label: bool = False,
) -> Fst:
    """An acceptor from arcs in any order; those of a state keep theirs, or come by label and next state."""
    order = np.lexsort((nexts, labels, sources)) if by_label else np.argsort(sources, kind="stable")
    first_arc = np.concatenate([[0], np.cumsum(np.bincount(sources, minlength=len(finals)))]).astype(np.int64)
    labels = np.ascontiguousarray(labels[order], np.int32)
    return Fst(
        start, finals.astype(np.float32), first_arc, labels, labels, costs[order].astype(np.float32),
        nexts[order].astype(np.int32),
    )  # fmt: skip


def reverse(fst: Fst) -> Fst:
    """The reversed acceptor: state 0 leads by epsilons to what was final, and the old start is final."""
    final_states = np.flatnonzero(fst.finals != np.inf)
    sources = np.concatenate([np.zeros(len(final_states), np.int64), fst.nexts.astype(np.int64) + 1])
    labels = np.concatenate([np.zeros(len(final_states), np.int32), fst.ilabels])
    costs = np.concatenate([fst.finals[final_states], fst.costs])
    nexts = np.concatenate([final_states, fst.sources()]) + 1
    finals = np.full(fst.num_states + 1, np.inf, np.float32)
    finals[fst.start + 1] = 0.0
    return arcs_sorted(0, finals, sources, labels, costs, nexts)


def connect(fst: Fst, by_label: bool = False) -> Fst:
    """Without the states that no path from the start to a final state goes through; the others keep their order."""
    sources = fst.sources()
    forward = np.zeros(fst.num_states, bool)
    forward[fst.start] = True
    backward = fst.finals != np.inf
    for reached, begins, ends in ((forward, sources, fst.nexts), (backward, fst.nexts, sources)):
        # Arcs leave the loop once they have been followed, so that it is short for long chains, too.
        left = np.arange(fst.num_arcs)
        while len(left):
            now = reached[begins[left]]
            if not now.any():
                break
            reached[ends[left[now]]] = True
            left = left[~now]
    keep = forward & backward
    if not keep[fst.start]:
        return build_fst(-1, 0, [], {})
    numbers = np.cumsum(keep) - 1
    arcs = keep[sources] & keep[fst.nexts]
    return arcs_sorted(
        int(numbers[fst.start]), fst.finals[keep], numbers[sources[arcs]], fst.ilabels[arcs], fst.costs[arcs],
        numbers[fst.nexts[arcs]], by_label,
    )  # fmt: skip


def push_evenly(fst: Fst) -> Fst:
    """Move probability along the paths until every state's arcs and final probability have the same sum.

    With r the eigenvector of the largest eigenvalue of the arcs' probabilities, the end leading back to the start, an
    arc i -> j gets the factor r(j) / r(i): paths keep their probabilities, and all sums are that eigenvalue.
    Of the acceptor every state must lie on a path from start to end.

    Raises:
        DataError: costs are so large that exp(-cost) is 0.
    """
    sources = fst.sources()
    probs, finals = np.exp(-fst.costs.astype(np.float64)), np.exp(-fst.finals.astype(np.float64))
    values = np.ones(fst.num_states)
    for _ in range(_MOST_ITERATIONS):
        following = np.bincount(sources, probs * values[fst.nexts], fst.num_states) + finals * values[fst.start]
        if not following.min() > 0.0:
            raise DataError("a graph has costs so large that its probabilities vanish")
        sums = following / values
        # Half of a step: the eigenvalues that oscillate (of graphs with a period) die out, too.
        values = 0.5 * (values + following / following.sum() * values.sum())
        if sums.max() <= sums.min() * (1.0 + _PUSH_TOLERANCE):
            break
    logs = np.log(values)
    return replace(
        fst,
        properties=0,
        costs=(fst.costs + logs[sources] - logs[fst.nexts]).astype(np.float32),
        finals=(fst.finals + logs - logs[fst.start]).astype(np.float32),
    )


def merge_equivalent(fst: Fst, quantum: float) -> Fst:
    """Round costs to multiples of `quantum` and merge states from which the same then follows.

    Arcs of a merged state that become the same are one arc with the sum of their probabilities. States are numbered
    by the first one that is in them.
    """
    units = np.floor(fst.costs / quantum + 0.5).astype(np.int64)
    final_units = np.full(fst.num_states, _NOT_FINAL)
    is_final = fst.finals != np.inf
    final_units[is_final] = np.floor(fst.finals[is_final] / quantum + 0.5)
    sources = fst.sources()
    _, emissions = np.unique(np.stack([fst.ilabels, units]), axis=1, return_inverse=True)
    emissions = emissions.reshape(-1)
    classes = np.unique(final_units, return_inverse=True)[1].reshape(-1)
    count = int(classes.max()) + 1
    while True:
        # A state is what it was, and the set of its (emission, class of the next state); sets compare by a sum of
        # 64 mixed bits an element.
        keys = np.unique(np.stack([sources, emissions, classes[fst.nexts]]), axis=1)
        codes = _mixed(keys[1].astype(np.uint64) << np.uint64(32) | keys[2].astype(np.uint64))
        sums = np.zeros(fst.num_states, np.uint64)
        np.add.at(sums, keys[0], codes)
        classes = np.unique(np.stack([classes.astype(np.uint64), sums]), axis=1, return_inverse=True)[1].reshape(-1)
        if int(classes.max()) + 1 == count:
            break
        count = int(classes.max()) + 1
    _, first, classes = np.unique(classes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    numbers = np.empty(count, np.int64)
    numbers[order] = np.arange(count)
    classes, first = numbers[classes.reshape(-1)], first[order]
    kept = np.zeros(fst.num_states, bool)
    kept[first] = True
    arcs = np.flatnonzero(kept[sources])
    groups = np.stack([classes[sources[arcs]], emissions[arcs], classes[fst.nexts[arcs]]])
    unique, places, group_of = np.unique(groups, axis=1, return_index=True, return_inverse=True)
    times = np.bincount(group_of.reshape(-1), minlength=unique.shape[1])
    back = np.argsort(places)
    chosen = arcs[places[back]]
    finals = np.where(is_final, final_units * quantum, np.inf)[first].astype(np.float32)
    return arcs_sorted(
        int(classes[fst.start]), finals, unique[0][back], fst.ilabels[chosen],
        units[chosen] * quantum - np.log(times[back]), unique[2][back],
    )  # fmt: skip


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each value's bits spread over 64 bits, one to one (the finaliser of splitmix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def by_falling_degree(fst: Fst) -> Fst:
    """States in the order of how many arcs enter and leave them, most first; states of the same degree keep theirs."""
    degrees = np.diff(fst.first_arc) + np.bincount(fst.nexts, minlength=fst.num_states)
    order = np.argsort(-degrees, kind="stable")
    numbers = np.empty(fst.num_states, np.int64)
    numbers[order] = np.arange(fst.num_states)
    return arcs_sorted(
        int(numbers[fst.start]), fst.finals[order], numbers[fst.sources()], fst.ilabels, fst.costs, numbers[fst.nexts]
    )
