"""The numerators as one launch, for GPUs (Triton): a program takes a graph through all of its steps and back.

Nothing is launched a frame, and nothing waits for the host: the graphs come with the minibatch. A program works on the
states of a step at a time (all of them, where the graph is cyclic), one a lane, and goes through their arcs. The
formulas stand in numerator_torch.py, which is the reference: tests compare the two through Triton's interpreter, and
device.py tries the kernel on the GPU itself before it is used. Sums of occupations are atomic, in float64: their order
may change the last bit of a float32 posterior.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kaldi_mpi.chain.numerator_torch import ArcTensors

ERRORS = (RuntimeError, triton.TritonError)  # of a GPU for which they cannot be compiled, or do not run

LANES = 128  # states at a time: a step of a constrained graph seldom has more


@triton.jit  # type: ignore[untyped-decorator]
def _leave(  # type: ignore[no-untyped-def]
    begin, end, first_arc, costs, nexts, entries, entry_steps, scores, frame, betas_of_nexts, betas, shares,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Betas of the states begin .. end - 1 that have arcs, and their arcs' shares."""
    for at in range(begin, end, SIZE):
        state = at + tl.arange(0, SIZE)
        there = state < end
        first = tl.load(first_arc + state, mask=there, other=0)
        degree = tl.load(first_arc + state + 1, mask=there, other=0) - first
        longest = tl.max(degree, axis=0)
        most = tl.full((SIZE,), float("-inf"), tl.float64)
        for number in range(longest):
            arc = first + number
            on = number < degree
            entry = tl.load(entries + arc, mask=on, other=0) + frame * tl.load(entry_steps + arc, mask=on, other=0)
            value = tl.load(scores + entry, mask=on, other=0.0).to(tl.float64) - tl.load(
                costs + arc, mask=on, other=0.0
            )
            value += tl.load(betas_of_nexts + tl.load(nexts + arc, mask=on, other=0), mask=on, other=0.0)
            tl.store(shares + arc, value, mask=on)
            most = tl.where(on & (value > most), value, most)
        safe = tl.where(most == float("-inf"), 0.0, most)
        # What one pass has stored, another reads.
        tl.debug_barrier()
        sum = tl.zeros((SIZE,), tl.float64)
        for number in range(longest):
            on = number < degree
            power = tl.exp(tl.load(shares + first + number, mask=on, other=float("-inf")) - safe)
            tl.store(shares + first + number, power, mask=on)
            sum += tl.where(on, power, 0.0)
        # Without a path the powers are 0; NaN stays.
        positive = tl.where(sum == 0.0, 1.0, sum)
        beta = tl.where(sum == 0.0, float("-inf"), safe + tl.log(positive))
        tl.store(betas + state, beta, mask=there & (degree > 0))
        tl.debug_barrier()
        for number in range(longest):
            on = number < degree
            power = tl.load(shares + first + number, mask=on, other=0.0)
            tl.store(shares + first + number, power / positive, mask=on)


@triton.jit  # type: ignore[untyped-decorator]
def _enter(  # type: ignore[no-untyped-def]
    begin, end, first_arc, nexts, entries, entry_steps, frame, occupied, after, shares, found, SIZE: tl.constexpr
):
    """The occupations of the states begin .. end - 1 handed on to where their arcs lead, and to entries."""
    for at in range(begin, end, SIZE):
        state = at + tl.arange(0, SIZE)
        there = state < end
        first = tl.load(first_arc + state, mask=there, other=0)
        degree = tl.load(first_arc + state + 1, mask=there, other=0) - first
        occupation = tl.load(occupied + state, mask=there, other=0.0)
        for number in range(tl.max(degree, axis=0)):
            arc = first + number
            on = number < degree
            part = occupation * tl.load(shares + arc, mask=on, other=0.0)
            entry = tl.load(entries + arc, mask=on, other=0) + frame * tl.load(entry_steps + arc, mask=on, other=0)
            tl.atomic_add(after + tl.load(nexts + arc, mask=on, other=0), part, mask=on)
            tl.atomic_add(found + entry, part, mask=on)


