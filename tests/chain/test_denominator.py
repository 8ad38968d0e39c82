"""The denominator in PyTorch's operations (float64) and in C: Kaldi's figures, sums over paths, invariants."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kaldi_mpi.chain.denominator import Denominator
from kaldi_mpi.chain.denominator_graph import denominator_graph, initial_probabilities
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst, read_fst
from kaldi_mpi.testing import chain_reference
from tests.chain.chain_data import NUM_PDFS, case, golden_graph, matrices
from tests.chain.graphs import make_fst, random_denominator, random_outputs, seeds
from tests.paths import golden

PDFS = 5
# Rounding of float32 over some frames, relative to the largest occupation; of log-probabilities, a frame.
ROUNDING = 3e-6


def occupations(denominator: Denominator, outputs: Tensor, checked: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and occupations; the sums that should be 1 are looked at, at the first `checked` frames."""
    derivative = torch.empty_like(outputs)
    sums = denominator(outputs, derivative, 1.0, max(1, checked))
    assert sums.state_sums is not None and sums.pdf_sums is not None
    assert sums.state_sums.shape == (max(1, checked), len(outputs))
    tolerance = 1e-12 if outputs.dtype == torch.float64 else 1e-5
    for found in (sums.state_sums, sums.pdf_sums):
        torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=tolerance)
    assert torch.equal(denominator(outputs).log_probs, sums.log_probs)
    return sums.log_probs, derivative


def close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], frames: int) -> None:
    assert (found[0] - wanted[0]).abs().max() <= ROUNDING * frames
    assert (found[1].double() - wanted[1]).abs().max() <= ROUNDING


def test_initial_probabilities_are_kaldis() -> None:
    wanted = case("test").matrices["initial-probs"][0].numpy()
    assert np.abs(golden_graph().initial - wanted).max() <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_occupations_of_whole_utterances_are_kaldis(dtype: torch.dtype) -> None:
    """What nnet3-chain-compute-post wrote for the outputs of two utterances."""
    denominator, posts = Denominator(golden_graph(), 0.1), matrices("decode/den_post.ark")
    outputs = matrices("decode/out.ark")
    assert len(posts) == 2
    for key, wanted in posts.items():
        found = occupations(denominator, torch.from_numpy(outputs[key]).to(dtype).unsqueeze(0), len(wanted))[1]
        assert np.abs(found[0].numpy() - wanted).max() <= 5e-6


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1e-5, 0.1, 0.9]))
@settings(max_examples=40, deadline=None)
def test_sums_over_paths(seed: int, states: int, frames: int, leaky: float) -> None:
    fst = random_denominator(seed, states, PDFS, 1.5)
    graph = denominator_graph(fst, PDFS)
    # Some beyond the limits.
    outputs = random_outputs(seed, 2, frames, PDFS, scale=15.0)
    found = occupations(Denominator(graph, leaky), outputs, frames)
    # float32 probabilities are part of the graph.
    rounded = dataclasses.replace(fst, costs=-np.log(np.exp(-fst.costs.astype(np.float64)).astype(np.float32)))
    for sequence in range(2):
        log_prob, shares = chain_reference.denominator(
            rounded, graph.initial.astype(np.float64), outputs[sequence].numpy(), leaky
        )
        assert abs(found[0][sequence].item() - log_prob) <= 1e-6 * max(1.0, abs(log_prob))
        assert np.abs(found[1][sequence].numpy() - shares).max() <= 1e-6


@given(seeds, st.integers(1, 30), st.integers(1, 70), st.integers(1, 6), st.sampled_from([1e-7, 1e-5, 0.1, 0.999]))
@settings(max_examples=40, deadline=None)
def test_c_is_float64_but_for_rounding(seed: int, states: int, sequences: int, frames: int, leaky: float) -> None:
    denominator = Denominator(denominator_graph(random_denominator(seed, states, PDFS), PDFS), leaky)
    outputs = random_outputs(seed, sequences, frames, PDFS).float()
    wanted = occupations(denominator, outputs.double(), frames)
    close(occupations(denominator, outputs, frames), wanted, frames)


@pytest.mark.parametrize("sequences", [1, 15, 16, 17, 32, 65])
@pytest.mark.parametrize("pdfs", [1, 127, 128, 129, 300])
def test_blocks_of_lanes_and_of_pdfs(sequences: int, pdfs: int) -> None:
    denominator = Denominator(denominator_graph(random_denominator(3, 40, pdfs), pdfs), 0.1)
    outputs = random_outputs(1, sequences, 4, pdfs).float()
    close(occupations(denominator, outputs, 4), occupations(denominator, outputs.double(), 4), 4)


@pytest.mark.parametrize("frames", [127, 128, 129, 256, 300])
def test_long_sequences(frames: int) -> None:
    """Their alphas are computed a second time, 128 frames after the other."""
    denominator = Denominator(denominator_graph(random_denominator(6, 9, PDFS), PDFS), 0.1)
    outputs = random_outputs(6, 2, frames, PDFS).float()
    close(occupations(denominator, outputs, frames), occupations(denominator, outputs.double(), frames), frames)


def test_neither_threads_nor_the_place_in_a_minibatch_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    denominator = Denominator(denominator_graph(random_denominator(5, 50, 20), 20), 0.1)
    outputs = random_outputs(2, 130, 7, 20).float()
    wanted = occupations(denominator, outputs)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for ours, theirs in zip(occupations(denominator, outputs), wanted, strict=True):
        assert torch.equal(ours, theirs)
    alone = occupations(denominator, outputs[77:78])
    assert torch.equal(alone[0], wanted[0][77:78]) and torch.equal(alone[1], wanted[1][77:78])


