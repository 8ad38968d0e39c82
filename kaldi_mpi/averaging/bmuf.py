"""``bmuf``: blockwise model-update filtering: periodic averaging with a momentum of its own behind the mean.

Rule (Chen and Huo, ICASSP 2016), each K frames over all learners, for a block that all began from `start`:

    G = (1/N) sum_j w_j - start            what the block did to the mean model                        (1)
    D <- eta D + zeta G                    block momentum, block learning rate                         (2)
    c <- c + D                             the global model                                            (3)
    start = c  (classical)   or   c + eta D  (Nesterov);    w_i <- start                               (4)

With eta = 0 and zeta = 1 it is plain averaging. (1) divides by N, so that zeta means the same for any number
of learners; some programs sum in its place, or fold 1 - eta into zeta.

*Learning rate.* Were G the same in each block, D would grow to zeta G / (1 - eta): a block moves the model by
that much. Learners therefore apply 1 - eta times Kaldi's actual rate (`rate_factor`), as Kaldi's own momentum
is scaled by 1 - m, and eta does not change the effective rate. With the default eta = 1 - 1/N the
learner's rate is the effective rate itself, as CNTK's documentation of BMUF wants it ("that of one worker").

*Local momentum* is stale where a block ends, since (4) moves the model elsewhere: it is forgotten unless
`reset_momentum` is False (CNTK's default as well).

Mixing matrix: the identity inside a block, 11'/N at its end; age 0; outer filter (2) to (4).
What travels in 16 bits is w_j - start, and what rounding takes from it is sent with the next block.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from kaldi_mpi.averaging.published import Flat
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.averaging.strategy import Hook, Synchronous
from kaldi_mpi.transport.number_formats import rounded
from kaldi_mpi.transport.world import Collective


class Bmuf(Synchronous):
    """Equations (1) to (4).

    Args:
        world: the learners.
        frames_per_average: K, counted over all learners.
        momentum: eta, in [0, 1); None: 1 - 1/N.
        learning_rate: zeta.
        nesterov: which of (4).
        reset_momentum: whether the optimiser is to forget its momentum at the end of a block.
        transfer_dtype: of what travels.
    """

    name: ClassVar[str] = "bmuf"
    hooks = Hook.MIX_PARAMETERS

    def __init__(
        self,
        world: Collective,
        frames_per_average: int,
        momentum: float | None = None,
        learning_rate: float = 1.0,
        nesterov: bool = False,
        reset_momentum: bool = True,
        transfer_dtype: str = "float32",
    ) -> None:
        super().__init__(world)
        self.frames_per_average = frames_per_average
        self.momentum = 1.0 - 1.0 / world.size if momentum is None else momentum
        self.learning_rate, self.nesterov, self.reset_momentum = learning_rate, nesterov, reset_momentum
        self.transfer_dtype = transfer_dtype
        self._frames = 0  # of this block, over all learners
        # c, D, and what rounding has kept back: (P,) float32 each, none for a learner alone.
        self._centre = self._delta = self._residue = np.zeros(0, np.float32)

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> Bmuf:
        assert settings.frames_per_average is not None  # check_settings has seen to it
        return cls(
            world,
            settings.frames_per_average,
            settings.block_momentum,
            settings.block_learning_rate,
            settings.nesterov,
            settings.reset_momentum,
            settings.transfer_dtype,
        )

    @property
    def rate_factor(self) -> float:
        """1 - eta; 1 for a learner alone."""
        return 1.0 if self.world.size == 1 else 1.0 - self.momentum

    def begin(self, parameters: Flat) -> None:
        """The first block begins here."""
        if self.world.size > 1:
            self._centre = parameters.copy()
            self._delta = np.zeros_like(parameters)
            self._residue = np.zeros(0 if self.transfer_dtype == "float32" else parameters.size, np.float32)

    def count_step(self, frames: int, global_frames: int) -> bool:
        """Count the step's frames; the block ends when K have gone by."""
        self._frames += global_frames
        return self._frames >= self.frames_per_average

    def _start(self) -> Flat:
        """(4): the model that the present block began from; a new array."""
        if not self.nesterov:
            return self._centre.copy()
        return self._centre + np.float32(self.momentum) * self._delta

    def mix_parameters(self, parameters: Flat) -> bool:
        """End a block by (1) to (4)."""
        self._frames = 0
        if self.world.size == 1:
            return False
        assert self._centre.size == parameters.size, "begin() has not been called"
        mean = parameters - self._start()
        if self._residue.size:
            self._residue += mean
            mean = rounded(self._residue, self.transfer_dtype)
            self._residue -= mean
        self.world.sum_(mean, self.transfer_dtype)
        mean *= np.float32(self.learning_rate / self.world.size)
        self._delta *= np.float32(self.momentum)
        self._delta += mean
        self._centre += self._delta
        parameters[:] = self._start()
        self._count_average(parameters, self.transfer_dtype)
        return self.reset_momentum

    def finish(self, parameters: Flat) -> None:
        """End the last block; the final model is c, without the look ahead."""
        if self._frames:
            self.mix_parameters(parameters)
        if self._centre.size:
            parameters[:] = self._centre

    def state_dict(self) -> dict[str, Any]:
        """Adds c and D, which give the start of the block by (4), what rounding kept back, and the block's frames."""
        return super().state_dict() | {
            "frames": self._frames,
            "centre": self._centre.copy(),
            "delta": self._delta.copy(),
            "residue": self._residue.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._frames = state["frames"]
        self._centre, self._delta = state["centre"].copy(), state["delta"].copy()
        self._residue = state["residue"].copy()
