"""``expair``, ours: pairwise exchanges over an exponential graph, as close as delay-by-one, never waiting.

Rule. Learner i starts an exchange (`exchange`) after each of its steps, the t-th of its life with partner

    j = i + 2^((t + i) mod ceil(log2 N))  mod N                                                         (1)

of weight 1/2, both models becoming their mean; or 1/3 if j has a request of its own under way, since three
models then meet: j's, ours and that of j's partner. Requests of a pair that cross are one exchange.

The graph is the one-peer exponential graph: with all hops taken once in step, W is the product over h of
(I + S^(2^h))/2, S the cyclic shift, and for N a power of two that product is exactly 11'/N, the full mean,
after log2 N exchanges each. The offset by the learner's own number in (1) was found by simulation
(``bench/consensus.py``): learners that keep step would otherwise all ask over the same hop at once, and each
would answer one neighbour while being answered by the other; with the hops spread, and the smaller weight
for a busy partner, models stay as close to their mean as with partners drawn at random, or closer.

Mixing matrix of one exchange: I - w (e_i - e_j)(e_i - e_j)', w = 1/2 or 1/3: symmetric, doubly stochastic.
Age: as old as a message takes. No outer filter. Nothing waits: partners are answered by communication
threads, and an exchange that was not even started when the next step ends is let go, so a slow link makes
exchanges rarer and never leaves a backlog. Sent by a learner in a step: its request and one answer, twice the
model, as by a ring or by an allreduce in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kaldi_mpi.averaging import topology
from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.transport.world import Collective


class Expair(Exchanging):
    """Exchanges with partners at exponential distances.

    Args:
        world: the learners.
        exchanges_per_step: started by a learner after each of its steps, one after the other; it is asked for
            as many.
        frames_per_average: see `Exchanging`.
    """

    name: ClassVar[str] = "expair"
    merges: ClassVar[bool] = True
    busy_weight: ClassVar[float | None] = 1 / 3

    def __init__(self, world: Collective, exchanges_per_step: int = 1, frames_per_average: int | None = None) -> None:
        super().__init__(world, frames_per_average)
        self.exchanges_per_step = exchanges_per_step
        self.weight = 1 / 2

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> Expair:
        return cls(world, settings.exchanges_per_step, settings.frames_per_average)

    def partners(self, round_number: int) -> Sequence[int]:
        """The next few by (1), t being the number of the exchange among those that this learner has started."""
        numbers = range(self._number, self._number + self.exchanges_per_step)
        return [self._neighbour(lambda place, size, t=t: topology.exponential(place, size, t)) for t in numbers]  # type: ignore[misc]
