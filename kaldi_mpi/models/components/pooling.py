"""Statistics over windows of time, and attention over a window of neighbours."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.config import Options
from kaldi_mpi.models.rows import Gather, positions


class _Windows:
    """For each output row the input rows that it sums, as a matrix of 0 and 1, once for each device."""

    def __init__(self, windows: Sequence[Sequence[int]], have: Sequence[int]) -> None:
        where = {t: index for index, t in enumerate(have)}
        matrix = np.zeros((len(windows), len(have)), np.float32)
        for row, window in enumerate(windows):
            matrix[row, [where[t] for t in window if t in where]] = 1.0
        self._matrix = torch.from_numpy(matrix)
        self._there: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, like: Tensor) -> Tensor:
        key = like.device, like.dtype
        if key not in self._there:
            self._there[key] = self._matrix.to(*key)
        return self._there[key]


@functools.lru_cache(maxsize=1024)
def _extraction_windows(call: Call, input_period: int, output_period: int) -> _Windows:
    starts = [t // output_period * output_period for t in call.out_times]
    return _Windows([range(start, start + output_period, input_period) for start in starts], call.in_times)


@functools.lru_cache(maxsize=1024)
def _pooling_windows(call: Call, left: int, right: int, period: int) -> _Windows:
    return _Windows([range(t - left, t + right + 1, period) for t in call.out_times], call.in_times)


class StatisticsExtraction(ComponentModule):
    """Rows [count, sum of x (, sum of x^2)] over the inputs that there are at multiples of `input_period` in a window
    of `output_period` frames."""

    kind = "StatisticsExtractionComponent"
    row_wise = False

    def __init__(
        self, input_dim: int, input_period: int = 1, output_period: int = 1, include_variance: bool = True
    ) -> None:
        if input_period < 1 or output_period < 1 or output_period % input_period:
            raise ValueError(f"output-period {output_period} is not a multiple of input-period {input_period}")
        super().__init__(input_dim, 1 + input_dim * (2 if include_variance else 1))
        self.input_period, self.output_period = input_period, output_period
        self.include_variance = include_variance

    @property
    def modulus(self) -> int:
        return self.output_period

    def input_times(self, t: int) -> tuple[Sequence[int], Sequence[int]]:
        start = t // self.output_period * self.output_period
        return (), range(start, start + self.output_period, self.input_period)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        matrix = _extraction_windows(call, self.input_period, self.output_period)(x)
        counts = matrix.sum(1).view(-1, 1, 1).expand(-1, x.shape[1], 1)
        parts = [x, x.square()] if self.include_variance else [x]
        return torch.cat([counts, *(torch.einsum("oi,ibd->obd", matrix, part) for part in parts)], dim=2)


class StatisticsPooling(ComponentModule):
    """Means (and standard deviations) out of the rows of StatisticsExtraction within a window around each frame.

    The count gets no derivative, and that of a standard deviation does not know its floor, as in nnet3.
    """

    kind = "StatisticsPoolingComponent"
    row_wise = False

    def __init__(
        self,
        input_dim: int,
        input_period: int = 1,
        left_context: int = -1,
        right_context: int = -1,
        num_log_count_features: int = 0,
        output_stddevs: bool = False,
        variance_floor: float = 1.0e-10,
    ) -> None:
        if input_period < 1 or left_context + right_context <= 0:
            raise ValueError(f"input-period {input_period}, contexts {left_context} and {right_context}")
        if left_context % input_period or right_context % input_period:
            raise ValueError(
                f"contexts {left_context} and {right_context} are not multiples of input-period {input_period}"
            )
        if num_log_count_features < 0 or (output_stddevs and (input_dim - 1) % 2) or variance_floor <= 0:
            raise ValueError(
                f"num-log-count-features {num_log_count_features}, input-dim {input_dim}, "
                f"variance-floor {variance_floor}"
            )
        super().__init__(input_dim, input_dim - 1 + num_log_count_features)
        self.input_period, self.left_context, self.right_context = input_period, left_context, right_context
        self.num_log_count_features, self.output_stddevs = num_log_count_features, output_stddevs
        self.variance_floor = variance_floor

    @property
    def modulus(self) -> int:
        return self.input_period

    def input_times(self, t: int) -> tuple[Sequence[int], Sequence[int]]:
        if t % self.input_period:
            return (), ()
        return (), range(t - self.left_context, t + self.right_context + 1, self.input_period)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        matrix = _pooling_windows(call, self.left_context, self.right_context, self.input_period)(x)
        sums = torch.einsum("oi,ibd->obd", matrix, x)
        counts = sums[:, :, :1].detach()
        means = sums[:, :, 1:] / counts
        parts = [counts.log().expand(-1, -1, self.num_log_count_features)] if self.num_log_count_features else []
        if not self.output_stddevs:
            return torch.cat([*parts, means], dim=2)
        mean, square = means.chunk(2, dim=2)
        variance = square - mean * mean
        floored = variance + (variance.clamp_min(self.variance_floor) - variance).detach()
        return torch.cat([*parts, mean, floored.sqrt()], dim=2)


@functools.lru_cache(maxsize=1024)
def _neighbours(call: Call, offsets: tuple[int, ...]) -> list[Gather]:
    return [Gather(positions([t + offset for t in call.out_times], call.in_times)) for offset in offsets]


class RestrictedAttention(ComponentModule):
    """Attention of each frame over neighbours at fixed offsets, with a bias for each offset.

    Povey et al., "A time-restricted self-attention layer for ASR", ICASSP 2018. Columns of a head: key, value,
    query, and one for each offset that is added to its product of query and key.
    """

    kind = "RestrictedAttentionComponent"
    row_wise = False

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        num_left_inputs: int,
        num_right_inputs: int,
        time_stride: int = 1,
        num_left_inputs_required: int = -1,
        num_right_inputs_required: int = -1,
        output_context: bool = True,
        key_scale: float = -1.0,
    ) -> None:
        left = num_left_inputs if num_left_inputs_required < 0 else num_left_inputs_required
        right = num_right_inputs if num_right_inputs_required < 0 else num_right_inputs_required
        numbers = {
            "num-heads": num_heads, "key-dim": key_dim, "value-dim": value_dim, "time-stride": time_stride,
            "num-left-inputs + num-right-inputs": num_left_inputs + num_right_inputs,
        }  # fmt: skip
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be above 0")
        if min(num_left_inputs, num_right_inputs) < 0 or left > num_left_inputs or right > num_right_inputs:
            raise ValueError(
                f"{num_left_inputs} left and {num_right_inputs} right inputs, of which {left} and {right} are required"
            )
        context = num_left_inputs + 1 + num_right_inputs
        super().__init__(
            num_heads * (2 * key_dim + value_dim + context),
            num_heads * (value_dim + (context if output_context else 0)),
        )
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.num_left_inputs, self.num_right_inputs, self.time_stride = num_left_inputs, num_right_inputs, time_stride
        self.num_left_inputs_required, self.num_right_inputs_required = left, right
        self.output_context = output_context
        self.key_scale = key_scale if key_scale > 0 else 1.0 / math.sqrt(key_dim)
        self.offsets = tuple(k * time_stride for k in range(-num_left_inputs, num_right_inputs + 1))

    def input_times(self, t: int) -> tuple[Sequence[int], Sequence[int]]:
        low, high = -self.num_left_inputs_required, self.num_right_inputs_required
        steps = {offset: offset // self.time_stride for offset in self.offsets}
        required = [t + offset for offset, step in steps.items() if low <= step <= high]
        return required, [t + offset for offset, step in steps.items() if not low <= step <= high]

    def forward(self, x: Tensor, call: Call) -> Tensor:
        heads = x.unflatten(2, (self.num_heads, -1))
        keys, values, queries = heads.split([self.key_dim, self.value_dim, self.key_dim + len(self.offsets)], dim=3)
        gathers = _neighbours(call, self.offsets)
        own = gathers[self.num_left_inputs](queries.flatten(2)).unflatten(2, (self.num_heads, -1))
        query, bias = own.split([self.key_dim, len(self.offsets)], dim=3)

        def neighbours(of: Tensor) -> Tensor:
            """(rows, B, heads, offsets, columns); those that are not there are zeros."""
            flat = of.flatten(2)
            return torch.stack([gather(flat).unflatten(2, (self.num_heads, -1)) for gather in gathers], dim=3)

        products = (neighbours(keys) * query.unsqueeze(3)).sum(4) * self.key_scale + bias
        weights = products.softmax(dim=3)
        found = (neighbours(values) * weights.unsqueeze(4)).sum(3)
        if self.output_context:
            found = torch.cat([found, weights], dim=3)
        return found.flatten(2)


def _extraction(options: Options, init: Initializer) -> StatisticsExtraction:
    dim = options.positive("input-dim")
    periods = options.integer("input-period", 1), options.integer("output-period", 1)
    return StatisticsExtraction(dim, *periods, options.flag("include-variance", True))


def _pooling(options: Options, init: Initializer) -> StatisticsPooling:
    dim = options.positive("input-dim")
    period, left = options.integer("input-period", 1), options.integer("left-context", -1)
    right, counts = options.integer("right-context", -1), options.integer("num-log-count-features", 0)
    stddevs, floor = options.flag("output-stddevs", False), options.number("variance-floor", 1.0e-10)
    return StatisticsPooling(dim, period, left, right, counts, stddevs, floor)


def _attention(options: Options, init: Initializer) -> RestrictedAttention:
    heads, key, value = options.integer("num-heads", 1), options.integer("key-dim"), options.integer("value-dim")
    left, right = options.integer("num-left-inputs"), options.integer("num-right-inputs")
    stride = options.integer("time-stride", 1)
    required = options.integer("num-left-inputs-required", -1), options.integer("num-right-inputs-required", -1)
    context, scale = options.flag("output-context", True), options.number("key-scale", -1.0)
    return RestrictedAttention(heads, key, value, left, right, stride, *required, context, scale)


MAKERS = {
    StatisticsExtraction.kind: _extraction,
    StatisticsPooling.kind: _pooling,
    RestrictedAttention.kind: _attention,
}
