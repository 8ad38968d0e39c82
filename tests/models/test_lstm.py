"""The fused LSTM against a naive one that autograd differentiates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kaldi_mpi.models.lstm import lstm
from kaldi_mpi.models.lstm_backward import LstmSettings


class Truncate(torch.autograd.Function):
    """nnet3's rule, written out row by row: scale, clip the norm, zero on a boundary."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: LstmSettings, t: int, alive: bool) -> Tensor:
        ctx.settings, ctx.t, ctx.alive = settings, t, alive
        return x * settings.scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        s = ctx.settings
        grad = grad * s.scale * ctx.alive
        for n in range(grad.shape[0]):
            norm = float(grad[n].norm())
            factor = min(1.0, s.clipping_threshold / norm) if norm else 1.0
            boundary = (ctx.t - n) // s.zeroing_interval != (ctx.t - s.recurrence_interval - n) // s.zeroing_interval
            grad[n] *= 0.0 if boundary and norm > s.zeroing_threshold else factor
        return grad, None, None, None


class Gate(torch.autograd.Function):
    """The gradient of a frame outside the derivative range is zero at every node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alive: bool) -> Tensor:
        ctx.alive = alive
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.alive, None


def naive(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    p: Tensor,
    s: LstmSettings,
    first: int = 0,
    low: int = -1000,
    high: int = 1000,
    w_rp: Tensor | None = None,
    b_rp: Tensor | None = None,
) -> Tensor:
    frames, batch, _ = x.shape
    cell, rec = p.shape[1], w.shape[1] - x.shape[2]
    times = range(frames) if s.delay < 0 else reversed(range(frames))
    state: dict[int, tuple[Tensor, Tensor]] = {}
    outputs: dict[int, Tensor] = {}
    for t in times:
        alive = low <= t + first <= high
        zero = x.new_zeros(batch, cell), x.new_zeros(batch, rec)
        c_old, h_old = state.get(t + s.delay, zero)
        gates = Gate.apply(torch.cat([x[t], h_old], 1) @ w.T + b, alive)
        i, f, g, o = gates.split(cell, 1)
        i = torch.sigmoid(i + p[0] * c_old)
        f = torch.sigmoid(f + p[1] * c_old)
        c = f * c_old + i * torch.tanh(g)
        m = torch.sigmoid(o + p[2] * c) * torch.tanh(c)
        both = Gate.apply(torch.cat([c, m], 1), alive)
        c, m = both[:, :cell], both[:, cell:]
        out = m
        if w_rp is not None:
            out = Gate.apply(m @ w_rp.T + (0 if b_rp is None else b_rp), alive)
        trunc = Truncate.apply(torch.cat([c, out[:, :rec]], 1), s, t + first, alive)
        state[t] = trunc[:, :cell], trunc[:, cell:]
        outputs[t] = out
    return torch.stack([outputs[t] for t in range(frames)])


def problem(
    frames: int = 11,
    batch: int = 3,
    in_dim: int = 4,
    cell: int = 5,
    proj: tuple[int, int] | None = None,
    gain: float = 1.0,
) -> list[Tensor]:
    gen = torch.Generator().manual_seed(frames * 100 + cell)
    rec = proj[0] if proj else cell
    sizes = [(frames, batch, in_dim), (4 * cell, in_dim + rec), (4 * cell,), (3, cell)]
    if proj:
        sizes += [(sum(proj), cell), (sum(proj),)]
    values = [torch.randn(*size, generator=gen, dtype=torch.float64) * gain for size in sizes]
    return [value.requires_grad_() for value in values]


CASES = [
    LstmSettings(delay=-1),
    LstmSettings(delay=-1, scale=0.9),
    LstmSettings(delay=-3, scale=0.85, recurrence_interval=3),
    LstmSettings(delay=1),
    LstmSettings(delay=2, scale=0.95, recurrence_interval=2),
    LstmSettings(delay=-20, recurrence_interval=20),
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("limits", ["none", "clip", "zero"])
@pytest.mark.parametrize("span", [(None, None), (-1, None), (0, 4), (3, 2)])
@pytest.mark.parametrize("proj", [None, (2, 1), (3, 0)])
def test_equals_naive(
    settings: LstmSettings, limits: str, span: tuple[int | None, int | None], proj: tuple[int, int] | None
) -> None:
    thresholds = {"none": (0.0, 0.0), "clip": (0.5, 0.0), "zero": (2.0, 0.3)}[limits]
    settings = dataclasses.replace(
        settings, clipping_threshold=thresholds[0], zeroing_threshold=thresholds[1], zeroing_interval=4
    )
    reference = dataclasses.replace(
        settings, clipping_threshold=thresholds[0] or 1e10, zeroing_threshold=thresholds[1] or 1e10
    )
    first = -2
    tensors = problem(proj=proj)
    x, w, b, p, *rp = tensors
    projection: dict[str, Any] = {"w_rp": rp[0], "b_rp": rp[1]} if proj else {}
    low, high = span
    ours = lstm(x, w, b, p, settings, first=first, min_deriv_time=low, max_deriv_time=high, **projection)
    theirs = naive(
        x, w, b, p, reference, first, -1000 if low is None else low, 1000 if high is None else high, **projection
    )
    assert torch.allclose(ours, theirs, atol=1e-12)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((theirs * weights).sum(), tensors)
    found = torch.autograd.grad((ours * weights).sum(), tensors, allow_unused=True)
    for want, got in zip(expected, found, strict=True):
        got = torch.zeros_like(want) if got is None else got
        assert torch.allclose(want, got, atol=1e-10), (want - got).abs().max()
    if limits == "clip" and span == (None, None) and settings.delay != -20:
        free = dataclasses.replace(settings, clipping_threshold=0.0)
        unlimited = torch.autograd.grad((lstm(x, w, b, p, free, first=first, **projection) * weights).sum(), w)
        assert not torch.allclose(unlimited[0], expected[1])


def test_gradcheck_without_limits() -> None:
    settings = LstmSettings(delay=-2, scale=0.8, clipping_threshold=0, zeroing_threshold=0)
    tensors = problem(frames=5, batch=2, in_dim=2, cell=3, proj=(2, 1), gain=0.5)
    assert torch.autograd.gradcheck(
        lambda x, w, b, p, wr, br: lstm(x, w, b, p, settings, w_rp=wr, b_rp=br), tensors, atol=1e-7
    )


def test_backward_twice_gives_the_same() -> None:
    x, w, b, p = problem()
    y = lstm(x, w, b, p, LstmSettings())
    once = torch.autograd.grad(y.sum(), w, retain_graph=True)[0]
    again = torch.autograd.grad(y.sum(), w)[0]
    assert torch.equal(once, again)


def test_one_row() -> None:
    x, w, b, p = problem(frames=1, batch=1)
    ours, theirs = (lstm(x, w, b, p, LstmSettings()), naive(x, w, b, p, LstmSettings()))
    assert torch.allclose(ours, theirs)
    grads = [torch.autograd.grad(y.sum(), [x, w, b, p]) for y in (ours, theirs)]
    assert all(torch.allclose(a, c) for a, c in zip(*grads, strict=True))
