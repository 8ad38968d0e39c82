"""The elementwise part of one step of the LSTM as one kernel, for GPUs (Triton).

What `lstm.lstm` does between two products of matrices is, in PyTorch, some ten launches forward and as many backward, a
time step each; here it is one (two with a projection). The formulas stand in lstm.py, whose PyTorch form is the
reference: tests compare the two through Triton's interpreter, and lstm.py tries them on the GPU itself before it uses
them.

A program works on one row. Tensors are float32; rows may lie apart, elements of a row may not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ERRORS = (RuntimeError, triton.TritonError)  # of a GPU for which they cannot be compiled, or do not run


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    # By exp of a number that is not positive, so that it cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    gates, c_old, peepholes, mask, c, tanh_c, m,
    gates_row, c_old_row, c_row, m_row, scale, cell,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    there = column < cell
    gates += row * gates_row + column
    old = tl.load(c_old + row * c_old_row + column, mask=there, other=0.0) * scale
    i = tl.load(gates, mask=there, other=0.0)
    f = tl.load(gates + cell, mask=there, other=0.0)
    g = tl.load(gates + 2 * cell, mask=there, other=0.0)
    o = tl.load(gates + 3 * cell, mask=there, other=0.0)
    i = _sigmoid(i + old * tl.load(peepholes + column, mask=there, other=0.0))
    f = _sigmoid(f + old * tl.load(peepholes + cell + column, mask=there, other=0.0))
    g = _tanh(g)
    if MASKED:
        new = i * g * tl.load(mask + row * 3) + f * tl.load(mask + row * 3 + 1) * old
    else:
        new = i * g + f * old
    o = _sigmoid(o + new * tl.load(peepholes + 2 * cell + column, mask=there, other=0.0))
    tanh = _tanh(new)
    out = o * tanh
    if MASKED:
        out *= tl.load(mask + row * 3 + 2)
    tl.store(gates, i, mask=there)
    tl.store(gates + cell, f, mask=there)
    tl.store(gates + 2 * cell, g, mask=there)
    tl.store(gates + 3 * cell, o, mask=there)
    tl.store(c + row * c_row + column, new, mask=there)
    tl.store(tanh_c + row * cell + column, tanh, mask=there)
    tl.store(m + row * m_row + column, out, mask=there)


def forward(
    gates: Tensor,
    c_old: Tensor,
    peepholes: Tensor,
    mask: Tensor | None,
    scale: float,
    c: Tensor,
    tanh_c: Tensor,
    m: Tensor,
) -> None:
    """Gates i, f, g, o, (rows, 4C), from what goes into them to their values; c, tanh(c) and m, (rows, C), written.

    Args:
        c_old: (rows, C).
        peepholes: (3, C), contiguous.
        mask: (rows, 3), contiguous, or None.
        tanh_c: contiguous.
    """
    rows, cell = c.shape
    _forward[(rows,)](
        gates, c_old, peepholes, gates if mask is None else mask, c, tanh_c, m,
        gates.stride(0), c_old.stride(0), c.stride(0), m.stride(0), scale, cell,
        MASKED=mask is not None, BLOCK=triton.next_power_of_2(cell),
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _limit(  # type: ignore[no-untyped-def]
    recur, boundary, factors, out, recur_row, out_row, cell, rec, clip, zero, BLOCK: tl.constexpr
):
    """What is left of a row's recurrent gradient, and its part of the outputs added to theirs."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    values = tl.load(recur + row * recur_row + column, mask=column < cell + rec, other=0.0)
    norm = tl.sqrt(tl.sum(values * values, axis=0))
    over = norm > clip
    factor = tl.where(over, clip / tl.where(over, norm, 1.0), 1.0)
    factor = tl.where((tl.load(boundary + row) != 0) & (norm > zero), 0.0, factor)
    tl.store(factors + row, factor)
    to = out + row * out_row + column
    of_outputs = tl.load(recur + row * recur_row + cell + column, mask=column < rec, other=0.0)
    tl.store(to, tl.load(to, mask=column < rec, other=0.0) + factor * of_outputs, mask=column < rec)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    recur, factors, dm, to_m, to_old, coefs, d_gates, target, of_cell, of_gates, of_old,
    recur_row, dm_row, coefs_row, d_gates_row, target_row, cell,
    REPAIRED: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    there = column < cell
    d_m = tl.load(dm + row * dm_row + column, mask=there, other=0.0)
    d_c = tl.load(recur + row * recur_row + column, mask=there, other=0.0) * tl.load(factors + row)
    d_c += d_m * tl.load(to_m + row * cell + column, mask=there, other=0.0)
    coefs += row * coefs_row + column
    d_gates += row * d_gates_row + column
    of_gates += row * 4 * cell + column
    d_o = d_m * tl.load(coefs + 3 * cell, mask=there, other=0.0)
    if REPAIRED:
        d_c += tl.load(of_cell + row * cell + column, mask=there, other=0.0)
        d_o += tl.load(of_gates + 3 * cell, mask=there, other=0.0)
    tl.store(d_gates + 3 * cell, d_o, mask=there)
    for gate in tl.static_range(3):
        value = d_c * tl.load(coefs + gate * cell, mask=there, other=0.0)
        if REPAIRED:
            value += tl.load(of_gates + gate * cell, mask=there, other=0.0)
        tl.store(d_gates + gate * cell, value, mask=there)
    if not LAST:
        old = d_c * tl.load(to_old + row * cell + column, mask=there, other=0.0)
        if REPAIRED:
            old += tl.load(of_old + row * cell + column, mask=there, other=0.0)
        tl.store(target + row * target_row + column, old, mask=there)


