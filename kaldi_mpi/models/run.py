"""Runs a computation: values of all nodes, forward, in a way that autograd can run backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kaldi_mpi.models.components import Affine, Call, ComponentModule, Linear, LstmNonlinearity
from kaldi_mpi.models.components.preconditioned import RowTrained
from kaldi_mpi.models.computation import Computation, Expression, FusedLstm, Leaf, Recurrence, Source, Step
from kaldi_mpi.models.config import ComponentNode
from kaldi_mpi.models.lstm import lstm


class _WithinWindow(torch.autograd.Function):
    """The rows themselves, whose derivatives outside [begin, end) are 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, begin: int, end: int) -> Tensor:
        ctx.begin, ctx.end = begin, end
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        (derivative,) = derivatives
        inner = derivative[ctx.begin : ctx.end]
        after = derivative.shape[0] - ctx.end
        return torch.nn.functional.pad(inner, (0, 0, 0, 0, ctx.begin, after)), None, None


def apply(module: ComponentModule, x: Tensor, call: Call) -> Tensor:
    """A component on the rows of a call; those outside the window of derivatives have none."""
    begin, end = call.window
    rows = len(call.out_times)
    whole = begin == 0 and end == rows
    if whole or not torch.is_grad_enabled() or not (x.requires_grad or module.updatable):
        y: Tensor = module(x, call)
        return y
    if not module.row_wise:
        y = module(x, call)
        masked: Tensor = _WithinWindow.apply(y, begin, end)  # type: ignore[no-untyped-call]
        return masked
    # Kaldi leaves the rows outside out of the update altogether, so no gradient may reach the component from them.
    parts = []
    for low, high, inside in ((0, begin, False), (begin, end, True), (end, rows, False)):
        if high > low:
            times = call.out_times[low:high]
            with torch.set_grad_enabled(inside):
                parts.append(module(x[low:high], Call.of(times)))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Values:
    """Rows of nodes: whole, by name; of the recurrence under way, by time."""

    def __init__(self, components: Mapping[str, ComponentModule], like: Tensor, batch: int) -> None:
        self.components, self.like, self.batch = components, like, batch
        self.whole: dict[str, Tensor] = {}
        self.first_column: dict[str, int] = {}  # of nodes of which only the last columns are kept
        self.rows: dict[str, dict[int, Tensor]] = {}

    def evaluate(self, source: Source) -> Tensor:
        """(rows, B, columns) of a descriptor."""
        if isinstance(source, Leaf):
            return self.leaf(source)
        if source.op == "Sum":
            return self.sum(source)
        if source.op == "Const":
            return self.like.new_full((source.count, self.batch, source.columns), source.scale)
        parts = [self.evaluate(part) for part in source.parts]
        if source.op == "Append":
            return torch.cat(parts, dim=2)
        if source.op == "Scale":
            return parts[0] * source.scale
        if source.op == "Switch":
            assert source.order is not None
            return source.order(torch.cat(parts))
        raise AssertionError(source.op)

    def sum(self, source: Expression) -> Tensor:
        """The scales of its terms are applied as they are added: one pass over memory less for each."""
        first, *others = source.parts
        total = self.evaluate(first)
        for part in others:
            if isinstance(part, Expression) and part.op == "Scale":
                total = torch.add(total, self.evaluate(part.parts[0]), alpha=part.scale)
            else:
                total = total + self.evaluate(part)
        return total

    def leaf(self, leaf: Leaf) -> Tensor:
        begin, end = leaf.begin, leaf.end
        by_time = self.rows.get(leaf.node)
        if by_time is not None:
            zeros = self.like.new_zeros(self.batch, end - begin)
            data = [
                by_time[t][:, begin:end] if there and t in by_time else zeros
                for t, there in zip(leaf.times, leaf.there, strict=True)
            ]
            return torch.stack(data)
        if leaf.node not in self.whole:
            return self.like.new_zeros(leaf.rows.count, self.batch, end - begin)
        data_ = leaf.rows(self.whole[leaf.node])
        shift = self.first_column.get(leaf.node, 0)
        return data_ if end - begin == data_.shape[2] else data_[:, :, begin - shift : end - shift]

    def step(self, step: Step, only_input: bool = False) -> Tensor:
        node, call = step.node, step.call
        if step.source is None:
            x = self.like.new_zeros(len(call.out_times), self.batch, 0)
        else:
            x = self.evaluate(step.source)
        if only_input or not isinstance(node, ComponentNode):
            return x
        return apply(self.components[node.component], x, call)

    def recurrence(self, recurrence: Recurrence) -> None:
        self.rows = {name: {} for name in recurrence.members}
        for block in recurrence.blocks:
            for step in block:
                data = self.step(step)
                self.rows[step.node.name].update(zip(step.call.out_times, data.unbind(0), strict=True))
        for name, by_time in self.rows.items():
            self.whole[name] = torch.stack([by_time[t] for t in sorted(by_time)])
        self.rows = {}

    def fused(self, step: FusedLstm) -> None:
        group, names = step.group, self.components
        w_all, nonlinearity = names[group.w_all], names[group.nonlinearity]
        projection = names[group.projection] if group.projection else None
        assert isinstance(w_all, Affine | Linear) and isinstance(nonlinearity, LstmNonlinearity)
        assert projection is None or isinstance(projection, Affine | Linear)
        x = self.evaluate(step.source)
        begin, end = step.window
        self.whole[group.value] = lstm(
            x,
            w_all.linear,
            w_all.bias if isinstance(w_all, Affine) else w_all.linear.new_zeros(w_all.output_dim),
            nonlinearity.peepholes,
            step.settings,
            first=step.times[0],
            stride=step.stride,
            # Times of the first and last row with derivatives; none where the window is empty.
            min_deriv_time=step.times[0] + begin * step.stride,
            max_deriv_time=step.times[0] + (end - 1) * step.stride,
            w_rp=None if projection is None else projection.linear,
            b_rp=projection.bias if isinstance(projection, Affine) else None,
            mask=None if step.mask is None else self.evaluate(step.mask),
            keeper=_Keeper(w_all, nonlinearity, projection) if torch.is_grad_enabled() else None,
        )
        if projection is None:
            self.first_column[group.value] = nonlinearity.output_dim // 2  # only m is kept, not c


