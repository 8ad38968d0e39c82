"""The nonlinearities of GRU layers in files."""

from __future__ import annotations

from kaldi_mpi.models.components.gru import GruNonlinearity, OutputGruNonlinearity, TanhStatistics
from kaldi_mpi.nnet3.components.fields import COMMON, Field, Kind, Values, array, mean, sums, tensor


def _take_statistics(module: TanhStatistics, values: Values) -> None:
    count = values.pop("Count")
    for token, total in (("ValueAvg", module.value_sum), ("DerivAvg", module.deriv_sum)):
        average = values.pop(token)
        if average.shape != total.shape:
            raise ValueError(f"<{token}> has shape {average.shape}")
        total.copy_(sums(average, count))
    module.count.fill_(count)


def _statistics(module: TanhStatistics) -> Values:
    return {
        "CellDim": module.cell_dim,
        "ValueAvg": mean(module.value_sum, module.count),
        "DerivAvg": mean(module.deriv_sum, module.count),
        "Count": module.count.item(),
    }


def _gru(values: Values) -> GruNonlinearity:
    module = GruNonlinearity(tensor(values, "w_h", 2))
    if (module.cell_dim, module.recurrent_dim) != (values.pop("CellDim"), values.pop("RecurrentDim")):
        raise ValueError(f"<w_h> has shape {tuple(module.w_h.shape)}")
    _take_statistics(module, values)
    return module


def _output_gru(values: Values) -> OutputGruNonlinearity:
    module = OutputGruNonlinearity(tensor(values, "w_h", 1))
    if module.cell_dim != values.pop("CellDim"):
        raise ValueError(f"<w_h> has {module.cell_dim} elements")
    _take_statistics(module, values)
    return module


_STATISTICS = (
    Field("ValueAvg", "vector"),
    Field("DerivAvg", "vector"),
    Field("SelfRepairTotal", "d"),
    Field("Count", "d"),
    Field("SelfRepairThreshold", "f"),
    Field("SelfRepairScale", "f"),
    Field("Alpha", "f"),
)

KINDS = {
    GruNonlinearity.kind: Kind(
        (
            *COMMON,
            Field("CellDim", "i"),
            Field("RecurrentDim", "i"),
            Field("w_h", "matrix"),
            *_STATISTICS,
            Field("RankInOut", "ii"),
            Field("UpdatePeriod", "i"),
        ),
        _gru,
        lambda module: {**_statistics(module), "RecurrentDim": module.recurrent_dim, "w_h": array(module.w_h)},
    ),
    OutputGruNonlinearity.kind: Kind(
        (
            *COMMON,
            Field("CellDim", "i"),
            Field("w_h", "vector"),
            *_STATISTICS,
            Field("Rank", "i"),
            Field("UpdatePeriod", "i"),
        ),
        _output_gru,
        lambda module: {**_statistics(module), "w_h": array(module.w_h)},
    ),
}
