"""The components (layers' inner parts) that a network is made of, as torch modules.

Values are time-major: (frames, sequences, columns), float32 (or float64 in tests). Initialisation follows
nnet3's: a normal distribution with ``param-stddev`` (default 1/sqrt(input-dim)) and ``bias-stddev`` (default 1).

`attributes` of a component holds what nnet3 stores beside the parameters (settings of natural gradient,
activation statistics), by nnet3's names; it is not interpreted here, only carried along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kaldi_mpi.models.config import ComponentSpec, Options

# 2^-66: nnet3's floor of the mean square in NormalizeComponent.
_NORM_FLOOR = 2.0**-66


class Initializer:
    """What initialisation draws from: one generator for the whole network, and the fixed transforms."""

    def __init__(self, seed: int, transforms: Mapping[str, NDArray[Any]]) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.transforms = transforms

    def normal(self, *shape: int, stddev: float) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * stddev


class ComponentModule(nn.Module):
    """Base of all components.

    Attributes:
        kind: nnet3's type name.
        input_dim, output_dim: numbers of columns.
        attributes: see the module's description.
    """

    kind: ClassVar[str]
    updatable: ClassVar[bool] = False

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.input_dim, self.output_dim = input_dim, output_dim
        self.attributes: dict[str, Any] = {}
        self.learning_rate_factor, self.max_change, self.l2_regularize = 1.0, 0.0, 0.0
        self.learning_rate = 0.001

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, input_dim) -> (T, B, output_dim)."""
        raise NotImplementedError(f"{self.kind} only works inside a recurrent layer")

    def take_rates(self, options: Options) -> None:
        self.learning_rate = options.number("learning-rate", 0.001)
        self.learning_rate_factor = options.number("learning-rate-factor", 1.0)
        self.max_change = options.number("max-change", 0.0)
        self.l2_regularize = options.number("l2-regularize", 0.0)


class Affine(ComponentModule):
    """y = x linear' + bias; `linear` is (output_dim, input_dim)."""

    kind = "AffineComponent"
    updatable = True

    def __init__(self, linear: Tensor, bias: Tensor) -> None:
        super().__init__(linear.shape[1], linear.shape[0])
        self.linear, self.bias = nn.Parameter(linear), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.linear, self.bias)


class NaturalGradientAffine(Affine):
    """The same; Kaldi trains it with natural gradient."""

    kind = "NaturalGradientAffineComponent"


class FixedAffine(ComponentModule):
    """An affine transform that is not trained, for example LDA."""

    kind = "FixedAffineComponent"
    linear: Tensor
    bias: Tensor

    def __init__(self, linear: Tensor, bias: Tensor) -> None:
        super().__init__(linear.shape[1], linear.shape[0])
        self.register_buffer("linear", linear)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.linear, self.bias)


class Linear(ComponentModule):
    """y = x linear'."""

    kind = "LinearComponent"
    updatable = True

    def __init__(self, linear: Tensor) -> None:
        super().__init__(linear.shape[1], linear.shape[0])
        self.linear = nn.Parameter(linear)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.linear)


class LstmNonlinearity(ComponentModule):
    """Peepholes of an LSTM; `peepholes` is (3, cell_dim): input, forget and output gate."""

    kind = "LstmNonlinearityComponent"
    updatable = True

    def __init__(self, peepholes: Tensor) -> None:
        super().__init__(5 * peepholes.shape[1], 2 * peepholes.shape[1])
        self.cell_dim = peepholes.shape[1]
        self.peepholes = nn.Parameter(peepholes)


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


