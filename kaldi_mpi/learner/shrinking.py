"""Shrinking: all parameters are multiplied by a number a little below 1 as an iteration begins."""

from __future__ import annotations

import dataclasses

from kaldi_mpi.errors import ConfigError

_LEAST_SCALE = 0.5  # as in Kaldi's scripts


@dataclasses.dataclass(frozen=True)
class Shrinking:
    """By what all parameters are multiplied as an iteration begins (``--trainer.optimization.*shrink*``).

    As in ``train_rnn.py``: 1 - `proportional` times the actual learning rate; or, where that is above `value`, `value`
    itself if this is the first iteration, or the model's saturation is above `threshold`, and else 1.

    Attributes:
        value: of shrink-value; 1 for never.
        threshold: of shrink-saturation-threshold.
        proportional: of proportional-shrink; 0 for never.
    """

    value: float = 1.0
    threshold: float = 0.4
    proportional: float = 0.0

    @property
    def acts(self) -> bool:
        """Whether any iteration can be shrunk."""
        return self.value != 1.0 or self.proportional != 0.0

    def scale(self, rate: float, first: bool, saturation: float) -> float:
        """The scale.

        Args:
            rate: the actual learning rate of a learner.
            first: whether this is the training's first iteration.
            saturation: of the model at the end of the one before, see `AcousticModel.saturation`.

        Raises:
            ConfigError: proportional-shrink makes it 0.5 or less.
        """
        scale = 1.0 - self.proportional * rate
        if scale <= _LEAST_SCALE:
            raise ConfigError(
                f"--trainer.optimization.proportional-shrink {self.proportional:g}: too large, at a learning rate of "
                f"{rate:g} it scales the parameters by {scale:g} each iteration, and Kaldi wants more than 0.5"
            )
        if self.value < scale:
            return self.value if first or saturation > self.threshold else 1.0
        return scale
