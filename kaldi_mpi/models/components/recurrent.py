"""The inner parts of LSTM layers."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from kaldi_mpi.models.components.base import ComponentModule, Initializer
from kaldi_mpi.models.config import Options


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


MAKERS = {LstmNonlinearity.kind: _lstm_nonlinearity, BackpropTruncation.kind: _truncation}