def test_occupations_are_the_derivative() -> None:
    denominator = Denominator(denominator_graph(random_denominator(8, 6, PDFS), PDFS), 0.3)
    outputs = random_outputs(4, 2, 4, PDFS)
    _, found = occupations(denominator, outputs)
    step = 1e-5
    for index in range(outputs.numel()):
        ends = []
        for sign in (1.0, -1.0):
            moved = outputs.clone()
            moved.view(-1)[index] += sign * step
            ends.append(denominator(moved).log_probs.sum().item())
        assert abs((ends[0] - ends[1]) / (2 * step) - found.view(-1)[index].item()) <= 1e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_are_limited_to_30(dtype: torch.dtype) -> None:
    denominator = Denominator(denominator_graph(random_denominator(9, 8, PDFS), PDFS), 0.1)
    outputs = random_outputs(5, 3, 5, PDFS, scale=40.0).to(dtype)
    outputs[0, 1, 2], outputs[1, 2, 3], outputs[2, 3, 4] = float("nan"), float("inf"), -float("inf")
    assert (outputs.abs() > 30).sum() > 20
    limited = outputs.clone()
    limited[0, 1, 2] = -30.0
    limited = limited.clamp(-30.0, 30.0)
    for ours, theirs in zip(occupations(denominator, outputs, 5), occupations(denominator, limited, 5), strict=True):
        assert torch.equal(ours, theirs)


def test_exponentials_are_right_to_a_few_bits() -> None:
    """With one state and one arc, log-probability less that of output 0 is the output."""
    denominator = Denominator(denominator_graph(make_fst([0.0], [[(1, 0.0, 0)]]), 1), 1e-5)
    outputs = torch.linspace(-30.0, 30.0, 6001).view(-1, 1, 1)
    found = denominator(outputs).log_probs - denominator(torch.zeros(1, 1, 1)).log_probs
    assert (found - outputs.view(-1).double()).abs().max() <= 4e-7


def test_more_states_than_16_bits_count() -> None:
    states, pdfs = 70_000, 30
    generator = np.random.default_rng(6)
    ends = np.stack([(np.arange(states) + 1) % states, generator.integers(0, states, states)], axis=1)
    labels = generator.integers(1, pdfs + 1, 2 * states).astype(np.int32)
    fst = Fst(
        0, np.full(states, np.inf, np.float32), 2 * np.arange(states + 1), labels, labels,
        np.full(2 * states, 0.7, np.float32), ends.reshape(-1).astype(np.int32),
    )  # fmt: skip
    graph = denominator_graph(fst, pdfs)
    assert (graph.num_states, graph.num_arcs) == (states, 2 * states)
    denominator, outputs = Denominator(graph, 0.1), random_outputs(7, 2, 3, pdfs).float()
    close(occupations(denominator, outputs, 3), occupations(denominator, outputs.double(), 3), 3)
    # Those that a shorter count would leave out are not without weight.
    assert graph.initial[65_536:].sum() > 0.01


def test_without_rounding_a_scale_is_a_factor() -> None:
    denominator = Denominator(denominator_graph(random_denominator(5, 9, PDFS), PDFS), 0.1)
    outputs = random_outputs(2, 3, 4, PDFS).float()
    found = torch.empty_like(outputs)
    denominator(outputs, found, -2.0)
    assert torch.equal(found, -2.0 * occupations(denominator, outputs)[1])


def test_a_graph_of_another_tree_is_refused() -> None:
    fst = read_fst(golden("chain/den.fst"))
    with pytest.raises(DataError, match=r"den\.fst: .*pdf-id 55, of a network with 55 outputs: it is of another tree"):
        denominator_graph(fst, NUM_PDFS - 1, "den.fst")
    assert denominator_graph(fst, NUM_PDFS + 10).num_pdfs == NUM_PDFS + 10


@pytest.mark.parametrize(
    ("fst", "cause"),
    [
        (make_fst([], []), "without arcs"),
        (make_fst([0.0], [[]]), "without arcs"),
        (make_fst([0.0], [[(0, 0.0, 0)]]), "label 0"),
        (make_fst([0.0], [[(1, float("inf"), 0)]]), "not a finite number"),
        (make_fst([float("inf"), 0.0], [[(1, 0.0, 1)], []]), "no path has 100 frames"),
    ],
)
def test_bad_graphs(fst: Fst, cause: str) -> None:
    with pytest.raises(DataError, match=f"^den.fst: .*{cause}"):
        denominator_graph(fst, 3, "den.fst")


def test_initial_probabilities_of_two_states() -> None:
    """By hand: from state 0 to state 1 and back, in turn."""
    fst = make_fst([float("inf"), 1.0], [[(1, 0.0, 1)], [(1, 2.0, 0)]])
    assert np.abs(initial_probabilities(fst) - 0.5).max() <= 1e-12


def test_what_does_not_fit() -> None:
    graph = denominator_graph(random_denominator(1, 3, PDFS), PDFS)
    for leaky in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="leaky-hmm-coefficient"):
            Denominator(graph, leaky)
    denominator = Denominator(graph, 0.1)
    for shape in ((2, 3, PDFS + 1), (3, PDFS), (2, 0, PDFS)):
        with pytest.raises(ValueError, match="outputs of shape"):
            denominator(torch.zeros(shape))
    with pytest.raises(ValueError, match="derivative of shape"):
        denominator(torch.zeros(2, 3, PDFS), torch.zeros(2, 4, PDFS))
