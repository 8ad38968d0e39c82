"""The sums of chain training over all paths, one by one, in float64: the yardstick for forward and backward.

Nothing here shares code with kaldi_mpi.chain; it is for graphs of a few states and frames.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.formats.fst import Fst

Matrix = NDArray[np.float64]


def arcs_of(fst: Fst) -> list[list[tuple[int, float, int]]]:
    """(pdf, cost, next) of the arcs that leave each state."""
    return [
        [
            (int(fst.ilabels[arc]) - 1, float(fst.costs[arc]), int(fst.nexts[arc]))
            for arc in range(fst.first_arc[state], fst.first_arc[state + 1])
        ]
        for state in range(len(fst.finals))
    ]


def _summed(paths: Iterator[tuple[float, tuple[int, ...]]], frames: int, num_pdfs: int) -> tuple[float, Matrix]:
    """The sum of all paths' weights, and the share of each pdf at each frame, (T, P)."""
    total, shares = 0.0, np.zeros((frames, num_pdfs))
    for weight, pdfs in paths:
        total += weight
        shares[np.arange(frames), list(pdfs)] += weight
    return total, shares / total if total > 0.0 else shares


def denominator(fst: Fst, initial: Matrix, outputs: Matrix, leaky: float) -> tuple[float, Matrix]:
    """The log of the sum over all paths, and occupations (T, P), of one sequence with the leaky HMM.

    A path begins in a state i with weight initial(i). Before each frame, and at the end, it goes on where it is, or
    leaks: with weight leaky times initial(k) it goes on from state k. Each arc has exp(-cost) exp(clip(y, -30, 30)).

    Args:
        initial: (S,).
        outputs: (T, P).
    """
    frames, num_pdfs = outputs.shape
    arcs, x = arcs_of(fst), np.exp(np.clip(outputs, -30.0, 30.0))

    def go_on(state: int, weight: float, pdfs: tuple[int, ...]) -> Iterator[tuple[float, tuple[int, ...]]]:
        frame = len(pdfs)
        leaks = [(k, weight * leaky * initial[k]) for k in range(len(initial))]
        for now, so_far in [(state, weight), *leaks]:
            if frame == frames:
                yield so_far, pdfs
                continue
            for pdf, cost, following in arcs[now]:
                yield from go_on(following, so_far * np.exp(-cost) * x[frame, pdf], (*pdfs, pdf))

    paths = (path for state in range(len(initial)) for path in go_on(state, float(initial[state]), ()))
    total, shares = _summed(paths, frames, num_pdfs)
    return float(np.log(total)), shares


def numerator(fst: Fst, outputs: Matrix) -> tuple[float, Matrix]:
    """The log of the sum over all paths of T arcs from the start to a final state, and posteriors (T, P).

    A path's weight is exp(outputs - costs - final cost). Without a path: -inf, and 0.

    Args:
        outputs: (T, P).
    """
    frames, num_pdfs = outputs.shape
    arcs = arcs_of(fst)

    def go_on(state: int, weight: float, pdfs: tuple[int, ...]) -> Iterator[tuple[float, tuple[int, ...]]]:
        if len(pdfs) == frames:
            if np.isfinite(fst.finals[state]):
                yield weight * np.exp(-float(fst.finals[state])), pdfs
            return
        for pdf, cost, following in arcs[state]:
            yield from go_on(following, weight * np.exp(outputs[len(pdfs), pdf] - cost), (*pdfs, pdf))

    total, shares = _summed(go_on(fst.start, 1.0, ()), frames, num_pdfs)
    return float(np.log(total)) if total > 0.0 else -np.inf, shares
