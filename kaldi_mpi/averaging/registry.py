"""Strategies by their names."""

from __future__ import annotations

from kaldi_mpi.averaging.allreduce import Allreduce
from kaldi_mpi.averaging.asgd import Asgd
from kaldi_mpi.averaging.bmuf import Bmuf
from kaldi_mpi.averaging.delay1 import Delay1
from kaldi_mpi.averaging.easgd import Easgd
from kaldi_mpi.averaging.expair import Expair
from kaldi_mpi.averaging.fixed_ring import FixedRing
from kaldi_mpi.averaging.periodic import Periodic
from kaldi_mpi.averaging.random_ring import RandomRing
from kaldi_mpi.averaging.settings import Settings, check_settings
from kaldi_mpi.averaging.strategy import Strategy
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.world import Collective

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (Allreduce, Periodic, Bmuf, Easgd, Asgd, FixedRing, RandomRing, Delay1, Expair)
}
NAMES = tuple(STRATEGIES)


def make_strategy(
    name: str, world: Collective, settings: Settings | None = None, *, frames_per_average: int | None = None
) -> Strategy:
    """The strategy called `name`.

    Whether all settings have a user is for `check_settings` to say, once for all phases of a run.

    Args:
        name: one of `NAMES`.
        world: the learners; with a dedicated server, it as well, as the last.
        settings: what the strategies can be told; None: nothing but `frames_per_average`.
        frames_per_average: short for the one setting, checked at once.

    Raises:
        ConfigError: there is no such strategy, or it lacks a setting.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"--strategy {name}: unknown; there are {', '.join(NAMES)}")
    if settings is None:
        settings = Settings(frames_per_average=frames_per_average)
        check_settings([name], settings)
    elif settings.frames_per_average is None:
        check_settings([name], Settings())
    return STRATEGIES[name].from_settings(world, settings)
