"""Dropout and SpecAugment in files."""

from __future__ import annotations

from kaldi_mpi.models.components.dropout import Dropout, DropoutMask, GeneralDropout, SpecAugmentTimeMask
from kaldi_mpi.nnet3.components.fields import Field, optional, settings

_DIM, _PROPORTION = Field("Dim", "i"), Field("DropoutProportion", "f")
_TEST_MODE, _TEST = Field("TestMode", "b"), optional("TestMode", "flag", False)
_CONTINUOUS = optional("Continuous", "flag", False)

KINDS = {
    Dropout.kind: settings(
        Dropout,
        (_DIM, _PROPORTION, Field("DropoutPerFrame", "b"), _TEST_MODE),
        {"Dim": "input_dim", "DropoutProportion": "dropout_proportion", "DropoutPerFrame": "per_frame"},
    ),
    GeneralDropout.kind: settings(
        GeneralDropout,
        (
            _DIM,
            Field("BlockDim", "i"),
            Field("TimePeriod", "i"),
            _PROPORTION,
            optional("SpecAugmentMaxProportion", "f", 0.0),
            optional("SpecAugmentMaxRegions", "i", 1),
            _TEST,
            _CONTINUOUS,
        ),
        {
            "Dim": "input_dim",
            "BlockDim": "block_dim",
            "TimePeriod": "time_period",
            "DropoutProportion": "dropout_proportion",
            "SpecAugmentMaxProportion": "specaugment_max_proportion",
            "SpecAugmentMaxRegions": "specaugment_max_regions",
            "Continuous": "continuous",
        },
    ),
    SpecAugmentTimeMask.kind: settings(
        SpecAugmentTimeMask,
        (_DIM, Field("ZeroedProportion", "f"), Field("TimeMaskMaxFrames", "i"), _TEST),
        {
            "Dim": "input_dim",
            "ZeroedProportion": "zeroed_proportion",
            "TimeMaskMaxFrames": "time_mask_max_frames",
        },
    ),
    DropoutMask.kind: settings(
        DropoutMask,
        (Field("OutputDim", "i"), _PROPORTION, _TEST_MODE, _CONTINUOUS),
        {"OutputDim": "output_dim", "DropoutProportion": "dropout_proportion", "Continuous": "continuous"},
    ),
}
