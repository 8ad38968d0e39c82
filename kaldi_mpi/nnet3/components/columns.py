"""Products, sums and permutations of columns in files."""

from __future__ import annotations

from kaldi_mpi.models.components.columns import ElementwiseProduct, Permute, Pnorm, SumBlock, SumGroup
from kaldi_mpi.nnet3.components.fields import Field, settings

_DIMS = (Field("InputDim", "i"), Field("OutputDim", "i"))


_NAMES = {"InputDim": "input_dim", "OutputDim": "output_dim"}

KINDS = {
    Permute.kind: settings(Permute, (Field("ColumnMap", "ints"),), {"ColumnMap": "column_map"}),
    ElementwiseProduct.kind: settings(ElementwiseProduct, _DIMS, _NAMES),
    Pnorm.kind: settings(Pnorm, _DIMS, _NAMES),
    SumBlock.kind: settings(SumBlock, (*_DIMS, Field("Scale", "f")), {**_NAMES, "Scale": "scale"}),
    SumGroup.kind: settings(SumGroup, (Field("Sizes", "ints"),), {"Sizes": "sizes"}),
}
