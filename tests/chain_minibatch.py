"""Minibatches of chain training whose supervision is made up: paths that a made-up denominator graph allows."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from kaldi_mpi.chain.denominator import Denominator
from kaldi_mpi.chain.denominator_graph import denominator_graph, initial_probabilities
from kaldi_mpi.chain.supervision_graphs import supervision_graphs
from kaldi_mpi.formats.fst import Fst
from kaldi_mpi.formats.supervision import Supervision
from kaldi_mpi.loader import ChainSupervision, ChunkShape, Minibatch
from kaldi_mpi.models import AcousticModel
from tests.chain.graphs import Arc, make_fst, random_denominator

_STATES, _PATHS = 24, 3


@functools.lru_cache(maxsize=8)
def made_graph(num_pdfs: int) -> Fst:
    """A small denominator graph of a tree with so many pdfs, not all of which occur."""
    return random_denominator(num_pdfs, _STATES, num_pdfs)


def made_denominator(num_pdfs: int, leaky: float) -> Denominator:
    """The denominator of `made_graph`."""
    return Denominator(denominator_graph(made_graph(num_pdfs), num_pdfs), leaky)


def allowed_paths(graph: Fst, frames: int, rng: np.random.Generator) -> Fst:
    """A constrained numerator of all paths through the places that some random ways through a graph come by.

    A path costs what it costs in the graph from where the denominator begins, so that what is allowed here is never
    more probable than the denominator.
    """
    initial = initial_probabilities(graph)
    ways = [[int(rng.choice(len(initial), p=initial))] for _ in range(_PATHS)]
    used: list[set[int]] = [set() for _ in range(frames)]  # arcs of the graph, by frame
    for way in ways:
        for of_frame in used:
            arc = int(rng.integers(graph.first_arc[way[-1]], graph.first_arc[way[-1] + 1]))
            of_frame.add(arc)
            way.append(int(graph.nexts[arc]))
    sources = np.repeat(np.arange(len(graph.finals)), np.diff(graph.first_arc))
    # Every way begins in state 0 here, whatever state of the graph that is; then a state for each place and time.
    reached = {(frame + 1, int(graph.nexts[arc])) for frame in range(frames) for arc in used[frame]}
    places = [(0, -1), *sorted(reached)]
    number = {place: count for count, place in enumerate(places)}
    arcs: list[list[Arc]] = [[] for _ in places]
    for frame in range(frames):
        for arc in sorted(used[frame]):
            source, cost = int(sources[arc]), float(graph.costs[arc])
            begin = (frame, source) if frame else (0, -1)
            cost -= 0.0 if frame else float(np.log(initial[source]))
            arcs[number[begin]].append((int(graph.ilabels[arc]), cost, number[frame + 1, int(graph.nexts[arc])]))
    return make_fst([0.0 if frame == frames else float("inf") for frame, _ in places], arcs)


def made_supervision(num_pdfs: int, sequences: int, frames: int, seed: int) -> ChainSupervision[Tensor]:
    """What the loader gives of a minibatch of constrained examples."""
    rng = np.random.default_rng(seed)
    fsts = [allowed_paths(made_graph(num_pdfs), frames, rng) for _ in range(sequences)]
    graphs = supervision_graphs([Supervision(1.0, 1, frames, num_pdfs, False, (fst,)) for fst in fsts])
    return ChainSupervision(
        graphs.weight,
        frames,
        num_pdfs,
        False,
        **{
            name: torch.from_numpy(getattr(graphs, name))
            for name in ("first_state", "first_sequence", "first_arc", "finals", "pdfs", "costs", "nexts")
        },
    )


def made_minibatch(model: AcousticModel, sequences: int, frames: int, factor: int, seed: int) -> Minibatch[Tensor]:
    """Random features, and i-vectors where the network takes them, with `made_supervision` for its outputs.

    Args:
        frames: output frames of a sequence.
        factor: input frames for each of them.
    """
    shape = ChunkShape(frames, model.left_context, model.right_context, subsampling=factor)
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(sequences, shape.rows, model.input_dim, generator=generator)
    ivectors = torch.randn(sequences, model.ivector_dim, generator=generator) if model.ivector_dim else None
    labels = torch.empty(sequences, 0, dtype=torch.int64)
    count = sequences * frames
    return Minibatch(
        feats, labels, count, count, float(count), 0, 0, shape,
        ivectors=ivectors, supervision=made_supervision(model.output_dim, sequences, frames, seed),
    )  # fmt: skip
