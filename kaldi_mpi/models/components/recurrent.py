"""The inner parts of LSTM layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer, saturations_of
from kaldi_mpi.models.config import Options
from kaldi_mpi.models.natural_gradient import NaturalGradient


@functools.lru_cache(maxsize=256)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants of a component or of a call, brought to a device once."""
    return torch.tensor(numbers, device=device)


class _Nudged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        ctx.save_for_backward(term)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        return derivatives[0] + ctx.saved_tensors[0], None


def _nudged(x: Tensor, term: Tensor) -> Tensor:
    """x itself; its derivative has `term` added."""
    y: Tensor = _Nudged.apply(x, term)  # type: ignore[no-untyped-call]
    return y


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

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """One row at a time: gates and the cell of before (and masks) -> the cell and m; see `lstm.lstm`."""
        c = self.cell_dim
        i, f, g, o, before = (x[..., k * c : (k + 1) * c] for k in range(5))
        of_i, of_f, of_o = (x[..., 5 * c + k : 5 * c + k + 1] for k in range(3)) if self.use_dropout else (1.0,) * 3
        repair = self.repair() if torch.is_grad_enabled() else None
        w_i, w_f, w_o = self.peepholes
        gate_i = self._gate(i + before * w_i, 0, repair, torch.sigmoid)
        gate_f = self._gate(f + before * w_f, 1, repair, torch.sigmoid)
        candidate = self._gate(g, 2, repair, torch.tanh)
        cell = gate_f * of_f * before + gate_i * of_i * candidate
        # The repair of tanh(c) acts on the cell itself, so that it flows on through time.
        squashed = torch.tanh(cell)
        if repair is not None and cell.requires_grad:
            cell = _nudged(cell, squashed.detach() * repair[4])
            squashed = torch.tanh(cell)
        gate_o = self._gate(o + cell * w_o, 3, repair, torch.sigmoid)
        if self.mode.store and cell.requires_grad:
            values = [part.detach().reshape(-1, c) for part in (gate_i, gate_f, candidate, gate_o, squashed)]
            squares = torch.stack([part.square().sum(0) for part in values])
            sums = torch.stack([part.sum(0) for part in values])
            of_values = sums.clone()
            of_values[2] = of_values[4] = float(len(values[0]))
            self.store(sums, of_values - squares, len(values[0]))
        return torch.cat([cell, gate_o * of_o * squashed], dim=-1)

    @staticmethod
    def _gate(x: Tensor, row: int, repair: Tensor | None, function: Callable[[Tensor], Tensor]) -> Tensor:
        if repair is not None and x.requires_grad:
            y = function(x.detach())
            x = _nudged(x, (y if function is torch.tanh else 2.0 * y - 1.0) * repair[row])
        return function(x)

    # As an `LstmKeeper`, with `run.py`.

    def repair(self) -> Tensor | None:
        """(5, C) float32: self-repair-scale where a unit's mean derivative is below its threshold, else 0."""
        config = np.asarray(self.attributes["SelfRepairConfig"])
        if not self.mode.store or not (config[5:] > 0).any():
            return None
        limits = _on_device(tuple(config.tolist()), self.value_sum.device).unsqueeze(1)
        mean = self.deriv_sum / (1.0 + self.count)
        return (limits[5:] * (mean < limits[:5])).to(self.peepholes.dtype)

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

    def saturations(self) -> list[float]:
        return saturations_of(self.deriv_sum, self.count, (0.25, 0.25, 1.0, 0.25, 1.0))

    def use_natural_gradient(self) -> None:
        self.preconditioner = NaturalGradient(_PEEPHOLE_RANK, _PEEPHOLE_PERIOD, _PEEPHOLE_HISTORY)
        self.natural_gradient = True

    def finish_gradient(self) -> None:
        if self.natural_gradient and self.peepholes.grad is not None:
            self.peepholes.grad.copy_(self.preconditioner(self.peepholes.grad))

    def freeze_natural_gradient(self, freeze: bool) -> None:
        if self.natural_gradient:
            self.preconditioner.frozen = freeze

    def training_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"pending": [part.cpu().clone() for part in self.pending]}
        if self.natural_gradient:
            state["preconditioner"] = self.preconditioner.state_dict()
        return state

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.pending = [part.to(self.peepholes.device) for part in state["pending"]]
        if self.natural_gradient:
            self.preconditioner.load_state_dict(state["preconditioner"], self.peepholes.device)


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

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y: Tensor = _Truncated.apply(x, self, call)  # type: ignore[no-untyped-call]
        return y


class _Truncated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: BackpropTruncation, call: Call) -> Tensor:
        ctx.module, ctx.call = module, call
        return x * module.scale

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        module: BackpropTruncation = ctx.module
        derivative = derivatives[0] * module.scale
        norms = torch.linalg.vector_norm(derivative, dim=2, keepdim=True)
        factors = torch.ones_like(norms)
        if module.clipping_threshold > 0:
            factors = torch.where(norms > module.clipping_threshold, module.clipping_threshold / norms, factors)
        if module.zeroing_threshold > 0:
            t = _on_device(ctx.call.in_times, norms.device).view(-1, 1, 1)
            # Shifted by the number of the sequence, so that boundaries do not all fall on the same frames.
            t = t - torch.arange(derivative.shape[1], device=norms.device).view(1, -1, 1)
            here, before = (
                torch.div(t - back, module.zeroing_interval, rounding_mode="floor")
                for back in (0, module.recurrence_interval)
            )
            factors = torch.where((here != before) & (norms > module.zeroing_threshold), 0.0, factors)
        return derivative * factors, None, None


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
