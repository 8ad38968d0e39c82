"""Both numerators, in PyTorch's operations (float64) and in C: sums over paths, and what is no supervision."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kaldi_mpi.chain.numerator import PreparedNumerator, prepare_numerator
from kaldi_mpi.chain.supervision_graphs import supervision_graphs
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst
from kaldi_mpi.formats.supervision import Supervision
from kaldi_mpi.testing import chain_reference
from tests.chain.graphs import make_fst, random_cycles, random_layers, random_outputs, seeds

PDFS = 5
INF = float("inf")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def prepared(fsts: list[Fst], frames: int, cyclic: bool, pdfs: int = PDFS) -> PreparedNumerator:
    """Of as many examples of one sequence."""
    examples = [Supervision(1.0, 1, frames, pdfs, cyclic, (fst,)) for fst in fsts]
    return prepare_numerator(supervision_graphs(examples), pdfs)


def dense(numerator: PreparedNumerator, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sums, and posteriors as (B, T, P); each entry is another output, and without posteriors sums are the same."""
    sums, posteriors = numerator.sums(outputs)
    assert posteriors is not None and posteriors.dtype == outputs.dtype
    assert len(np.unique(numerator.entries)) == len(numerator.entries)
    assert torch.equal(numerator.sums(outputs, posteriors=False)[0], sums)
    found = torch.zeros_like(outputs)
    found.view(-1)[torch.from_numpy(numerator.entries)] = posteriors
    return sums, found


