"""The settings of all strategies: of each its option, default, range, help and the strategies that use it, once.

A setting that none of the chosen strategies has a use for is an error: it would otherwise be ignored in silence.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from kaldi_mpi.averaging.published import DEFAULT_PIECE
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.options import boolean, number
from kaldi_mpi.transport.number_formats import WIRE_TYPES

_GOSSIP = ("adpsgd-fixed", "adpsgd-random", "expair")
CENTRES = ("easgd", "asgd")  # those with a model besides the learners'
HIERARCHICAL = (*_GOSSIP, "adpsgd-delay1")  # those in which super-learners can take the learners' place


@dataclasses.dataclass(frozen=True)
class Setting:
    """What there is to know of one setting besides its default.

    Attributes:
        option: of the command line; errors speak of it.
        help: for the command line.
        kind: int, float, bool or str.
        users: the strategies that have a use for it; None: all.
        low, high: the range of numbers; `open_low`, `open_high`: its ends do not belong to it.
        choices: of a string.
        needed_by: strategies that cannot do without it.
        own_option: whether the option is this setting's own, and not of something else that decides it.
    """

    option: str
    help: str
    kind: type
    users: tuple[str, ...] | None = None
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    needed_by: tuple[str, ...] = ()
    own_option: bool = True

    def allows(self, value: Any) -> bool:
        """Whether a setting can have this value; None, where it is the default, is for the caller to allow."""
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind is str:
            return value in self.choices
        above = value > self.low if self.open_low else value >= self.low
        return bool(above and (value < self.high if self.open_high else value <= self.high))

    @property
    def range(self) -> str:
        """The values that it can have, in words."""
        if self.choices:
            return " or ".join(self.choices)
        if self.kind is int:
            return f"{self.low:g} or more"
        parts = [f"{'above' if self.open_low else 'at least'} {self.low:g}"]
        if self.high < math.inf:
            parts.append(f"{'less than' if self.open_high else 'at most'} {self.high:g}")
        return " and ".join(parts)


def _setting(default: Any, option: str, help: str, kind: type, *users: str, **more: Any) -> Any:
    """A field of `Settings`; without `users` it is of use to all strategies."""
    return dataclasses.field(default=default, metadata={"setting": Setting(option, help, kind, users or None, **more)})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``--strategy`` and its companions say.

    Raises:
        ConfigError: a value that cannot be; the message begins with the option's name.
    """

    frames_per_average: int | None = _setting(
        None,
        "--frames-per-average",
        "frames over all learners between two averagings, K (periodic, bmuf: needed); asynchronous strategies exchange "
        "after K/N frames of a learner's own (default: after each of its minibatches)",
        int, "periodic", "bmuf", *CENTRES, *_GOSSIP, low=1, needed_by=("periodic", "bmuf"),
    )  # fmt: skip
    block_momentum: float | None = _setting(
        None, "--block-momentum", "bmuf: eta (default: 1 - 1/N)", float, "bmuf", low=0, high=1, open_high=True
    )
    block_learning_rate: float = _setting(
        1.0, "--block-learning-rate", "bmuf: zeta", float, "bmuf", low=0, open_low=True, high=math.inf, open_high=True
    )
    nesterov: bool = _setting(
        False, "--bmuf-nesterov", "bmuf: blocks start ahead, where block momentum will carry the model", bool, "bmuf"
    )
    reset_momentum: bool = _setting(
        True, "--bmuf-reset-momentum", "bmuf: forget the optimiser's momentum where a block ends", bool, "bmuf"
    )
    elastic_alpha: float | None = _setting(
        None, "--elastic-alpha", "easgd: alpha (default: 0.9/N)", float, "easgd", low=0, high=1, open_low=True
    )
    elastic_momentum: float = _setting(
        0.0, "--elastic-momentum", "easgd: delta of EAMSGD", float, "easgd", low=0, high=1, open_high=True
    )
    staleness_bound: int = _setting(
        16, "--staleness-bound", "asgd: exchanges that a learner may be ahead of the slowest, s", int, "asgd", low=0
    )
    exchanges_per_step: int = _setting(
        1, "--exchanges-per-step", "expair: started after each of a learner's steps", int, "expair", low=1
    )
    seed: int = _setting(0, "--trainer.srand", "of permutations and partners", int, own_option=False)
    piece_size: int = _setting(
        DEFAULT_PIECE, "--piece-size", "parameters that travel in one message", int, *_GOSSIP, *CENTRES, low=1
    )
    transfer_dtype: str = _setting(
        "float32", "--transfer-dtype", "of parameters on their way", str, choices=tuple(WIRE_TYPES)
    )
    super_learner_size: int = _setting(
        1, "--super-learner-size", "adpsgd-*, expair: this many learners act as one", int, *HIERARCHICAL, low=1
    )
    dedicated_server: bool = _setting(
        False, "--dedicated-server", "easgd, asgd: the last rank keeps the centre and learns nothing", bool, *CENTRES
    )

    def __post_init__(self) -> None:
        for name, (setting, default) in SETTINGS.items():
            value = getattr(self, name)
            if not (value is None and default is None) and not setting.allows(value):
                raise ConfigError(f"{setting.option} {value}: must be {setting.range}")


# By name: what there is to know, and the default.
SETTINGS: dict[str, tuple[Setting, Any]] = {
    field.name: (field.metadata["setting"], field.default) for field in dataclasses.fields(Settings)
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option a setting; ranges are checked when `settings_of` makes the settings."""
    for name, (setting, default) in SETTINGS.items():
        if not setting.own_option:
            continue
        kind: Callable[[str], Any] = number(setting.kind)
        if setting.kind in (bool, str):
            kind = boolean if setting.kind is bool else str
        choices = setting.choices or None
        parser.add_argument(setting.option, dest=name, type=kind, default=default, choices=choices, help=setting.help)


def settings_of(given: dict[str, Any], seed: int) -> Settings:
    """Take the options of `add_options` out of `given`, and make settings of them.

    Raises:
        ConfigError: a value that cannot be.
    """
    own = {name: given.pop(name) for name, (setting, _) in SETTINGS.items() if setting.own_option}
    return Settings(seed=seed, **own)


def check_settings(names: Sequence[str], settings: Settings) -> None:
    """Check that the strategies `names`, all of one run, have what they need and a use for all that was set.

    Raises:
        ConfigError: a setting is missing, or no strategy of the run has a use for it.
    """
    for field, (setting, default) in SETTINGS.items():
        value = getattr(settings, field)
        for name in names:
            if name in setting.needed_by and value is None:
                raise ConfigError(f"--strategy {name} needs {setting.option}, a number of frames above 0")
        if value != default and setting.users is not None and not set(setting.users) & set(names):
            verb = "has" if len(names) == 1 else "have"
            raise ConfigError(
                f"{setting.option}: strategy {', '.join(names)} {verb} no use for it; "
                f"it is for {', '.join(setting.users)}"
            )
