"""Normalisation of rows and of columns, in files."""

from __future__ import annotations

import numpy as np
import torch

from kaldi_mpi.models.components import BatchNorm, Normalize
from kaldi_mpi.nnet3.components.fields import Field, Kind, Values, array, optional


def _normalize(values: Values) -> Normalize:
    dim = values.pop("InputDim")
    block_dim = values.pop("BlockDim", None)
    return Normalize(dim, values.pop("TargetRms"), block_dim, values.pop("AddLogStddev"))


def _normalize_values(module: Normalize) -> Values:
    return {
        "InputDim": module.input_dim,
        "BlockDim": None if module.block_dim == module.input_dim else module.block_dim,
        "TargetRms": module.target_rms,
        "AddLogStddev": module.add_log_stddev,
    }


def _batch_norm(values: Values) -> BatchNorm:
    module = BatchNorm(values.pop("Dim"), values.pop("BlockDim"), values.pop("Epsilon"), values.pop("TargetRms"))
    mean, variance = values.pop("StatsMean"), values.pop("StatsVar")
    if mean.shape != (module.block_dim,) or variance.shape != mean.shape:
        raise ValueError(f"<StatsMean> and <StatsVar> have shapes {mean.shape} and {variance.shape}")
    module.count.fill_(values.pop("Count"))
    module.moments.copy_(torch.from_numpy(np.concatenate([mean, variance])))
    return module


def _batch_norm_values(module: BatchNorm) -> Values:
    mean, variance = array(module.moments).reshape(2, -1)
    return {
        "StatsMean": mean,
        "StatsVar": variance,
        "TestMode": bool(module.attributes.get("TestMode", False)),
        "Dim": module.input_dim,
        "BlockDim": module.block_dim,
        "Epsilon": module.epsilon,
        "TargetRms": module.target_rms,
        "Count": module.count.item(),
    }


KINDS = {
    Normalize.kind: Kind(
        (
            Field("InputDim", "i"),
            optional("BlockDim", "i"),
            Field("TargetRms", "f"),
            Field("AddLogStddev", "b"),
        ),
        _normalize,
        _normalize_values,
    ),
    BatchNorm.kind: Kind(
        (
            Field("Dim", "i"),
            Field("BlockDim", "i"),
            Field("Epsilon", "f"),
            Field("TargetRms", "f"),
            Field("TestMode", "b"),
            Field("Count", "d"),
            Field("StatsMean", "vector"),
            Field("StatsVar", "vector"),
        ),
        _batch_norm,
        _batch_norm_values,
    ),
}
