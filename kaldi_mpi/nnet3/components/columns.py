"""Products, sums and permutations of columns in files."""

from __future__ import annotations

from typing import Any

from kaldi_mpi.models.components.columns import ElementwiseProduct, Permute, Pnorm, SumBlock, SumGroup
from kaldi_mpi.nnet3.components.fields import Field, Kind, Values

_DIMS = (Field("InputDim", "i"), Field("OutputDim", "i"))


def _of_dims(cls: type[Any]) -> Kind:
    return Kind(
        _DIMS,
        lambda values: cls(values.pop("InputDim"), values.pop("OutputDim")),
        lambda module: {"InputDim": module.input_dim, "OutputDim": module.output_dim},
    )


def _sum_block(values: Values) -> SumBlock:
    return SumBlock(values.pop("InputDim"), values.pop("OutputDim"), values.pop("Scale"))


KINDS = {
    Permute.kind: Kind(
        (Field("ColumnMap", "ints"),),
        lambda values: Permute(values.pop("ColumnMap")),
        lambda module: {"ColumnMap": module.column_map},
    ),
    ElementwiseProduct.kind: _of_dims(ElementwiseProduct),
    Pnorm.kind: _of_dims(Pnorm),
    SumBlock.kind: Kind(
        (*_DIMS, Field("Scale", "f")),
        _sum_block,
        lambda module: {"InputDim": module.input_dim, "OutputDim": module.output_dim, "Scale": module.scale},
    ),
    SumGroup.kind: Kind(
        (Field("Sizes", "ints"),),
        lambda values: SumGroup(values.pop("Sizes")),
        lambda module: {"Sizes": module.sizes},
    ),
}
