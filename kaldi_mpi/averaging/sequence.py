"""Strategies that follow one another: ``--strategy "allreduce:1ep,adpsgd-random:14ep,periodic:1ep"``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from kaldi_mpi.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PhaseSpec:
    """One strategy and how long it lasts.

    Attributes:
        name: the strategy.
        epochs: above 0; of all learners together, as everywhere.
    """

    name: str
    epochs: float


def parse_sequence(text: str, num_epochs: float | None, default_epochs: float, known: Sequence[str]) -> list[PhaseSpec]:
    """The phases that ``--strategy`` asks for, at least one.

    Args:
        text: a strategy's name, which then lasts the whole training; or ``name:<epochs>ep`` for each phase,
            with commas between them.
        num_epochs: ``--trainer.num-epochs`` where the user gave it; the phases' sum must then equal it.
        default_epochs: the training's length where neither says it.
        known: the names that there are.

    Raises:
        ConfigError: a name or a length that cannot be read, or lengths whose sum is not `num_epochs`.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        name = part.partition(":")[0].strip()
        if name not in known:
            raise ConfigError(f"--strategy {text}: there is no strategy '{name}'; there are {', '.join(known)}")
    if len(parts) == 1 and ":" not in text:
        return [PhaseSpec(parts[0], default_epochs if num_epochs is None else num_epochs)]
    phases = [_phase(part, text) for part in parts]
    total = sum(phase.epochs for phase in phases)
    if num_epochs is not None and not math.isclose(total, num_epochs, rel_tol=1e-9):
        raise ConfigError(
            f"--strategy {text}: the phases have {total:g} epochs together, --trainer.num-epochs {num_epochs:g}"
        )
    return phases


def _phase(part: str, text: str) -> PhaseSpec:
    name, colon, length = (field.strip() for field in part.partition(":"))
    if not colon:
        raise ConfigError(f"--strategy {text}: say how long {name} lasts, as in {name}:2ep")
    number = length[:-2].strip() if length.endswith("ep") else ""
    try:
        epochs = float(number)
    except ValueError:
        epochs = math.nan
    if not 0 < epochs < math.inf:
        raise ConfigError(f"--strategy {text}: '{length}' is no length; write a number of epochs above 0 as in 2ep")
    return PhaseSpec(name, epochs)
