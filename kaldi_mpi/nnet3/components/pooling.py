"""Statistics over windows, and attention, in files."""

from __future__ import annotations

from collections.abc import Mapping

from kaldi_mpi.models.components.pooling import RestrictedAttention, StatisticsExtraction, StatisticsPooling
from kaldi_mpi.nnet3.components.fields import Field, settings

_EXTRACTION = {
    "InputDim": "input_dim",
    "InputPeriod": "input_period",
    "OutputPeriod": "output_period",
    "IncludeVarinance": "include_variance",  # the token as Kaldi spells it
}
_POOLING = {
    "InputDim": "input_dim",
    "InputPeriod": "input_period",
    "LeftContext": "left_context",
    "RightContext": "right_context",
    "NumLogCountFeatures": "num_log_count_features",
    "OutputStddevs": "output_stddevs",
    "VarianceFloor": "variance_floor",
}
_ATTENTION = {
    "NumHeads": "num_heads",
    "KeyDim": "key_dim",
    "ValueDim": "value_dim",
    "NumLeftInputs": "num_left_inputs",
    "NumRightInputs": "num_right_inputs",
    "TimeStride": "time_stride",
    "NumLeftInputsRequired": "num_left_inputs_required",
    "NumRightInputsRequired": "num_right_inputs_required",
    "OutputContext": "output_context",
    "KeyScale": "key_scale",
}
_KINDS = {"IncludeVarinance": "b", "OutputStddevs": "b", "OutputContext": "b", "VarianceFloor": "f", "KeyScale": "f"}


def _fields(names: Mapping[str, str]) -> tuple[Field, ...]:
    return tuple(Field(token, _KINDS.get(token, "i")) for token in names)


KINDS = {
    StatisticsExtraction.kind: settings(StatisticsExtraction, _fields(_EXTRACTION), _EXTRACTION),
    StatisticsPooling.kind: settings(StatisticsPooling, _fields(_POOLING), _POOLING),
    RestrictedAttention.kind: settings(
        RestrictedAttention,
        (
            *_fields(_ATTENTION),
            Field("StatsCount", "d"),
            Field("EntropyStats", "double vector"),
            Field("PosteriorStats", "double matrix"),
        ),
        _ATTENTION,
    ),
}
