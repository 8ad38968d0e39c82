"""Functions of each element or row, in files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kaldi_mpi.models.components import ComponentModule, LogSoftmax, NoOp, RectifiedLinear, Sigmoid, Tanh
from kaldi_mpi.nnet3.components.fields import Field, Kind, Values, optional

_NONLINEAR = (
    Field("Dim", "i"),
    optional("BlockDim", "i"),
    Field("ValueAvg", "vector"),
    Field("DerivAvg", "vector"),
    Field("Count", "d"),
    optional("OderivRms", "vector"),
    optional("OderivCount", "d"),
    optional("NumDimsSelfRepaired", "d"),
    optional("NumDimsProcessed", "d"),
    optional("SelfRepairLowerThreshold", "f"),
    optional("SelfRepairUpperThreshold", "f"),
    optional("SelfRepairScale", "f", 0.0),
)

_COUNTS = {"OderivCount": 0.0, "NumDimsSelfRepaired": 0.0, "NumDimsProcessed": 0.0}


def _make(cls: type[Any]) -> Callable[[Values], ComponentModule]:
    def make(values: Values) -> ComponentModule:
        module: ComponentModule = cls(values.pop("Dim"))
        return module

    return make


def _values(module: ComponentModule) -> Values:
    statistics = {"OderivRms": np.zeros(0, dtype=np.float32), **_COUNTS}
    return {**statistics, **module.attributes, "Dim": module.input_dim}


KINDS = {
    **{cls.kind: Kind(_NONLINEAR, _make(cls), _values) for cls in (RectifiedLinear, Sigmoid, Tanh, LogSoftmax)},
    NoOp.kind: Kind(
        (Field("Dim", "i"), Field("BackpropScale", "f")), _make(NoOp), lambda module: {"Dim": module.input_dim}
    ),
}
