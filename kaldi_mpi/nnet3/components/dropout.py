"""Dropout and SpecAugment in files."""

from __future__ import annotations

from kaldi_mpi.models.components.dropout import Dropout, DropoutMask, GeneralDropout, SpecAugmentTimeMask
from kaldi_mpi.nnet3.components.fields import Field, Kind, Values, optional


def _dropout(values: Values) -> Dropout:
    return Dropout(values.pop("Dim"), values.pop("DropoutProportion"), values.pop("DropoutPerFrame"))


def _dropout_values(module: Dropout) -> Values:
    return {
        "Dim": module.input_dim,
        "DropoutProportion": module.dropout_proportion,
        "DropoutPerFrame": module.per_frame,
    }


def _general(values: Values) -> GeneralDropout:
    return GeneralDropout(
        values.pop("Dim"),
        values.pop("BlockDim"),
        values.pop("TimePeriod"),
        values.pop("DropoutProportion"),
        values.pop("SpecAugmentMaxProportion"),
        values.pop("SpecAugmentMaxRegions"),
        values.pop("Continuous"),
    )


def _general_values(module: GeneralDropout) -> Values:
    return {
        "Dim": module.input_dim,
        "BlockDim": module.block_dim,
        "TimePeriod": module.time_period,
        "DropoutProportion": module.dropout_proportion,
        "SpecAugmentMaxProportion": module.specaugment_max_proportion,
        "SpecAugmentMaxRegions": module.specaugment_max_regions,
        "Continuous": module.continuous,
    }


def _time_mask(values: Values) -> SpecAugmentTimeMask:
    return SpecAugmentTimeMask(values.pop("Dim"), values.pop("ZeroedProportion"), values.pop("TimeMaskMaxFrames"))


def _time_mask_values(module: SpecAugmentTimeMask) -> Values:
    return {
        "Dim": module.input_dim,
        "ZeroedProportion": module.zeroed_proportion,
        "TimeMaskMaxFrames": module.time_mask_max_frames,
    }


def _mask(values: Values) -> DropoutMask:
    return DropoutMask(values.pop("OutputDim"), values.pop("DropoutProportion"), values.pop("Continuous"))


def _mask_values(module: DropoutMask) -> Values:
    return {
        "OutputDim": module.output_dim,
        "DropoutProportion": module.dropout_proportion,
        "Continuous": module.continuous,
    }


KINDS = {
    Dropout.kind: Kind(
        (
            Field("Dim", "i"),
            Field("DropoutProportion", "f"),
            Field("DropoutPerFrame", "b"),
            Field("TestMode", "b"),
        ),
        _dropout,
        _dropout_values,
    ),
    GeneralDropout.kind: Kind(
        (
            Field("Dim", "i"),
            Field("BlockDim", "i"),
            Field("TimePeriod", "i"),
            Field("DropoutProportion", "f"),
            optional("SpecAugmentMaxProportion", "f", 0.0),
            optional("SpecAugmentMaxRegions", "i", 1),
            optional("TestMode", "flag", False),
            optional("Continuous", "flag", False),
        ),
        _general,
        _general_values,
    ),
    SpecAugmentTimeMask.kind: Kind(
        (
            Field("Dim", "i"),
            Field("ZeroedProportion", "f"),
            Field("TimeMaskMaxFrames", "i"),
            optional("TestMode", "flag", False),
        ),
        _time_mask,
        _time_mask_values,
    ),
    DropoutMask.kind: Kind(
        (
            Field("OutputDim", "i"),
            Field("DropoutProportion", "f"),
            Field("TestMode", "b"),
            optional("Continuous", "flag", False),
        ),
        _mask,
        _mask_values,
    ),
}
