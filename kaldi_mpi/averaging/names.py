"""Strategies by their names."""

from __future__ import annotations

from collections.abc import Callable

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


def _periodic(world: Collective, settings: Settings) -> Strategy:
    assert settings.frames_per_average is not None  # check_settings has seen to it
    return Periodic(world, settings.frames_per_average, settings.transfer_dtype)


def _bmuf(world: Collective, settings: Settings) -> Strategy:
    assert settings.frames_per_average is not None
    return Bmuf(
        world,
        settings.frames_per_average,
        settings.block_momentum,
        settings.block_learning_rate,
        settings.nesterov,
        settings.reset_momentum,
        settings.transfer_dtype,
    )


def _easgd(world: Collective, settings: Settings) -> Strategy:
    return Easgd(
        world,
        settings.frames_per_average,
        settings.elastic_alpha,
        settings.elastic_momentum,
        settings.dedicated_server,
    )


def _asgd(world: Collective, settings: Settings) -> Strategy:
    return Asgd(world, settings.frames_per_average, settings.staleness_bound, settings.dedicated_server)


# The asynchronous ones find the piece size and the type of what travels in the published model that they mix.
_MAKERS: dict[str, Callable[[Collective, Settings], Strategy]] = {
    "allreduce": lambda world, settings: Allreduce(world, settings.transfer_dtype),
    "periodic": _periodic,
    "bmuf": _bmuf,
    "easgd": _easgd,
    "asgd": _asgd,
    "adpsgd-fixed": lambda world, settings: FixedRing(world, settings.frames_per_average),
    "adpsgd-random": lambda world, settings: RandomRing(world, settings.seed, settings.frames_per_average),
    "adpsgd-delay1": lambda world, settings: Delay1(world, settings.transfer_dtype),
    "expair": lambda world, settings: Expair(world, settings.exchanges_per_step, settings.frames_per_average),
}
NAMES = tuple(_MAKERS)


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
    if name not in _MAKERS:
        raise ConfigError(f"--strategy {name}: unknown; there are {', '.join(NAMES)}")
    if settings is None:
        settings = Settings(frames_per_average=frames_per_average)
        check_settings([name], settings)
    elif settings.frames_per_average is None:
        check_settings([name], Settings())
    return _MAKERS[name](world, settings)
