"""``adpsgd-random``: neighbours on a ring that is shuffled at each step.

Rule (AD-PSGD with random mixing, arXiv 2002.01119 and 2110.11199; RM, T_u): as ``adpsgd-fixed``, with

    W_k = P_k' circ(1/3, 1/3, 0, .., 0, 1/3) P_k                                                          (1)

P_k the permutation of step k, drawn (Fisher-Yates) from a seed that all learners share, so that they need not
tell each other. A learner takes k from its own count of rounds; learners that are not in step look at
different rings, and conserve the mean all the same, since each exchange is a transaction of its pair.

Mixing matrix: (1), doubly stochastic for each k. With C = circ(..) and the ring random,

    E |W x - mean|^2 = lambda |x - mean|^2,   lambda = (trace(C'C) - 1)/(N - 1)                          (2)

since the mean of P'(C'C)P over all permutations P commutes with every permutation: it is the same number on
all vectors of mean zero. For N >= 3 trace(C'C) = N/3, which makes lambda = (N/3 - 1)/(N - 1) < 1/3: the
models approach by more than sqrt(1/3) = 0.577 a step whatever N is (the paper's bound is
sqrt(N - 1)/sqrt(3)^k after k steps), where the fixed ring's factor goes to 1.

Age: what is mixed is as old as a message takes; no outer filter. Sent by a learner in a step: twice the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kaldi_mpi.averaging import topology
from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.transport.world import Collective


class RandomRing(Exchanging):
    """Exchanges of weight 1/3 with the right neighbour on this round's ring.

    Args:
        world: the learners.
        seed: of the permutations; the same on all ranks.
        frames_per_average: see `Exchanging`.
    """

    name: ClassVar[str] = "adpsgd-random"

    def __init__(self, world: Collective, seed: int, frames_per_average: int | None = None) -> None:
        super().__init__(world, frames_per_average)
        self.seed = seed
        self.weight = 1 / 3

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> RandomRing:
        return cls(world, settings.seed, settings.frames_per_average)

    def partners(self, round_number: int) -> Sequence[int]:
        """The right neighbour of this round."""
        return [self._neighbour(lambda place, size: topology.random_ring(place, size, round_number, self.seed))]
