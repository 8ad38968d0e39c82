"""``easgd``: elastic averaging: each learner is tied to a common centre by a spring, and the centre to all of them.

Rule (Zhang, Choromanska and LeCun, arXiv 1412.6651, the asynchronous Algorithm 1), learner i after each K/N
frames of its own:

    d <- alpha (x_i - c);     x_i <- x_i - d;     c <- c + d                                             (1)

As a transaction: learner i sends the snapshot s of its model; the owner of the centre answers c and adds
alpha (s - c) to it; on the answer the learner adds alpha (c - s), the exact opposite. The sum of all models
and the centre is unchanged, whoever is late. In equation (X) the centre is one more column that takes no
steps: W = I - alpha (e_i - e_c)(e_i - e_c)', a star; the age is that of the answer. Were all learners to exchange
at once, the centre would move by N alpha times its distance from their mean: beta = N alpha of the paper,
whose experiments have beta = 0.9, hence the default alpha = 0.9/N.

*Momentum* (EAMSGD, the paper's Algorithm 2) is Nesterov's, delta, of each learner alone, on the gradient at a
point that lies ahead:

    v <- delta v + u(x + delta v);     x <- x + v                                                         (2)

with u the step that the optimiser makes of a gradient. The published model here is that point, y = x + delta v:
where learners meet is where gradients are taken. For it, (2) is

    y' = x' + delta v' = (y - delta v) + v' + delta v' = y + u + delta v',        v' = delta v + u        (3)

so the published change is u + delta v' in the place of u. With (1 - delta) u for u, as with Kaldi's own
momentum, delta does not change the effective learning rate.

The final model is the mean of the learners' (the paper takes the centre, which follows it).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from kaldi_mpi.averaging.centre import Centred
from kaldi_mpi.averaging.published import Flat
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.averaging.strategy import Hook
from kaldi_mpi.transport.number_formats import Wire, from_wire
from kaldi_mpi.transport.world import Collective


class Easgd(Centred):
    """Equations (1) and (3).

    Args:
        world, frames_per_average, dedicated_server: see `Centred`.
        alpha: in (0, 1]; None: 0.9/N.
        momentum: delta, in [0, 1).
    """

    name: ClassVar[str] = "easgd"

    def __init__(
        self,
        world: Collective,
        frames_per_average: int | None = None,
        alpha: float | None = None,
        momentum: float = 0.0,
        dedicated_server: bool = False,
    ) -> None:
        super().__init__(world, frames_per_average, dedicated_server)
        self.weight = 0.9 / self.num_learners if alpha is None else alpha
        self.momentum = momentum
        self.hooks = Hook.FILTER_CHANGE if momentum > 0 else Hook.NONE
        self._velocity = np.zeros(0, np.float32)  # v, (P,), once there is momentum

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> Easgd:
        return cls(
            world,
            settings.frames_per_average,
            settings.elastic_alpha,
            settings.elastic_momentum,
            settings.dedicated_server,
        )

    def update_centre(self, piece: int, source: int, number: int, theirs: Wire) -> Wire:
        """The owner's half of (1), in the numbers that travel."""
        reply = self.centre_wire(piece)
        difference = from_wire(theirs) - from_wire(reply)
        difference *= np.float32(self.weight)
        self.centre[piece] += difference
        return reply

    def filter_change(self, change: Flat) -> None:
        """(3): `change`, (P,), is u and becomes the change of y."""
        if not self.momentum or self.size == 1:
            return
        if not self._velocity.size:
            self._velocity = np.zeros_like(change)
        delta = np.float32(self.momentum)
        change *= np.float32(1 - self.momentum)
        self._velocity *= delta
        self._velocity += change
        change += delta * self._velocity

    def state_dict(self) -> dict[str, Any]:
        """Adds v."""
        return super().state_dict() | {"velocity": self._velocity.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._velocity = state["velocity"].copy()