@triton.jit  # type: ignore[untyped-decorator]
def _fill(values, begin, end, number, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    for at in range(begin, end, SIZE):
        place = at + tl.arange(0, SIZE)
        tl.store(values + place, tl.zeros((SIZE,), tl.float64) + number, mask=place < end)


@triton.jit  # type: ignore[untyped-decorator]
def _layered(  # type: ignore[no-untyped-def]
    layers, first_layer, first_arc, costs, nexts, entries, entry_steps, scores, betas, occupied, shares, found,
    WANTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    graph = tl.program_id(0)
    layer, last = tl.load(first_layer + graph), tl.load(first_layer + graph + 1) - 2
    for back in range(last - layer):
        of_step = layers + last - 1 - back
        _leave(
            tl.load(of_step), tl.load(of_step + 1), first_arc, costs, nexts, entries, entry_steps, scores, 0,
            betas, betas, shares, SIZE,
        )  # fmt: skip
        tl.debug_barrier()
    if WANTED:
        for step in range(last - layer):
            of_step = layers + layer + step
            _enter(
                tl.load(of_step), tl.load(of_step + 1), first_arc, nexts, entries, entry_steps, 0,
                occupied, occupied, shares, found, SIZE,
            )  # fmt: skip
            tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def _cyclic(  # type: ignore[no-untyped-def]
    starts, first_arc, costs, nexts, entries, entry_steps, scores, betas, occupied, shares, found,
    steps, states, arcs,
    WANTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """betas and occupied: (2, states): of two frames in turn; betas of frame `steps` are there."""
    graph = tl.program_id(0)
    begin, end = tl.load(starts + graph), tl.load(starts + graph + 1)
    for back in range(steps):
        frame = steps - 1 - back
        before = betas + (frame % 2) * states
        # States that no arc leaves keep this.
        _fill(before, begin, end, float("-inf"), SIZE)
        tl.debug_barrier()
        _leave(
            begin, end, first_arc, costs, nexts, entries, entry_steps, scores, frame,
            betas + ((frame + 1) % 2) * states, before, shares, SIZE,
        )  # fmt: skip
        # Step by step, as all of them may be more than an int32 counts.
        shares += arcs
        tl.debug_barrier()
    if WANTED:
        for frame in range(steps):
            after = occupied + ((frame + 1) % 2) * states
            _fill(after, begin, end, 0.0, SIZE)
            tl.debug_barrier()
            shares -= arcs
            _enter(
                begin, end, first_arc, nexts, entries, entry_steps, frame, occupied + (frame % 2) * states,
                after, shares, found, SIZE,
            )  # fmt: skip
            tl.debug_barrier()


def sum_paths(arcs: ArcTensors, scores: Tensor, posteriors: bool) -> tuple[Tensor, Tensor | None]:
    """As numerator_torch.sum_paths; scores are float32."""
    graphs, states, steps = len(arcs.starts), len(arcs.finals), arcs.steps
    parts = 2 if arcs.cyclic else 1
    betas = arcs.finals.repeat(parts)
    occupied = torch.zeros_like(betas)
    occupied[arcs.starts] = 1.0
    shares = betas.new_empty((steps if arcs.cyclic else 1) * len(arcs.costs))
    found = betas.new_zeros(max(1, arcs.num_entries) if posteriors else 1)
    of_arcs = arcs.first_arc, arcs.costs, arcs.nexts, arcs.entries, arcs.entry_steps
    if arcs.cyclic:
        _cyclic[(graphs,)](
            arcs.bounds, *of_arcs, scores, betas, occupied, shares, found, steps, states, len(arcs.costs),
            WANTED=posteriors, SIZE=LANES,
        )  # fmt: skip
    else:
        _layered[(graphs,)](
            arcs.layers, arcs.first_layer, *of_arcs, scores, betas, occupied, shares, found,
            WANTED=posteriors, SIZE=LANES,
        )  # fmt: skip
    return betas[arcs.starts], found[: arcs.num_entries].to(scores.dtype) if posteriors else None
