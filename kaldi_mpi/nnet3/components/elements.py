"""Scales, offsets and constants in files."""

from __future__ import annotations

from kaldi_mpi.models.components.elements import (
    Constant,
    ConstantFunction,
    FixedBias,
    FixedScale,
    NaturalGradientPerElementScale,
    PerElementOffset,
    PerElementScale,
    ScaleAndOffset,
)
from kaldi_mpi.nnet3.components.fields import COMMON, Field, Kind, Values, array, tensor


def _scale_and_offset(values: Values) -> ScaleAndOffset:
    scales, offsets = tensor(values, "Scales", 1), tensor(values, "Offsets", 1)
    wanted, rank = values.pop("UseNaturalGradient"), values.pop("Rank")
    return ScaleAndOffset(values.pop("Dim"), scales, offsets, wanted, rank)


def _scale_and_offset_values(module: ScaleAndOffset) -> Values:
    return {
        "Dim": module.input_dim,
        "Scales": array(module.scales),
        "Offsets": array(module.offsets),
        "UseNaturalGradient": module.wants_natural_gradient,
        "Rank": module.rank,
    }


def _offset(values: Values) -> PerElementOffset:
    offsets = tensor(values, "Offsets", 1)
    return PerElementOffset(values.pop("Dim"), offsets, values.pop("UseNaturalGradient"))


def _offset_values(module: PerElementOffset) -> Values:
    return {
        "Offsets": array(module.offsets),
        "Dim": module.input_dim,
        "UseNaturalGradient": module.wants_natural_gradient,
    }


def _constant_function(values: Values) -> ConstantFunction:
    output = tensor(values, "Output", 1)
    return ConstantFunction(values.pop("InputDim"), output, values.pop("IsUpdatable"), values.pop("UseNaturalGradient"))


def _constant(values: Values) -> Constant:
    output = tensor(values, "Output", 1)
    return Constant(output, values.pop("IsUpdatable"), values.pop("UseNaturalGradient"))


def _constant_values(module: ConstantFunction) -> Values:
    return {
        "InputDim": module.input_dim,
        "Output": array(module.output),
        "IsUpdatable": module.trained,
        "UseNaturalGradient": module.wants_natural_gradient,
    }


_CONSTANT = (Field("Output", "vector"), Field("IsUpdatable", "b"), Field("UseNaturalGradient", "b"))

KINDS = {
    ScaleAndOffset.kind: Kind(
        (
            *COMMON,
            Field("Dim", "i"),
            Field("Scales", "vector"),
            Field("Offsets", "vector"),
            Field("UseNaturalGradient", "b"),
            Field("Rank", "i"),
        ),
        _scale_and_offset,
        _scale_and_offset_values,
    ),
    PerElementScale.kind: Kind(
        (*COMMON, Field("Params", "vector")),
        lambda values: PerElementScale(tensor(values, "Params", 1)),
        lambda module: {"Params": array(module.scales)},
    ),
    NaturalGradientPerElementScale.kind: Kind(
        (
            *COMMON,
            Field("Params", "vector"),
            # Beside that of all updatable components: this one writes it always.
            Field("IsGradient", "b"),
            Field("Rank", "i"),
            Field("UpdatePeriod", "i"),
            Field("NumSamplesHistory", "f"),
            Field("Alpha", "f"),
        ),
        lambda values: NaturalGradientPerElementScale(tensor(values, "Params", 1)),
        lambda module: {"Params": array(module.scales), "IsGradient": False},
    ),
    PerElementOffset.kind: Kind(
        (*COMMON, Field("Offsets", "vector"), Field("Dim", "i"), Field("UseNaturalGradient", "b")),
        _offset,
        _offset_values,
    ),
    ConstantFunction.kind: Kind((*COMMON, Field("InputDim", "i"), *_CONSTANT), _constant_function, _constant_values),
    Constant.kind: Kind(
        (*COMMON, *_CONSTANT),
        _constant,
        lambda module: {token: value for token, value in _constant_values(module).items() if token != "InputDim"},
    ),
    FixedScale.kind: Kind(
        (Field("Scales", "vector"),),
        lambda values: FixedScale(tensor(values, "Scales", 1)),
        lambda module: {"Scales": array(module.scales)},
    ),
    FixedBias.kind: Kind(
        (Field("Bias", "vector"),),
        lambda values: FixedBias(tensor(values, "Bias", 1)),
        lambda module: {"Bias": array(module.bias)},
    ),
}
