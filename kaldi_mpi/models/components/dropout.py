"""Dropout and SpecAugment: masks of each kind that nnet3 has.

Masks are drawn on the device. In test mode (`Mode.dropout` off) each component gives its expected value, as nnet3 does.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.config import Options


class DropoutBase(ComponentModule):
    """A component with a proportion that a schedule may change while it trains.

    Attributes:
        dropout_proportion: what is dropped, in [0, 1].
    """

    def __init__(self, input_dim: int, output_dim: int, dropout_proportion: float) -> None:
        super().__init__(input_dim, output_dim)
        if not 0.0 <= dropout_proportion <= 1.0:
            raise ValueError(f"dropout-proportion {dropout_proportion} is not between 0 and 1")
        self.dropout_proportion = dropout_proportion


class Dropout(DropoutBase):
    """Elements, or whole rows, times 0 or 1; not scaled by 1 / (1 - p): the test mode multiplies by 1 - p instead."""

    kind = "DropoutComponent"

    def __init__(self, dim: int, dropout_proportion: float, per_frame: bool = False) -> None:
        super().__init__(dim, dim, dropout_proportion)
        self.per_frame = per_frame

    def forward(self, x: Tensor, call: Call) -> Tensor:
        p = self.dropout_proportion
        if not self.mode.dropout:
            return x * (1.0 - p) if p else x
        if p == 0.0:
            return x
        shape = (*x.shape[:2], 1 if self.per_frame else x.shape[2])
        kept = self.mode.chance.uniform(*shape, like=x) >= p
        return x * kept


class GeneralDropout(DropoutBase):
    """A mask that a sequence's frames share, wholly or for each `time_period` frames; scaled to the mean 1.

    Args:
        dim: columns.
        block_dim: columns of the mask, which all blocks of a row share.
        time_period: frames that share a mask; 0: all of a sequence.
        specaugment_max_proportion: above 0, columns are zeroed as SpecAugment does (arXiv 1904.08779), in up to
            `specaugment_max_regions` regions, the others not scaled; `dropout_proportion` means nothing then.
        continuous: factors uniform in [1 - 2p, 1 + 2p] in place of 0 and 1 / (1 - p).
    """

    kind = "GeneralDropoutComponent"
    row_wise = False

    def __init__(
        self,
        dim: int,
        block_dim: int | None = None,
        time_period: int = 0,
        dropout_proportion: float = 0.5,
        specaugment_max_proportion: float = 0.0,
        specaugment_max_regions: int = 1,
        continuous: bool = False,
    ) -> None:
        super().__init__(dim, dim, dropout_proportion)
        self.block_dim = dim if block_dim is None else block_dim
        if self.block_dim < 1 or dim % self.block_dim:
            raise ValueError(f"block-dim {self.block_dim} does not divide dim {dim}")
        if time_period < 0 or specaugment_max_regions < 1 or not 0.0 <= specaugment_max_proportion <= 1.0:
            raise ValueError(
                f"time-period {time_period}, specaugment-max-regions {specaugment_max_regions}, "
                f"specaugment-max-proportion {specaugment_max_proportion}"
            )
        if specaugment_max_proportion and continuous:
            raise ValueError("specaugment-max-proportion and continuous exclude each other")
        self.time_period, self.continuous = time_period, continuous
        self.specaugment_max_proportion = specaugment_max_proportion
        self.specaugment_max_regions = specaugment_max_regions

    def forward(self, x: Tensor, call: Call) -> Tensor:
        p = self.dropout_proportion
        if not self.mode.dropout or (p == 0.0 and not self.specaugment_max_proportion):
            return x
        index = _periods(call.out_times, self.time_period)
        count = index[-1] + 1 if index else 1
        if self.specaugment_max_proportion:
            mask = self._frequency_mask(count, x)
        else:
            mask = self.mode.chance.uniform(count, x.shape[1], self.block_dim, like=x)
            if self.continuous:
                mask = mask * (4.0 * p) + (1.0 - 2.0 * p)
            else:
                mask = (mask > p).to(x.dtype) / (1.0 - p) if p < 1.0 else torch.zeros_like(mask)
        if count > 1:
            mask = mask.index_select(0, torch.tensor(index, device=x.device))
        if self.block_dim == self.input_dim:
            return x * mask
        return (x.unflatten(2, (-1, self.block_dim)) * mask.unsqueeze(2)).flatten(2)

    def _frequency_mask(self, count: int, x: Tensor) -> Tensor:
        """(count, B, block_dim) of 0 and 1: a run of columns on a circle, parts of which are turned around."""
        bins, batch, chance = self.block_dim, x.shape[1], self.mode.chance
        most = int(bins * self.specaugment_max_proportion + 0.5)

        def below(bound: int) -> Tensor:
            return (chance.uniform(count, batch, 1, like=x) * bound).floor().clamp_max(bound - 1)

        columns = torch.arange(bins, device=x.device, dtype=x.dtype)
        number, start = below(most + 1), below(bins)
        mask = (torch.remainder(columns - start, bins) >= number).to(x.dtype)
        half, quarter = bins // 2, bins // 2 // 2
        for _ in range(1, self.specaugment_max_regions):
            # Column first + i changes places with first + half - i, for i below a quarter of the circle.
            first = below(bins)
            place = torch.remainder(columns - first, bins)
            swapped = (place < quarter) | ((place > half - quarter) & (place <= half))
            other = torch.where(swapped, half - place, place)
            source = torch.remainder(first + other, bins).round().to(torch.int64)
            mask = torch.where(number > 0, mask.gather(2, source), mask)
        return mask


@functools.lru_cache(maxsize=1024)
def _periods(times: tuple[int, ...], period: int) -> tuple[int, ...]:
    """For each time the number of its period, from 0 without gaps; all 0 if the period is 0."""
    if period == 0:
        return (0,) * len(times)
    numbers = {number: index for index, number in enumerate(sorted({t // period for t in times}))}
    return tuple(numbers[t // period] for t in times)


class SpecAugmentTimeMask(ComponentModule):
    """Runs of rows are kept and zeroed in turn: SpecAugment's time mask, by sequence, over its rows in order.

    Args:
        zeroed_proportion: z, of the rows in the long run, in (0, 1).
        time_mask_max_frames: T; a zeroed run has 1 .. T rows, a kept one 1 .. T (1 - z) / z.
    """

    kind = "SpecAugmentTimeMaskComponent"
    row_wise = False

    def __init__(self, dim: int, zeroed_proportion: float = 0.25, time_mask_max_frames: int = 10) -> None:
        super().__init__(dim, dim)
        if not 0.0 <= zeroed_proportion < 1.0 or time_mask_max_frames < 2:
            raise ValueError(
                f"zeroed-proportion {zeroed_proportion} must be in [0, 1), time-mask-max-frames "
                f"{time_mask_max_frames} above 1"
            )
        self.zeroed_proportion, self.time_mask_max_frames = zeroed_proportion, time_mask_max_frames

    def forward(self, x: Tensor, call: Call) -> Tensor:
        z, most = self.zeroed_proportion, self.time_mask_max_frames
        if not self.mode.dropout or z == 0.0:
            return x
        # On the host, where no value of the device is needed: lengths are few and do not depend on the data.
        rows, batch = x.shape[:2]
        longest_kept = max(1, int(most * (1.0 - z) / z))
        chance = self.mode.chance
        mask = torch.ones(rows, batch)
        for sequence in range(batch):
            kept = chance.decide(self.name, "kept first", z)
            row = 0
            while row < rows:
                length = chance.integer(1, longest_kept if kept else most)
                if not kept:
                    mask[row : row + length, sequence] = 0.0
                row += length
                kept = not kept
        return x * mask.to(x.device, x.dtype, non_blocking=True).unsqueeze(2)


class DropoutMask(DropoutBase):
    """Rows of factors 0 and 1 for the gates of an LSTM; without an input.

    With two or three columns one draw decides the first two, so that they are never both 0 for p <= 1/2.
    """

    kind = "DropoutMaskComponent"
    takes_nothing = True

    def __init__(self, output_dim: int, dropout_proportion: float = 0.5, continuous: bool = False) -> None:
        super().__init__(output_dim, output_dim, dropout_proportion)
        self.continuous = continuous

    def forward(self, x: Tensor, call: Call) -> Tensor:
        p, shape = self.dropout_proportion, (len(call.out_times), x.shape[1], self.output_dim)
        if not self.mode.dropout:
            return x.new_full(shape, 1.0 if self.continuous else 1.0 - p)
        if p == 0.0:
            return x.new_ones(shape)
        draw = self.mode.chance.uniform(*shape, like=x)
        if self.continuous:
            return draw * (4.0 * p) + (1.0 - 2.0 * p)
        if self.output_dim in (2, 3):
            first = draw[:, :, :1]
            rest = [draw[:, :, 2:] > p] if self.output_dim == 3 else []
            return torch.cat([first > p, 1.0 - first > p, *rest], dim=2).to(x.dtype)
        return (draw > p).to(x.dtype)


def _proportion(options: Options, default: float | None) -> float:
    value = options.number("dropout-proportion", default)
    if not 0.0 <= value <= 1.0:
        raise options.place.error(f"must be between 0 and 1, is {value}", "dropout-proportion")
    return value


def _dropout(options: Options, init: Initializer) -> Dropout:
    dim = options.positive("dim")
    component = Dropout(dim, _proportion(options, None), options.flag("dropout-per-frame", False))
    component.attributes["TestMode"] = options.flag("test-mode", False)
    return component


def _general(options: Options, init: Initializer) -> GeneralDropout:
    dim = options.positive("dim")
    block_dim, period = options.integer("block-dim", dim), options.integer("time-period", 0)
    p = _proportion(options, 0.5)
    share, regions = options.number("specaugment-max-proportion", 0.0), options.integer("specaugment-max-regions", 1)
    continuous, test = options.flag("continuous", False), options.flag("test-mode", False)
    component = GeneralDropout(dim, block_dim, period, p, share, regions, continuous)
    component.attributes["TestMode"] = test
    return component


def _time_mask(options: Options, init: Initializer) -> SpecAugmentTimeMask:
    dim, share = options.positive("dim"), options.number("zeroed-proportion", 0.25)
    return SpecAugmentTimeMask(dim, share, options.integer("time-mask-max-frames", 10))


def _mask(options: Options, init: Initializer) -> DropoutMask:
    dim, p = options.positive("output-dim"), _proportion(options, 0.5)
    component = DropoutMask(dim, p, options.flag("continuous", False))
    component.attributes["TestMode"] = options.flag("test-mode", False)
    return component


MAKERS = {
    Dropout.kind: _dropout,
    GeneralDropout.kind: _general,
    SpecAugmentTimeMask.kind: _time_mask,
    DropoutMask.kind: _mask,
}