def compare(numerator: PreparedNumerator, fsts: list[Fst], outputs: Tensor) -> None:
    """With sums over paths, in float64 and for float32 in C."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        rounded = outputs.to(dtype)
        sums, posteriors = dense(numerator, rounded)
        for sequence, fst in enumerate(fsts):
            log_sum, shares = chain_reference.numerator(fst, rounded[sequence].double().numpy())
            assert sums[sequence].item() == pytest.approx(log_sum, rel=1e-10, abs=1e-10)
            assert np.abs(posteriors[sequence].numpy() - shares).max() <= tolerance


@given(seeds, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_constrained_sums_over_paths(seed: int, frames: int, sequences: int) -> None:
    fsts = [random_layers(seed + number, frames, PDFS) for number in range(sequences)]
    compare(prepared(fsts, frames, False), fsts, random_outputs(seed, sequences, frames, PDFS, scale=20.0))


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_cyclic_sums_over_paths(seed: int, states: int, frames: int, sequences: int) -> None:
    fsts = [random_cycles(seed + number, states, PDFS) for number in range(sequences)]
    compare(prepared(fsts, frames, True), fsts, random_outputs(seed, sequences, frames, PDFS, scale=20.0))


@DTYPES
def test_sequences_in_one_graph_are_one_after_the_other(dtype: torch.dtype) -> None:
    """As a merged example has them: the final costs of one are on the arcs to the next."""
    frames, pdfs = 3, 4
    first, second = random_layers(1, frames, pdfs), random_layers(2, frames, pdfs)
    arcs: list[list[tuple[int, float, int]]] = []
    at = int(np.flatnonzero(np.isfinite(first.finals))[0])
    for shift, fst in ((0, first), (at, second)):
        for state in range(len(fst.finals)):
            if shift == 0 and np.isfinite(fst.finals[state]):
                continue
            arcs.append([])
            for arc in range(fst.first_arc[state], fst.first_arc[state + 1]):
                label, cost, end = int(fst.ilabels[arc]), float(fst.costs[arc]), int(fst.nexts[arc])
                if shift == 0 and end >= at:
                    cost, end = cost + float(fst.finals[end]), at
                arcs[-1].append((label, cost, end + shift * (shift > 0)))
    finals = np.concatenate([np.full(at, INF), second.finals])
    merged = Supervision(1.0, 2, frames, pdfs, False, (make_fst(finals.tolist(), arcs),))
    outputs = random_outputs(3, 2, frames, pdfs).to(dtype)
    numerator = prepare_numerator(supervision_graphs([merged]), pdfs)
    assert numerator.graphs.num_graphs == 1 and numerator.graphs.num_sequences == 2
    sums, posteriors = dense(numerator, outputs)
    apart = dense(prepared([first, second], frames, False, pdfs), outputs)
    assert sums[0].item() == pytest.approx(apart[0].sum().item(), rel=1e-7)
    assert (posteriors - apart[1]).abs().max() <= 1e-6


@DTYPES
@pytest.mark.parametrize("cyclic", [False, True])
def test_posteriors_are_the_derivative(dtype: torch.dtype, cyclic: bool) -> None:
    fst = random_cycles(12, 4, PDFS) if cyclic else random_layers(12, 5, PDFS)
    numerator, outputs = prepared([fst], 5, cyclic), random_outputs(4, 1, 5, PDFS)
    found = dense(numerator, outputs.to(dtype))[1]
    assert (found.sum(dim=2) - 1.0).abs().max() <= 1e-6
    step = 1e-5
    for index in range(outputs.numel()):
        moved = [outputs.clone(), outputs.clone()]
        for sign, values in zip((1.0, -1.0), moved, strict=True):
            values.view(-1)[index] += sign * step
        ends = [numerator.sums(values)[0].item() for values in moved]
        assert abs((ends[0] - ends[1]) / (2 * step) - found.view(-1)[index].item()) <= 1e-6


@DTYPES
def test_paths_far_apart_are_not_lost(dtype: torch.dtype) -> None:
    """A path that is 2000 behind, in the log, may be the only one to end: nothing is limited, nothing underflows."""
    fst = make_fst([INF, INF, INF, 0.0], [[(1, 0.0, 1), (2, 0.0, 2)], [], [(2, 0.0, 3)], []])
    outputs = torch.tensor([[[1000.0, -1000.0], [1000.0, -1000.0]]], dtype=dtype)
    sums, posteriors = dense(prepared([fst], 2, True, 2), outputs)
    assert sums.item() == -2000.0
    assert torch.equal(posteriors, torch.tensor([[[0.0, 1.0], [0.0, 1.0]]], dtype=dtype))


@DTYPES
def test_no_path(dtype: torch.dtype) -> None:
    """Two arcs lead to the end, in three frames there is no path; the other sequence is not touched."""
    fst = make_fst([INF, INF, 0.0], [[(1, 0.0, 1)], [(1, 0.0, 2)], []])
    other = random_cycles(2, 3, PDFS)
    outputs = random_outputs(5, 2, 3, PDFS).to(dtype)
    sums, posteriors = dense(prepared([fst, other], 3, True), outputs)
    assert sums[0] == -INF and not posteriors[0].any()
    alone = dense(prepared([other], 3, True), outputs[1:])
    assert sums[1] == alone[0][0] and torch.equal(posteriors[1], alone[1][0])


@DTYPES
@pytest.mark.parametrize("cyclic", [False, True])
def test_nan_is_found(dtype: torch.dtype, cyclic: bool) -> None:
    fst = random_cycles(2, 3, PDFS) if cyclic else random_layers(2, 4, PDFS)
    outputs = random_outputs(5, 1, 4, PDFS).to(dtype)
    outputs[0, 2] = float("nan")
    assert torch.isnan(prepared([fst], 4, cyclic).sums(outputs)[0]).all()


@pytest.mark.parametrize("cyclic", [False, True])
def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, cyclic: bool) -> None:
    fsts = [random_cycles(n, 6, PDFS) if cyclic else random_layers(n, 6, PDFS) for n in range(11)]
    numerator, outputs = prepared(fsts, 6, cyclic), random_outputs(5, 11, 6, PDFS).float()
    wanted = dense(numerator, outputs)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for ours, theirs in zip(dense(numerator, outputs), wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("finals", "arcs", "cause"),
    [
        ([INF, INF, 0.0], [[(1, 0, 1)], [(7, 0, 2)], []], "pdf-id 6, which the network does not have"),
        ([INF, INF, 0.0], [[(1, 0, 1)], [(0, 0, 2)], []], "pdf-id -1, which the network does not have"),
        ([INF, INF, 0.0], [[(1, 0, 1)], [(1, 0, 5)], []], "an arc to state 5, which there is not"),
        ([INF, INF, 0.0], [[(1, 0, 1), (1, 0, 2)], [(1, 0, 2)], []], "state 2 has more than one time"),
        ([INF, INF, 0.0], [[(1, 0, 2)], [(1, 0, 2)], []], "state 1 no path leads to"),
        ([INF, INF, 0.0], [[(1, 0, 1)], [(1, 0, 1)], []], "state 1 has more than one time"),
        ([INF, INF, INF, INF, 0.0], [[(1, 0, 1), (1, 0, 3)], [(1, 0, 2)], [], [(1, 0, 4)], []], "its 2 frames"),
        ([INF, 0.0, 0.0], [[(1, 0, 1)], [(1, 0, 2)], []], "does not end after its 2 frames"),
        ([INF, INF, INF], [[(1, 0, 1)], [(1, 0, 2)], []], "does not end after its 2 frames"),
        ([INF, INF, 0.0, INF], [[(1, 0, 1)], [(1, 0, 2)], [(1, 0, 3)], []], "more than 2 frames"),
    ],
)
def test_bad_constrained_graphs(finals: list[float], arcs: list[list[tuple[int, float, int]]], cause: str) -> None:
    fsts = [random_layers(1, 2, 3), make_fst(finals, arcs)]
    with pytest.raises(DataError, match=f"^key sequence 1 of the minibatch: supervision .*{cause}"):
        prepared(fsts, 2, False, 3)


def test_states_out_of_order() -> None:
    """State 2 is of time 1, state 1 of time 2."""
    arcs: list[list[tuple[int, float, int]]] = [[(1, 0, 1), (1, 0, 3)], [(1, 0, 2)], [], [(1, 0, 4)], []]
    with pytest.raises(DataError, match="state 3 is not in the order of time"):
        prepared([make_fst([INF, INF, 0.0, INF, 0.0], arcs)], 2, False, 3)


def test_bad_cyclic_graphs() -> None:
    with pytest.raises(DataError, match="sequence 0 of the minibatch: supervision of pdf-id 3"):
        prepared([make_fst([0.0], [[(4, 0, 0)]])], 2, True, 3)


def test_what_cannot_be_merged() -> None:
    def example(weight: float, frames: int, cyclic: bool) -> Supervision:
        return Supervision(weight, 1, frames, PDFS, cyclic, (random_layers(1, frames, PDFS),))

    ours = example(1.0, 3, False)
    for other, what in (
        (example(0.5, 3, False), "weight is 0.5, and that of a is 1.0"),
        (example(1.0, 4, False), "number of frames is 4, and that of a is 3"),
        (example(1.0, 3, True), "kind"),
    ):
        with pytest.raises(DataError, match=f"^key b: .*{what}.*cannot be merged"):
            supervision_graphs([ours, other], ["a", "b"])
    other_tree = dataclasses.replace(ours, label_dim=PDFS + 1)
    with pytest.raises(DataError, match=r"^key b: .*number of pdfs is 6, and that of a is 5"):
        supervision_graphs([ours, other_tree], ["a", "b"])
    with pytest.raises(DataError, match="examples of a tree with 6 pdfs, for a network with 5 outputs"):
        prepare_numerator(supervision_graphs([other_tree]), PDFS)
    empty = dataclasses.replace(make_fst([], []), start=-1)
    with pytest.raises(DataError, match=r"^key a: a supervision without a path"):
        supervision_graphs([Supervision(1.0, 1, 3, PDFS, False, (empty,))], ["a"])
    with pytest.raises(ValueError, match="for a supervision of"):
        prepare_numerator(supervision_graphs([ours]), PDFS).sums(torch.zeros(1, 2, PDFS))
