"""The inner parts of LSTM layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kaldi_mpi.models.components.base import ComponentModule, Initializer
from kaldi_mpi.models.config import Options
from kaldi_mpi.models.natural_gradient import NaturalGradient

# Of the peepholes' gradient, whose three rows are preconditioned (LstmNonlinearityComponent::InitNaturalGradient).
_PEEPHOLE_RANK, _PEEPHOLE_PERIOD, _PEEPHOLE_HISTORY = 20, 2, 1000.0


class LstmNonlinearity(ComponentModule):
    """Peepholes of an LSTM, and the statistics of its five nonlinearities.

    Rows of all that is (5, C): gates i and f, candidate g, gate o, tanh of the cell.

    Attributes:
        peepholes: (3, C) of the input, forget and output gate.
        value_sum, deriv_sum: (5, C), sums of values and derivatives as the model file has them.
        count: of rows in them, 0-dim; no whole number, since it goes through the update like the parameters.
        pending: what has been collected for the next update: both sums and the count, of the running delta.
        use_dropout: its input ends in three columns of a dropout mask.
    """

    kind = "LstmNonlinearityComponent"
    updatable = True
    value_sum: Tensor
    deriv_sum: Tensor
    count: Tensor

    def __init__(self, peepholes: Tensor, use_dropout: bool = False) -> None:
        super().__init__(5 * peepholes.shape[1] + 3 * use_dropout, 2 * peepholes.shape[1])
        self.cell_dim, self.use_dropout = peepholes.shape[1], use_dropout
        self.peepholes = nn.Parameter(peepholes)
        for name in ("value_sum", "deriv_sum"):
            self.register_buffer(name, torch.zeros(5, self.cell_dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.pending: list[Tensor] = []

    # As an `LstmKeeper`, with `run.py`.

    def repair(self) -> Tensor | None:
        """(5, C) float32: self-repair-scale where a unit's mean derivative is below its threshold, else 0."""
        config = torch.from_numpy(np.asarray(self.attributes["SelfRepairConfig"]))
        if not self.mode.store or not bool((config[5:] > 0).any()):
            return None
        config = config.to(self.value_sum.device, non_blocking=True).unsqueeze(1)
        mean = self.deriv_sum / (1.0 + self.count)
        return (config[5:] * (mean < config[:5])).to(self.peepholes.dtype)

    def store(self, values: Tensor, derivatives: Tensor, rows: int) -> None:
        """Collect sums over `rows` rows."""
        if not self.mode.store:
            return
        if not self.pending:
            self.pending = [torch.zeros_like(t) for t in (self.value_sum, self.deriv_sum, self.count)]
        self.pending[0] += values
        self.pending[1] += derivatives
        self.pending[2] += rows

    def update_statistics(self, factor: float | Tensor, momentum: float) -> None:
        for total, part in zip((self.value_sum, self.deriv_sum, self.count), self.pending, strict=False):
            total += factor * part
            part *= momentum

    def statistics(self) -> list[Tensor]:
        return [self.value_sum, self.deriv_sum, self.count]

    def use_natural_gradient(self) -> None:
        self.preconditioner = NaturalGradient(_PEEPHOLE_RANK, _PEEPHOLE_PERIOD, _PEEPHOLE_HISTORY)
        self.natural_gradient = True

    def finish_gradient(self) -> None:
        if self.natural_gradient and self.peepholes.grad is not None:
            self.peepholes.grad.copy_(self.preconditioner(self.peepholes.grad))

    def freeze_natural_gradient(self, freeze: bool) -> None:
        if self.natural_gradient:
            self.preconditioner.frozen = freeze

    def preconditioner_state(self) -> dict[str, Any]:
        return self.preconditioner.state_dict() if self.natural_gradient else {}

    def load_preconditioner_state(self, state: dict[str, Any]) -> None:
        if self.natural_gradient:
            self.preconditioner.load_state_dict(state, self.peepholes.device)


class BackpropTruncation(ComponentModule):
    """Scales the recurrence in the forward pass, and limits its gradient in the backward pass."""

    kind = "BackpropTruncationComponent"

    def __init__(
        self,
        dim: int,
        scale: float = 1.0,
        clipping_threshold: float = 30.0,
        zeroing_threshold: float = 15.0,
        zeroing_interval: int = 20,
        recurrence_interval: int = 1,
    ) -> None:
        super().__init__(dim, dim)
        if zeroing_interval < 1 or recurrence_interval < 1:
            raise ValueError(f"zeroing interval {zeroing_interval}, recurrence interval {recurrence_interval}")
        self.scale = scale
        self.clipping_threshold, self.zeroing_threshold = clipping_threshold, zeroing_threshold
        self.zeroing_interval, self.recurrence_interval = zeroing_interval, recurrence_interval


def _lstm_nonlinearity(options: Options, init: Initializer) -> LstmNonlinearity:
    cell = options.positive("cell-dim")
    peepholes = init.normal(3, cell, stddev=options.number("param-stddev", 1.0))
    component = LstmNonlinearity(peepholes, options.flag("use-dropout", False))
    component.take_rates(options)
    tanh = options.number("tanh-self-repair-threshold", 0.2)
    sigmoid = options.number("sigmoid-self-repair-threshold", 0.05)
    scale = options.number("self-repair-scale", 1e-5)
    component.attributes["SelfRepairConfig"] = np.array(
        [sigmoid, sigmoid, tanh, sigmoid, tanh] + 5 * [scale], dtype=np.float32
    )
    return component


def _truncation(options: Options, init: Initializer) -> BackpropTruncation:
    return BackpropTruncation(
        options.positive("dim"),
        options.number("scale", 1.0),
        options.number("clipping-threshold", 30.0),
        options.number("zeroing-threshold", 15.0),
        options.positive("zeroing-interval", 20),
        options.positive("recurrence-interval", 1),
    )


MAKERS = {LstmNonlinearity.kind: _lstm_nonlinearity, BackpropTruncation.kind: _truncation}
