"""A rank that is lost in the middle, at any moment: the others' exchanges end, and go on without it."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from kaldi_mpi.averaging.asgd import Asgd
from kaldi_mpi.averaging.easgd import Easgd
from kaldi_mpi.testing.simulation import Event, Simulation
from tests.gossip import GOSSIP, Make, simulation, starting_models, still

NUM_STEPS, SIZE, PIECE = 12, 4, 2
MAKERS: dict[str, Make] = {
    **GOSSIP,
    "easgd": Easgd,
    "asgd": functools.partial(Asgd, staleness_bound=2),
    "asgd-server": functools.partial(Asgd, staleness_bound=2, dedicated_server=True),
}


class Losing:
    """A simulation with ranks that are silent: nothing happens at them, and what they have sent is dropped."""

    def __init__(self, make: Make, seed: int) -> None:
        models = starting_models(SIZE)
        steps = [NUM_STEPS] * SIZE
        # A server that learns nothing has no steps.
        if make is MAKERS["asgd-server"]:
            steps[-1] = 0
        self.world: Simulation = simulation(make, models, steps, piece_size=PIECE)
        self.random = np.random.default_rng(seed)
        self.gone: set[int] = set()

    def possible(self) -> list[Event]:
        """What may happen next at those that are there."""
        return [e for e in self.world.possible() if not {e.rank, e.source} & self.gone]

    def run(self, most: int | None = None) -> None:
        count = 0
        while (events := self.possible()) and count != most:
            self.world.do(events[int(self.random.integers(len(events)))])
            count += 1

    def lose(self, rank: int) -> None:
        """One after the other hears of it, other things happening in between."""
        self.gone.add(rank)
        self.world.channels = {pair: c for pair, c in self.world.channels.items() if rank not in pair}
        for other in self.random.permutation([r for r in range(SIZE) if r not in self.gone]):
            self.world.strategies[int(other)].drop(rank)
            self.run(most=int(self.random.integers(4)))
            # What somebody sends to it who has not heard yet is never read.
            self.world.channels = {pair: c for pair, c in self.world.channels.items() if rank not in pair}

    def take_back(self, rank: int) -> None:
        """It has rank 0's model, and all know."""
        strategies = self.world.strategies
        lost = strategies[rank]
        lost.abandon()
        self.world.ranks[rank].posted.clear()
        self.world.published_models[rank].values[:] = self.world.published_models[0].values
        lost.adopt()
        for other in range(SIZE):
            if other != rank:
                strategies[other].admit(rank)
        self.gone.discard(rank)

    def check_end(self) -> None:
        for rank in set(range(SIZE)) - self.gone:
            assert self.world.ranks[rank].left, f"learner {rank} waits for ever before its step"
            assert self.world.strategies[rank].quiet(), f"an exchange of rank {rank} is never answered"
        assert np.isfinite(self.world.models()).all()


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("comes_back", [False, True])
def test_the_others_go_on(name: str, comes_back: bool) -> None:
    for seed in range(60):
        losing = Losing(MAKERS[name], seed)
        losing.run(most=int(losing.random.integers(200)))
        rank = int(losing.random.integers(1, SIZE - 1))
        if not losing.world.ranks[rank].left:
            losing.lose(rank)
            losing.run(most=int(losing.random.integers(60)))
            if comes_back:
                losing.take_back(rank)
        losing.run()
        losing.check_end()


@pytest.mark.parametrize("name", ["adpsgd-fixed", "adpsgd-random", "expair"])
def test_those_that_are_left_still_approach_each_other(name: str) -> None:
    """Without steps of their own, all models but the lost one end near one."""
    losing = Losing(MAKERS[name], seed=1)
    losing.world.change = still
    losing.world.num_steps = [60] * SIZE
    losing.run(most=20)
    losing.lose(2)
    losing.run()
    losing.check_end()
    models = losing.world.models()[[0, 1, 3]]
    assert np.abs(models - models.mean(0)).max() < 1e-3
