"""Kaldi's LSTM recurrence, forward and backward, as one differentiable operation.

What nnet3 builds out of an affine component over (input, recurrence), LstmNonlinearityComponent (peephole LSTM,
arxiv.org/abs/1402.1128 equations 7 to 14), an optional projection, and BackpropTruncationComponent is computed
here in one loop over time. Values are time-major and flat: row ``t * B + b`` of a matrix is frame t of
sequence b, so the frame ``delay`` frames away is ``delay * B`` rows away, and a recurrence with delay -d, which
is d interleaved sequences, advances by blocks of ``d * B`` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from kaldi_mpi.log import logger
from kaldi_mpi.models.lstm_backward import Limit, LstmSettings, coefficients, repairs, sums


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


def _blocks(rows: int, block: int, reverse: bool) -> list[int]:
    """Sizes of consecutive blocks; the short one is the last to be processed."""
    whole, rest = divmod(rows, block)
    sizes = [block] * whole
    if rest:
        sizes.insert(0 if reverse else whole, rest)
    return sizes


def _order(parts: Sequence[Sequence[Tensor]], reverse: bool) -> list[tuple[Tensor, ...]]:
    steps = list(zip(*parts, strict=True))
    return steps[::-1] if reverse else steps


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
        reverse = settings.delay > 0
        shift = abs(settings.delay) // place.stride * batch
        x = x3.reshape(rows, in_dim)
        gates = torch.addmm(bias, x, w_all[:, :in_dim].t())
        w_rec = (w_all[:, in_dim:] * settings.scale).t().contiguous()
        weights = peepholes.contiguous()
        w_if, w_o = weights[:2], weights[2]
        kernels = kernels_for(x.device)

        # Cells and recurrent outputs have `shift` rows of zeros where the recurrence starts, so that the
        # values of a block and those that it recurs to are two views of one buffer.
        here = slice(0, rows) if reverse else slice(shift, None)
        there = slice(shift, None) if reverse else slice(0, rows)
        edge = slice(rows, None) if reverse else slice(0, shift)
        cells = x.new_empty(rows + shift, cell)
        outputs = x.new_empty(rows + shift, cell if w_rp is None else w_rp.shape[0])
        cells[edge] = 0.0
        outputs[edge] = 0.0
        m = outputs[here] if w_rp is None else x.new_empty(rows, cell)
        tanh_c = torch.empty_like(m)
        w_proj = None if w_rp is None else w_rp.t().contiguous()

        sizes = _blocks(rows, shift, reverse)
        width = 4 * cell

        def columns(begin: int, end: int) -> Sequence[Tensor]:
            return gates[:, begin:end].split(sizes)

        pairs = gates[:, : 2 * cell].unflatten(1, (2, cell))
        parts: list[Sequence[Tensor]] = [
            gates.split(sizes),
            pairs.split(sizes),
            columns(0, 2 * cell),
            columns(0, cell),
            columns(cell, 2 * cell),
            columns(2 * cell, 3 * cell),
            columns(3 * cell, width),
            cells[here].split(sizes),
            cells[there].split(sizes),
            cells[there].unsqueeze(1).split(sizes),
            outputs[there][:, :rec_dim].split(sizes),
            outputs[here].split(sizes),
            m.split(sizes),
            tanh_c.split(sizes),
            (x if mask is None else mask.reshape(rows, 3)).split(sizes),
        ]
        scale = settings.scale
        for s, s_if2, s_if, i, f, g, o, c, c_old, c_old2, h_old, out, m_k, tanh, dropped in _order(parts, reverse):
            s.addmm_(h_old, w_rec)
            if kernels is not None:
                kernels.forward(s, c_old, weights, None if mask is None else dropped, scale, c, tanh, m_k)
            else:
                s_if2.addcmul_(c_old2, w_if, value=scale)
                s_if.sigmoid_()
                g.tanh_()
                torch.mul(i, g, out=c)
                if mask is None:
                    c.addcmul_(f, c_old, value=scale)
                else:
                    c.mul_(dropped[:, 0:1]).addcmul_(f * dropped[:, 1:2], c_old, value=scale)
                o.addcmul_(c, w_o)
                o.sigmoid_()
                torch.tanh(c, out=tanh)
                torch.mul(o, tanh, out=m_k)
                if mask is not None:
                    m_k.mul_(dropped[:, 2:3])
            if w_proj is not None:
                if b_rp is None:
                    torch.mm(m_k, w_proj, out=out)
                else:
                    torch.addmm(b_rp, m_k, w_proj, out=out)

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
            drop = None if mask is None else mask.reshape(rows, 3)[span]
            to_m, to_old = coefficients(gates[span], cells[there][span], tanh_c[span], peepholes, settings.scale, drop)
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
        x, coefs, to_m, to_old, c, _, h_old, _, w_all, w_rp = ctx.saved_tensors
        cell, rec_dim, scale = c.shape[1], h_old.shape[1], settings.scale
        rows, shift = x.shape[0], abs(settings.delay) // ctx.place.stride * batch
        reverse = settings.delay < 0
        w_rec = w_all[:, in_dim:] * scale

        # recur[t] = gradient of what frame t gives to its successor, columns (cell, output). A block writes
        # it for its predecessors, `shift` rows away, which for the edge of the range are spare rows.
        recur = x.new_empty(rows + shift, cell + rec_dim)
        here, target = slice(0, rows), slice(shift, None)
        if reverse:
            here, target = target, here
        recur[slice(rows, None) if reverse else slice(0, shift)] = 0.0
        d_gates = x.new_empty(rows, 4 * cell)
        grad = grad[ctx.low : ctx.high].reshape(rows, -1)
        kernels = kernels_for(x.device)
        d_out = grad if w_rp is None and kernels is None else grad.clone()
        first = ctx.place.first + ctx.low * ctx.place.stride
        limit = Limit(settings, first, ctx.high - ctx.low, batch, ctx.place.stride, x.device)
        repair = ctx.repair

        sizes = _blocks(rows, shift, reverse)
        ifg = 3 * cell
        parts: list[Sequence[Tensor]] = [
            recur[here].split(sizes),
            recur[here][:, :cell].split(sizes),
            recur[here][:, cell:].split(sizes),
            d_out.split(sizes),
            to_m.split(sizes),
            to_old.split(sizes),
            coefs[:, :ifg].unflatten(1, (3, cell)).split(sizes),
            coefs[:, ifg:].split(sizes),
            d_gates.split(sizes),
            d_gates[:, :ifg].unflatten(1, (3, cell)).split(sizes),
            d_gates[:, ifg:].split(sizes),
            recur[target][:, :cell].split(sizes),
            recur[target][:, cell:].split(sizes),
            recur[here][:, :cell].unsqueeze(1).split(sizes),
            coefs.split(sizes),
            limit.boundaries.split(sizes),
            *(part.split(sizes) for part in repair or ()),
        ]
        steps = _order(parts, reverse)
        for number, step in enumerate(steps):
            both, dc, dh, out, k_m, k_old, k_ifg, k_o, ds, ds_ifg, ds_o, to_dc, to_dh, dc3, k, boundary, *more = step
            last = number + 1 == len(steps)
            if kernels is not None:
                factors = kernels.limit(both, boundary, out, cell, limit.clip, limit.zero)
                dm = out if w_rp is None else torch.mm(out, w_rp)
                kernels.backward(dc, factors, dm, (k_m, k_old, k), more or None, ds, None if last else to_dc)
                if not last:
                    torch.mm(ds, w_rec, out=to_dh)
                continue
            limit.apply(both, boundary)
            if w_rp is None:
                dm = dh.add_(out)
            else:
                out[:, :rec_dim].add_(dh)
                dm = torch.mm(out, w_rp)
            dc.addcmul_(dm, k_m)
            torch.mul(dm, k_o, out=ds_o)
            if more:
                of_cell, of_gates, of_old = more
                dc.add_(of_cell)
                ds_o.add_(of_gates[:, ifg:])
            torch.mul(dc3, k_ifg, out=ds_ifg)
            if more:
                ds_ifg.add_(of_gates[:, :ifg].unflatten(1, (3, cell)))
            if not last:
                torch.mul(dc, k_old, out=to_dc)
                if more:
                    to_dc.add_(of_old)
                torch.mm(ds, w_rec, out=to_dh)
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


# By device: the kernels that stand in for PyTorch's operations between the products, or None.
_KERNELS: dict[torch.device, ModuleType | None] = {}


def kernels_for(device: torch.device) -> ModuleType | None:
    """lstm_kernels.py on a GPU where it gives what PyTorch gives, which is tried at the first call; else None."""
    if device.type != "cuda" and device not in _KERNELS:
        return None
    if device not in _KERNELS:
        _KERNELS[device] = None  # for the trial's reference
        try:
            from kaldi_mpi.models import lstm_kernels
        except ImportError as error:
            logger.warning("LSTM on %s by PyTorch's operations, several times slower: no Triton (%s)", device, error)
            return None
        error_ = lstm_kernels.trial(lambda chosen: _trial(device, chosen))
        if error_ is None:
            _KERNELS[device] = lstm_kernels
        else:
            logger.warning("LSTM on %s by PyTorch's operations, several times slower: Triton %s", device, error_)
    return _KERNELS[device]


def _trial(device: torch.device, kernels: ModuleType | None) -> list[Tensor]:
    """Output and gradients of a small layer."""
    _KERNELS[device] = kernels
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
