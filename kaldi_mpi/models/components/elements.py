"""Components with a parameter for each column: scales and offsets, trained or fixed, and constants."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.config import Options
from kaldi_mpi.models.natural_gradient import NaturalGradient

# A scale of ScaleAndOffsetComponent is kept this far from 0 in the forward pass.
_SMALLEST_SCALE = 1e-4


class ElementTrained(ComponentModule):
    """A component whose parameters are sums over rows: of what the rows are, each parameter has its own preconditioner.

    The gradient of a parameter is the sum of its rows after they have been preconditioned.

    Attributes:
        preconditioners: by parameter; empty: plain gradients.
    """

    updatable = True
    names: ClassVar[tuple[str, ...]]

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__(input_dim, output_dim)
        self.preconditioners: dict[str, NaturalGradient] = {}
        self._rows: dict[str, list[Tensor]] = {}

    def make_preconditioners(self) -> dict[str, NaturalGradient]:
        """Of the parameters, by the component's settings; empty: it is trained by plain gradients."""
        return {}

    def keep(self, name: str, rows: Tensor) -> None:
        """Rows (..., columns) of one call for the parameter `name`, of as many or a divisor of that many columns."""
        size = getattr(self, name).shape[0]
        self._rows.setdefault(name, []).append(rows.reshape(-1, size))

    def use_natural_gradient(self) -> None:
        self.preconditioners = self.make_preconditioners()
        self.natural_gradient = bool(self.preconditioners)

    def finish_gradient(self) -> None:
        for name, parts in self._rows.items():
            gradient = getattr(self, name).grad
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
            gradient += self.preconditioners[name](rows).sum(0)
        self._rows = {}

    def freeze_natural_gradient(self, freeze: bool) -> None:
        for preconditioner in self.preconditioners.values():
            preconditioner.frozen = freeze

    def training_state(self) -> dict[str, Any]:
        return {name: preconditioner.state_dict() for name, preconditioner in self.preconditioners.items()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        device = next(self.parameters()).device
        for name, preconditioner in self.preconditioners.items():
            preconditioner.load_state_dict(state[name], device)


class _Scaled(torch.autograd.Function):
    """x scale + offset by column of a block, whose backward pass has the component keep its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, offset: Tensor | None, module: ElementTrained) -> Tensor:
        size = (scale if scale is not None else offset).shape[0]  # type: ignore[union-attr]
        blocks = x.reshape(-1, size)
        y = blocks if scale is None else blocks * scale
        y = y if offset is None else y + offset
        ctx.module = module
        ctx.save_for_backward(blocks, scale, offset)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        blocks, scale, offset = ctx.saved_tensors
        derivative = derivatives[0].reshape(blocks.shape)
        names = ctx.module.names
        if scale is not None:
            ctx.module.keep(names[0], blocks * derivative)
        if offset is not None:
            ctx.module.keep(names[-1], derivative)
        of_x = derivative if scale is None else derivative * scale
        return of_x.view(derivatives[0].shape) if ctx.needs_input_grad[0] else None, None, None, None


def scaled(x: Tensor, scale: Tensor, module: ElementTrained) -> Tensor:
    """x times `scale`, (columns,); in training with natural gradient, `module` keeps the rows of scale's gradient."""
    if module.natural_gradient and torch.is_grad_enabled():
        y: Tensor = _Scaled.apply(x, scale, None, module)  # type: ignore[no-untyped-call]
        return y
    return x * scale


class ScaleAndOffset(ElementTrained):
    """y = x scales + offsets; `scales` and `offsets` are (block_dim,)."""

    kind = "ScaleAndOffsetComponent"
    names = ("scales", "offsets")

    def __init__(
        self, dim: int, scales: Tensor, offsets: Tensor, wants_natural_gradient: bool = True, rank: int = 20
    ) -> None:
        super().__init__(dim, dim)
        if scales.shape != offsets.shape or dim % len(scales):
            raise ValueError(f"{len(scales)} scales and {len(offsets)} offsets for a dim of {dim}")
        self.scales, self.offsets = nn.Parameter(scales), nn.Parameter(offsets)
        self.wants_natural_gradient, self.rank = wants_natural_gradient, rank

    def make_preconditioners(self) -> dict[str, NaturalGradient]:
        if not self.wants_natural_gradient:
            return {}
        # The update period of a config line does not survive the model file: it is 1 in all of Kaldi's trainings.
        return {name: NaturalGradient(self.rank, update_period=1) for name in self.names}

    def forward(self, x: Tensor, call: Call) -> Tensor:
        small = self.scales.abs() < _SMALLEST_SCALE
        least = torch.full_like(self.scales, _SMALLEST_SCALE).copysign(self.scales)
        scales = torch.where(small, least, self.scales)
        if self.natural_gradient and torch.is_grad_enabled():
            y: Tensor = _Scaled.apply(x, scales.detach(), self.offsets, self)  # type: ignore[no-untyped-call]
            return y
        return (x.reshape(-1, len(scales)) * scales + self.offsets).view(x.shape)


class PerElementScale(ElementTrained):
    """y = x scales; `scales` is (dim,)."""

    kind = "PerElementScaleComponent"
    names = ("scales",)

    def __init__(self, scales: Tensor) -> None:
        super().__init__(len(scales), len(scales))
        self.scales = nn.Parameter(scales)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return scaled(x, self.scales, self)


class NaturalGradientPerElementScale(PerElementScale):
    """The same; Kaldi trains it with natural gradient."""

    kind = "NaturalGradientPerElementScaleComponent"

    def make_preconditioners(self) -> dict[str, NaturalGradient]:
        a = self.attributes
        return {"scales": NaturalGradient(a["Rank"], a["UpdatePeriod"], a["NumSamplesHistory"], a["Alpha"])}


class PerElementOffset(ElementTrained):
    """y = x + offsets; `offsets` is (block_dim,)."""

    kind = "PerElementOffsetComponent"
    names = ("offsets",)

    def __init__(self, dim: int, offsets: Tensor, wants_natural_gradient: bool = True) -> None:
        super().__init__(dim, dim)
        if dim % len(offsets):
            raise ValueError(f"{len(offsets)} offsets for a dim of {dim}")
        self.offsets, self.wants_natural_gradient = nn.Parameter(offsets), wants_natural_gradient

    def make_preconditioners(self) -> dict[str, NaturalGradient]:
        return {"offsets": NaturalGradient(20, update_period=4)} if self.wants_natural_gradient else {}

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if self.natural_gradient and torch.is_grad_enabled():
            y: Tensor = _Scaled.apply(x, None, self.offsets, self)  # type: ignore[no-untyped-call]
            return y
        return (x.reshape(-1, len(self.offsets)) + self.offsets).view(x.shape)


class _ConstantRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, module: ElementTrained, rows: int, batch: int) -> Tensor:
        ctx.module = module
        return output.expand(rows, batch, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        ctx.module.keep("output", derivatives[0])
        return None, None, None, None


class ConstantFunction(ElementTrained):
    """Rows that are all `output`, (output_dim,), whatever the input is."""

    kind = "ConstantFunctionComponent"
    takes_nothing = True

    def __init__(
        self, input_dim: int, output: Tensor, trained: bool = True, wants_natural_gradient: bool = True
    ) -> None:
        super().__init__(input_dim, len(output))
        self.output = nn.Parameter(output)
        self.trained, self.wants_natural_gradient = trained, wants_natural_gradient

    def make_preconditioners(self) -> dict[str, NaturalGradient]:
        wanted = self.trained and self.wants_natural_gradient
        return {"output": NaturalGradient(40, update_period=1)} if wanted else {}

    def forward(self, x: Tensor, call: Call) -> Tensor:
        rows, batch = len(call.out_times), x.shape[1]
        if self.natural_gradient and torch.is_grad_enabled():
            y: Tensor = _ConstantRows.apply(self.output, self, rows, batch)  # type: ignore[no-untyped-call]
            return y
        output = self.output if self.trained else self.output.detach()
        return output.expand(rows, batch, -1)


class Constant(ConstantFunction):
    """The same without an input."""

    kind = "ConstantComponent"

    def __init__(self, output: Tensor, trained: bool = True, wants_natural_gradient: bool = True) -> None:
        super().__init__(len(output), output, trained, wants_natural_gradient)


class FixedScale(ComponentModule):
    """y = x scales, not trained."""

    kind = "FixedScaleComponent"
    scales: Tensor

    def __init__(self, scales: Tensor) -> None:
        super().__init__(len(scales), len(scales))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return x * self.scales


class FixedBias(ComponentModule):
    """y = x + bias, not trained."""

    kind = "FixedBiasComponent"
    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__(len(bias), len(bias))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return x + self.bias


def _block_dim(options: Options, dim: int) -> int:
    block_dim = options.integer("block-dim", dim)
    if block_dim < 1 or dim % block_dim:
        raise options.place.error(f"{block_dim} does not divide dim {dim}", "block-dim")
    return block_dim


def _scale_and_offset(options: Options, init: Initializer) -> ScaleAndOffset:
    dim = options.positive("dim")
    block = _block_dim(options, dim)
    wanted, rank = options.flag("use-natural-gradient", True), options.positive("rank", 20)
    component = ScaleAndOffset(dim, torch.ones(block), torch.zeros(block), wanted, rank)
    component.take_rates(options)
    return component


def _random(options: Options, init: Initializer, dim: int, mean: float) -> Tensor:
    mean = options.number("param-mean", mean)
    return init.normal(dim, stddev=options.number("param-stddev", 0.0)) + mean


def _per_element_scale(options: Options, init: Initializer) -> PerElementScale:
    component = PerElementScale(_random(options, init, options.positive("dim"), 1.0))
    component.take_rates(options)
    return component


def _natural_scale(options: Options, init: Initializer) -> NaturalGradientPerElementScale:
    component = NaturalGradientPerElementScale(_random(options, init, options.positive("dim"), 1.0))
    component.take_rates(options)
    component.attributes = {
        "Rank": options.positive("rank", 8),
        "UpdatePeriod": options.positive("update-period", 10),
        "NumSamplesHistory": options.number("num-samples-history", 2000.0),
        "Alpha": options.number("alpha", 4.0),
    }
    return component


def _per_element_offset(options: Options, init: Initializer) -> PerElementOffset:
    dim = options.positive("dim")
    offsets = _random(options, init, _block_dim(options, dim), 0.0)
    component = PerElementOffset(dim, offsets, options.flag("use-natural-gradient", True))
    component.take_rates(options)
    return component


def _constant_function(options: Options, init: Initializer) -> ConstantFunction:
    input_dim, dim = options.positive("input-dim"), options.positive("output-dim")
    output = init.normal(dim, stddev=options.number("output-stddev", 0.0)) + options.number("output-mean", 0.0)
    trained, wanted = options.flag("is-updatable", True), options.flag("use-natural-gradient", True)
    component = ConstantFunction(input_dim, output, trained, wanted)
    component.take_rates(options)
    return component


def _constant(options: Options, init: Initializer) -> Constant:
    dim = options.positive("output-dim")
    output = init.normal(dim, stddev=options.number("output-stddev", 0.0)) + options.number("output-mean", 0.0)
    component = Constant(output, options.flag("is-updatable", True), options.flag("use-natural-gradient", True))
    component.take_rates(options)
    return component


def _of_mean(cls: type[FixedScale] | type[FixedBias]) -> Any:
    def make(options: Options, init: Initializer) -> ComponentModule:
        path = options.values.pop("scales" if cls is FixedScale else "bias", None)
        if path is not None:
            if path not in init.transforms:
                raise options.place.error(f"vector {path} has not been made yet")
            return cls(torch.from_numpy(init.transforms[path].reshape(-1).astype("float32")))
        dim = options.positive("dim")
        return cls(init.normal(dim, stddev=1.0))

    return make


MAKERS = {
    ScaleAndOffset.kind: _scale_and_offset,
    PerElementScale.kind: _per_element_scale,
    NaturalGradientPerElementScale.kind: _natural_scale,
    PerElementOffset.kind: _per_element_offset,
    ConstantFunction.kind: _constant_function,
    Constant.kind: _constant,
    FixedScale.kind: _of_mean(FixedScale),
    FixedBias.kind: _of_mean(FixedBias),
}
