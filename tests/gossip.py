"""What the tests of asynchronous strategies share: a small simulated world, and a problem to train on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.averaging.driver import Participant
from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.expair import Expair
from kaldi_mpi.averaging.fixed_ring import FixedRing
from kaldi_mpi.averaging.journal import Journal, Records
from kaldi_mpi.averaging.published import HostPublishedModel
from kaldi_mpi.averaging.random_ring import RandomRing
from kaldi_mpi.averaging.strategy import Asynchronous
from kaldi_mpi.learner.flat import ComponentSlice, FlatParameters
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.testing.reference import kaldi_step
from kaldi_mpi.testing.simulation import SimulatedRank, Simulation
from kaldi_mpi.transport.world import Collective, World

Make = Callable[[Collective], Asynchronous]

GOSSIP: dict[str, Callable[[Collective], Exchanging]] = {
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
        [make(SimulatedRank(rank, size)) for rank in range(size)],
        [HostPublishedModel(row, piece_size, wire) for row in models],
        [Journal() for _ in range(size)],
        change,
        [num_steps] * size if isinstance(num_steps, int) else num_steps,
    )


def total_after(models: NDArray[np.float32], num_steps: Sequence[int]) -> NDArray[np.float64]:
    """(P,): the sum of all models and of all steps of `noise`, in float64."""
    total: NDArray[np.float64] = models.astype(np.float64).sum(0)
    for rank, steps in enumerate(num_steps):
        for step in range(steps):
            total += noise(rank, step, models[0])[0]
    return total


# A problem with gradients: least squares, by Kaldi's optimiser with all its limits.

DIM, NUM_STEPS, PIECE = 12, 9, 5
MAX_CHANGE = [(slice(0, 5), 0.05), (slice(5, DIM), 0.02)]
MAX_PARAM_CHANGE, MOMENTUM = 0.04, 0.5


def gradient(w: NDArray[np.float64], learner: int, step: int) -> NDArray[np.float64]:
    """Least squares on this learner's minibatch of this step; sizes differ."""
    rng = np.random.default_rng([learner, step])
    frames = 1 + (5 * learner + 3 * step) % 7
    x, y = rng.standard_normal((frames, DIM)), rng.standard_normal(frames)
    return x.T @ (x @ w - y)


def start_model() -> NDArray[np.float64]:
    """(DIM,), the same for all learners."""
    return np.random.default_rng(99).standard_normal(DIM)


def flat_parameters(limits: bool = True) -> FlatParameters:
    """`start_model` in the learner's own buffers, as two components with a largest change each."""
    return FlatParameters(
        torch.from_numpy(start_model().astype(np.float32)),
        [
            ComponentSlice(f"c{i}", where, limit if limits else 0.0, 1.0, 0.0)
            for i, (where, limit) in enumerate(MAX_CHANGE)
        ],
    )


def rate(step: int, size: int) -> float:
    """The actual learning rate of a step."""
    return 0.002 * 0.9**step * size


def num_steps(rank: int) -> int:
    """Some learners end earlier than others."""
    return NUM_STEPS - 2 * (rank % 2)


def train(world: World, strategy: Asynchronous) -> tuple[NDArray[np.float32], NDArray[np.float32], Records]:
    """A training with the learner's real optimiser; returns own model, final model, journal."""
    flat = flat_parameters()
    optimiser = KaldiSgd(flat, MOMENTUM, MAX_PARAM_CHANGE)
    w, change = flat.values.numpy(), torch.zeros(DIM)
    model, journal = HostPublishedModel(w, PIECE), Journal()
    participant = Participant(strategy, model, world.messages, journal)
    participant.connect()
    world.barrier()
    for step in range(num_steps(world.rank)):
        flat.gradients.numpy()[:] = gradient(w.astype(np.float64), world.rank, step)
        optimiser.step(rate(step, world.size), 1, change)
        participant.publish(change, w, frames=10)
        if (step + world.rank) % 3 == 0:
            time.sleep(0.002)  # so that messages meet learners in various states
    participant.leave()
    participant.settle()
    world.barrier()
    own, final = model.to_numpy(), model.to_numpy()
    strategy.finish(final)
    participant.disconnect()
    return own, final, journal.records()


def reference_change(size: int) -> Callable[[int, int, NDArray[np.float64]], NDArray[np.float64]]:
    """The changes that `train` makes, in float64, for `replay`."""
    deltas = [np.zeros(DIM) for _ in range(size)]

    def change(rank: int, step: int, w: NDArray[np.float64]) -> NDArray[np.float64]:
        own, deltas[rank] = kaldi_step(
            deltas[rank], gradient(w, rank, step), rate(step, size), MOMENTUM, MAX_CHANGE, MAX_PARAM_CHANGE
        )
        return own

    return change
