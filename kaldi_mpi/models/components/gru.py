"""The nonlinearities of Kaldi's GRU layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer, saturations_of
from kaldi_mpi.models.components.elements import ElementTrained, scaled
from kaldi_mpi.models.components.preconditioned import Rows, RowTrained, kept
from kaldi_mpi.models.config import Options
from kaldi_mpi.models.natural_gradient import NaturalGradient

# Statistics are stored, and units repaired, in about every second backward call.
_PROBABILITY = 0.5


class TanhStatistics(ComponentModule):
    """What both have: statistics of the tanh of their candidate, and its self-repair.

    Attributes:
        value_sum, deriv_sum: (C,) float64, as the model file has them; count: of rows in them.
        pending: what has been collected for the next update, which is what self-repair looks at (nnet3 keeps these
            statistics in its running delta).
    """

    value_sum: Tensor
    deriv_sum: Tensor
    count: Tensor

    def add_statistics(self, cell_dim: int) -> None:
        self.cell_dim = cell_dim
        for name in ("value_sum", "deriv_sum"):
            self.register_buffer(name, torch.zeros(cell_dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.pending: list[Tensor] = []

    def statistics(self) -> list[Tensor]:
        return [self.value_sum, self.deriv_sum, self.count]

    def saturations(self) -> list[float]:
        return saturations_of(self.deriv_sum, self.count, (1.0,))

    def update_statistics(self, factor: float | Tensor, momentum: float) -> None:
        for total, part in zip(self.statistics(), self.pending, strict=False):
            total += factor * part
            part *= momentum

    def training_state(self) -> dict[str, Any]:
        return super().training_state() | {"pending": [part.cpu().clone() for part in self.pending]}

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        self.pending = [part.to(self.value_sum.device) for part in state["pending"]]

    def tanh(self, x: Tensor) -> Tensor:
        """tanh(x), with statistics and self-repair in training."""
        if not (self.mode.store and torch.is_grad_enabled()):
            return torch.tanh(x)
        y: Tensor = _RepairedTanh.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def repair(self, h: Tensor) -> Tensor | None:
        """What is added to the loss's derivative at the input of the tanh; None: nothing."""
        if not self.mode.chance.decide(self.name, "repair", _PROBABILITY):
            return None
        if not self.pending:
            self.pending = [torch.zeros_like(t) for t in self.statistics()]
        rows = h.reshape(-1, self.cell_dim)
        self.pending[0] += rows.sum(0)
        self.pending[1] += (1.0 - rows.square()).sum(0)
        self.pending[2] += len(rows)
        low = self.pending[1] < self.attributes["SelfRepairThreshold"] * self.pending[2]
        return h * (low.to(h.dtype) * (self.attributes["SelfRepairScale"] / _PROBABILITY))


class _RepairedTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: TanhStatistics) -> Tensor:
        h = torch.tanh(x)
        ctx.module = module
        ctx.save_for_backward(h)
        return h

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        gradient = derivatives[0] * (1.0 - h * h)
        repair = ctx.module.repair(h)
        return gradient if repair is None else gradient + repair, None


class GruNonlinearity(TanhStatistics, RowTrained):
    """(z, r, hpart, c of before, s of before) -> (h, c): h = tanh(hpart + w_h (s * r)), c = (1 - z) h + z c_before.

    `w_h` is (cell_dim, recurrent_dim). Without a projection (recurrent_dim = cell_dim) s is c of before.
    """

    kind = "GruNonlinearityComponent"
    updatable = True

    def __init__(self, w_h: Tensor) -> None:
        cell, recurrent = w_h.shape
        if recurrent > cell:
            raise ValueError(f"recurrent-dim {recurrent} is above cell-dim {cell}")
        projected = recurrent != cell
        super().__init__(3 * cell + recurrent + (recurrent if projected else 0), 2 * cell)
        self.add_statistics(cell)
        self.recurrent_dim = recurrent
        self.w_h = nn.Parameter(w_h)

    def make_rows(self) -> Rows:
        a = self.attributes
        rank_in, rank_out = a["RankInOut"]
        return Rows(rank_in, rank_out, a["UpdatePeriod"], 2000.0, a["Alpha"])

    def trained_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.w_h, None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        c, r = self.cell_dim, self.recurrent_dim
        z, reset, part, before = x[..., :c], x[..., c : c + r], x[..., c + r : 2 * c + r], x[..., 2 * c + r : 3 * c + r]
        gated = x[..., x.shape[-1] - r :] * reset
        if self.natural_gradient and torch.is_grad_enabled():
            product = kept(self.rows, gated, self.w_h, None)
        else:
            product = functional.linear(gated, self.w_h)
        h = self.tanh(part + product)
        return torch.cat([h, (1.0 - z) * h + z * before], dim=-1)


class OutputGruNonlinearity(TanhStatistics, ElementTrained):
    """(z, hpart, c of before) -> (h, c): h = tanh(hpart + w_h * c_before), c = (1 - z) h + z c_before; w_h is (C,)."""

    kind = "OutputGruNonlinearityComponent"
    names = ("w_h",)

    def __init__(self, w_h: Tensor) -> None:
        super().__init__(3 * len(w_h), 2 * len(w_h))
        self.add_statistics(len(w_h))
        self.w_h = nn.Parameter(w_h)

    def make_preconditioners(self) -> dict[str, NaturalGradient]:
        a = self.attributes
        return {"w_h": NaturalGradient(a["Rank"], a["UpdatePeriod"], alpha=a["Alpha"])}

    def forward(self, x: Tensor, call: Call) -> Tensor:
        z, part, before = x.chunk(3, dim=-1)
        h = self.tanh(part + scaled(before, self.w_h, self))
        return torch.cat([h, (1.0 - z) * h + z * before], dim=-1)


def _settings(options: Options, component: TanhStatistics, period: int) -> None:
    component.take_rates(options)
    component.attributes = {
        "SelfRepairTotal": 0.0,
        "SelfRepairThreshold": options.number("self-repair-threshold", 0.2),
        "SelfRepairScale": options.number("self-repair-scale", 1.0e-05),
        "Alpha": options.number("alpha", 4.0),
        "UpdatePeriod": options.positive("update-period", period),
    }


def _gru(options: Options, init: Initializer) -> GruNonlinearity:
    cell = options.positive("cell-dim")
    recurrent = options.integer("recurrent-dim", -1)
    recurrent = cell if recurrent < 0 else recurrent
    if not 0 < recurrent <= cell:
        raise options.place.error(f"must be between 1 and cell-dim {cell}, is {recurrent}", "recurrent-dim")
    stddev = options.number("param-stddev", 1.0 / math.sqrt(cell))
    component = GruNonlinearity(init.normal(cell, recurrent, stddev=stddev))
    _settings(options, component, 4)
    component.attributes["RankInOut"] = options.positive("rank-in", 20), options.positive("rank-out", 80)
    return component


def _output_gru(options: Options, init: Initializer) -> OutputGruNonlinearity:
    cell = options.positive("cell-dim")
    w_h = init.normal(cell, stddev=options.number("param-stddev", 1.0)) + options.number("param-mean", 0.0)
    component = OutputGruNonlinearity(w_h)
    _settings(options, component, 10)
    component.attributes["Rank"] = options.positive("rank", 8)
    return component


MAKERS = {GruNonlinearity.kind: _gru, OutputGruNonlinearity.kind: _output_gru}
