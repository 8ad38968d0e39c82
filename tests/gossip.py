"""What the tests of asynchronous strategies share: a small simulated world, and a problem to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.expair import Expair
from kaldi_mpi.averaging.fixed_ring import FixedRing
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.random_ring import RandomRing
from kaldi_mpi.averaging.shared import SharedModel
from kaldi_mpi.averaging.strategy import Collective
from kaldi_mpi.transport.simulate import Place, Simulation

Make = Callable[[Collective], Exchanging]

GOSSIP: dict[str, Make] = {
    "adpsgd-fixed": FixedRing,
    "adpsgd-random": lambda world: RandomRing(world, seed=3),
    "expair": Expair,
    "expair-2": lambda world: Expair(world, exchanges_per_step=2),
}
NUM_PARAMETERS = 5


def noise(rank: int, step: int, copy: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """A step of unit noise that depends on who and when alone."""
    return np.random.default_rng([rank, step]).standard_normal(copy.size).astype(np.float32), 10


def still(rank: int, step: int, copy: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """A step that changes nothing."""
    return np.zeros_like(copy), 10


def starting_models(size: int, num_parameters: int = NUM_PARAMETERS) -> NDArray[np.float32]:
    """(N, P): different models, as they are in the middle of a run."""
    return np.random.default_rng(size).standard_normal((size, num_parameters)).astype(np.float32)


def simulation(
    make: Make,
    models: NDArray[np.float32],
    num_steps: int | Sequence[int],
    change: Callable[[int, int, NDArray[np.float32]], tuple[NDArray[np.float32], int]] = noise,
    piece_size: int = 10**6,
    wire: str = "float32",
) -> Simulation:
    """N learners that start from the rows of `models`."""
    size = len(models)
    return Simulation(
        [make(Place(rank, size)) for rank in range(size)],
        [SharedModel(row, piece_size, wire) for row in models],
        [Journal() for _ in range(size)],
        change,
        [num_steps] * size if isinstance(num_steps, int) else num_steps,
    )


def total_after(models: NDArray[np.float32], num_steps: Sequence[int]) -> NDArray[np.float64]:
    """(P,): the sum of all models and of all steps of `noise`, in float64."""
    total = models.astype(np.float64).sum(0)
    for rank, steps in enumerate(num_steps):
        for step in range(steps):
            total += noise(rank, step, models[0])[0]
    return total
