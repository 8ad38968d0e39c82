"""The numerators in PyTorch's operations, a step in time after the other for all graphs at once: the reference.

    b(j) = -final cost at the end;  b(i) = log sum over arcs i -> j of pdf n: exp(y(n) - cost + b(j))
    share of an arc = exp(y(n) - cost + b(j) - b(i));  occupation of an arc = its share of that of its state

A graph's log-sum is b of its first state, whose occupation is 1. The states of a constrained graph have a time each;
a cyclic one has its b anew for each frame. Povey et al. 2016, section 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.chain.supervision_graphs import SupervisionGraphs


@dataclass(frozen=True, eq=False)
class ArcTensors:
    """The graphs of a minibatch on a device: G graphs, S states, N arcs, E entries; indices are int64.

    Attributes:
        cyclic: whether graphs are.
        steps: T, or as many as the longest constrained graph has.
        starts: (G,) each graph's first state.
        finals: (S,) float64: minus the final cost; -inf where a state is not final.
        first_arc: (S + 1,).
        costs: (N,) float64.
        sources, nexts: (N,) states.
        entries: (N,) of each arc, at its time or at frame 0.
        entry_steps: (N,) how far an entry is from the same pdf's at the frame before; of cyclic graphs.
        first_of_step: arcs of constrained graphs by the time of their source: where each step's begin in `by_step`.
        by_step: (N,).
        bounds: (G + 1,) each graph's first state, and S.
        layers: the first state of each time of each constrained graph, and its end.
        first_layer: (G + 1,) where those of a graph begin.
        num_entries: E.
    """

    cyclic: bool
    steps: int
    starts: Tensor
    finals: Tensor
    first_arc: Tensor
    costs: Tensor
    sources: Tensor
    nexts: Tensor
    entries: Tensor
    entry_steps: Tensor
    first_of_step: list[int]
    by_step: Tensor
    bounds: Tensor
    layers: Tensor
    first_layer: Tensor
    num_entries: int

    @classmethod
    def of(
        cls,
        graphs: SupervisionGraphs,
        times: NDArray[np.int32],
        arc_entries: NDArray[np.int32],
        first_entry: NDArray[np.int64],
        device: torch.device,
    ) -> ArcTensors:
        """From what numerator.prepare_numerator has found."""

        def there(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        sources = np.repeat(np.arange(len(graphs.finals)), np.diff(graphs.first_arc))
        lengths = np.diff(graphs.first_sequence) * graphs.frames
        entries, entry_steps = arc_entries.astype(np.int64), np.zeros(len(arc_entries), dtype=np.int64)
        first_of_step, by_step = [0, len(entries)], np.arange(len(entries))
        layers: list[NDArray[Any]] = [np.zeros(0, dtype=np.int64)]
        if graphs.cyclic:
            of_arc = np.repeat(np.arange(graphs.num_graphs), np.diff(graphs.first_arc[graphs.first_state]))
            entries += first_entry[of_arc]
            entry_steps = (np.diff(first_entry) // graphs.frames)[of_arc]
        else:
            of_step = times[sources]
            by_step = np.argsort(of_step, kind="stable")
            first_of_step = np.searchsorted(of_step[by_step], np.arange(int(lengths.max()) + 1)).tolist()
            for begin, end, length in zip(graphs.first_state, graphs.first_state[1:], lengths, strict=False):
                layers.append(begin + np.searchsorted(times[begin:end], np.arange(length + 2)))
        return cls(
            graphs.cyclic, int(lengths.max()), there(graphs.first_state[:-1].astype(np.int64)),
            there(-graphs.finals.astype(np.float64)), there(graphs.first_arc),
            there(graphs.costs.astype(np.float64)), there(sources), there(graphs.nexts.astype(np.int64)),
            there(entries), there(entry_steps), first_of_step, there(by_step),
            there(graphs.first_state.astype(np.int64)), there(np.concatenate(layers)),
            there(np.cumsum([0, *map(len, layers[1:])])), int(first_entry[-1]),
        )  # fmt: skip

    @cached_property
    def by_time(self) -> list[Tensor]:
        """The arcs of each step of constrained graphs."""
        return [self.by_step[begin:end] for begin, end in zip(self.first_of_step, self.first_of_step[1:], strict=False)]


def sum_paths(arcs: ArcTensors, scores: Tensor, posteriors: bool) -> tuple[Tensor, Tensor | None]:
    """The log-sum over the paths of each graph, (G,) float64; posteriors of entries, (E,) as scores, if wanted.

    Args:
        scores: (E,), the outputs of the entries.
    """
    sums, shares = (_cyclic if arcs.cyclic else _layered)(arcs, scores.double())
    if not posteriors:
        return sums, None
    found = torch.zeros(arcs.num_entries, dtype=torch.float64, device=scores.device)
    now = torch.zeros_like(arcs.finals)
    # No path: no arc of it has an occupation, as its shares are 0.
    now[arcs.starts] = 1.0
    for t in range(arcs.steps):
        of_step = slice(None) if arcs.cyclic else arcs.by_time[t]
        part = now[arcs.sources[of_step]] * (shares[t] if arcs.cyclic else shares[0][of_step])
        if arcs.cyclic:
            now = torch.zeros_like(now)
        now.index_add_(0, arcs.nexts[of_step], part)
        found.index_add_(0, arcs.entries[of_step] + t * arcs.entry_steps[of_step], part)
    return sums, found.to(scores.dtype)


def _layered(arcs: ArcTensors, scores: Tensor) -> tuple[Tensor, list[Tensor]]:
    betas, shares = arcs.finals.clone(), torch.zeros_like(arcs.costs)
    for of_step in reversed(arcs.by_time):
        sources = arcs.sources[of_step]
        values = scores[arcs.entries[of_step]] - arcs.costs[of_step] + betas[arcs.nexts[of_step]]
        found, shares[of_step] = _log_sums(sources, values, len(betas))
        betas[sources] = found[sources]
    return betas[arcs.starts], [shares]


def _cyclic(arcs: ArcTensors, scores: Tensor) -> tuple[Tensor, list[Tensor]]:
    betas, shares = arcs.finals, []
    for t in range(arcs.steps - 1, -1, -1):
        values = scores[arcs.entries + t * arcs.entry_steps] - arcs.costs + betas[arcs.nexts]
        betas, of_frame = _log_sums(arcs.sources, values, len(betas))
        shares.append(of_frame)
    return betas[arcs.starts], shares[::-1]


def _log_sums(sources: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The log-sum of the arcs that leave each state, (S,), and each arc's share of it."""
    most = torch.full((count,), -torch.inf, dtype=values.dtype, device=values.device)
    most = most.scatter_reduce(0, sources, values, "amax")
    safe = torch.where(most == -torch.inf, torch.zeros_like(most), most)
    powers = torch.exp(values - safe[sources])
    sums = torch.zeros_like(most).index_add_(0, sources, powers)
    return safe + torch.log(sums), powers / torch.where(sums == 0.0, torch.ones_like(sums), sums)[sources]