class Pointwise(ComponentModule):
    """A function of each element (or row, for softmax), without parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)


class RectifiedLinear(Pointwise):
    """max(x, 0)."""

    kind = "RectifiedLinearComponent"

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class Sigmoid(Pointwise):
    """Logistic sigmoid."""

    kind = "SigmoidComponent"

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class Tanh(Pointwise):
    """Hyperbolic tangent."""

    kind = "TanhComponent"

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class LogSoftmax(Pointwise):
    """Log of the softmax of each row."""

    kind = "LogSoftmaxComponent"

    def forward(self, x: Tensor) -> Tensor:
        return functional.log_softmax(x, dim=-1)


class NoOp(Pointwise):
    """The input itself."""

    kind = "NoOpComponent"

    def forward(self, x: Tensor) -> Tensor:
        return x


class Normalize(ComponentModule):
    """y = x target_rms / sqrt(mean(x^2)), over all columns."""

    kind = "NormalizeComponent"

    def __init__(self, dim: int, target_rms: float = 1.0) -> None:
        super().__init__(dim, dim)
        self.target_rms = target_rms

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.square().mean(dim=-1, keepdim=True) / self.target_rms**2
        return x * mean_square.clamp_min(_NORM_FLOOR).rsqrt()


def split_transform(matrix: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """(out, in + 1) with the offset in the last column, as float32 (linear, bias)."""
    both = torch.from_numpy(np.array(matrix, dtype=np.float32))
    return both[:, :-1].clone(), both[:, -1].clone()


def _natural_gradient_ranks(input_dim: int, output_dim: int, options: Options) -> tuple[int, int]:
    rank_in, rank_out = options.integer("rank-in", -1), options.integer("rank-out", -1)
    return (
        rank_in if rank_in >= 0 else min(20, (input_dim + 1) // 2),
        rank_out if rank_out >= 0 else min(80, (output_dim + 1) // 2),
    )


def _affine(options: Options, init: Initializer, cls: type[Affine]) -> Affine:
    in_, out = options.positive("input-dim"), options.positive("output-dim")
    linear = init.normal(out, in_, stddev=options.number("param-stddev", 1.0 / math.sqrt(in_)))
    bias = init.normal(out, stddev=options.number("bias-stddev", 1.0))
    natural = cls is NaturalGradientAffine
    component = cls(linear, bias + options.number("bias-mean", 0.0) if natural else bias)
    component.take_rates(options)
    if natural:
        rank_in, rank_out = _natural_gradient_ranks(in_, out, options)
        component.attributes = {
            "RankIn": rank_in,
            "RankOut": rank_out,
            "UpdatePeriod": options.integer("update-period", 4),
            "NumSamplesHistory": options.number("num-samples-history", 2000.0),
            "Alpha": options.number("alpha", 4.0),
        }
    component.attributes["OrthonormalConstraint"] = options.number("orthonormal-constraint", 0.0)
    return component


def _linear(options: Options, init: Initializer) -> Linear:
    in_, out = options.positive("input-dim"), options.positive("output-dim")
    component = Linear(init.normal(out, in_, stddev=options.number("param-stddev", 1.0 / math.sqrt(in_))))
    component.take_rates(options)
    component.attributes = {
        "OrthonormalConstraint": options.number("orthonormal-constraint", 0.0),
        "UseNaturalGradient": options.flag("use-natural-gradient", True),
        "RankInOut": _natural_gradient_ranks(in_, out, options),
        "Alpha": options.number("alpha", 4.0),
        "NumSamplesHistory": options.number("num-samples-history", 2000.0),
        "UpdatePeriod": options.integer("update-period", 4),
    }
    return component


def _fixed_affine(options: Options, init: Initializer) -> FixedAffine:
    path = options.text("matrix")
    if path not in init.transforms:
        raise options.place.error(f"transform {path} has not been made yet", "matrix")
    matrix = init.transforms[path]
    if matrix.ndim != 2 or matrix.shape[1] < 2:
        raise options.place.error(f"transform {path} has shape {matrix.shape}, not (out, in + 1)", "matrix")
    return FixedAffine(*split_transform(matrix))


def _lstm_nonlinearity(options: Options, init: Initializer) -> LstmNonlinearity:
    cell = options.positive("cell-dim")
    component = LstmNonlinearity(init.normal(3, cell, stddev=options.number("param-stddev", 1.0)))
    component.take_rates(options)
    if options.flag("use-dropout", False):
        raise options.place.error("gate dropout is not supported yet", "use-dropout")
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


def _pointwise(cls: type[Pointwise]) -> Callable[[Options, Initializer], Pointwise]:
    def make(options: Options, init: Initializer) -> Pointwise:
        component = cls(options.positive("dim"))
        if cls is NoOp:
            component.attributes["BackpropScale"] = options.number("backprop-scale", 1.0)
            return component
        component.attributes["SelfRepairScale"] = options.number("self-repair-scale", 0.0)
        for end in ("lower", "upper"):
            threshold = options.number(f"self-repair-{end}-threshold", -1000.0)
            if threshold != -1000.0:  # nnet3's value for "not set"
                component.attributes[f"SelfRepair{end.capitalize()}Threshold"] = threshold
        return component

    return make


def _normalize(options: Options, init: Initializer) -> Normalize:
    dim = options.integer("dim", -1)
    component = Normalize(dim if dim > 0 else options.positive("input-dim"), options.number("target-rms", 1.0))
    if options.flag("add-log-stddev", False):
        raise options.place.error("is not supported yet", "add-log-stddev")
    return component


_MAKERS: dict[str, Callable[[Options, Initializer], ComponentModule]] = {
    Affine.kind: lambda options, init: _affine(options, init, Affine),
    NaturalGradientAffine.kind: lambda options, init: _affine(options, init, NaturalGradientAffine),
    FixedAffine.kind: _fixed_affine,
    Linear.kind: _linear,
    LstmNonlinearity.kind: _lstm_nonlinearity,
    BackpropTruncation.kind: _truncation,
    Normalize.kind: _normalize,
    **{cls.kind: _pointwise(cls) for cls in (RectifiedLinear, Sigmoid, Tanh, LogSoftmax, NoOp)},
}


def make_component(spec: ComponentSpec, init: Initializer) -> ComponentModule:
    """A freshly initialised component.

    Raises:
        ConfigError: unknown type, unknown or bad option; names file, line and key.
    """
    if spec.type not in _MAKERS:
        raise spec.place.error(f"component type {spec.type} is not supported yet", spec.name)
    options = Options(spec.options, spec.place)
    component = _MAKERS[spec.type](options, init)
    options.done(spec.type)
    return component
