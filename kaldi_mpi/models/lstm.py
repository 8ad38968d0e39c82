"""Kaldi's LSTM recurrence, forward and backward, as one differentiable operation.

What nnet3 builds out of an affine component over (input, recurrence), LstmNonlinearityComponent (peephole LSTM,
arxiv.org/abs/1402.1128 equations 7 to 14), an optional projection, and BackpropTruncationComponent is computed
here in one loop over time. Values are time-major and flat: row ``t * B + b`` of a matrix is frame t of
sequence b, so the frame ``delay`` frames away is ``delay * B`` rows away, and a recurrence with delay -d, which
is d interleaved sequences, advances by blocks of ``d * B`` rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kaldi_mpi.models.lstm_backward import LstmSettings, boundaries_on, coefficients, repairs, sums
from kaldi_mpi.models.lstm_device import means_for
from kaldi_mpi.models.lstm_steps import Layout, backward_steps, forward_steps


class LstmKeeper(Protocol):
    """What the layer's components want of a pass beside values and gradients."""

    def repair(self) -> Tensor | None:
        """(5, C): how much each unit of i, f, g, o and tanh(c) is repaired (0: not); None: none is."""

    def store(self, values: Tensor, derivatives: Tensor, rows: int) -> None:
        """Sums of values and derivatives of i, f, g, o and tanh(c), (5, C), over the `rows` that got derivatives."""

    def keep_gates(self, x: Tensor, derivative: Tensor) -> bool:
        """Rows of the affine component of the gates and their derivatives; False: its gradient is wanted instead."""

    def keep_projection(self, m: Tensor, derivative: Tensor) -> bool:
        """The same of the projection."""


