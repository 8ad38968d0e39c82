"""A strategy of one's own: after each step the learners average, but only what has changed most since the last time.

Of its change d_i = w_i - c a learner sends the largest tenth, s_i, and keeps the rest for later:
w_i <- w_i + mean_j(s_j) - s_i and c <- c + mean_j(s_j), so that the mean of the models stays where it is.
It runs here over threads, beside the same rule in float64. Run: python examples/own_strategy.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.averaging import Hook, Synchronous, synchronous_step
from kaldi_mpi.averaging.published import Flat
from kaldi_mpi.testing.array_learner import ArrayLearner
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import World

NUM_LEARNERS, NUM_PARAMETERS, NUM_STEPS, FRAMES = 3, 50, 12, 10


class LargestChanges(Synchronous):
    """The rule above; named in `kaldi_mpi.averaging.registry` it would be there for ``--strategy largest``."""

    name = "largest"
    hooks = Hook.MIX_PARAMETERS

    def begin(self, parameters: Flat) -> None:
        self.centre = parameters.copy()

    def count_step(self, frames: int, global_frames: int) -> bool:
        return True

    def mix_parameters(self, parameters: Flat) -> bool:
        change = parameters - self.centre
        change[np.abs(change) < np.quantile(np.abs(change), 0.9)] = 0
        mean = change.copy()
        self.world.sum_(mean)
        mean /= np.float32(self.world.size)
        parameters += mean - change
        self.centre += mean
        return False

    def finish(self, parameters: Flat) -> None:
        parameters[:] = self.mean_model(parameters)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"centre": self.centre.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.centre = state["centre"].copy()


def gradient(rank: int, step: int) -> NDArray[np.float64]:
    """(P,), of a problem without a meaning."""
    return np.random.default_rng([rank, step]).standard_normal(NUM_PARAMETERS)


def train(world: World) -> Flat:
    """What each learner does; returns its model before the last mean."""
    strategy = LargestChanges(world)
    learner = ArrayLearner(np.zeros(NUM_PARAMETERS, np.float32), rate=0.1)
    strategy.begin(learner.parameters)
    for step in range(NUM_STEPS):

        def compute(step: int = step) -> None:
            learner.gradients[:] = gradient(world.rank, step)

        synchronous_step(strategy, learner, compute, FRAMES, FRAMES * world.size)
    own = learner.parameters.copy()
    strategy.finish(learner.parameters)
    return own


def formula() -> NDArray[np.float64]:
    """(N, P): the models by the rule as it stands above, all in one place."""
    w, centre = np.zeros((NUM_LEARNERS, NUM_PARAMETERS)), np.zeros(NUM_PARAMETERS)
    for step in range(NUM_STEPS):
        w -= 0.1 * np.array([gradient(rank, step) for rank in range(NUM_LEARNERS)])
        change = w - centre
        least = np.quantile(np.abs(change), 0.9, axis=1, keepdims=True)
        sent = np.where(np.abs(change) < least, 0, change)
        w += sent.mean(0) - sent
        centre += sent.mean(0)
    return w


def main() -> None:
    """Compare the two."""
    models, expected = np.array(run_world(NUM_LEARNERS, train)), formula()
    print(f"largest difference from the formula: {np.abs(models - expected).max():.1e}")
    print(f"distance of the models from their mean: {np.sqrt(((models - models.mean(0)) ** 2).mean()):.3f}")
    np.testing.assert_allclose(models, expected, atol=1e-5)


if __name__ == "__main__":
    main()
