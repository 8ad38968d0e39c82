"""Affine and linear transforms of each row, trained or fixed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.components.preconditioned import Rows, RowTrained, kept
from kaldi_mpi.models.config import Options


class Affine(ComponentModule):
    """y = x linear' + bias; `linear` is (output_dim, input_dim), `bias` (output_dim,)."""

    kind = "AffineComponent"
    updatable = True

    def __init__(self, linear: Tensor, bias: Tensor) -> None:
        super().__init__(linear.shape[1], linear.shape[0])
        self.linear, self.bias = nn.Parameter(linear), nn.Parameter(bias)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return functional.linear(x, self.linear, self.bias)

    def constrain(self) -> bool:
        return constrain_orthonormal(self, self.linear)


class NaturalGradientAffine(Affine, RowTrained):
    """The same, trained with natural gradient: rows [x 1] and the derivatives at the output are preconditioned."""

    kind = "NaturalGradientAffineComponent"

    def make_rows(self) -> Rows:
        a = self.attributes
        return Rows(a["RankIn"], a["RankOut"], a["UpdatePeriod"], a["NumSamplesHistory"], a["Alpha"])

    def trained_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.linear, self.bias

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if self.natural_gradient and torch.is_grad_enabled():
            return kept(self.rows, x, self.linear, self.bias)
        return super().forward(x, call)


class FixedAffine(ComponentModule):
    """An affine transform that is not trained, for example LDA."""

    kind = "FixedAffineComponent"
    linear: Tensor
    bias: Tensor

    def __init__(self, linear: Tensor, bias: Tensor) -> None:
        super().__init__(linear.shape[1], linear.shape[0])
        self.register_buffer("linear", linear)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return functional.linear(x, self.linear, self.bias)


class Linear(RowTrained):
    """y = x linear'; trained with natural gradient, whatever its file's <UseNaturalGradient> says, as in Kaldi."""

    kind = "LinearComponent"
    updatable = True

    def __init__(self, linear: Tensor) -> None:
        super().__init__(linear.shape[1], linear.shape[0])
        self.linear = nn.Parameter(linear)

    def make_rows(self) -> Rows:
        a = self.attributes
        rank_in, rank_out = a["RankInOut"]
        return Rows(rank_in, rank_out, a["UpdatePeriod"], a["NumSamplesHistory"], a["Alpha"])

    def trained_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.linear, None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if self.natural_gradient and torch.is_grad_enabled():
            return kept(self.rows, x, self.linear, None)
        return functional.linear(x, self.linear)

    def constrain(self) -> bool:
        return constrain_orthonormal(self, self.linear)


# After each minibatch, a matrix under the constraint is turned towards it with this probability.
_CONSTRAINT_PROBABILITY = 0.25


@torch.no_grad()
def constrain_orthonormal(component: ComponentModule, matrix: Tensor) -> bool:
    """One step of Kaldi's orthonormal constraint on `matrix`, in place, in one of four minibatches.

    With M the matrix, transposed if it has more rows than columns, and P = M M', M becomes M - 4 nu / s^2 (P - s^2 I) M
    (ConstrainOrthonormal; semi-orthogonal factors of Povey et al., Interspeech 2018). <OrthonormalConstraint> gives s;
    below 0, s^2 = tr(P P) / tr(P) "floats", and nu = 1/8 is halved where P is far from a multiple of I.

    Returns:
        whether it was this minibatch's turn.
    """
    if not component.constrained or not component.mode.chance.decide_together(
        component.name, "orthonormal", _CONSTRAINT_PROBABILITY
    ):
        return False
    constraint = float(component.attributes["OrthonormalConstraint"])
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    product = wide @ wide.t()
    nu = torch.full((), 0.125, dtype=matrix.dtype, device=matrix.device)
    square = torch.full_like(nu, constraint * constraint)
    if constraint < 0:
        trace, trace_of_square = product.diagonal().sum(), product.square().sum()
        square = trace_of_square / trace
        ratio = len(wide) * trace_of_square / (trace * trace)
        nu = torch.where(ratio > 1.02, nu * 0.5, nu)
        nu = torch.where(ratio > 1.1, nu * 0.5, nu)
        # A matrix of zeros has no direction to keep; the choice stays on the device.
        nu = torch.where(trace < 1e-15, torch.zeros_like(nu), nu)
        square = torch.where(trace < 1e-15, torch.ones_like(square), square)
    product.diagonal().sub_(square)
    step = (product @ wide) * (-4.0 * nu / square)
    matrix.add_(step if wide is matrix else step.t())
    return True


def split_transform(matrix: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """(out, in + 1) with the offset in the last column, as float32 (linear, bias)."""
    both = torch.from_numpy(np.array(matrix, dtype=np.float32))
    return both[:, :-1].clone(), both[:, -1].clone()


def natural_gradient_ranks(input_dim: int, output_dim: int, options: Options) -> tuple[int, int]:
    """The ranks of input and output side, by ``rank-in`` and ``rank-out`` or nnet3's defaults."""
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
        rank_in, rank_out = natural_gradient_ranks(in_, out, options)
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
        "RankInOut": natural_gradient_ranks(in_, out, options),
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


MAKERS = {
    Affine.kind: lambda options, init: _affine(options, init, Affine),
    NaturalGradientAffine.kind: lambda options, init: _affine(options, init, NaturalGradientAffine),
    FixedAffine.kind: _fixed_affine,
    Linear.kind: _linear,
}
