"""Normalisation of rows and of columns, in files."""

from __future__ import annotations

from kaldi_mpi.models.components import Normalize
from kaldi_mpi.nnet3.components.fields import Field, Kind, Values, optional


def _normalize(values: Values) -> Normalize:
    dim = values.pop("InputDim")
    if values.get("AddLogStddev") or values.get("BlockDim") not in (None, dim):
        raise ValueError("<AddLogStddev> and <BlockDim> are not supported yet")
    return Normalize(dim, values.pop("TargetRms"))


KINDS = {
    Normalize.kind: Kind(
        (
            Field("InputDim", "i"),
            optional("BlockDim", "i"),
            Field("TargetRms", "f"),
            Field("AddLogStddev", "b"),
        ),
        _normalize,
        lambda module: {"InputDim": module.input_dim, "TargetRms": module.target_rms, "AddLogStddev": False},
    ),
}