class _Keeper:
    """What the components of a fused LSTM want of its backward pass."""

    def __init__(
        self, w_all: ComponentModule, nonlinearity: LstmNonlinearity, projection: ComponentModule | None
    ) -> None:
        self._w_all, self._nonlinearity, self._projection = w_all, nonlinearity, projection

    def repair(self) -> Tensor | None:
        return self._nonlinearity.repair()

    def store(self, values: Tensor, derivatives: Tensor, rows: int) -> None:
        self._nonlinearity.store(values, derivatives, rows)

    def keep_gates(self, x: Tensor, derivative: Tensor) -> bool:
        return _keep(self._w_all, x, derivative)

    def keep_projection(self, m: Tensor, derivative: Tensor) -> bool:
        return self._projection is not None and _keep(self._projection, m, derivative)


def _keep(module: ComponentModule, x: Tensor, derivative: Tensor) -> bool:
    if not module.natural_gradient:
        return False
    assert isinstance(module, RowTrained)
    module.rows.keep(x, derivative)
    return True


def run_computation(
    components: Mapping[str, ComponentModule],
    computation: Computation,
    inputs: Mapping[str, Tensor],
    only_input: str | None = None,
) -> dict[str, Tensor]:
    """Values of the nodes of a computation: (rows, B, columns) by name.

    Args:
        components: by name.
        inputs: (rows, B, columns) of each input node.
        only_input: a node of which the value is what its component would get.
    """
    like = next(iter(inputs.values()))
    values = _Values(components, like, like.shape[1])
    values.whole.update(inputs)
    for step in computation.steps:
        if isinstance(step, Recurrence):
            values.recurrence(step)
        elif isinstance(step, FusedLstm):
            values.fused(step)
        else:
            values.whole[step.node.name] = values.step(step, only_input == step.node.name)
    return values.whole