def lstm(
    x: Tensor,
    w_all: Tensor,
    bias: Tensor,
    peepholes: Tensor,
    settings: LstmSettings,
    *,
    first: int = 0,
    min_deriv_time: int | None = None,
    max_deriv_time: int | None = None,
    w_rp: Tensor | None = None,
    b_rp: Tensor | None = None,
    stride: int = 1,
    mask: Tensor | None = None,
    keeper: LstmKeeper | None = None,
) -> Tensor:
    """Run the recurrence from a zero state over all frames of `x`.

    The gradient limits (clipping, zeroing) are meant for the gradient of an objective summed over frames,
    as Kaldi's is; a caller that averages makes them ineffective.

    Args:
        x: (T, B, I) input.
        w_all: (4C, I + R) weights of gates i, f, g, o; the last R columns multiply the recurrence
            (R = C without a projection).
        bias: (4C,).
        peepholes: (3, C) of gates i, f (old cell) and o (new cell).
        first: time of x[0].
        min_deriv_time, max_deriv_time: gradients exist only for frames in this range (both ends included);
            the others are computed forward only.
        w_rp, b_rp: projection (P, C) and its bias (P,) or None.
        stride: frames from one row of x to the next; a divisor of the delay.
        mask: (T, B, 3) factors of the gates i, f, o after their sigmoids (gate dropout), the same for all cells.
        keeper: of statistics, self-repair and natural gradient.

    Returns:
        (T, B, C) outputs m, or (T, B, P) projected ones.
    """
    frames = x.shape[0]
    low = 0 if min_deriv_time is None else min(max(-((first - min_deriv_time) // stride), 0), frames)
    high = frames if max_deriv_time is None else min(max((max_deriv_time - first) // stride + 1, low), frames)
    place = _Place(first, stride, low, high)
    arguments = (x, w_all, bias, peepholes, w_rp, b_rp, settings, place, mask, keeper)
    output: Tensor = _Lstm.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


@dataclass(frozen=True)
class _Place:
    """Rows in time: the first one's, frames between them, and those [low, high) that get derivatives."""

    first: int
    stride: int
    low: int
    high: int


class _Lstm(torch.autograd.Function):
    """Backward notation: with s the pre-activations of the gates, each of ds_i, ds_f, ds_g is the gradient of
    the cell times a coefficient that only depends on the forward pass, and so is ds_o with the gradient of m.
    The forward pass leaves these coefficients in place of the gates."""

    @staticmethod
    def forward(
        ctx: Any,
        x3: Tensor,
        w_all: Tensor,
        bias: Tensor,
        peepholes: Tensor,
        w_rp: Tensor | None,
        b_rp: Tensor | None,
        settings: LstmSettings,
        place: _Place,
        mask: Tensor | None,
        keeper: LstmKeeper | None,
    ) -> Tensor:
        low, high = place.low, place.high
        frames, batch, in_dim = x3.shape
        cell, rows = peepholes.shape[1], frames * batch
        rec_dim = w_all.shape[1] - in_dim
        ctx.empty = high == low or rows == 0
        if rows == 0:
            return x3.new_empty(frames, batch, cell if w_rp is None else w_rp.shape[0])
        x = x3.reshape(rows, in_dim)
        gates = torch.addmm(bias, x, w_all[:, :in_dim].t())
        w_rec = (w_all[:, in_dim:] * settings.scale).t().contiguous()
        layout = Layout(abs(settings.delay) // place.stride * batch, settings.delay > 0, settings.scale, rec_dim)
        here, there = layout.here, layout.there
        drop = None if mask is None else mask.reshape(rows, 3)
        w_proj = None if w_rp is None else w_rp.t().contiguous()
        arguments = (gates, w_rec, peepholes.contiguous(), w_proj, b_rp, drop)
        gates, cells, outputs, tanh_c, before = means_for(x.device, small_layer).run(forward_steps, layout, *arguments)
        m = outputs[here] if before is None else before

        result = outputs[here].view(frames, batch, -1)
        if any(ctx.needs_input_grad) and not ctx.empty:
            span = slice(low * batch, high * batch)
            ctx.settings, ctx.place, ctx.low, ctx.high, ctx.keeper = settings, place, low, high, keeper
            ctx.shape = (frames, batch, in_dim)
            ctx.sums = None if keeper is None else sums(gates[span], tanh_c[span])
            repair = None if keeper is None else keeper.repair()
            ctx.repair = (
                None if repair is None else repairs(gates[span], tanh_c[span], repair, peepholes, settings.scale)
            )
            to_m, to_old = coefficients(
                gates[span],
                cells[there][span],
                tanh_c[span],
                peepholes,
                settings.scale,
                None if drop is None else drop[span],
            )
            ctx.save_for_backward(
                x[span],
                gates[span],
                to_m,
                to_old,
                cells[here][span],
                cells[there][span],
                outputs[there][span, :rec_dim],
                m[span],
                w_all,
                w_rp,
            )
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        if ctx.empty:
            return (None,) * 10
        frames, batch, in_dim = ctx.shape
        settings: LstmSettings = ctx.settings
        x, coefs, to_m, to_old, _, _, h_old, _, w_all, w_rp = ctx.saved_tensors
        rec_dim, scale = h_old.shape[1], settings.scale
        rows, shift = x.shape[0], abs(settings.delay) // ctx.place.stride * batch
        w_rec = w_all[:, in_dim:] * scale
        clip, zero = settings.limits
        layout = Layout(shift, settings.delay < 0, scale, rec_dim, clip, zero)
        grad = grad[ctx.low : ctx.high].reshape(rows, -1)
        means = means_for(x.device, small_layer)
        d_out = grad if w_rp is None and means.kernels is None else grad.clone()
        first = ctx.place.first + ctx.low * ctx.place.stride
        boundaries = boundaries_on(x.device, settings, first, ctx.high - ctx.low, batch, ctx.place.stride)
        repair = ctx.repair or (None, None, None)
        arguments = (d_out, coefs, to_m, to_old, w_rec, w_rp, boundaries, *repair)
        d_gates, d_out = means.run(backward_steps, layout, *arguments)
        return _Lstm._gradients(ctx, d_gates, None if w_rp is None else d_out, (frames, batch, in_dim))

    @staticmethod
    def _gradients(ctx: Any, d_gates: Tensor, d_rp: Tensor | None, shape: tuple[int, int, int]) -> Any:
        """One large product for each weight matrix, over all frames."""
        frames, batch, in_dim = shape
        x, _, _, _, c, c_old, h_old, m, w_all, _ = ctx.saved_tensors
        cell, scale = c.shape[1], ctx.settings.scale
        dx = None
        if ctx.needs_input_grad[0]:
            dx = d_gates.new_zeros(frames, batch, in_dim)
            torch.mm(d_gates, w_all[:, :in_dim], out=dx[ctx.low : ctx.high].view(-1, in_dim))
        keeper: LstmKeeper | None = ctx.keeper
        if keeper is not None:
            values, derivatives = ctx.sums
            keeper.store(values, derivatives, x.shape[0])
        dw = d_bias = None
        both = torch.cat([x, h_old if scale == 1.0 else h_old * scale], dim=1)
        if keeper is None or not keeper.keep_gates(both, d_gates):
            dw, d_bias = d_gates.t() @ both, d_gates.sum(0)
        d_peep = d_gates.new_empty(3, cell)
        old = d_gates[:, : 2 * cell].unflatten(1, (2, cell)) * c_old.unsqueeze(1)
        torch.sum(old, 0, out=d_peep[:2])
        d_peep[:2] *= scale
        torch.sum(d_gates[:, 3 * cell :] * c, 0, out=d_peep[2])
        d_wrp = d_brp = None
        if d_rp is not None and (keeper is None or not keeper.keep_projection(m, d_rp)):
            d_wrp, d_brp = torch.mm(d_rp.t(), m), d_rp.sum(0)
        return dx, dw, d_bias, d_peep, d_wrp, d_brp, None, None, None, None


def small_layer(device: torch.device) -> list[Tensor]:
    """Output and gradients of a small layer: what means are tried on."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 5, 7), (48, 7 + 8), (48,), (3, 12), (8, 12), (8,)]
    x, w_all, bias, peepholes, w_rp, b_rp = (
        torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes
    )
    settings = LstmSettings(delay=-2, scale=0.9, clipping_threshold=2.0, zeroing_threshold=1.5, zeroing_interval=3)
    with torch.enable_grad():
        output = lstm(x, w_all, bias, peepholes, settings, w_rp=w_rp, b_rp=b_rp)
        gradients = torch.autograd.grad(output.square().sum(), [x, w_all, bias, peepholes, w_rp, b_rp])
    return [output.detach(), *gradients]
