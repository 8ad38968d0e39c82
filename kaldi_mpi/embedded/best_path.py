"""Best paths of many lattices under many scales at once.

Scoring looks for the best word sequence of each lattice under some thirty pairs of language-model weight and
word insertion penalty. One sweep in topological order over the arcs of many lattices, with a column per
pair, replaces as many runs of ``lattice-scale | lattice-add-penalty | lattice-best-path``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded.lattice import Lattice
from kaldi_mpi.errors import DataError

# Arcs in one sweep; bounds the memory to a few hundred bytes for each.
_MAX_ARCS = 400_000

_Int = NDArray[np.int64]


def best_paths(
    lattices: Sequence[Lattice], acoustic_scale: NDArray[np.float64], word_penalty: NDArray[np.float64]
) -> list[list[tuple[int, ...]]]:
    """The words on the cheapest path of each lattice, for each setting.

    The cost of a path is the sum over its arcs of graph cost + acoustic scale x acoustic cost, and the
    penalty for each word.

    Args:
        lattices: each with at least one complete path.
        acoustic_scale: (S,), for example 1 / language-model weight.
        word_penalty: (S,).

    Returns:
        per lattice and setting the words.

    Raises:
        DataError: a lattice has a cycle or no complete path.
    """
    results: list[list[tuple[int, ...]]] = []
    group: list[Lattice] = []
    arcs = 0
    for lattice in lattices:
        if group and arcs + len(lattice.source) > _MAX_ARCS:
            results += _Sweep(group, acoustic_scale, word_penalty).words()
            group, arcs = [], 0
        group.append(lattice)
        arcs += len(lattice.source)
    if group:
        results += _Sweep(group, acoustic_scale, word_penalty).words()
    return results


class _Sweep:
    """Several lattices as one graph, each with states of its own."""

    def __init__(self, lattices: Sequence[Lattice], scale: NDArray[np.float64], penalty: NDArray[np.float64]) -> None:
        self._scale, self._penalty = scale, penalty
        sizes = np.array([lattice.num_states + 1 for lattice in lattices])
        ends = np.cumsum(sizes)
        offsets = ends - sizes
        self._starts = offsets + np.array([max(lattice.start, 0) for lattice in lattices])
        self._finals = ends - 1
        self._num_states = int(ends[-1])
        source = np.concatenate([lat.source + off for lat, off in zip(lattices, offsets, strict=True)])
        target = np.concatenate([lat.target + off for lat, off in zip(lattices, offsets, strict=True)])
        # Arcs are kept in the order of their targets: the ways into a state are neighbours.
        order = np.argsort(target, kind="stable")
        self._source = source[order]
        self._word = np.concatenate([lattice.word for lattice in lattices])[order]
        self._graph = np.concatenate([lattice.graph for lattice in lattices])[order].astype(np.float64)
        self._acoustic = np.concatenate([lattice.acoustic for lattice in lattices])[order].astype(np.float64)
        self._first_in = _starts_of_groups(target[order], self._num_states)
        out = np.argsort(self._source, kind="stable")
        self._target_of_out = target[order][out]
        self._first_out = _starts_of_groups(self._source[out], self._num_states)

    def words(self) -> list[list[tuple[int, ...]]]:
        costs = self._forward()
        if not np.isfinite(costs[self._finals]).all():
            raise DataError("a lattice has a cycle or no complete path")
        return self._trace(costs)

    def _forward(self) -> NDArray[np.float64]:
        """(num_states, S) cost of the best path from the start to each state; infinite if there is none."""
        costs = np.full((self._num_states, len(self._scale)), np.inf)
        waiting = np.diff(self._first_in)
        ready = np.flatnonzero(waiting == 0)
        costs[self._starts] = 0.0
        while len(ready):
            arcs, first = _expand(self._first_in, ready)
            if len(arcs):
                # The starts have no arcs in; after the first round every state in `ready` has some.
                costs[ready] = np.minimum.reduceat(self._through(costs, arcs), first, axis=0)
            leaving, _ = _expand(self._first_out, ready)
            reached, count = np.unique(self._target_of_out[leaving], return_counts=True)
            waiting[reached] -= count
            ready = reached[waiting[reached] == 0]
        return costs

    def _through(self, costs: NDArray[np.float64], arcs: _Int) -> NDArray[np.float64]:
        """(len(arcs), S) cost of the best path that ends with each arc."""
        result: NDArray[np.float64] = (
            costs[self._source[arcs]]
            + self._graph[arcs][:, None]
            + self._acoustic[arcs][:, None] * self._scale
            + (self._word[arcs] != 0)[:, None] * self._penalty
        )
        return result

    def _trace(self, costs: NDArray[np.float64]) -> list[list[tuple[int, ...]]]:
        """Follow the best paths of all lattices and settings backwards at the same time."""
        count, settings = len(self._finals), len(self._scale)
        words: list[list[int]] = [[] for _ in range(count * settings)]
        path = np.arange(count * settings)  # the paths that have not reached their start
        state = np.repeat(self._finals, settings)
        begin = np.repeat(self._starts, settings)
        while len(path):
            arcs, first = _expand(self._first_in, state)
            lengths = np.diff(np.append(first, len(arcs)))
            setting = np.repeat(path % settings, lengths)
            through = (
                costs[self._source[arcs], setting]
                + self._graph[arcs]
                + self._acoustic[arcs] * self._scale[setting]
                + (self._word[arcs] != 0) * self._penalty[setting]
            )
            # The same sums as in _forward, in the same order: the best arc's is equal, not just close.
            is_best = through == np.repeat(costs[state, path % settings], lengths)
            position = np.where(is_best, np.arange(len(arcs)), len(arcs))
            best = arcs[np.minimum.reduceat(position, first)]
            for index in np.flatnonzero(self._word[best]):
                words[path[index]].append(int(self._word[best[index]]))
            state = self._source[best]
            going = state != begin[path]
            path, state = path[going], state[going]
        return [[tuple(words[k * settings + s][::-1]) for s in range(settings)] for k in range(count)]


def _starts_of_groups(keys: _Int, num_keys: int) -> _Int:
    """For sorted `keys`, where the group of each key from 0 to num_keys begins: (num_keys + 1,)."""
    starts: _Int = np.searchsorted(keys, np.arange(num_keys + 1))
    return starts


def _expand(starts: _Int, groups: _Int) -> tuple[_Int, _Int]:
    """The members of some groups one after the other, and where each group begins among them."""
    lengths = starts[groups + 1] - starts[groups]
    ends = np.cumsum(lengths)
    first = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts[groups] - first, lengths), first
