"""Small graphs made by chance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from kaldi_mpi.formats.fst import Fst

Arc = tuple[int, float, int]  # label, cost, next


def make_fst(finals: Sequence[float], arcs: Sequence[Sequence[Arc]]) -> Fst:
    """An acceptor that starts in state 0, from the arcs of each state."""
    flat = [arc for of_state in arcs for arc in of_state]
    labels = np.array([label for label, _, _ in flat], dtype=np.int32)
    return Fst(
        0,
        np.array(finals, dtype=np.float32),
        np.cumsum([0, *map(len, arcs)]).astype(np.int64),
        labels,
        labels,
        np.array([cost for _, cost, _ in flat], dtype=np.float32),
        np.array([following for _, _, following in flat], dtype=np.int32),
    )


def random_denominator(seed: int, states: int, pdfs: int, degree: float = 3.0) -> Fst:
    """Any state leads somewhere; degrees differ; arcs of the same pdf between the same states occur."""
    generator = np.random.default_rng(seed)
    arcs = []
    for state in range(states):
        count = min(int(generator.geometric(1.0 / degree)), 4 * states)
        of_state = [
            (int(generator.integers(1, pdfs + 1)), float(generator.uniform(0.0, 4.0)), int(generator.integers(states)))
            for _ in range(count)
        ]
        arcs.append([*of_state, (int(generator.integers(1, pdfs + 1)), 0.7, (state + 1) % states)])
    finals = np.where(generator.random(states) < 0.3, generator.uniform(0.0, 3.0, states), np.inf)
    return make_fst(finals.tolist(), arcs)


def random_layers(seed: int, frames: int, pdfs: int, width: int = 3) -> Fst:
    """A constrained numerator: every state has a time and is on a path; final costs at the end."""
    generator = np.random.default_rng(seed)
    layers = [[0]]
    for _ in range(frames):
        begin = layers[-1][-1] + 1
        layers.append(list(range(begin, begin + int(generator.integers(1, width + 1)))))
    arcs: list[list[Arc]] = []
    for here, there in itertools.pairwise(layers):
        ends = [[int(generator.choice(there))] for _ in here]
        for state in there:  # each is reached
            ends[int(generator.integers(len(here)))].append(state)
        for of_state in ends:
            arcs.append(
                [(int(generator.integers(1, pdfs + 1)), float(generator.uniform(-1, 5)), end) for end in of_state]
            )
    arcs += [[] for _ in layers[-1]]
    finals = [float("inf")] * layers[-1][0] + [float(cost) for cost in generator.uniform(0, 2, len(layers[-1]))]
    return make_fst(finals, arcs)


def random_cycles(seed: int, states: int, pdfs: int) -> Fst:
    """An end-to-end numerator, of which a part may lead nowhere."""
    generator = np.random.default_rng(seed)
    arcs: list[list[Arc]] = [
        [
            (int(generator.integers(1, pdfs + 1)), float(generator.uniform(-1, 4)), int(generator.integers(states)))
            for _ in range(int(generator.integers(0, 4)))
        ]
        for _ in range(states)
    ]
    arcs[0].append((1, 0.5, 0))
    finals = np.where(generator.random(states) < 0.4, generator.uniform(0.0, 3.0, states), np.inf)
    finals[0] = 0.3
    return make_fst(finals.tolist(), arcs)


def random_outputs(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    """float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


seeds = st.integers(0, 2**31)
