"""Convolutions in files."""

from __future__ import annotations

import numpy as np
import torch

from kaldi_mpi.models.components.convolution import Tdnn, TimeHeightConvolution
from kaldi_mpi.nnet3.components.fields import COMMON, Field, Kind, Values, array, tensor


def _tdnn(values: Values) -> Tdnn:
    bias = values.pop("BiasParams")
    linear = tensor(values, "LinearParams", 2)
    return Tdnn(values.pop("TimeOffsets"), linear, torch.from_numpy(bias.copy()) if bias.size else None)


def _tdnn_values(module: Tdnn) -> Values:
    return {
        "TimeOffsets": list(module.time_offsets),
        "LinearParams": array(module.linear),
        "BiasParams": np.zeros(0, np.float32) if module.bias is None else array(module.bias),
    }


def _convolution(values: Values) -> TimeHeightConvolution:
    linear, bias = tensor(values, "LinearParams", 2), tensor(values, "BiasParams", 1)
    filters_out = values.pop("NumFiltersOut")
    if len(linear) != filters_out:
        raise ValueError(f"<LinearParams> has {len(linear)} rows for <NumFiltersOut> {filters_out}")
    points = values.pop("Offsets")  # time, height, time, height, ...
    return TimeHeightConvolution(
        values.pop("NumFiltersIn"),
        values.pop("HeightIn"),
        values.pop("HeightOut"),
        values.pop("HeightSubsampleOut"),
        list(zip(points[::2], points[1::2], strict=True)),
        values.pop("RequiredTimeOffsets"),
        linear,
        bias,
    )


def _convolution_values(module: TimeHeightConvolution) -> Values:
    return {
        "NumFiltersIn": module.num_filters_in,
        "NumFiltersOut": module.num_filters_out,
        "HeightIn": module.height_in,
        "HeightOut": module.height_out,
        "HeightSubsampleOut": module.height_subsample_out,
        "Offsets": [number for point in module.offsets for number in point],
        "RequiredTimeOffsets": module.required_time_offsets,
        "LinearParams": array(module.linear),
        "BiasParams": array(module.bias),
    }


KINDS = {
    Tdnn.kind: Kind(
        (
            *COMMON,
            Field("TimeOffsets", "ints"),
            Field("LinearParams", "matrix"),
            Field("BiasParams", "vector"),
            Field("OrthonormalConstraint", "f"),
            Field("UseNaturalGradient", "b"),
            Field("NumSamplesHistory", "f"),
            Field("AlphaInOut", "ff"),
            Field("RankInOut", "ii"),
        ),
        _tdnn,
        _tdnn_values,
    ),
    TimeHeightConvolution.kind: Kind(
        (
            *COMMON,
            Field("Model", "mark"),
            Field("ConvolutionModel", "mark"),
            Field("NumFiltersIn", "i"),
            Field("NumFiltersOut", "i"),
            Field("HeightIn", "i"),
            Field("HeightOut", "i"),
            Field("HeightSubsampleOut", "i"),
            Field("Offsets", "pairs"),
            Field("RequiredTimeOffsets", "ints"),
            Field("/ConvolutionModel", "mark"),
            Field("LinearParams", "matrix"),
            Field("BiasParams", "vector"),
            Field("MaxMemoryMb", "f"),
            Field("UseNaturalGradient", "b"),
            Field("NumMinibatchesHistory", "f"),
            Field("AlphaInOut", "ff"),
            Field("RankInOut", "ii"),
        ),
        _convolution,
        _convolution_values,
    ),
}
