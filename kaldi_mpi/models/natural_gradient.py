"""Kaldi's online natural gradient: a preconditioner that is estimated while it is used.

Source: Povey, Zhang, Khudanpur, "Parallel training of DNNs with natural gradient and parameter averaging"
(arXiv 1410.7455), section 4 and appendix A; the constants and the order of work are those of nnet3's
OnlineNaturalGradient. It stands for a Fisher matrix F = V' diag(d) V + rho I of rows of dimension D, where V has R
orthonormal rows, and keeps W = E^(1/2) V with E = diag(e), e_i = 1 / (beta / d_i + 1),
beta = rho (1 + alpha) + alpha / D sum(d).

What is large (W, the rows) stays on the device; the host works on R x R matrices alone. On a CPU an update takes
effect at once, as Kaldi's does. On a GPU the moments travel to page-locked memory behind the learner's back and the
new estimate is put in at the preconditioner's next update, so that the host waits for nothing that has just been
queued; the first ten calls, in which the estimate changes fast, are exempt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_EPSILON, _DELTA = 1.0e-10, 5.0e-4
_WORST_CONDITION, _ORTHOGONALITY = 1.0e6, 1.0e-3
_FIRST_CALLS = 10  # in which each call updates
_FIRST_ESTIMATES = 3  # repetitions on the first rows
_LARGEST_INVERSE = 100.0
# Of a norm that is computed as a difference: below this share of what it is the difference of, it is rounding.
_LEAST_DIFFERENCE = 1.0e-2
_FEW = 24  # up to so many columns a product is made faster as its transpose

Matrix = NDArray[np.float64]
Parts = tuple[Tensor, ...]  # columns side by side


@dataclasses.dataclass
class _Moments:
    """Of one call: R x R matrices K = J J' and L = H' H, and tr(X X'), in one float32 tensor; J stays on the device."""

    packed: Tensor
    j: Tensor
    rows: int
    ready: Any = None  # the event after which `packed` is on the host; None: it is

    def unpack(self, rank: int) -> tuple[Matrix, Matrix, float]:
        if self.ready is not None:
            self.ready.synchronize()
        flat = self.packed.numpy().astype(np.float64)
        k, l = flat[: 2 * rank * rank].reshape(2, rank, rank)  # noqa: E741 - the paper's name
        return k, l, float(flat[-1])


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """Preconditioned rows X - X W'W, or X where it is cheaper to take W'W off a product with them.

    Attributes:
        x: columns side by side, (N, D1), (N, D2) and so on.
        last: a further column, (N,): what was ones; None: there is none.
        w: (R, D), D being the number of all columns; None: W'W has been taken off.
        factor: 0-dim; what gives the rows their norm back is still to be multiplied by.
    """

    x: Parts
    last: Tensor | None
    w: Tensor | None
    factor: Tensor

    def product(self, left: Tensor) -> Tensor:
        """left' X, (L, D), as x and `last` are; `left` is (N, L)."""
        dims = [part.shape[1] for part in self.x]
        product = left.new_empty(left.shape[1], sum(dims) + int(self.last is not None))
        for part, columns in zip(self.x, product[:, : sum(dims)].split(dims, dim=1), strict=True):
            torch.mm(left.t(), part, out=columns)
        if self.last is not None:
            torch.mv(left.t(), self.last, out=product[:, -1])
        return product


class NaturalGradient:
    """The preconditioner of one kind of rows.

    Args:
        rank: R; at most D - 1 is used.
        update_period: P: after the first ten calls, each P-th call updates the estimate.
        num_samples_history: how many rows the estimate remembers.
        alpha: how much of a multiple of the identity is mixed in.
        num_minibatches_history: if above 0, the same in calls, in place of `num_samples_history`.

    Attributes:
        frozen: while True, nothing is updated; calls are counted.
    """

    def __init__(
        self,
        rank: int,
        update_period: int = 4,
        num_samples_history: float = 2000.0,
        alpha: float = 4.0,
        num_minibatches_history: float = 0.0,
    ) -> None:
        if rank < 1 or update_period < 1 or alpha < 0 or num_samples_history <= 0:
            raise ValueError(
                f"natural gradient: rank {rank}, update period {update_period}, alpha {alpha}, "
                f"history of {num_samples_history} samples"
            )
        self.rank, self.update_period, self.alpha = rank, update_period, alpha
        self.num_samples_history, self.num_minibatches_history = num_samples_history, num_minibatches_history
        self.frozen = False
        self.calls = 0
        self.rho = _EPSILON
        self.d: NDArray[np.float32] = np.zeros(0, np.float32)
        self.w: Tensor | None = None
        self._pending: _Moments | None = None
        self._gram: Tensor | None = None  # of `w`, where it has been needed

    def __call__(self, rows: Tensor) -> Tensor:
        """The preconditioned rows, (N, D): of the same Frobenius norm as `rows`, (N, D) float32."""
        preconditioned, factor = self.precondition(rows)
        return preconditioned * factor

    def precondition(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same in two parts: rows, and the factor (0-dim, on the device) that gives them their norm back."""
        split = self.split([rows])
        return split.x[0], split.factor

    @torch.no_grad()
    def split(self, rows: Sequence[Tensor], ones: bool = False, against: int | None = None) -> SplitRows:
        """The preconditioned rows, or what they can be made of later, where that saves work.

        Args:
            rows: float32, columns side by side: (N, D1), (N, D2) and so on.
            ones: whether a further column of ones belongs to them, which nobody need write.
            against: columns of the matrix whose transpose all rows will be multiplied by, after which `w` can be taken
                off; None: the preconditioned rows themselves are wanted.
        """
        rows = tuple(rows)
        one = rows[0].new_ones(())
        dim = sum(part.shape[1] for part in rows)
        columns = dim + int(ones)
        if columns == 1 or not len(rows[0]):
            return SplitRows(rows, one.expand(len(rows[0])) if ones else None, None, one)
        if self.w is None or self.w.shape[1] != columns:
            self._begin(rows, ones)
        assert self.w is not None
        w = self.w
        update = not self.frozen and (
            self.calls <= _FIRST_CALLS or (self.calls - _FIRST_CALLS) % self.update_period == 0
        )
        if update and self._pending is not None:
            self._finish(self._pending)
            self._pending = None
            w = self.w
        hidden, before = self._hidden(rows, ones), _square(rows, ones)
        worth = self._worth_taking_off_later(hidden, dim, against)
        l = hidden.t() @ hidden if update or worth else None  # noqa: E741 - the paper's name
        after = self._square_without_rows(before, l) if worth and l is not None else None
        last = one.expand(len(hidden)) if ones else None
        if after is not None:
            split_off, x = w, rows
        else:
            split_off = None
            x = tuple(torch.addmm(part, hidden, of, alpha=-1) for part, of in zip(rows, _columns(w, rows), strict=True))
            after = _square(x, False)
            if last is not None:
                last = last - hidden @ w[:, -1]
                after = after + last.square().sum()
        if update and l is not None:
            moments = self._moments(rows, hidden, l, before, ones)
            if moments.ready is None or self.calls <= _FIRST_CALLS:
                self._finish(moments)
            else:
                self._pending = moments
        self.calls += 1
        factor = torch.where(before > 0, (before / after).sqrt(), one)
        return SplitRows(x, last, split_off, factor)

    def _worth_taking_off_later(self, hidden: Tensor, dim: int, against: int | None) -> bool:
        """Whether two products of W with a matrix of `against` x `dim`, and H'H, are less work than H W.

        On a GPU products cost little, and whether the sum of squares can be trusted would have to be waited for.
        """
        if against is None or hidden.device.type != "cpu":
            return False
        count, rank = hidden.shape
        return count * dim > 2 * against * dim + count * rank

    def _square_without_rows(self, before: Tensor, l: Tensor) -> Tensor | None:  # noqa: E741
        """|X - H W|^2 = |X|^2 - 2 |H|^2 + <H'H, WW'>, as H = X W', 0-dim; None: it would be mere rounding."""
        assert self.w is not None
        if self._gram is None:
            self._gram = (self.w @ self.w.t()).double()
        exact = l.double()
        after = before.double() - 2.0 * exact.trace() + (exact * self._gram).sum()
        return after.to(l.dtype) if after > _LEAST_DIFFERENCE * before else None

    def _hidden(self, rows: Parts, ones: bool) -> Tensor:
        """[rows ones] w', (N, R)."""
        assert self.w is not None
        (first, *parts), (of_first, *of_parts) = rows, _columns(self.w, rows)
        if len(self.w) > _FEW:
            hidden = torch.addmm(self.w[:, -1], first, of_first.t()) if ones else first @ of_first.t()
            for part, of in zip(parts, of_parts, strict=True):
                hidden.addmm_(part, of.t())
            return hidden
        transposed = torch.addmm(self.w[:, -1:], of_first, first.t()) if ones else of_first @ first.t()
        for part, of in zip(parts, of_parts, strict=True):
            transposed.addmm_(of, part.t())
        return transposed.t()

    def _begin(self, rows: Parts, ones: bool) -> None:
        """Start from a fixed set of directions, and estimate a few times on the first rows."""
        count, dim = len(rows[0]), sum(part.shape[1] for part in rows) + int(ones)
        rank = min(self.rank, dim - 1)
        self.rho, self.d = _EPSILON, np.full(rank, _EPSILON, np.float32)
        self._pending = None
        start = torch.zeros(rank, dim)
        for row in range(rank):
            start[row, row::rank] = 1.0
            start[row, row] = 1.1
            start[row] /= start[row].norm()
        start /= math.sqrt(2.0 + self.alpha * (dim + rank) / dim)
        self.w = start.to(rows[0])
        for _ in range(1 if count <= rank else _FIRST_ESTIMATES):
            hidden = self._hidden(rows, ones)
            self._finish(self._moments(rows, hidden, hidden.t() @ hidden, _square(rows, ones), ones))

    def _moments(
        self,
        rows: Parts,
        hidden: Tensor,
        l: Tensor,  # noqa: E741
        trace: Tensor,
        ones: bool,
    ) -> _Moments:
        of_ones = [hidden.sum(0).unsqueeze(1)] if ones else []
        j = torch.cat([*(hidden.t() @ part for part in rows), *of_ones], dim=1)
        parts = [j @ j.t(), l, trace]
        packed = torch.cat([part.reshape(-1) for part in parts])
        if packed.device.type == "cpu":
            return _Moments(packed, j, len(hidden))
        host, event = send_to_host(packed)
        return _Moments(host, j, len(hidden), event)

    def _finish(self, moments: _Moments) -> None:
        """Put the estimate that follows from a call's moments in the place of the present one."""
        assert self.w is not None
        k, l, trace = moments.unpack(len(self.d))  # noqa: E741
        of_j, of_w, self.d, self.rho, root = self._next(k, l, trace, moments.rows)
        small = [of_j, of_w] if root is None else [of_j, of_w, np.diag(root)]
        there = torch.from_numpy(np.stack(small).astype(np.float32)).to(self.w.device, non_blocking=True)
        there = there.to(self.w.dtype)
        self.w, self._gram = torch.addmm(there[0] @ moments.j, there[1], self.w), None
        if root is not None:
            self.w = _reorthogonalised(self.w, there[2].diagonal())

    def _next(
        self,
        k: Matrix,
        l: Matrix,  # noqa: E741
        trace: float,
        rows: int,
    ) -> tuple[Matrix, Matrix, NDArray[np.float32], float, Matrix | None]:
        """Matrices A and B of the next W = A J + B W, the next d and rho, and sqrt(e) if W may not be orthogonal."""
        assert self.w is not None
        dim, rank = self.w.shape[1], len(self.d)
        if self.num_minibatches_history > 0:
            eta = 1.0 / self.num_minibatches_history
        else:
            eta = min(0.9, 1.0 - math.exp(-rows / self.num_samples_history))
        a, b = eta / rows, 1.0 - eta
        d = self.d.astype(np.float64)
        rho = self.rho
        root = np.sqrt(self._e(d, rho, dim))
        q = d + rho
        scaled_l = l / np.outer(root, root)
        z = a * a * k / np.outer(root, root) + a * b * (scaled_l * q + q[:, None] * scaled_l) + np.diag((b * q) ** 2)
        scale = max(1.0, float(np.trace(z)))
        if not math.isfinite(scale):
            raise FloatingPointError("natural gradient: derivatives are not finite")
        # In float32, as Kaldi decomposes it: directions below its rounding are noise in both.
        values, vectors = np.linalg.eigh((z / scale).astype(np.float32))
        order = np.argsort(-np.abs(values), kind="stable")
        c, u = values[order].astype(np.float64) * scale, vectors[:, order].astype(np.float64)
        again = bool(c[0] > _WORST_CONDITION * c[-1])
        floor = (rho * b) ** 2
        again = again or bool((c < floor).any())
        c = np.maximum(c, floor)
        root_c = np.sqrt(c)
        next_rho = (a * trace + b * (dim * rho + d.sum()) - root_c.sum()) / (dim - rank)
        next_d = root_c - next_rho
        lowest = max(_EPSILON, _DELTA * root_c.max())
        next_rho, next_d = max(next_rho, lowest), np.maximum(next_d, lowest)
        next_root = np.sqrt(self._e(next_d, next_rho, dim))
        # W' = a E'^(1/2) c^(-1/2) U' E^(-1/2) (J + b/a Q W)
        of_j = a * (next_root / root_c)[:, None] * u.T / root
        of_w = of_j * (b / a) * q
        return of_j, of_w, next_d.astype(np.float32), float(np.float32(next_rho)), next_root if again else None

    def _e(self, d: Matrix, rho: float, dim: int) -> Matrix:
        beta = rho * (1.0 + self.alpha) + self.alpha / dim * d.sum()
        return np.asarray(1.0 / (beta / d + 1.0))

    def state_dict(self) -> dict[str, Any]:
        """The estimate; one that is on its way is put in first."""
        if self._pending is not None:
            self._finish(self._pending)
            self._pending = None
        w = None if self.w is None else self.w.cpu()
        return {"calls": self.calls, "rho": self.rho, "d": torch.from_numpy(self.d.copy()), "w": w}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.calls, self.rho, self.d = state["calls"], state["rho"], state["d"].numpy().copy()
        self.w = None if state["w"] is None else state["w"].to(device)
        self._pending = self._gram = None


def _columns(w: Tensor, rows: Parts) -> tuple[Tensor, ...]:
    """The columns of w, (R, D) or more, that belong to each part of rows."""
    dims = [part.shape[1] for part in rows]
    return w[:, : sum(dims)].split(dims, dim=1)


def _square(rows: Parts, ones: bool) -> Tensor:
    """The sum of all squares of [rows ones], 0-dim; row by row, so that rounding does not add up."""
    squares = [torch.linalg.vector_norm(part, dim=1).square().sum() for part in rows]
    square = squares[0] if len(squares) == 1 else torch.stack(squares).sum()
    return square + len(rows[0]) if ones else square


def send_to_host(packed: Tensor) -> tuple[Tensor, Any]:
    """A page-locked copy that a GPU's tensor is on its way to, and the event after which it has arrived."""
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    event: Any = torch.cuda.Event()
    event.record()
    return host, event


def _reorthogonalised(w: Tensor, root: Tensor) -> Tensor:
    """`w`, (R, D), with its rows made orthogonal, of the norms `root`, where they are not nearly so.

    By Cholesky factors of their inner products; where these are too far from the identity for that, by a QR
    decomposition, which spans the same spaces in the same order as Kaldi's Gram-Schmidt. All choices stay on a GPU.
    """
    unit = (w @ w.t()) / torch.outer(root, root)
    eye = torch.eye(len(unit), dtype=w.dtype, device=w.device)
    off = (unit - eye).abs().amax() > _ORTHOGONALITY
    on_host = w.device.type == "cpu"
    if on_host and not off:
        return w
    factor, info = torch.linalg.cholesky_ex(unit)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    good = (info == 0) & (inverse.abs().amax() < _LARGEST_INVERSE)
    by_factor = (root.unsqueeze(1) * inverse / root) @ w
    if on_host and good:
        return by_factor
    q, r = torch.linalg.qr(w.t())
    by_qr = (root * torch.where(r.diagonal() < 0, -1.0, 1.0)).unsqueeze(1) * q.t()
    return torch.where(off, torch.where(good, by_factor, by_qr), w)
