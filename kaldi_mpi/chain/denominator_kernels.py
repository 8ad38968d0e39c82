"""The denominator as one launch, for GPUs (Triton): a program takes a sequence through all frames and back.

Sequences do not depend on each other, so that no program waits for another, and there are about as many sequences as a
GPU has multiprocessors. What one works on in a frame (states, outputs) stays in its first cache; arcs come from the
second. The formulas stand in denominator_torch.py, which is the reference: tests compare the two through Triton's
interpreter, and device.py tries the kernel on the GPU itself before it is used.

All work is sums over the arcs of a row: of those into a state, out of one, or of a pdf. Rows are sorted by their number
of arcs and padded to powers of two, so that a tile of arcs is some whole rows. There are no atomic operations: results
are the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.chain.denominator_graph import DenominatorGraph
from kaldi_mpi.chain.denominator_torch import DenominatorSums

ERRORS = (RuntimeError, triton.TritonError)  # of a GPU for which they cannot be compiled, or do not run

TILE = 1024  # arcs, or states
WIDTHS = 11  # rows of 1, 2, 4 .. TILE arcs; longer ones take several tiles
# Of `bins`: a width's first tile, and its first row; behind them those of the long rows, and the ends.
_BINS = WIDTHS + 2


@dataclass(frozen=True)
class Rows:
    """Arcs by the rows that sum them, in tiles; padding has probability 0.

    Attributes:
        bins: (2, WIDTHS + 2) int32: the first tile, and the first row, of each width; then of long rows; then ends.
        rows: int32: states or pdfs in the order of their tiles; -1 where a tile has no more.
        long: int32: the first tile of each long row, and the last one's end.
        first, second: int32, (tiles, TILE): what an arc reads: states, and a pdf or a state.
        probs: float32.
    """

    bins: Tensor
    rows: Tensor
    long: Tensor
    first: Tensor
    second: Tensor
    probs: Tensor


@dataclass(frozen=True)
class Arranged:
    """A graph on a device, by the state that arcs lead to, by that which they leave, and by pdf."""

    graph: DenominatorGraph
    initial: Tensor
    into: Rows
    out: Rows
    of_pdf: Rows


def arrange(graph: DenominatorGraph, device: torch.device) -> Arranged:
    """What `forward_backward` wants of a graph; kept by the caller."""
    into = graph.group_states[graph.arc_groups]
    pdfs = graph.group_pdfs[graph.arc_groups]
    initial = torch.from_numpy(graph.initial).to(device)
    states, probs = graph.num_states, graph.in_probs
    return Arranged(
        graph,
        initial,
        _rows(into, states, graph.sources, pdfs, probs, device),
        _rows(graph.sources, states, into, pdfs, probs, device),
        _rows(pdfs, graph.num_pdfs, graph.sources, into, probs, device),
    )


def _rows(
    row_of_arc: NDArray[Any],
    count: int,
    first: NDArray[Any],
    second: NDArray[Any],
    probs: NDArray[np.float32],
    device: torch.device,
) -> Rows:
    degrees = np.bincount(row_of_arc, minlength=count)
    begins = np.cumsum(degrees) - degrees
    order = np.argsort(row_of_arc, kind="stable")
    width_of = np.minimum(np.ceil(np.log2(np.maximum(degrees, 1))).astype(np.int64), WIDTHS)
    bins, long = np.zeros((2, _BINS), dtype=np.int32), []
    rows: list[NDArray[Any]] = []
    arcs: list[NDArray[Any]] = []
    for width in range(WIDTHS + 1):
        bins[:, width] = sum(map(len, arcs)) // TILE, sum(map(len, rows))
        here = np.flatnonzero(width_of == width)
        if width == WIDTHS:
            padded = -(-degrees[here] // TILE) * TILE
            long = (bins[0, width] + np.cumsum([0, *padded]) // TILE).tolist()
        else:
            here = np.append(here, np.full(-len(here) % (TILE >> width), -1))
            padded = np.full(len(here), 1 << width)
        rows.append(here)
        # The arcs of each row, from which on there is padding: -1.
        row = np.repeat(here, padded)
        at = np.arange(len(row)) - np.repeat(np.cumsum(padded) - padded, padded)
        there = (row >= 0) & (at < degrees[row])
        arcs.append(np.where(there, order[np.where(there, begins[row] + at, 0)], -1))
    bins[:, WIDTHS + 1] = sum(map(len, arcs)) // TILE, sum(map(len, rows))
    of_arc = np.concatenate(arcs)

    def there_or_0(values: NDArray[Any], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.where(of_arc >= 0, values[of_arc], 0).astype(dtype)).to(device)

    def numbers(values: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)

    return Rows(
        numbers(bins), numbers(np.concatenate(rows)), numbers(long), there_or_0(first, np.int32),
        there_or_0(second, np.int32), there_or_0(probs, np.float32),
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _products(first, second, probs, tile, a, b, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """probability times a of the first times b of the second, of a tile's arcs."""
    arc = tile * SIZE + tl.arange(0, SIZE)
    of_a = tl.load(a + tl.load(first + arc))
    return tl.load(probs + arc) * of_a * tl.load(b + tl.load(second + arc))


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(  # type: ignore[no-untyped-def]
    bins, rows, long, first, second, probs, a, b, factors, scale, out, out_scale, weights,
    BY_ROW: tl.constexpr, WEIGHTED: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """out[row] = out_scale s, with s the sum of the row's products times `scale`, and factors[row] if BY_ROW.

    Returns the sum of s, times weights[row] if WEIGHTED, over all rows.
    """
    total = 0.0
    for width in tl.static_range(BINS - 2):
        begin = tl.load(bins + width)
        for tile in range(begin, tl.load(bins + width + 1)):
            values = _products(first, second, probs, tile, a, b, SIZE)
            sums = tl.sum(tl.reshape(values, (SIZE >> width, 1 << width)), axis=1) * scale
            place = tl.load(bins + BINS + width) + (tile - begin) * (SIZE >> width) + tl.arange(0, SIZE >> width)
            row = tl.load(rows + place)
            there = row >= 0
            if BY_ROW:
                sums *= tl.load(factors + row, mask=there, other=0.0)
            tl.store(out + row, sums * out_scale, mask=there)
            if WEIGHTED:
                sums *= tl.load(weights + row, mask=there, other=0.0)
            total += tl.sum(tl.where(there, sums, 0.0), axis=0)
    begin = tl.load(bins + BINS + BINS - 2)
    for number in range(tl.load(bins + BINS + BINS - 1) - begin):
        values = tl.zeros((SIZE,), tl.float32)
        for tile in range(tl.load(long + number), tl.load(long + number + 1)):
            values += _products(first, second, probs, tile, a, b, SIZE)
        sum = tl.sum(values, axis=0) * scale
        row = tl.load(rows + begin + number)
        if BY_ROW:
            sum *= tl.load(factors + row)
        tl.store(out + row, sum * out_scale)
        if WEIGHTED:
            sum *= tl.load(weights + row)
        total += sum
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _expose(outputs, x, pdfs, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x = exp of the outputs within -30 .. 30; NaN is -30."""
    for begin in range(0, pdfs, SIZE):
        pdf = begin + tl.arange(0, SIZE)
        y = tl.load(outputs + pdf, mask=pdf < pdfs, other=0.0)
        y = tl.where(y > -30.0, tl.where(y < 30.0, y, 30.0), -30.0)
        tl.store(x + pdf, tl.exp(y), mask=pdf < pdfs)


@triton.jit  # type: ignore[untyped-decorator]
def _add_leak(values, initial, leak, states, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """values += leak times initial, and the sum of all of them."""
    total = 0.0
    for begin in range(0, states, SIZE):
        state = begin + tl.arange(0, SIZE)
        there = state < states
        value = tl.load(values + state, mask=there, other=0.0)
        value += leak * tl.load(initial + state, mask=there, other=0.0)
        tl.store(values + state, value, mask=there)
        total += tl.sum(value, axis=0)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    outputs, initial, alphas, totals, x, leaky, frames, states, pdfs,
    bins, rows, long, first, second, probs,
    BINS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Alphas with the leak, (B, T + 1, S); totals of them without it, (B, T + 1), and in the last place with it."""
    sequence = tl.program_id(0).to(tl.int64)
    outputs += sequence * frames * pdfs
    alphas += sequence * (frames + 1) * states
    totals += sequence * (frames + 1)
    x += sequence * pdfs
    total = 0.0
    for begin in range(0, states, SIZE):
        state = begin + tl.arange(0, SIZE)
        value = tl.load(initial + state, mask=state < states, other=0.0)
        tl.store(alphas + state, value, mask=state < states)
        total += tl.sum(value, axis=0)
    tl.debug_barrier()
    _add_leak(alphas, initial, leaky * total, states, SIZE)
    for frame in range(frames):
        tl.store(totals + frame, total)
        _expose(outputs + frame * pdfs, x, pdfs, SIZE)
        tl.debug_barrier()
        following = alphas + states
        total = _sum_rows(
            bins, rows, long, first, second, probs, alphas, x, x, 1.0 / total, following, 1.0, x,
            False, False, BINS, SIZE,
        )  # fmt: skip
        tl.debug_barrier()
        last = _add_leak(following, initial, leaky * total, states, SIZE)
        tl.debug_barrier()
        alphas = following
        if frame == frames - 1:
            tl.store(totals + frames, last)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    outputs, initial, alphas, totals, x, betas, derivative, scale, state_sums, pdf_sums, leaky, frames, states, pdfs,
    checked,
    out_bins, out_rows, out_long, out_first, out_second, out_probs,
    pdf_bins, pdf_rows, pdf_long, pdf_first, pdf_second, pdf_probs,
    BINS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Occupations times `scale`, (B, T, P), from what _forward has left; betas: (B, 2, S), of two frames."""
    sequence = tl.program_id(0).to(tl.int64)
    outputs += sequence * frames * pdfs
    derivative += sequence * frames * pdfs
    alphas += sequence * (frames + 1) * states
    totals += sequence * (frames + 1)
    x += sequence * pdfs
    betas += sequence * 2 * states
    state_sums += sequence * checked
    pdf_sums += sequence * checked
    inverse = 1.0 / tl.load(totals + frames)
    leak = 0.0
    for begin in range(0, states, SIZE):
        state = begin + tl.arange(0, SIZE)
        there = state < states
        tl.store(betas + (frames % 2) * states + state, tl.zeros((SIZE,), tl.float32) + inverse, mask=there)
        leak += tl.sum(tl.load(initial + state, mask=there, other=0.0), axis=0) * inverse
    tl.debug_barrier()
    for back in range(frames):
        frame = frames - 1 - back
        after, before = betas + ((frame + 1) % 2) * states, betas + (frame % 2) * states
        alpha = alphas + frame * states
        # The leak is the same for each state: what is added is leaky * leak, without `initial`.
        for begin in range(0, states, SIZE):
            state = begin + tl.arange(0, SIZE)
            value = tl.load(after + state, mask=state < states, other=0.0)
            tl.store(after + state, value + leaky * leak, mask=state < states)
        _expose(outputs + frame * pdfs, x, pdfs, SIZE)
        tl.debug_barrier()
        of_frame = 1.0 / tl.load(totals + frame)
        occupied = _sum_rows(
            pdf_bins, pdf_rows, pdf_long, pdf_first, pdf_second, pdf_probs, alpha, after, x, of_frame,
            derivative + frame * pdfs, scale, x, True, False, BINS, SIZE,
        )  # fmt: skip
        leak = _sum_rows(
            out_bins, out_rows, out_long, out_first, out_second, out_probs, after, x, x, of_frame,
            before, 1.0, initial, False, True, BINS, SIZE,
        )  # fmt: skip
        tl.debug_barrier()
        if frame < checked:
            total = 0.0
            for begin in range(0, states, SIZE):
                state = begin + tl.arange(0, SIZE)
                there = state < states
                of_alpha = tl.load(alpha + state, mask=there, other=0.0)
                total += tl.sum(of_alpha * tl.load(before + state, mask=there, other=0.0), axis=0)
            tl.store(state_sums + frame, total)
            tl.store(pdf_sums + frame, occupied)
        # `before` is read here and written above in the next frame.
        tl.debug_barrier()


def forward_backward(
    arranged: Arranged, outputs: Tensor, leaky: float, derivative: Tensor | None, scale: float, checked: int = 1
) -> DenominatorSums:
    """As denominator_torch.forward_backward; outputs and derivative are contiguous float32 on the graph's device."""
    sequences, frames, pdfs = outputs.shape
    states = arranged.graph.num_states
    alphas = outputs.new_empty(sequences, frames + 1, states)
    totals, x = outputs.new_empty(sequences, frames + 1), outputs.new_empty(sequences, pdfs)
    settings: dict[str, Any] = {"BINS": _BINS, "SIZE": TILE, "num_warps": 16}
    _forward[(sequences,)](
        outputs, arranged.initial, alphas, totals, x, leaky, frames, states, pdfs, *_tensors(arranged.into), **settings
    )
    log_probs = totals.double().log().sum(dim=1)
    if derivative is None:
        return DenominatorSums(log_probs)
    betas = outputs.new_empty(sequences, 2, states)
    sums = outputs.new_empty(2, sequences, checked)
    _backward[(sequences,)](
        outputs, arranged.initial, alphas, totals, x, betas, derivative, scale, sums[0], sums[1], leaky, frames,
        states, pdfs, checked, *_tensors(arranged.out), *_tensors(arranged.of_pdf), **settings,
    )  # fmt: skip
    state_sums, pdf_sums = sums.double().transpose(1, 2).unbind(0)
    return DenominatorSums(log_probs, state_sums, pdf_sums)


def _tensors(rows: Rows) -> tuple[Tensor, ...]:
    return rows.bins, rows.rows, rows.long, rows.first, rows.second, rows.probs
