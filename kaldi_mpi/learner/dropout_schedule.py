"""``--trainer.dropout-schedule``: how the dropout of components changes while the data pass by.

    schedule  = group {" " group}            later groups win where patterns overlap
    group     = [pattern "="] value {"," value ["@" fraction]} "," value
    pattern   = a component's name, in which * stands for any characters; default *

The first value holds at the beginning, the last at the end, those between at their fraction of the data (0.5 where
none is given); between two points the value is linear (Kaldi's steps/libs/nnet3/train/dropout_schedule.py). Kaldi
applies it once an iteration, here it is applied at each step.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.models.components.dropout import DropoutBase

_OPTION = "--trainer.dropout-schedule"


@dataclasses.dataclass(frozen=True)
class DropoutSchedule:
    """Patterns of component names, each with its points (fraction of the data, proportion), in the order given."""

    groups: tuple[tuple[str, tuple[tuple[float, float], ...]], ...] = ()

    @classmethod
    def parse(cls, text: str) -> DropoutSchedule:
        """Of an option's text; empty: no schedule.

        Raises:
            ConfigError: names what is wrong; all mistakes at once, a line each.
        """
        groups, complaints = [], []
        for group in text.split():
            name, equals, points = group.rpartition("=")
            try:
                if "=" in name or (equals and not name):
                    raise ValueError("more than one '=', or no pattern before it")
                groups.append((name or "*", _points(points)))
            except ValueError as error:
                complaints.append(f"{_OPTION}: {group!r}: {error}")
        if complaints:
            raise ConfigError("\n".join(complaints))
        return cls(tuple(groups))

    def proportions(self, fraction: float) -> list[tuple[str, float]]:
        """(pattern, proportion) when `fraction` of the data, in [0, 1], has been trained on; later ones win."""
        return [(name, _value(points, min(1.0, max(0.0, fraction)))) for name, points in self.groups]

    def apply(self, model: AcousticModel, fraction: float) -> None:
        """Set the proportions of a model's components."""
        for pattern, proportion in self.proportions(fraction):
            for name, component in model.by_name.items():
                if isinstance(component, DropoutBase) and _matches(name, pattern):
                    component.dropout_proportion = proportion

    def check(self, model: AcousticModel) -> list[str]:
        """The patterns that match no component with dropout."""
        names = [name for name, component in model.by_name.items() if isinstance(component, DropoutBase)]
        return [pattern for pattern, _ in self.groups if not any(_matches(name, pattern) for name in names)]


def _matches(name: str, pattern: str) -> bool:
    # * is nnet3's only wildcard.
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]").replace("?", "[?]"))


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{what} between 0 and 1 expected, found {text!r}")
    return value


def _points(text: str) -> tuple[tuple[float, float], ...]:
    first, *middle = text.split(",")
    if not middle:
        raise ValueError("at least a first and a last value are needed, as in '0,0'")
    if "@" in middle[-1] or "@" in first:
        raise ValueError("the first and the last value stand at 0 and 1, and have no '@'")
    points = [(0.0, _number(first, "a proportion"))]
    for part in middle[:-1]:
        value, at, fraction = part.partition("@")
        place = _number(fraction, "a fraction of the data") if at else 0.5
        if place < points[-1][0]:
            raise ValueError(f"fractions of the data must not decrease, {part!r} comes after {points[-1][0]:g}")
        points.append((place, _number(value, "a proportion")))
    points.append((1.0, _number(middle[-1], "a proportion")))
    return tuple(points)


def _value(points: tuple[tuple[float, float], ...], fraction: float) -> float:
    """Linear between the points; of several at the same fraction the last holds from there on."""
    if fraction == 0.0:
        return points[0][1]
    low = max(index for index, (place, _) in enumerate(points) if place <= fraction)
    if low == len(points) - 1:
        return points[-1][1]
    (begin, first), (end, last) = points[low], points[low + 1]
    return (fraction - begin) * (last - first) / (end - begin) + first