def limit(recur: Tensor, boundary: Tensor, out: Tensor, cell: int, clip: float, zero: float) -> Tensor:
    """Factors, (rows,), of the recurrent gradient's rows by their norms; its part of the outputs is added to `out`.

    Args:
        recur: (rows, C + R), columns of the cell and of the recurrent output.
        boundary: (rows,) bool: where a norm above `zero` makes it 0.
        out: (rows, P), P >= R.
        clip, zero: may be infinite.
    """
    rows, columns = recur.shape
    factors = recur.new_empty(rows)
    _limit[(rows,)](
        recur, boundary, factors, out, recur.stride(0), out.stride(0), cell, columns - cell, clip, zero,
        BLOCK=triton.next_power_of_2(columns),
    )  # fmt: skip
    return factors


def backward(
    recur: Tensor,
    factors: Tensor,
    dm: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    repair: tuple[Tensor, Tensor, Tensor] | None,
    d_gates: Tensor,
    target: Tensor | None,
) -> None:
    """Derivatives at the gates' inputs, (rows, 4C), and at the old cell into `target`, (rows, C); None: it has none.

    Args:
        recur: the cell's columns of the recurrent gradient, (rows, C); `factors` of its rows.
        dm: derivatives at m, (rows, C).
        coefficients: d cell / d m and d old cell / d cell, (rows, C) contiguous, and of the gates, (rows, 4C).
        repair: what self-repair adds at the cell, the gates and the old cell, contiguous.
    """
    to_m, to_old, coefs = coefficients
    rows, cell = to_m.shape
    of_cell, of_gates, of_old = (to_m, to_m, to_m) if repair is None else repair
    into = d_gates if target is None else target
    _backward[(rows,)](
        recur, factors, dm, to_m, to_old, coefs, d_gates, into, of_cell, of_gates, of_old,
        recur.stride(0), dm.stride(0), coefs.stride(0), d_gates.stride(0), into.stride(0), cell,
        REPAIRED=repair is not None, LAST=target is None, BLOCK=triton.next_power_of_2(cell),
    )  # fmt: skip
