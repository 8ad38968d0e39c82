"""Convolutions over time, and over time and height."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaldi_mpi.models.components.affine import constrain_orthonormal, natural_gradient_ranks
from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.components.preconditioned import Rows, RowTrained, kept
from kaldi_mpi.models.config import Options
from kaldi_mpi.models.natural_gradient import NaturalGradient
from kaldi_mpi.models.passes import column_sums
from kaldi_mpi.models.rows import Gather, positions


@functools.lru_cache(maxsize=1024)
def _gathers(call: Call, offsets: tuple[int, ...]) -> list[Gather]:
    """For each time offset, which rows of the input it takes; rows that are not there are zeros."""
    return [Gather(positions([t + offset for t in call.out_times], call.in_times)) for offset in offsets]


class Tdnn(RowTrained):
    """y(t) = sum over offsets o_k of linear_k x(t + o_k), + bias: a convolution over time.

    Attributes:
        linear: (output_dim, len(time_offsets) * input_dim).
        bias: (output_dim,), or None.
    """

    kind = "TdnnComponent"
    updatable = True
    row_wise = False
    fills_gaps = True

    def __init__(self, time_offsets: Sequence[int], linear: Tensor, bias: Tensor | None) -> None:
        self.time_offsets = tuple(time_offsets)
        if not self.time_offsets or linear.shape[1] % len(self.time_offsets):
            raise ValueError(f"{linear.shape[1]} columns for {len(self.time_offsets)} time offsets")
        super().__init__(linear.shape[1] // len(self.time_offsets), linear.shape[0])
        self.linear = nn.Parameter(linear)
        self.bias = None if bias is None else nn.Parameter(bias)

    def input_times(self, t: int) -> tuple[Sequence[int], Sequence[int]]:
        return [t + offset for offset in self.time_offsets], ()

    def make_rows(self) -> Rows:
        a = self.attributes
        rank_in, rank_out = a["RankInOut"]
        return Rows(rank_in, rank_out, 4, a["NumSamplesHistory"], a["AlphaInOut"])

    def trained_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.linear, self.bias

    def use_natural_gradient(self) -> None:
        if self.attributes.get("UseNaturalGradient", True):
            super().use_natural_gradient()

    def forward(self, x: Tensor, call: Call) -> Tensor:
        gathers = _gathers(call, self.time_offsets)
        keeps = self.natural_gradient and torch.is_grad_enabled()
        runs = [gather.run for gather in gathers]
        if torch.is_grad_enabled() and all(run is not None for run in runs):
            y: Tensor = _Spliced.apply(  # type: ignore[no-untyped-call]
                x, self.linear, self.bias, runs, self.rows if keeps else None
            )
            return y
        spliced = torch.cat([gather(x) for gather in gathers], dim=2)
        if keeps:
            return kept(self.rows, spliced, self.linear, self.bias)
        return functional.linear(spliced, self.linear, self.bias)

    def constrain(self) -> bool:
        return constrain_orthonormal(self, self.linear)


class _Spliced(torch.autograd.Function):
    """A `Tdnn` whose offsets each take a run of rows: views go into the products, and derivatives are added in place.

    With `rows` these are kept for the natural gradient, and the parameters get no gradient, as in `kept`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linear: Tensor, bias: Tensor | None, runs: Sequence[slice], rows: Rows | None
    ) -> Tensor:
        ctx.runs, ctx.rows, ctx.shape = runs, rows, x.shape
        parts = [x[run].reshape(-1, x.shape[2]) for run in runs]
        weights = linear.split(x.shape[2], dim=1)
        ctx.save_for_backward(x, linear, bias)
        out = functional.linear(parts[0], weights[0], bias)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            out.addmm_(part, weight.t())
        return out.view(-1, x.shape[1], linear.shape[0])

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        x, linear, bias = ctx.saved_tensors
        derivative, columns = derivatives[0].reshape(-1, linear.shape[0]), ctx.shape[2]
        of_x = of_linear = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = derivative.new_empty(ctx.shape)
            (first, *runs), (weight, *weights) = ctx.runs, linear.split(columns, dim=1)
            of_x[: first.start] = 0.0
            of_x[first.stop :] = 0.0
            torch.mm(derivative, weight, out=of_x[first].view(-1, columns))
            for run, weight in zip(runs, weights, strict=True):
                of_x[run].view(-1, columns).addmm_(derivative, weight)
        parts = [x[run].reshape(-1, columns) for run in ctx.runs]
        if ctx.rows is not None:
            ctx.rows.keep(parts, derivative)
        else:
            of_linear = torch.cat([derivative.t() @ part for part in parts], dim=1)
            of_bias = None if bias is None else column_sums(derivative)
        return of_x, of_linear, of_bias, None, None


