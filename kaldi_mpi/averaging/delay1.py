"""``adpsgd-delay1``: the models' full mean, taken while the gradient is computed: one step old when it is used.

Rule (D1D of arXiv 2110.11199, Algorithm 4; HYBRID of arXiv 1904.04956), learner i of N, each minibatch:

    at the same time:  h = (1/N) sum_j w_j       and       u_i = the optimiser's change, g taken at w_i     (1)
    then               w_i <- h + u_i                                                                      (2)

The paper's equation puts the gradient one step further back; its algorithm, which can be carried out, is (1).
After (2) the models differ by one step of each, whatever N is; that noise is what its authors credit for
the batch sizes at which it still converges.

Mixing matrix: 11'/N on models that lack the step being taken: age 1; no outer filter. The mean of the models
moves as synchronous SGD does, by the mean of the u_i. There is a barrier in each step: a slow learner slows all.
The mean may travel in 16 bits: w_i <- w_i + (1/N) sum_j q(w_j) - q(w_i) + u_i, where q rounds, has the same mean.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from kaldi_mpi.averaging.published import Flat
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.averaging.strategy import Hook, Synchronous
from kaldi_mpi.transport.world import Collective, Pending


class Delay1(Synchronous):
    """Equations (1) and (2).

    Args:
        world: the learners.
        transfer_dtype: of what travels.
    """

    name: ClassVar[str] = "adpsgd-delay1"
    hooks = Hook.START_STEP | Hook.BASE

    def __init__(self, world: Collective, transfer_dtype: str = "float32") -> None:
        super().__init__(world)
        self.transfer_dtype = transfer_dtype
        self._pending: Pending | None = None
        self._mean: Flat | None = None  # (P,) float32, while it is on its way

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> Delay1:
        return cls(world, settings.transfer_dtype)

    def start_step(self, parameters: Flat) -> None:
        """Set out for the mean."""
        if self.world.size == 1 or self._mean is not None:  # not None: restored in the middle of this step
            return
        # No copy of the parameters, which wait for the mean: a pass over memory here would not be hidden.
        self._mean = np.empty_like(parameters)
        self._pending = self.world.start_mean(parameters, self._mean, self.transfer_dtype)
        self._count_average(self._mean, self.transfer_dtype)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def base(self) -> Flat | None:
        """The mean h of (2)."""
        if self.world.size == 1:
            return None
        assert self._mean is not None, "start_step() has not been called"
        self._wait()
        mean, self._mean = self._mean, None
        return mean

    def finish(self, parameters: Flat) -> None:
        """The final model is the learners' mean."""
        if self.world.size > 1:
            parameters[:] = self.mean_model(parameters)

    def state_dict(self) -> dict[str, Any]:
        """Adds the mean that is on its way, for which it waits."""
        self._wait()
        return super().state_dict() | {"mean": None if self._mean is None else self._mean.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._pending = None
        self._mean = None if state["mean"] is None else state["mean"].copy()
