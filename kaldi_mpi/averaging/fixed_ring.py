"""``adpsgd-fixed``: each learner averages with its two neighbours on a ring, without waiting.

Rule (AD-PSGD with the matrix T_1, arXiv 2110.11199; FM there). In lock step, with L = x_(i-1), R = x_(i+1),

    h_i = (L + x_i + R) / 3,      x_i = h_i + D_i                                                      (1)

where D_i is the learner's own change at its own, not yet averaged model. Here (1) is carried out by pairs:
after each own step a learner starts an exchange (`exchange`) of weight 1/3 with its right neighbour. If all
requests are under way before any is answered, learner i adds (L - x_i)/3 when it answers the left one and
(R - x_i)/3 when its own is answered: exactly (1). Otherwise one of the two acts on a newer model than
the other, and the mean of all models is kept all the same.

Mixing matrix: the circulant W = circ(1/3, 1/3, 0, .., 0, 1/3). Its eigenvalues are 1/3 + (2/3) cos(2 pi k/N), so
models approach each other by max_k>0 |.| a step: 0.333 at N = 4, 0.805 at 8, 0.949 at 16, 0.997 at 64; the
spectral gap falls as 4 pi^2/(3 N^2). For N = 2 both neighbours are the same learner: 1/3 and 2/3.
Requests that cross need no rule of their own: with 1/3 twice the models still approach.

Age: what is mixed is as old as a message takes; no outer filter. Sent by a learner in a step: its
request and one answer, twice the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kaldi_mpi.averaging import topology
from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.transport.world import Collective


class FixedRing(Exchanging):
    """Exchanges of weight 1/3 with the right neighbour.

    Args:
        world: the learners.
        frames_per_average: see `Exchanging`.
    """

    name: ClassVar[str] = "adpsgd-fixed"

    def __init__(self, world: Collective, frames_per_average: int | None = None) -> None:
        super().__init__(world, frames_per_average)
        self.weight = 1 / 3

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> FixedRing:
        return cls(world, settings.frames_per_average)

    def partners(self, round_number: int) -> Sequence[int]:
        """The right neighbour."""
        return [self._neighbour(topology.fixed_ring)]