class TimeHeightConvolution(ComponentModule):
    """A convolution over time and height of feature maps; column height * num_filters + filter of a row.

    Outputs are at every `height_subsample_out`-th height; beyond the input's heights there are zeros, and beyond its
    times too, but for the required time offsets.

    Attributes:
        offsets: (time, height) of the filters' points, sorted.
        linear: (num_filters_out, len(offsets) * num_filters_in), the offset's number slow, the filter's fast.
        bias: (num_filters_out,).

    Raises:
        ValueError: numbers that do not fit each other; says which.
    """

    kind = "TimeHeightConvolutionComponent"
    updatable = True
    row_wise = False

    def __init__(
        self,
        num_filters_in: int,
        height_in: int,
        height_out: int,
        height_subsample_out: int,
        offsets: Sequence[tuple[int, int]],
        required_time_offsets: Sequence[int],
        linear: Tensor,
        bias: Tensor,
    ) -> None:
        super().__init__(num_filters_in * height_in, linear.shape[0] * height_out)
        self.num_filters_in, self.num_filters_out = num_filters_in, linear.shape[0]
        self.height_in, self.height_out, self.height_subsample_out = height_in, height_out, height_subsample_out
        self.offsets = [(int(time), int(height)) for time, height in offsets]
        self.required_time_offsets = [int(t) for t in required_time_offsets]
        check_convolution(self)
        if linear.shape[1] != len(self.offsets) * num_filters_in or bias.shape != linear.shape[:1]:
            raise ValueError(
                f"parameters of shapes {tuple(linear.shape)} and {tuple(bias.shape)} for {len(self.offsets)} offsets "
                f"of {num_filters_in} filters"
            )
        self.linear, self.bias = nn.Parameter(linear), nn.Parameter(bias)
        self._times = tuple(sorted({time for time, _ in self.offsets}))

    def input_times(self, t: int) -> tuple[Sequence[int], Sequence[int]]:
        required = set(self.required_time_offsets)
        return [t + o for o in self._times if o in required], [t + o for o in self._times if o not in required]

    def forward(self, x: Tensor, call: Call) -> Tensor:
        rows, batch = len(call.out_times), x.shape[1]
        low = min(0, min(height for _, height in self.offsets))
        last = (self.height_out - 1) * self.height_subsample_out + max(height for _, height in self.offsets)
        padding = (0, 0, -low, max(0, last - self.height_in + 1))
        maps = {
            time: functional.pad(gather(x).reshape(rows, batch, self.height_in, self.num_filters_in), padding)
            for time, gather in zip(self._times, _gathers(call, self._times), strict=True)
        }
        step, span = self.height_subsample_out, (self.height_out - 1) * self.height_subsample_out + 1
        points = [maps[time][:, :, height - low : height - low + span : step] for time, height in self.offsets]
        return functional.linear(torch.cat(points, dim=3), self.linear, self.bias).reshape(rows, batch, -1)

    def use_natural_gradient(self) -> None:
        a = self.attributes
        if not a.get("UseNaturalGradient", True):
            return
        history = a["NumMinibatchesHistory"]
        self.of_rows, self.of_columns = (
            NaturalGradient(rank, update_period=1, alpha=alpha, num_minibatches_history=history)
            for rank, alpha in zip(a["RankInOut"], a["AlphaInOut"], strict=True)
        )
        self.natural_gradient = True

    @torch.no_grad()
    def finish_gradient(self) -> None:
        """The gradient itself is preconditioned, [weights bias] by row and then by column."""
        if not self.natural_gradient:
            return
        assert self.linear.grad is not None and self.bias.grad is not None
        both = torch.cat([self.linear.grad, self.bias.grad.unsqueeze(1)], dim=1)
        both, of_rows = self.of_rows.precondition(both)
        turned, of_columns = self.of_columns.precondition(both.t().contiguous())
        turned = turned * (of_rows * of_columns)
        self.linear.grad.copy_(turned[:-1].t())
        self.bias.grad.copy_(turned[-1])

    def freeze_natural_gradient(self, freeze: bool) -> None:
        if self.natural_gradient:
            self.of_rows.frozen = self.of_columns.frozen = freeze

    def training_state(self) -> dict[str, Any]:
        if not self.natural_gradient:
            return {}
        return {"rows": self.of_rows.state_dict(), "columns": self.of_columns.state_dict()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        if self.natural_gradient:
            self.of_rows.load_state_dict(state["rows"], self.linear.device)
            self.of_columns.load_state_dict(state["columns"], self.linear.device)


def check_convolution(c: TimeHeightConvolution) -> None:
    """Raises ValueError where Kaldi's ConvolutionModel::Check fails; says what does not fit."""
    sizes = {
        "num-filters-in": c.num_filters_in, "num-filters-out": c.num_filters_out, "height-in": c.height_in,
        "height-out": c.height_out, "height-subsample-out": c.height_subsample_out,
    }  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} {value} must be above 0")
    if not c.offsets or c.offsets != sorted(set(c.offsets)):
        raise ValueError(f"offsets {c.offsets} must be there, sorted, and none twice")
    required = set(c.required_time_offsets)
    if not required or not required <= {time for time, _ in c.offsets}:
        raise ValueError(f"required-time-offsets {sorted(required)} are not among the time offsets")
    used = set()
    for out in range(c.height_out):
        inside = [(t, h) for t, h in c.offsets if 0 <= out * c.height_subsample_out + h < c.height_in]
        used.update(inside)
        if not any(time in required for time, _ in inside):
            raise ValueError(
                f"height-out {c.height_out} (height-subsample-out {c.height_subsample_out}) does not fit height-in "
                f"{c.height_in}: output height {out} has no input"
            )
    for offset in c.offsets:
        if offset not in used:
            raise ValueError(f"offset (time, height) = {offset} is never inside height-in {c.height_in}")


