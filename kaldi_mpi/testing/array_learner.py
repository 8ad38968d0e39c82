"""A learner without a network, for tests, benchmarks and examples of synchronous strategies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kaldi_mpi.averaging.published import Flat


class ArrayLearner:
    """A `SteppingLearner` of plain SGD whose vectors are NumPy arrays.

    Attributes:
        parameters, gradients: (P,) float32; they stay the same arrays.
        rate: the actual learning rate of the next step.

    Args:
        parameters: to start from; kept, not copied.
        rate: see above.
    """

    def __init__(self, parameters: Flat, rate: float = 1.0) -> None:
        self.parameters, self.gradients, self.rate = parameters, np.zeros_like(parameters), rate

    def read_parameters(self, look: Callable[[Flat], None]) -> None:
        look(self.parameters)

    def mix_gradients(self, rule: Callable[[Flat], None]) -> None:
        rule(self.gradients)

    def mix_parameters(self, rule: Callable[[Flat], bool]) -> bool:
        return rule(self.parameters)

    def update(self, base: Flat | None, together: bool) -> None:
        """base - rate * gradients; a learner without frames has gradients of 0."""
        np.subtract(
            self.parameters if base is None else base, np.float32(self.rate) * self.gradients, out=self.parameters
        )

    def forget_momentum(self) -> None:
        """It has none."""
