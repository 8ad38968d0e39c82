"""The inner parts of recurrent layers, in files."""

from __future__ import annotations

import numpy as np

from kaldi_mpi.models.components import BackpropTruncation, LstmNonlinearity
from kaldi_mpi.nnet3.components.fields import COMMON, Field, Kind, Values, array, mean, optional, settings, sums, tensor


def _lstm_nonlinearity(values: Values) -> LstmNonlinearity:
    peepholes = tensor(values, "Params", 2)
    if len(peepholes) != 3:
        raise ValueError(f"<Params> has {len(peepholes)} rows instead of 3")
    module = LstmNonlinearity(peepholes, values.pop("UseDropout", False))
    count = values.pop("Count", 0.0)
    for token, total in (("ValueAvg", module.value_sum), ("DerivAvg", module.deriv_sum)):
        average = values.pop(token)
        if average.size:
            total.copy_(sums(average, count))
    module.count.fill_(count)
    return module


def _lstm_values(module: LstmNonlinearity) -> Values:
    return {
        "SelfRepairProb": np.zeros(5, dtype=np.float32),
        **module.attributes,
        "ValueAvg": mean(module.value_sum, module.count),
        "DerivAvg": mean(module.deriv_sum, module.count),
        "Params": array(module.peepholes),
        "UseDropout": module.use_dropout,
        "Count": module.count.item(),
    }


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
    BackpropTruncation.kind: settings(
        BackpropTruncation,
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
        {
            "Dim": "input_dim",
            "Scale": "scale",
            "ClippingThreshold": "clipping_threshold",
            "ZeroingThreshold": "zeroing_threshold",
            "ZeroingInterval": "zeroing_interval",
            "RecurrenceInterval": "recurrence_interval",
        },
    ),
}
