"""A model's parameters and gradients as two flat buffers that the model's tensors view.

Strategies mix one float32 vector, the optimiser updates one vector, and a message is one vector; the model
goes on using its tensors, which are windows on the buffers. On a GPU, strategies see a page-locked copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.models import AcousticModel
from kaldi_mpi.models.components import BatchNorm, ComponentModule

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ComponentSlice:
    """Where one updatable component's parameters lie, and how Kaldi lets them move.

    Attributes:
        module: the component; None in vectors that belong to no model.
    """

    name: str
    where: slice
    max_change: float
    learning_rate_factor: float
    l2_regularize: float
    module: ComponentModule | None = None


@dataclasses.dataclass(frozen=True)
class StatisticsSlice:
    """Where the mean and variance of a batch-norm lie: they are averaged as parameters are, but not trained."""

    where: slice
    module: BatchNorm


class FlatParameters:
    """Parameters and gradients of a learner.

    Attributes:
        values: (P,) float32 on the model's device.
        gradients: (P,) float32, beside it.
        components, statistics: the slices, which together cover 0..P without gaps.
    """

    def __init__(
        self,
        values: torch.Tensor,
        components: Sequence[ComponentSlice],
        statistics: Sequence[StatisticsSlice] = (),
    ) -> None:
        self.values, self.gradients = values, torch.zeros_like(values)
        self.components, self.statistics = list(components), list(statistics)
        on_gpu = values.device.type == "cuda"
        self._staging = torch.empty(values.numel(), dtype=torch.float32, pin_memory=True) if on_gpu else None
        self._shown: torch.Tensor | None = None

    @classmethod
    def of_model(cls, model: AcousticModel) -> FlatParameters:
        """Lay a model's updatable parameters into one buffer, component by component, in the model's order.

        Batch-norm's statistics come behind them: whoever mixes models mixes these with them. The model's parameters
        become views of `values`, and their ``.grad`` of `gradients`, to which backward passes add.
        """
        parameters = [p for c in model.updatable_components() for p in c.parameters]
        device = parameters[0].device if parameters else torch.device("cpu")
        components: list[ComponentSlice] = []
        start = 0
        for c in model.updatable_components():
            where = slice(start, start + sum(p.numel() for p in c.parameters))
            rates = c.max_change, c.learning_rate_factor, c.l2_regularize
            components.append(ComponentSlice(c.name, where, *rates, model.by_name[c.name]))
            start = where.stop
        statistics: list[StatisticsSlice] = []
        for module in model.by_name.values():
            if isinstance(module, BatchNorm):
                statistics.append(StatisticsSlice(slice(start, start + module.moments.numel()), module))
                start = statistics[-1].where.stop
        flat = cls(torch.empty(start, dtype=torch.float32, device=device), components, statistics)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            flat.values[start:end] = parameter.detach().reshape(-1)
            parameter.data = flat.values[start:end].view(parameter.shape)
            parameter.grad = flat.gradients[start:end].view(parameter.shape)
            start = end
        for s in statistics:
            flat.values[s.where] = s.module.moments
            s.module.moments = flat.values[s.where]
        return flat

    def take_statistics(self) -> None:
        """Put what the minibatch changes in the statistics where the gradients are, negated as those of the loss."""
        for s in self.statistics:
            torch.neg(s.module.take_change(), out=self.gradients[s.where])

    def mix(self, buffer: torch.Tensor, rule: Callable[[NDArray[np.float32]], T]) -> T:
        """Let `rule` change `buffer` (a vector such as `values`) in place through a NumPy view of it.

        On a GPU the buffer goes through page-locked memory, both ways. Returns what `rule` returns.
        """
        if self._staging is None:
            return rule(buffer.numpy())
        self._staging.copy_(buffer)
        result = rule(self._staging.numpy())
        buffer.copy_(self._staging)
        return result

    def read(self, buffer: torch.Tensor, look: Callable[[NDArray[np.float32]], object]) -> None:
        """Show `buffer` to `look`, which must not change it, and may go on looking until the next `read`."""
        if self._staging is not None:
            # Not the memory of `mix`, which may be called while somebody still looks.
            if self._shown is None:
                self._shown = torch.empty_like(self._staging, pin_memory=True)
            self._shown.copy_(buffer)
            buffer = self._shown
        look(buffer.numpy())

    def on_device(self, values: NDArray[np.float32]) -> torch.Tensor:
        """`values`, (P,) float32, on the model's device; in main memory they are not copied."""
        if self._staging is None:
            return torch.from_numpy(values)
        self._staging.copy_(torch.from_numpy(values))
        return self._staging.to(self.values.device)

    def to_numpy(self) -> NDArray[np.float32]:
        """A copy of the parameters, (P,) float32."""
        return self.values.cpu().numpy().copy()

    def load(self, values: NDArray[np.float32]) -> None:
        """Set the parameters to `values`, (P,) float32."""
        self.values.copy_(torch.from_numpy(np.ascontiguousarray(values)))
