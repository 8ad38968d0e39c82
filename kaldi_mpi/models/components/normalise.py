"""Normalisation of rows, and of columns over a minibatch."""

from __future__ import annotations

from torch import Tensor

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.config import Options

# 2^-66: nnet3's floor of the mean square in NormalizeComponent.
_NORM_FLOOR = 2.0**-66


class Normalize(ComponentModule):
    """y = x target_rms / sqrt(mean(x^2)), over all columns."""

    kind = "NormalizeComponent"

    def __init__(self, dim: int, target_rms: float = 1.0) -> None:
        super().__init__(dim, dim)
        self.target_rms = target_rms

    def forward(self, x: Tensor, call: Call) -> Tensor:
        mean_square = x.square().mean(dim=-1, keepdim=True) / self.target_rms**2
        return x * mean_square.clamp_min(_NORM_FLOOR).rsqrt()


def _normalize(options: Options, init: Initializer) -> Normalize:
    dim = options.integer("dim", -1)
    component = Normalize(dim if dim > 0 else options.positive("input-dim"), options.number("target-rms", 1.0))
    if options.flag("add-log-stddev", False):
        raise options.place.error("is not supported yet", "add-log-stddev")
    return component


MAKERS = {Normalize.kind: _normalize}
