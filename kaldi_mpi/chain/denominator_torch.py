"""The denominator in PyTorch's operations: right on any device and in any number format, and the reference.

The formulas are those of Povey et al. 2016 as Kaldi computes them, with the leaky HMM; S states, P pdfs, B sequences:

    x(t, n) = exp(clip(y(t, n), -30, 30))
    a(0, i) = initial(i)                a'(t, i) = a(t, i) + leaky tot(t) initial(i),  tot(t) = sum_i a(t, i)
    a(t + 1, j) = sum over arcs i -> j of pdf n:  a'(t, i) p x(t, n) / tot(t)
    logprob = log sum_i a'(T, i) + sum_{t < T} log tot(t)
    b'(T, i) = 1 / sum_i a'(T, i)       b(t, i) = b'(t, i) + leaky sum_k initial(k) b'(t, k)
    b'(t, i) = sum over arcs i -> j of pdf n:  b(t + 1, j) p x(t, n) / tot(t)
    gamma(t, n) = sum over arcs of pdf n:  a'(t, i) p b(t + 1, j) x(t, n) / tot(t)

All states are final. gamma is the derivative of logprob but where y is limited. Without rounding, sum_i a'(t, i)
b'(t, i) = 1 and sum_n gamma(t, n) = 1 at each frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.chain.denominator_graph import DenominatorGraph

# Kaldi's limits of what is exponentiated: exp(30) times the few thousand frames' scales stays in float32.
LIMIT = 30.0


@dataclass(frozen=True)
class DenominatorSums:
    """What a denominator finds, beside the occupations.

    Attributes:
        log_probs: (B,) float64.
        state_sums, pdf_sums: (frames that were checked, B) float64: sum_i a' b' and sum_n gamma, each 1 but for
            rounding; None where no derivative was wanted.
    """

    log_probs: Tensor
    state_sums: Tensor | None = None
    pdf_sums: Tensor | None = None


@dataclass(frozen=True)
class GraphTensors:
    """A DenominatorGraph's arrays on a device, indices as int64; see there. `out_states`: what an arc leaves."""

    num_states: int
    num_pdfs: int
    initial: Tensor
    group_states: Tensor
    group_pdfs: Tensor
    arc_groups: Tensor
    sources: Tensor
    in_probs: Tensor
    out_states: Tensor
    out_groups: Tensor
    out_probs: Tensor


def graph_tensors(graph: DenominatorGraph, device: torch.device, dtype: torch.dtype) -> GraphTensors:
    """The arrays of a graph on a device, probabilities as `dtype`."""

    def indices(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    def floats(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(device, dtype)

    out_states = np.repeat(np.arange(graph.num_states), np.diff(graph.first_out))
    return GraphTensors(
        graph.num_states, graph.num_pdfs, floats(graph.initial), indices(graph.group_states),
        indices(graph.group_pdfs), indices(graph.arc_groups), indices(graph.sources), floats(graph.in_probs),
        indices(out_states), indices(graph.out_groups), floats(graph.out_probs),
    )  # fmt: skip


def limited_exp(outputs: Tensor) -> Tensor:
    """exp of the outputs within the limits; of NaN, exp(-30)."""
    return outputs.nan_to_num(nan=-LIMIT, posinf=LIMIT, neginf=-LIMIT).clamp(-LIMIT, LIMIT).exp()


def forward_backward(
    graph: GraphTensors, outputs: Tensor, leaky: float, derivative: Tensor | None, scale: float, checked: int = 1
) -> DenominatorSums:
    """Log-probabilities of sequences; occupations times `scale` are written to `derivative`.

    Args:
        graph: on the outputs' device, of their dtype.
        outputs: (B, T, P).
        leaky: the coefficient of the leaky HMM, between 0 and 1.
        derivative: (B, T, P), or None: not wanted.
        checked: for how many of the first frames the sums are taken.
    """
    frames = outputs.shape[1]
    x = limited_exp(outputs).permute(1, 2, 0)  # (T, P, B)
    alphas, totals = _forward(graph, x, leaky)
    last = alphas[frames].double().sum(dim=0)
    log_probs = last.log() + torch.stack(totals[:frames]).double().log().sum(dim=0)
    if derivative is None:
        return DenominatorSums(log_probs)
    betas = (1.0 / last).to(x.dtype).expand(graph.num_states, -1)
    state_sums, pdf_sums = [], []
    for t in range(frames - 1, -1, -1):
        leak = leaky * (graph.initial.unsqueeze(1) * betas).sum(dim=0, dtype=torch.float64).to(x.dtype)
        beta = (betas + leak) / totals[t]
        through = beta[graph.group_states] * x[t][graph.group_pdfs]
        gammas = _sums_by(graph.group_pdfs, _sum_arcs(graph, alphas[t]) * through, graph.num_pdfs)
        derivative[:, t] = (scale * gammas).T
        out = through[graph.out_groups] * graph.out_probs.unsqueeze(1)
        betas = _sums_by(graph.out_states, out, graph.num_states)
        if t < checked:
            state_sums.append((alphas[t].double() * betas.double()).sum(dim=0))
            pdf_sums.append(gammas.double().sum(dim=0))
    return DenominatorSums(log_probs, torch.stack(state_sums[::-1]), torch.stack(pdf_sums[::-1]))


def _forward(graph: GraphTensors, x: Tensor, leaky: float) -> tuple[list[Tensor], list[Tensor]]:
    """a' of all frames, (S, B) each, and their totals without the leak, (B,) each."""
    initial = graph.initial.unsqueeze(1)
    alpha = initial.expand(-1, x.shape[2])
    alphas: list[Tensor] = []
    totals: list[Tensor] = []
    for t in range(len(x) + 1):
        if t > 0:
            into = _sum_arcs(graph, alphas[-1]) * x[t - 1][graph.group_pdfs]
            alpha = _sums_by(graph.group_states, into, graph.num_states) / totals[-1]
        totals.append(alpha.sum(dim=0, dtype=torch.float64).to(x.dtype))
        alphas.append(alpha + leaky * totals[-1] * initial)
    return alphas, totals


def _sum_arcs(graph: GraphTensors, alpha: Tensor) -> Tensor:
    """(G, B): the sum over a group's arcs of probability times a'."""
    return _sums_by(graph.arc_groups, alpha[graph.sources] * graph.in_probs.unsqueeze(1), len(graph.group_pdfs))


def _sums_by(indices: Tensor, rows: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, indices, rows)
