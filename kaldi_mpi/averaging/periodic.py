"""``periodic``: the parameters of all learners are averaged each K frames. Kaldi's jobs, without the jobs.

Rule (Kaldi nnet3's ``nnet3-average`` after each iteration, arXiv 1410.7455 section 2.2; local SGD):

    between averagings   w_i <- w_i - (N a) g_i                                                (1)
    when sum_i n_i >= K  w_i <- sum_j n_j w_j / sum_j n_j ;   n_i <- 0                         (2)

n_i counts the frames that learner i has trained on since the last averaging. All learners know sum_i n_i
without asking, since the sizes of all minibatches of a step are known everywhere, so they average after
the same step. The weights n_i make an unevenly fed learner count for what it saw (Kaldi weighs its jobs
equally, which is the same when they are); a learner that saw nothing has weight zero.

Mixing matrix: the identity between averagings, the weighted mean at an averaging; age 0; no outer filter.
Momentum stays with its learner through an averaging: the mean of the local momenta acts on the mean model
as one momentum would.

Models may travel in 16 bits. With r_i = n_i / sum_j n_j and q for the rounding,

    w_i <- w_i + sum_j q(r_j w_j) - q(r_i w_i) / r_i      (w_i <- the sum, where r_i = 0)                     (3)

in place of (2) leaves the weighted mean where it is, and each learner with what rounding took from its own
model; the last averaging is by (2).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from kaldi_mpi.averaging.published import Flat
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.averaging.strategy import Hook, Synchronous
from kaldi_mpi.transport.number_formats import rounded
from kaldi_mpi.transport.world import Collective


class Periodic(Synchronous):
    """Equations (1) and (2).

    Args:
        world: the learners.
        frames_per_average: K, counted over all learners.
        transfer_dtype: of what travels.
    """

    name: ClassVar[str] = "periodic"
    hooks = Hook.MIX_PARAMETERS

    def __init__(self, world: Collective, frames_per_average: int, transfer_dtype: str = "float32") -> None:
        super().__init__(world)
        self.transfer_dtype = transfer_dtype
        self.frames_per_average = frames_per_average
        self._own_frames = 0
        self._global_frames = 0

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> Periodic:
        assert settings.frames_per_average is not None  # check_settings has seen to it
        return cls(world, settings.frames_per_average, settings.transfer_dtype)

    def count_step(self, frames: int, global_frames: int) -> bool:
        """Count the step's frames; an averaging is due when K have gone by."""
        self._own_frames += frames
        self._global_frames += global_frames
        return self._global_frames >= self.frames_per_average

    def mix_parameters(self, parameters: Flat) -> bool:
        """Average as in (2)."""
        if self.world.size > 1:
            if self.transfer_dtype == "float32":
                parameters[:] = self.mean_model(parameters)
            else:
                self._mix_narrow(parameters)
            self._count_average(parameters, self.transfer_dtype)
        self._own_frames = self._global_frames = 0
        return False

    def _mix_narrow(self, parameters: Flat) -> None:
        """Average as in (3)."""
        share = np.float32(self._own_frames / self._global_frames)
        mine = rounded(share * parameters, self.transfer_dtype)
        total = mine.copy()
        self.world.sum_(total, self.transfer_dtype)
        if share == 0:
            parameters[:] = total
        else:
            parameters += total - mine / share

    def finish(self, parameters: Flat) -> None:
        """Average what has been trained since the last averaging."""
        if self.world.size > 1 and (self._global_frames or self.transfer_dtype != "float32"):
            parameters[:] = self.mean_model(parameters)
            self._count_average(parameters)
        self._own_frames = self._global_frames = 0

    def mean_model(self, parameters: Flat) -> Flat:
        """The model that an averaging now would give, by (2), as a new array."""
        if not self._global_frames:  # just averaged: equal, but for each one's rounding
            return parameters.copy() if self.transfer_dtype == "float32" else super().mean_model(parameters)
        mean = parameters.copy()
        if self.world.size > 1:
            mean *= np.float32(self._own_frames / self._global_frames)
            self.world.sum_(mean)
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Adds the frames since the last averaging."""
        return super().state_dict() | {"own_frames": self._own_frames, "global_frames": self._global_frames}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._own_frames, self._global_frames = state["own_frames"], state["global_frames"]