def _integers(options: Options, key: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise options.place.error(f"integers separated by commas expected, found {text!r}", key) from None


def _unique(options: Options, key: str, text: str) -> list[int]:
    values = _integers(options, key, text)
    if values != sorted(set(values)):
        raise options.place.error(f"must be sorted, and none twice: {text}", key)
    return values


def _tdnn(options: Options, init: Initializer) -> Tdnn:
    in_, out = options.positive("input-dim"), options.positive("output-dim")
    offsets = _integers(options, "time-offsets", options.text("time-offsets"))
    if len(set(offsets)) != len(offsets):
        raise options.place.error("the same offset twice", "time-offsets")
    columns = in_ * len(offsets)
    stddev = options.number("param-stddev", -1.0)
    linear = init.normal(out, columns, stddev=stddev if stddev >= 0 else 1.0 / math.sqrt(columns))
    bias_stddev, bias_mean = options.number("bias-stddev", 1.0), options.number("bias-mean", 0.0)
    bias = init.normal(out, stddev=bias_stddev) + bias_mean if options.flag("use-bias", True) else None
    component = Tdnn(offsets, linear, bias)
    component.take_rates(options)
    component.attributes = {
        "OrthonormalConstraint": options.number("orthonormal-constraint", 0.0),
        "UseNaturalGradient": options.flag("use-natural-gradient", True),
        "NumSamplesHistory": options.number("num-samples-history", 2000.0),
        "AlphaInOut": (options.number("alpha-in", 4.0), options.number("alpha-out", 4.0)),
        "RankInOut": natural_gradient_ranks(columns, out, options),
    }
    return component


def _offsets(options: Options) -> list[tuple[int, int]]:
    """The points of the filters, by ``offsets`` or by ``time-offsets`` and ``height-offsets``."""
    text = options.values.pop("offsets", None)
    if text is None:
        times = _unique(options, "time-offsets", options.text("time-offsets"))
        heights = _unique(options, "height-offsets", options.text("height-offsets"))
        return [(time, height) for time in times for height in heights]
    pairs = [_integers(options, "offsets", pair) for pair in text.split(";")]
    if any(len(pair) != 2 for pair in pairs):
        raise options.place.error(f"pairs time,height separated by ; expected, found {text!r}", "offsets")
    return sorted((time, height) for time, height in pairs)


def _convolution(options: Options, init: Initializer) -> TimeHeightConvolution:
    filters_in, filters_out = options.integer("num-filters-in"), options.integer("num-filters-out")
    heights = options.integer("height-in"), options.integer("height-out"), options.integer("height-subsample-out", 1)
    offsets = _offsets(options)
    required = options.values.pop("required-time-offsets", None)
    required_times = (
        sorted({time for time, _ in offsets})
        if required is None or required == "undef"
        else _unique(options, "required-time-offsets", required)
    )
    stddev = options.number("param-stddev", -1.0)
    columns = max(1, filters_in) * len(offsets)
    rows = max(0, filters_out)
    linear = init.normal(rows, columns, stddev=stddev if stddev >= 0 else 1.0 / math.sqrt(columns))
    bias = init.normal(rows, stddev=options.number("bias-stddev", 0.0))
    if options.flag("init-unit", False):
        if filters_in != filters_out or (0, 0) not in offsets:
            raise options.place.error("needs num-filters-in = num-filters-out and the offset 0,0", "init-unit")
        linear.zero_()
        at = offsets.index((0, 0)) * filters_in
        linear[:, at : at + filters_in] = torch.eye(filters_in)
    component = TimeHeightConvolution(filters_in, *heights, offsets, required_times, linear, bias)
    component.take_rates(options)
    rank_in, rank_out = options.integer("rank-in", -1), options.integer("rank-out", -1)
    component.attributes = {
        "MaxMemoryMb": options.number("max-memory-mb", 200.0),
        "UseNaturalGradient": options.flag("use-natural-gradient", True),
        "NumMinibatchesHistory": options.number("num-minibatches-history", 4.0),
        "AlphaInOut": (options.number("alpha-in", 4.0), options.number("alpha-out", 4.0)),
        "RankInOut": (
            rank_in if rank_in >= 0 else min(80, (columns + 2) // 2),
            rank_out if rank_out >= 0 else min(80, (rows + 1) // 2),
        ),
    }
    return component


MAKERS = {Tdnn.kind: _tdnn, TimeHeightConvolution.kind: _convolution}
