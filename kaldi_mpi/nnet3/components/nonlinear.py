"""Functions of each element or row, in files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kaldi_mpi.models.components import LogSoftmax, NoOp, RectifiedLinear, Sigmoid, Softmax, Tanh
from kaldi_mpi.models.components.nonlinear import Stored
from kaldi_mpi.nnet3.components.fields import Field, Kind, Values, mean, optional, sums

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

_THRESHOLDS = {"SelfRepairLowerThreshold": "lower_threshold", "SelfRepairUpperThreshold": "upper_threshold"}


def _make(cls: type[Stored]) -> Callable[[Values], Stored]:
    def make(values: Values) -> Stored:
        module = cls(values.pop("Dim"), values.pop("BlockDim", None))
        count, oderiv_count = values.pop("Count"), values.pop("OderivCount", None) or 0.0
        rms = values.pop("OderivRms", None)
        squares = np.zeros(0) if rms is None else rms.astype(np.float64) ** 2
        averages = (("value_sum", values.pop("ValueAvg"), count), ("deriv_sum", values.pop("DerivAvg"), count),
                    ("oderiv_sum", squares, oderiv_count))  # fmt: skip
        for name, average, rows in averages:
            setattr(module, name, sums(average, rows))
        module.count.fill_(count)
        module.oderiv_count.fill_(oderiv_count)
        module.repair_scale = values.pop("SelfRepairScale", 0.0)
        for token, name in _THRESHOLDS.items():
            setattr(module, name, values.pop(token, None))
        return module

    return make


def _values(module: Stored) -> Values:
    values: Values = {"NumDimsSelfRepaired": 0.0, "NumDimsProcessed": 0.0, **module.attributes}
    values |= {
        "Dim": module.input_dim,
        "BlockDim": None if module.block_dim == module.input_dim else module.block_dim,
        "ValueAvg": mean(module.value_sum, module.count),
        "DerivAvg": mean(module.deriv_sum, module.count),
        "Count": module.count.item(),
        "OderivRms": np.sqrt(mean(module.oderiv_sum, module.oderiv_count)),
        "OderivCount": module.oderiv_count.item(),
        "SelfRepairScale": module.repair_scale,
    }
    return values | {token: getattr(module, name) for token, name in _THRESHOLDS.items()}


KINDS = {
    **{
        cls.kind: Kind(_NONLINEAR, _make(cls), _values) for cls in (RectifiedLinear, Sigmoid, Tanh, LogSoftmax, Softmax)
    },
    NoOp.kind: Kind(
        (Field("Dim", "i"), Field("BackpropScale", "f")),
        lambda values: NoOp(values.pop("Dim")),
        lambda module: {"Dim": module.input_dim},
    ),
}
