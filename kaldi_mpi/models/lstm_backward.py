"""What the backward pass of the LSTM takes beside products of matrices: coefficients, self-repair, limits."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


@dataclass(frozen=True)
class LstmSettings:
    """What the recurrence needs beside its parameters.

    Attributes:
        delay: frames from a frame to the one that it recurs to; negative for the past.
        scale: factor of the recurrence in the forward pass (1 - |delay| / decay-time).
        clipping_threshold: largest norm of the recurrent gradient of a frame; not positive: no limit.
        zeroing_threshold: norm above which it becomes 0 at a frame on a boundary; not positive: never.
        zeroing_interval: frames between boundaries.
    """

    delay: int = -1
    scale: float = 1.0
    clipping_threshold: float = 30.0
    zeroing_threshold: float = 15.0
    zeroing_interval: int = 20
    recurrence_interval: int = 1

    @property
    def limits(self) -> tuple[float, float]:
        """The thresholds of clipping and of zeroing; infinite where there is none."""
        clip, zero = self.clipping_threshold, self.zeroing_threshold
        return clip if clip > 0 else math.inf, zero if zero > 0 else math.inf

    def boundaries(self, first: int, frames: int, sequences: int, stride: int = 1) -> Tensor:
        """(frames * sequences,) bool: where a large recurrent gradient is zeroed; frames lie `stride` apart.

        As in nnet3 the boundaries are shifted by the number of the sequence in the minibatch, so that they
        do not always fall on the same frame of an utterance.
        """
        t = torch.arange(first, first + frames * stride, stride).unsqueeze(1) - torch.arange(sequences).unsqueeze(0)
        interval = self.zeroing_interval
        here = torch.div(t, interval, rounding_mode="floor")
        before = torch.div(t - self.recurrence_interval, interval, rounding_mode="floor")
        return (here != before).reshape(-1)


def sums(gates: Tensor, tanh_c: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows of the values of i, f, g, o, tanh(c) and of their derivatives, (5, C) each."""
    cell = tanh_c.shape[1]
    values = torch.stack([*gates.sum(0).split(cell), tanh_c.sum(0)])
    squares = torch.stack([*gates.square().sum(0).split(cell), tanh_c.square().sum(0)])
    # A sigmoid's derivative is y - y^2, a tanh's 1 - y^2.
    of_values = values.clone()
    of_values[2] = of_values[4] = float(len(tanh_c))
    return values, of_values - squares


def repairs(
    gates: Tensor, tanh_c: Tensor, repair: Tensor, peepholes: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What self-repair adds to the derivatives of the loss: at the cell, the gates' inputs, and the old cell.

    Saturated units are pushed back to where they are not: by s (2 y - 1) for a sigmoid, s y for a tanh.
    """
    cell = tanh_c.shape[1]
    i, f, g, o = gates.split(cell, dim=1)
    of_gates = torch.cat(
        [(2 * i - 1) * repair[0], (2 * f - 1) * repair[1], g * repair[2], (2 * o - 1) * repair[3]], dim=1
    )
    of_cell = tanh_c * repair[4] + of_gates[:, 3 * cell :] * peepholes[2]
    of_old = (of_gates[:, :cell] * peepholes[0] + of_gates[:, cell : 2 * cell] * peepholes[1]) * scale
    return of_cell, of_gates, of_old


def coefficients(
    gates: Tensor, c_old: Tensor, tanh_c: Tensor, peepholes: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replace the gates i, f, g, o by the coefficients of their gradients.

    Args:
        mask: (rows, 3), the gates' dropout masks.

    Returns:
        d cell / d m (through tanh and the output gate's peephole), and d old cell / d cell.
    """
    i, f, g, o = gates.split(c_old.shape[1], dim=1)
    to_m = _tanh_backward(o, tanh_c, grad_input=torch.empty_like(c_old))
    _sigmoid_backward(tanh_c, o, grad_input=o)
    to_old = f.clone(memory_format=torch.contiguous_format)
    _sigmoid_backward(c_old, f, grad_input=f)
    of_g = _tanh_backward(i, g, grad_input=torch.empty_like(c_old))
    _sigmoid_backward(g, i, grad_input=i)
    g.copy_(of_g)
    if mask is not None:
        of_i, of_f, of_o = mask.unsqueeze(1).unbind(2)
        for value, factor in ((to_m, of_o), (o, of_o), (to_old, of_f), (f, of_f), (g, of_i), (i, of_i)):
            value.mul_(factor)
    to_m.addcmul_(o, peepholes[2])
    if scale != 1.0:
        f *= scale
    to_old.addcmul_(i, peepholes[0]).addcmul_(f, peepholes[1])

    if scale != 1.0:
        to_old *= scale
    return to_m, to_old


@functools.lru_cache(maxsize=64)
def boundaries_on(device: torch.device, settings: LstmSettings, *shape: int) -> Tensor:
    """`LstmSettings.boundaries` on a device: brought there once, not with each minibatch."""
    return settings.boundaries(*shape).to(device)


def apply_limit(rows: Tensor, boundary: Tensor, clip: float, zero: float) -> None:
    """BackpropTruncationComponent's limits on the recurrent gradient, in place, of a block of rows.

    Args:
        boundary: (rows,) bool.
        clip, zero: norms, of which a larger one becomes `clip`, or 0 at a boundary; infinite: it does not.
    """
    smallest = min(clip, zero)
    # The norm of all rows together bounds that of each: mostly one reduction settles it.
    if math.isinf(smallest):
        return
    # On a GPU the host would wait for it.
    if rows.device.type == "cpu" and torch.linalg.vector_norm(rows).item() <= smallest:
        return
    norms = torch.linalg.vector_norm(rows, dim=1)
    factors = (clip / norms).clamp_(max=1.0)
    factors.masked_fill_(boundary & (norms > zero), 0.0)
    rows.mul_(factors.unsqueeze(1))
