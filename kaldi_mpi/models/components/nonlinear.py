"""Functions of each element, or of each row, without parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.config import Options


class Pointwise(ComponentModule):
    """A function of each element (or row, for softmax), without parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)


class RectifiedLinear(Pointwise):
    """max(x, 0)."""

    kind = "RectifiedLinearComponent"

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return torch.relu(x)


class Sigmoid(Pointwise):
    """Logistic sigmoid."""

    kind = "SigmoidComponent"

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return torch.sigmoid(x)


class Tanh(Pointwise):
    """Hyperbolic tangent."""

    kind = "TanhComponent"

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return torch.tanh(x)


class LogSoftmax(Pointwise):
    """Log of the softmax of each row."""

    kind = "LogSoftmaxComponent"

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return functional.log_softmax(x, dim=-1)


class NoOp(Pointwise):
    """The input itself."""

    kind = "NoOpComponent"

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return x


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


MAKERS = {cls.kind: _pointwise(cls) for cls in (RectifiedLinear, Sigmoid, Tanh, LogSoftmax, NoOp)}
