"""``allreduce``: the gradients of all learners are averaged at each minibatch.

Rule (synchronous SGD; SC-PSGD of arXiv 1904.04956, BSP of arXiv 1703.05880), learner i of N:

    g = (1/N) * sum_j g_j,      w_i = w_i - (N a) g                                            (1)

where g_j is summed over the frames of learner j's minibatch and a is the effective learning rate, so that
(1) is w - a * sum_j g_j: exactly the step that one learner takes on the N-fold minibatch. Optimiser state
(momentum, maximum change) sees the same gradient on every rank, so the models never differ.

Gradients may travel in 16 bits: each is rounded before it is summed, the sum and its way back are not.

Mixing matrix: 11'/N on the gradients; age 0; no outer filter. It holds for uneven minibatches too: a
learner without frames adds a zero.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kaldi_mpi.averaging.published import Flat
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.averaging.strategy import Hook, Synchronous
from kaldi_mpi.transport.world import Collective


class Allreduce(Synchronous):
    """Equation (1). N learners equal one learner with the N-fold minibatch, to float32 rounding.

    Args:
        world: the learners.
        transfer_dtype: of what travels.
    """

    name: ClassVar[str] = "allreduce"
    hooks = Hook.COMBINE_GRADIENTS
    moves_together: ClassVar[bool] = True

    def __init__(self, world: Collective, transfer_dtype: str = "float32") -> None:
        super().__init__(world)
        self.transfer_dtype = transfer_dtype

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> Allreduce:
        return cls(world, settings.transfer_dtype)

    def combine_gradients(self, gradients: Flat) -> None:
        """Replace `gradients` by their mean over the learners, as in (1)."""
        if self.world.size == 1:
            return  # not one bit changes for a single learner
        self.world.sum_(gradients, self.transfer_dtype)
        gradients /= np.float32(self.world.size)
        self._count_average(gradients, self.transfer_dtype)

    def mean_model(self, parameters: Flat) -> Flat:
        """A copy: the models never differ, and a mean of equal numbers could still round."""
        return parameters.copy()


class SuperLearnerAllreduce(Allreduce):
    """(1) where all learners are one super-learner, which has summed its gradients already."""

    hooks = Hook.NONE
