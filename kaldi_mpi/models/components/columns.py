"""Components that put columns together without parameters: products, sums, permutations."""

from __future__ import annotations

import torch
from torch import Tensor

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.config import Options


class Permute(ComponentModule):
    """Column i of the output is column column_map[i] of the input."""

    kind = "PermuteComponent"
    index: Tensor

    def __init__(self, column_map: list[int]) -> None:
        if not column_map or sorted(column_map) != list(range(len(column_map))):
            raise ValueError(f"column-map is not a permutation of 0 .. {len(column_map) - 1}")
        super().__init__(len(column_map), len(column_map))
        self.column_map = list(column_map)
        self.register_buffer("index", torch.tensor(column_map), persistent=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return x.index_select(2, self.index)


class ElementwiseProduct(ComponentModule):
    """The product of the input's blocks of output_dim columns."""

    kind = "ElementwiseProductComponent"

    def __init__(self, input_dim: int, output_dim: int) -> None:
        if output_dim < 1 or input_dim < 2 * output_dim or input_dim % output_dim:
            raise ValueError(f"input-dim {input_dim} is not 2 or more times output-dim {output_dim}")
        super().__init__(input_dim, output_dim)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        first, *rest = x.split(self.output_dim, dim=2)
        for part in rest:
            first = first * part
        return first


class SumBlock(ComponentModule):
    """`scale` times the sum of the input's blocks of output_dim columns."""

    kind = "SumBlockComponent"

    def __init__(self, input_dim: int, output_dim: int, scale: float = 1.0) -> None:
        if output_dim < 1 or input_dim < 1 or input_dim % output_dim:
            raise ValueError(f"input-dim {input_dim} is not a multiple of output-dim {output_dim}")
        super().__init__(input_dim, output_dim)
        self.scale = scale

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return x.unflatten(2, (-1, self.output_dim)).sum(2) * self.scale


class SumGroup(ComponentModule):
    """Column i of the output is the sum of the next sizes[i] columns of the input."""

    kind = "SumGroupComponent"
    group: Tensor

    def __init__(self, sizes: list[int]) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes {sizes} must be there and above 0")
        super().__init__(sum(sizes), len(sizes))
        self.sizes = list(sizes)
        groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self.register_buffer("group", groups, persistent=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        out = x.new_zeros(*x.shape[:2], self.output_dim)
        return out.index_add(2, self.group, x)


class Pnorm(ComponentModule):
    """The 2-norm of each group of neighbouring columns."""

    kind = "PnormComponent"

    def __init__(self, input_dim: int, output_dim: int) -> None:
        if output_dim < 1 or input_dim < 1 or input_dim % output_dim:
            raise ValueError(f"input-dim {input_dim} is not a multiple of output-dim {output_dim}")
        super().__init__(input_dim, output_dim)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return torch.linalg.vector_norm(x.unflatten(2, (self.output_dim, -1)), dim=3)


def _permute(options: Options, init: Initializer) -> Permute:
    text = options.text("column-map")
    return Permute([int(part) for part in text.split(",") if part.strip()])


def _product(options: Options, init: Initializer) -> ElementwiseProduct:
    return ElementwiseProduct(options.positive("input-dim"), options.positive("output-dim"))


def _sum_block(options: Options, init: Initializer) -> SumBlock:
    in_, out = options.positive("input-dim"), options.positive("output-dim")
    return SumBlock(in_, out, options.number("scale", 1.0))


def _sum_group(options: Options, init: Initializer) -> SumGroup:
    if "sizes" in options.values:
        sizes = [int(part) for part in options.text("sizes").split(",")]
    else:
        in_, out = options.positive("input-dim"), options.positive("output-dim")
        sizes = [in_ // out] * out
    return SumGroup(sizes)


def _pnorm(options: Options, init: Initializer) -> Pnorm:
    return Pnorm(options.positive("input-dim"), options.positive("output-dim"))


MAKERS = {
    Permute.kind: _permute,
    ElementwiseProduct.kind: _product,
    SumBlock.kind: _sum_block,
    SumGroup.kind: _sum_group,
    Pnorm.kind: _pnorm,
}
