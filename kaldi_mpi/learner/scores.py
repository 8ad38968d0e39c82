"""What an objective comes to, of minibatches and of whole sets; with the lines of Kaldi's programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Term(NamedTuple):
    """One output's part of an objective, summed over frames.

    Attributes:
        objective: 0-dim; without regularisation.
        weight: what its mean is taken over.
        l2: of the output, as Kaldi prints it beside.
    """

    objective: Tensor
    weight: Tensor | float
    l2: Tensor | float = 0.0


def mean_and_l2(objective: float, l2: float) -> str:
    """Means as Kaldi prints them: ``O``, or ``O + L = Z`` where outputs are regularised."""
    return f"{objective:.6g} + {l2:.6g} = {objective + l2:.6g}" if l2 else f"{objective:.6g}"


@dataclasses.dataclass(frozen=True)
class Score:
    """What Kaldi's ``nnet3-compute-prob`` reports of one set.

    Attributes:
        log_likelihood: mean log-probability of the right pdf-id per frame, natural logarithm.
        accuracy: share of frames whose most probable pdf-id is the right one; None where the objective is not linear,
            and `log_likelihood` is its mean.
        frames: how many, by the weights of their labels.
        by_class: the accuracy of each pdf-id, -1 where it does not occur; None: not asked for.
    """

    log_likelihood: float
    accuracy: float | None
    frames: int
    by_class: tuple[float, ...] | None = None

    @property
    def total(self) -> float:
        """What the final combination compares."""
        return self.log_likelihood

    @property
    def reported(self) -> float:
        """What accuracy.report has."""
        return self.log_likelihood if self.accuracy is None else self.accuracy

    def lines(self) -> list[str]:
        """The lines of ``nnet3-compute-prob``, which Kaldi's scripts parse."""
        over = f"per frame, over {self.frames} frames."
        if self.accuracy is None:
            return [f"Overall objective for 'output' is {self.log_likelihood:.6g} {over}"]
        lines = [
            f"Overall log-likelihood for 'output' is {self.log_likelihood:.6g} {over}",
            f"Overall accuracy for 'output' is {self.accuracy:.6g} {over}",
        ]
        if self.by_class is not None:
            vector = " ".join(f"{accuracy:.6g}" for accuracy in self.by_class)
            lines.append(f"Overall per-dim accuracy vector for 'output' is  [ {vector} ] {over}")
        return lines


class ChainOutput(NamedTuple):
    """Of one output: the mean objective of a frame, and the mean l2."""

    name: str
    objective: float
    l2: float


@dataclasses.dataclass(frozen=True)
class ChainScore:
    """What Kaldi's ``nnet3-chain-compute-prob`` reports of one set.

    Attributes:
        outputs: ``output``, and ``output-xent`` where it is trained.
        frames: how many output frames, by the weights of their supervision.
    """

    outputs: Sequence[ChainOutput]
    frames: float

    @property
    def log_likelihood(self) -> float:
        """The mean objective of the main output: log-probability of the numerator less that of the denominator."""
        return self.outputs[0].objective

    @property
    def total(self) -> float:
        """What the final combination compares."""
        return self.outputs[0].objective + self.outputs[0].l2

    @property
    def reported(self) -> float:
        """What accuracy.report has."""
        return self.log_likelihood

    def lines(self) -> list[str]:
        """The program's lines, which Kaldi's scripts parse."""
        return [
            f"Overall log-probability for '{one.name}' is {mean_and_l2(one.objective, one.l2)} per frame, over "
            f"{self.frames:.10g} frames."
            for one in self.outputs
        ]
