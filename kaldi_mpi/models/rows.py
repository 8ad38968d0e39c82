"""Rows of a tensor by number: views where they are a run, a gather elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Rows that are not there; they are zeros.
MISSING = -1


class Gather:
    """Rows of a tensor by number; `MISSING` gives zeros. A run of rows is a view."""

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self.count = len(rows)
        there = np.flatnonzero(rows != MISSING)
        self._before = int(there[0]) if len(there) else self.count
        self._after = self.count - 1 - int(there[-1]) if len(there) else 0
        inner = rows[self._before : self.count - self._after]
        steps = np.diff(inner)
        self._slice: slice | None = None
        self._all = False
        if len(inner) and (steps > 0).all() and len(set(steps.tolist())) <= 1:
            step = int(steps[0]) if len(steps) else 1
            self._slice = slice(int(inner[0]), int(inner[-1]) + 1, step)
        self._inner = inner
        self._one_row = len(inner) > 1 and (steps == 0).all() and inner[0] != MISSING
        self._index: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, data: Tensor) -> Tensor:
        """(rows, B, D) -> (count, B, D)."""
        if not len(self._inner):
            return data.new_zeros(self.count, *data.shape[1:])
        if self._slice is not None:
            whole = self._slice.start == 0 and self._slice.stop == data.shape[0] and self._slice.step == 1
            found = data if whole else data[self._slice]
        elif self._one_row:
            found = data[int(self._inner[0])].expand(len(self._inner), *data.shape[1:])
        else:
            found = self._select(data)
        if self._before or self._after:
            found = functional.pad(found, (0, 0, 0, 0, self._before, self._after))
        return found

    @property
    def run(self) -> slice | None:
        """The rows, where they follow one another without gaps, or None."""
        whole = self._before == self._after == 0 and self._slice is not None and self._slice.step == 1
        return self._slice if whole else None

    def _select(self, data: Tensor) -> Tensor:
        if data.device not in self._index:
            rows = torch.from_numpy(np.maximum(self._inner, 0)).to(data.device)
            gaps = self._inner == MISSING
            mask = torch.from_numpy(~gaps).to(data.device).view(-1, 1, 1) if gaps.any() else None
            self._index[data.device] = rows, mask
        rows, mask = self._index[data.device]
        found = data.index_select(0, rows)
        return found if mask is None else found * mask


def positions(times: Sequence[int], have: Sequence[int]) -> NDArray[np.int64]:
    """Where each of `times` is among the ascending times `have`; `MISSING` where it is not."""
    where = {t: index for index, t in enumerate(have)}
    return np.array([where.get(t, MISSING) for t in times], np.int64)
