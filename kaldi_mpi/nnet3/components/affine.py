"""Affine and linear components in files."""

from __future__ import annotations

from torch import Tensor

from kaldi_mpi.models.components import Affine, FixedAffine, Linear, NaturalGradientAffine
from kaldi_mpi.nnet3.components.fields import COMMON, Field, Kind, Values, array, optional, tensor

_AFFINE = (*COMMON, Field("LinearParams", "matrix"), Field("BiasParams", "vector"))
_ORTHONORMAL = optional("OrthonormalConstraint", "f", 0.0)


def _with_bias(values: Values) -> tuple[Tensor, Tensor]:
    linear, bias = tensor(values, "LinearParams", 2), tensor(values, "BiasParams", 1)
    if len(linear) != len(bias):
        raise ValueError(f"<BiasParams> has {len(bias)} elements for {len(linear)} rows of <LinearParams>")
    return linear, bias


def _affine_values(module: Affine | FixedAffine) -> Values:
    return {"LinearParams": array(module.linear), "BiasParams": array(module.bias)}


KINDS = {
    NaturalGradientAffine.kind: Kind(
        (
            *_AFFINE,
            Field("RankIn", "i"),
            Field("RankOut", "i"),
            _ORTHONORMAL,
            Field("UpdatePeriod", "i"),
            Field("NumSamplesHistory", "f"),
            Field("Alpha", "f"),
        ),
        lambda values: NaturalGradientAffine(*_with_bias(values)),
        _affine_values,
    ),
    Affine.kind: Kind((*_AFFINE, _ORTHONORMAL), lambda values: Affine(*_with_bias(values)), _affine_values),
    FixedAffine.kind: Kind(
        (Field("LinearParams", "matrix"), Field("BiasParams", "vector")),
        lambda values: FixedAffine(*_with_bias(values)),
        _affine_values,
    ),
    Linear.kind: Kind(
        (
            *COMMON,
            Field("Params", "matrix"),
            _ORTHONORMAL,
            Field("UseNaturalGradient", "b"),
            Field("RankInOut", "ii"),
            Field("Alpha", "f"),
            Field("NumSamplesHistory", "f"),
            Field("UpdatePeriod", "i"),
        ),
        lambda values: Linear(tensor(values, "Params", 2)),
        lambda module: {"Params": array(module.linear)},
    ),
}
