"""Functions of each element, or of each row, without parameters; their statistics and self-repair.

Statistics (NonlinearComponent of nnet3): sums over rows of the function's value and derivative, stored in about every
second forward call; of the squares of the derivative that arrives ("oderiv"), in about three of four. Both always at
first. Self-repair (the components' RepairGradients) adds a small constant to the derivative at the input of units
whose mean derivative says that they are dead or saturated, in about every second backward call, hence twice the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kaldi_mpi.models import passes
from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer, saturations_of
from kaldi_mpi.models.config import Options
from kaldi_mpi.models.passes import column_sums

_STORE, _REPAIR, _ODERIV = 0.5, 0.5, 0.75
_LARGEST_REPAIR = 0.1


_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


class Pointwise(ComponentModule):
    """Rows of `dim` columns to rows of as many."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)


class Stored(Pointwise):
    """A function whose statistics are kept.

    Attributes:
        block_dim: columns that repeat; units of a block share self-repair.
        value_sum, deriv_sum, oderiv_sum: (dim,) float64, or (0,) where there are none.
        count, oderiv_count: of rows in them, 0-dim float64.
        repair_scale, lower_threshold, upper_threshold: of self-repair; a threshold of None is the default one.
    """

    default_lower: ClassVar[float] = 0.05
    default_upper: ClassVar[float | None] = None
    repairs: ClassVar[bool] = True
    steepest: ClassVar[float | None] = None  # the largest derivative, of functions that can saturate
    value_sum: Tensor
    deriv_sum: Tensor
    oderiv_sum: Tensor
    count: Tensor
    oderiv_count: Tensor

    def __init__(self, dim: int, block_dim: int | None = None) -> None:
        super().__init__(dim)
        self.block_dim = dim if block_dim is None else block_dim
        if self.block_dim < 1 or dim % self.block_dim:
            raise ValueError(f"block-dim {self.block_dim} does not divide dim {dim}")
        self.repair_scale = 0.0
        self.lower_threshold: float | None = None
        self.upper_threshold: float | None = None
        for name in ("value_sum", "deriv_sum", "oderiv_sum"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))
        for name in ("count", "oderiv_count"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def statistics(self) -> list[Tensor]:
        return [self.value_sum, self.deriv_sum, self.oderiv_sum, self.count, self.oderiv_count]

    def load_statistics(self, totals: Sequence[Tensor]) -> None:
        names = ("value_sum", "deriv_sum", "oderiv_sum", "count", "oderiv_count")
        for name, total in zip(names, totals, strict=True):
            setattr(self, name, total)  # there may have been none of a size yet

    def zero_statistics(self) -> None:
        super().zero_statistics()
        self._stored = self._stored_oderiv = False

    def saturations(self) -> list[float]:
        return [] if self.steepest is None else saturations_of(self.deriv_sum, self.count, (self.steepest,))

    def function(self, x: Tensor) -> Tensor:
        """The value, row by row."""
        raise NotImplementedError

    def slope(self, y: Tensor) -> Tensor | None:
        """The function's derivative where its value is `y`; None: it is not stored."""
        return None

    def pushes(self, y: Tensor) -> Tensor:
        """In which direction units are repaired, by their values."""
        raise NotImplementedError

    def gradient(self, y: Tensor, derivative: Tensor) -> Tensor:
        """The derivative at the input, of the value and the derivative at the output."""
        raise NotImplementedError

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if not (self.mode.store and torch.is_grad_enabled()):
            if torch.is_grad_enabled() and not self.mode.collect:
                return self.function(x)
            y, sums = self.value(x, self.mode.collect and self.stores())
            if sums is not None:
                self.add(sums, x.shape[0] * x.shape[1])
            return y
        y = _Trained.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    _stored = False
    _stored_oderiv = False

    def training_state(self) -> dict[str, Any]:
        return {"stored": (self._stored, self._stored_oderiv)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._stored, self._stored_oderiv = state["stored"]

    def value(self, x: Tensor, sums: bool) -> tuple[Tensor, tuple[Tensor, Tensor | None] | None]:
        """The value of rows, (rows, B, dim); and, if wanted, sums over rows of it and of the function's derivative."""
        y = self.function(x)
        if not sums:
            return y, None
        slope = self.slope(y)
        return y, (column_sums(y), None if slope is None else column_sums(slope))

    def repaired(
        self, y: Tensor, derivative: Tensor, repair: Tensor | None, squares: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`gradient` with `repair`, (dim,), times `pushes` added; and, if wanted, sums of the derivative's squares."""
        gradient = self.gradient(y, derivative)
        if repair is not None:
            gradient = gradient.addcmul(self.pushes(y), repair)
        return gradient, column_sums(derivative.square()) if squares else None

    def stores(self) -> bool:
        """Whether the sums of this forward call are kept."""
        stored, self._stored = self._stored, True
        return self.mode.chance.decide(self.name, "stats", _STORE) or not stored

    def add(self, sums: tuple[Tensor, Tensor | None], rows: int) -> None:
        """Keep the sums of a forward call."""
        for name, of in zip(("value_sum", "deriv_sum"), sums, strict=True):
            if of is not None:
                self._add_to(name, of)
        self.count += rows

    def stores_oderiv(self) -> bool:
        """Whether the squares of the derivatives of this backward call are kept."""
        stored, self._stored_oderiv = self._stored_oderiv, True
        return self.mode.chance.decide(self.name, "oderiv", _ODERIV) or not stored

    def add_oderiv(self, squares: Tensor, rows: int) -> None:
        """Keep them."""
        self._add_to("oderiv_sum", squares)
        self.oderiv_count += rows

    def _add_to(self, name: str, sums: Tensor) -> None:
        total = getattr(self, name)
        if total.numel() != self.output_dim:
            total = torch.zeros(self.output_dim, dtype=torch.float64, device=sums.device)
            setattr(self, name, total)
        total += sums

    def units_to_repair(self) -> Tensor:
        """(block_dim,) float32: 1 for units whose mean derivative is too small, -1 for those where it is too large."""
        # Compared as sums in float32, as Kaldi does: ties are exact there.
        total = self.deriv_sum.view(-1, self.block_dim).mean(0).to(torch.float32)
        count = self.count.to(torch.float32)
        lower = self.default_lower if self.lower_threshold is None else self.lower_threshold
        low = (total <= lower * count) if self.default_upper is not None else (total < lower * count)
        units = low.to(torch.float32)
        if self.default_upper is not None:
            upper = self.default_upper if self.upper_threshold is None else self.upper_threshold
            units = units - (total > upper * count).to(torch.float32)
        return units


class _Trained(torch.autograd.Function):
    """The function while it is trained: keeps its statistics, and repairs its units."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Stored) -> Tensor:
        y, sums = module.value(x, module.stores())
        if sums is not None:
            module.add(sums, x.shape[0] * x.shape[1])
        ctx.module = module
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        module: Stored = ctx.module
        (y,) = ctx.saved_tensors
        repair = None
        may = module.repairs and module.repair_scale > 0 and module.deriv_sum.numel() == module.output_dim
        if may and module.mode.chance.decide(module.name, "repair", _REPAIR):
            units = module.units_to_repair().to(y.dtype).repeat(module.output_dim // module.block_dim)
            # The loss is the negated objective: what Kaldi adds to a derivative is subtracted here.
            repair = units * (-module.repair_scale / _REPAIR)
        gradient, squares = module.repaired(y, derivatives[0], repair, module.stores_oderiv())
        if squares is not None:
            module.add_oderiv(squares, y.shape[0] * y.shape[1])
        return gradient, None


class RectifiedLinear(Stored):
    """max(x, 0)."""

    kind = "RectifiedLinearComponent"
    default_upper = 0.95

    def function(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def value(self, x: Tensor, sums: bool) -> tuple[Tensor, tuple[Tensor, Tensor | None] | None]:
        return passes.relu(x, sums)

    def repaired(
        self, y: Tensor, derivative: Tensor, repair: Tensor | None, squares: bool
    ) -> tuple[Tensor, Tensor | None]:
        return passes.relu_backward(derivative, y, repair, squares)  # pushed by 1 wherever they are


class Sigmoid(Stored):
    """Logistic sigmoid."""

    kind = "SigmoidComponent"
    steepest = 0.25

    def function(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def slope(self, y: Tensor) -> Tensor:
        return y * (1.0 - y)

    def gradient(self, y: Tensor, derivative: Tensor) -> Tensor:
        return _sigmoid_backward(derivative, y)

    def pushes(self, y: Tensor) -> Tensor:
        return 1.0 - 2.0 * y


class Tanh(Stored):
    """Hyperbolic tangent."""

    kind = "TanhComponent"
    default_lower = 0.2
    steepest = 1.0

    def function(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def slope(self, y: Tensor) -> Tensor:
        return 1.0 - y * y

    def gradient(self, y: Tensor, derivative: Tensor) -> Tensor:
        return _tanh_backward(derivative, y)

    def pushes(self, y: Tensor) -> Tensor:
        return -y


class LogSoftmax(Stored):
    """Log of the softmax of each row."""

    kind = "LogSoftmaxComponent"
    repairs = False

    def function(self, x: Tensor) -> Tensor:
        return functional.log_softmax(x, dim=-1)

    def stores(self) -> bool:
        return False  # as in Kaldi

    def gradient(self, y: Tensor, derivative: Tensor) -> Tensor:
        return derivative - y.exp() * derivative.sum(dim=-1, keepdim=True)


class Softmax(Stored):
    """The softmax of each row."""

    kind = "SoftmaxComponent"
    repairs = False

    def function(self, x: Tensor) -> Tensor:
        return functional.softmax(x, dim=-1)

    def gradient(self, y: Tensor, derivative: Tensor) -> Tensor:
        return y * (derivative - (y * derivative).sum(dim=-1, keepdim=True))


class NoOp(Pointwise):
    """The input itself; the derivative is multiplied by <BackpropScale>."""

    kind = "NoOpComponent"

    def forward(self, x: Tensor, call: Call) -> Tensor:
        scale = float(self.attributes.get("BackpropScale", 1.0))
        if scale == 1.0 or not x.requires_grad:
            return x
        return x.detach() * (1.0 - scale) + x * scale


def _stored(cls: type[Stored]) -> Callable[[Options, Initializer], Stored]:
    def make(options: Options, init: Initializer) -> Stored:
        dim = options.positive("dim")
        block_dim = options.integer("block-dim", dim)
        component = cls(dim, block_dim)
        component.repair_scale = options.number("self-repair-scale", 0.0)
        if not 0 <= component.repair_scale < _LARGEST_REPAIR:
            raise options.place.error(
                f"expected 0 <= scale < {_LARGEST_REPAIR}, is {component.repair_scale}", "self-repair-scale"
            )
        for end in ("lower", "upper"):
            threshold = options.number(f"self-repair-{end}-threshold", -1000.0)
            if threshold != -1000.0:  # nnet3's value for "not set"
                if end == "upper" and cls.default_upper is None:
                    raise options.place.error(f"means nothing for {cls.kind}", "self-repair-upper-threshold")
                setattr(component, f"{end}_threshold", threshold)
        return component

    return make


def _no_op(options: Options, init: Initializer) -> NoOp:
    component = NoOp(options.positive("dim"))
    component.attributes["BackpropScale"] = options.number("backprop-scale", 1.0)
    return component


MAKERS: dict[str, Callable[[Options, Initializer], ComponentModule]] = {
    **{cls.kind: _stored(cls) for cls in (RectifiedLinear, Sigmoid, Tanh, LogSoftmax, Softmax)},
    NoOp.kind: _no_op,
}
