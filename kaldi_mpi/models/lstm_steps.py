"""The LSTM's loops over time: what stands between the large products before and after them.

Both are functions of tensors alone (and of a `Layout`), which write to no memory but what they are given and what they
make, so that a GPU can replay them as one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from kaldi_mpi.models.lstm_backward import apply_limit


@dataclass(frozen=True)
class Layout:
    """How the rows of a recurrence follow each other.

    Attributes:
        shift: rows from a row to the one that it recurs to.
        reverse: the last rows come first.
        scale: of the recurrence.
        rec_dim: columns of the recurrent output.
        clip, zero: limits on the norm of a row's recurrent gradient; infinite: none.
    """

    shift: int
    reverse: bool
    scale: float
    rec_dim: int
    clip: float = float("inf")
    zero: float = float("inf")

    @property
    def here(self) -> slice:
        """The values of all rows in a buffer with `shift` rows of zeros where the recurrence starts."""
        return slice(0, -self.shift) if self.reverse else slice(self.shift, None)

    @property
    def there(self) -> slice:
        """What they recur to: another view of the same buffer."""
        return slice(self.shift, None) if self.reverse else slice(0, -self.shift)

    def sizes(self, rows: int) -> list[int]:
        """Of consecutive blocks; the short one is the last to be processed."""
        whole, rest = divmod(rows, self.shift)
        sizes = [self.shift] * whole
        if rest:
            sizes.insert(0 if self.reverse else whole, rest)
        return sizes

    def order(self, parts: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """The blocks of all parts, as they are processed."""
        steps = list(zip(*parts, strict=True))
        return steps[::-1] if self.reverse else steps


def forward_steps(
    layout: Layout,
    kernels: ModuleType | None,
    gates: Tensor,
    w_rec: Tensor,
    peepholes: Tensor,
    w_proj: Tensor | None,
    b_rp: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Forward, from gates, (rows, 4C), to which the recurrence has still to be added.

    Args:
        kernels: lstm_kernels.py, or None: PyTorch's operations.
        w_rec: (R, 4C), scaled; w_proj, b_rp: (C, P) and (P,), of a projection.
        peepholes: (3, C).
        mask: (rows, 3).

    Returns:
        the gates' values (in place); cells and outputs, with rows of zeros as in `Layout.here`; tanh of the cells; and,
        with a projection, what goes into it, (rows, C), else None.
    """
    rows, cell = gates.shape[0], peepholes.shape[1]
    sizes, scale = layout.sizes(rows), layout.scale
    w_if, w_o = peepholes[:2], peepholes[2]
    # With `shift` rows of zeros where the recurrence starts, the values of a block and those that it recurs to are two
    # views of one buffer.
    here, there = layout.here, layout.there
    edge = slice(rows, None) if layout.reverse else slice(0, layout.shift)
    cells = gates.new_empty(rows + layout.shift, cell)
    outputs = gates.new_empty(rows + layout.shift, cell if w_proj is None else w_proj.shape[1])
    cells[edge] = 0.0
    outputs[edge] = 0.0
    m = outputs[here] if w_proj is None else gates.new_empty(rows, cell)
    tanh_c = gates.new_empty(rows, cell)
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
        outputs[there][:, : layout.rec_dim].split(sizes),
        outputs[here].split(sizes),
        m.split(sizes),
        tanh_c.split(sizes),
        (gates if mask is None else mask).split(sizes),
    ]
    for s, s_if2, s_if, i, f, g, o, c, c_old, c_old2, h_old, out, m_k, tanh, dropped in layout.order(parts):
        s.addmm_(h_old, w_rec)
        if kernels is not None:
            kernels.forward(s, c_old, peepholes, None if mask is None else dropped, scale, c, tanh, m_k)
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
    return gates, cells, outputs, tanh_c, None if w_proj is None else m


def backward_steps(
    layout: Layout,
    kernels: ModuleType | None,
    d_out: Tensor,
    coefs: Tensor,
    to_m: Tensor,
    to_old: Tensor,
    w_rec: Tensor,
    w_rp: Tensor | None,
    boundaries: Tensor,
    of_cell: Tensor | None,
    of_gates: Tensor | None,
    of_old: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Backward, to the derivatives at the gates' inputs, (rows, 4C).

    Args:
        layout: of the way back: reversed against the forward one.
        d_out: (rows, P), at the outputs; is written to.
        coefs, to_m, to_old: of `lstm_backward.coefficients`.
        w_rec: (4C, R), scaled; w_rp: (P, C), of a projection.
        boundaries: (rows,) bool, where a large recurrent gradient is zeroed.
        of_cell, of_gates, of_old: of `lstm_backward.repairs`, or None.

    Returns:
        these derivatives; and those at the projection's outputs (d_out, in place).
    """
    rows, cell = to_m.shape
    shift, sizes = layout.shift, layout.sizes(rows)
    # recur[t] = gradient of what frame t gives to its successor, columns (cell, output). A block writes
    # it for its predecessors, `shift` rows away, which for the edge of the range are spare rows.
    recur = to_m.new_empty(rows + shift, cell + layout.rec_dim)
    here, target = slice(0, rows), slice(shift, None)
    if layout.reverse:
        here, target = target, here
    recur[slice(rows, None) if layout.reverse else slice(0, shift)] = 0.0
    d_gates = to_m.new_empty(rows, 4 * cell)
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
        boundaries.split(sizes),
        *(part.split(sizes) for part in (of_cell, of_gates, of_old) if part is not None),
    ]
    steps = layout.order(parts)
    for number, step in enumerate(steps):
        both, dc, dh, out, k_m, k_old, k_ifg, k_o, ds, ds_ifg, ds_o, to_dc, to_dh, dc3, k, boundary, *more = step
        last = number + 1 == len(steps)
        if kernels is not None:
            factors = kernels.limit(both, boundary, out, cell, layout.clip, layout.zero)
            dm = out if w_rp is None else torch.mm(out, w_rp)
            kernels.backward(dc, factors, dm, (k_m, k_old, k), more or None, ds, None if last else to_dc)
            if not last:
                torch.mm(ds, w_rec, out=to_dh)
            continue
        apply_limit(both, boundary, layout.clip, layout.zero)
        if w_rp is None:
            dm = dh.add_(out)
        else:
            out[:, : layout.rec_dim].add_(dh)
            dm = torch.mm(out, w_rp)
        dc.addcmul_(dm, k_m)
        torch.mul(dm, k_o, out=ds_o)
        if more:
            at_cell, at_gates, at_old = more
            dc.add_(at_cell)
            ds_o.add_(at_gates[:, ifg:])
        torch.mul(dc3, k_ifg, out=ds_ifg)
        if more:
            ds_ifg.add_(at_gates[:, :ifg].unflatten(1, (3, cell)))
        if not last:
            torch.mul(dc, k_old, out=to_dc)
            if more:
                to_dc.add_(at_old)
            torch.mm(ds, w_rec, out=to_dh)
    return d_gates, d_out
