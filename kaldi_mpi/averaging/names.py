"""Strategies by their names."""

from __future__ import annotations

from kaldi_mpi.averaging.allreduce import Allreduce
from kaldi_mpi.averaging.periodic import Periodic
from kaldi_mpi.averaging.strategy import Collective, Strategy
from kaldi_mpi.errors import ConfigError


def make_strategy(name: str, world: Collective, *, frames_per_average: int | None = None) -> Strategy:
    """The strategy called `name`.

    Args:
        name: ``allreduce`` or ``periodic``.
        world: the learners.
        frames_per_average: frames over all learners between two averagings; needed by ``periodic`` alone.

    Raises:
        ConfigError: there is no such strategy, or it lacks a setting.
    """
    if name == Allreduce.name:
        if frames_per_average is not None:
            raise ConfigError("--frames-per-average: strategy allreduce averages at every minibatch; use periodic")
        return Allreduce(world)
    if name == Periodic.name:
        if frames_per_average is None or frames_per_average <= 0:
            raise ConfigError("--strategy periodic needs --frames-per-average, a number of frames above 0")
        return Periodic(world, frames_per_average)
    raise ConfigError(f"--strategy {name}: unknown; there are {Allreduce.name} and {Periodic.name}")
