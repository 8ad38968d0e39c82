"""The inner parts of recurrent layers, in files."""

from __future__ import annotations

import numpy as np
import torch

from kaldi_mpi.models.components import BackpropTruncation, LstmNonlinearity
from kaldi_mpi.nnet3.components.fields import COMMON, Field, Kind, Values, array, optional, tensor

_TRUNCATION = {
    "Scale": "scale",
    "ClippingThreshold": "clipping_threshold",
    "ZeroingThreshold": "zeroing_threshold",
    "ZeroingInterval": "zeroing_interval",
    "RecurrenceInterval": "recurrence_interval",
}


def _lstm_nonlinearity(values: Values) -> LstmNonlinearity:
    peepholes = tensor(values, "Params", 2)
    if len(peepholes) != 3:
        raise ValueError(f"<Params> has {len(peepholes)} rows instead of 3")
    module = LstmNonlinearity(peepholes, values.pop("UseDropout", False))
    count = values.pop("Count", 0.0)
    for token, total in (("ValueAvg", module.value_sum), ("DerivAvg", module.deriv_sum)):
        average = values.pop(token)
        if average.size:
            total.copy_(torch.from_numpy(average.astype(np.float64)) * count)
    module.count.fill_(count)
    return module


def _truncation(values: Values) -> BackpropTruncation:
    settings = {name: values.pop(token) for token, name in _TRUNCATION.items()}
    return BackpropTruncation(values.pop("Dim"), **settings)


def _lstm_values(module: LstmNonlinearity) -> Values:
    count = module.count.item()
    averages = {
        token: (total / count if count else total).to("cpu", torch.float32).numpy().copy()
        for token, total in (("ValueAvg", module.value_sum), ("DerivAvg", module.deriv_sum))
    }
    return {
        "SelfRepairProb": np.zeros(5, dtype=np.float32),
        **module.attributes,
        **averages,
        "Params": array(module.peepholes),
        "UseDropout": module.use_dropout,
        "Count": count,
    }


def _truncation_values(module: BackpropTruncation) -> Values:
    return {"Dim": module.input_dim, **{token: getattr(module, name) for token, name in _TRUNCATION.items()}}


KINDS = {
    LstmNonlinearity.kind: Kind(
        (
            *COMMON,
            Field("Params", "matrix"),
            Field("ValueAvg", "matrix"),
            Field("DerivAvg", "matrix"),
            Field("SelfRepairConfig", "vector"),
            Field("SelfRepairProb", "vector"),
            optional("UseDropout", "b", False),
            Field("Count", "d"),
        ),
        _lstm_nonlinearity,
        _lstm_values,
    ),
    BackpropTruncation.kind: Kind(
        (
            Field("Dim", "i"),
            Field("Scale", "f"),
            Field("ClippingThreshold", "f"),
            Field("ZeroingThreshold", "f"),
            Field("ZeroingInterval", "i"),
            Field("RecurrenceInterval", "i"),
            Field("NumElementsClipped", "d"),
            Field("NumElementsZeroed", "d"),
            Field("NumElementsProcessed", "d"),
            Field("NumZeroingBoundaries", "d"),
        ),
        _truncation,
        _truncation_values,
    ),
}
