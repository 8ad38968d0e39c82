"""The objective and its derivatives against Kaldi's, and the rules of penalty, weights and failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kaldi_mpi.chain import objective
from kaldi_mpi.chain.denominator import Denominator
from kaldi_mpi.chain.denominator_graph import denominator_graph
from kaldi_mpi.chain.denominator_torch import DenominatorSums
from kaldi_mpi.chain.numerator import PreparedNumerator, prepare_numerator
from kaldi_mpi.chain.objective import ChainObjective, ChainOptions, chain_objective
from kaldi_mpi.chain.supervision_graphs import supervision_graphs
from kaldi_mpi.formats.fst import Fst
from kaldi_mpi.formats.supervision import Supervision
from tests.chain.chain_data import NUM_PDFS, Case, case, golden_graph
from tests.chain.graphs import make_fst, random_cycles, random_denominator, random_layers, random_outputs

CASES = ("zero", "test", "leaky1e-5", "merged", "weighted", "unconstrained", "range", "penalty")
XENT = 0.1
PDFS, FRAMES, SEQUENCES = 6, 4, 3


@pytest.fixture(params=["torch, float64", "C, float32", "Triton, float32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of the outputs; what computes them. The kernels stand in for C, which a CPU otherwise has."""
    if request.param.startswith("Triton"):
        pytest.importorskip("triton", reason="Triton is not installed")
        from kaldi_mpi.chain import denominator_kernels, numerator_kernels

        def of_denominator(
            self: Denominator, outputs: Tensor, derivative: Tensor | None, scale: float, checked: int
        ) -> DenominatorSums:
            arranged = denominator_kernels.arrange(self.graph, outputs.device)
            return denominator_kernels.forward_backward(arranged, outputs, self.leaky, derivative, scale, checked)

        def of_numerator(self: PreparedNumerator, scores: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
            return numerator_kernels.sum_paths(self.on(scores.device), scores, wanted)

        monkeypatch.setattr(Denominator, "_c", of_denominator)
        monkeypatch.setattr(PreparedNumerator, "_c", of_numerator)
    return torch.float64 if "64" in request.param else torch.float32


def kaldis(found: Case, key: str, denominator: Denominator, dtype: torch.dtype, **more: Any) -> ChainObjective:
    """An example of a golden case."""
    options = ChainOptions(found.number("l2"), XENT, found.number("leaky"), found.number("oor"))
    numerator = prepare_numerator(supervision_graphs([found.supervisions[key]], [key]), NUM_PDFS)
    output, xent = (found.matrices[f"{key}-{name}"].to(dtype) for name in ("output", "xent"))
    return chain_objective(denominator, numerator, output, options, xent=xent, **more)


@pytest.mark.parametrize("name", CASES)
def test_kaldis_figures(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Objectives to 1e-5 (they are differences), log-probabilities to 1e-6, derivatives to 1e-4 of the largest.

    float32 is within the same: the rounding of Kaldi's own float32 is the larger part.
    """
    found = case(name)
    denominator = Denominator(golden_graph(), found.number("leaky"))
    # The interpreter takes seconds for an example.
    examples = 1 if "Triton" in request.node.name else len(found.table)
    for key, row in list(found.table.items())[:examples]:
        ours = kaldis(found, key, denominator, dtype, penalise=name == "penalty")
        assert ours.weight == row["weight"]
        assert not ours.failed
        assert ours.objf.item() == pytest.approx(row["objf"], rel=1e-5, abs=1e-5)
        assert ours.l2.item() == pytest.approx(row["l2"], rel=3e-6, abs=1e-12)
        assert ours.xent is not None and ours.xent.item() == pytest.approx(row["xent_objf"], rel=3e-6)
        output = found.matrices[f"{key}-output"].to(dtype)
        assert denominator(output).log_probs.sum().item() == pytest.approx(row["den"], rel=1e-6)
        graphs = supervision_graphs([found.supervisions[key]])
        num = graphs.weight * prepare_numerator(graphs, NUM_PDFS).sums(output)[0].sum().item()
        if name != "unconstrained":
            # Kaldi's own total is a float32 of the merged graph, and nearly 0 in one case.
            assert num == pytest.approx(row["num"], rel=1e-6, abs=2e-6)
        for matrix, wanted, scale in (
            (ours.derivative, found.matrices[f"{key}-deriv"], 1.0),
            (ours.xent_derivative, found.matrices[f"{key}-post"], XENT),
        ):
            assert matrix is not None and matrix.dtype == dtype
            largest = scale * wanted.abs().max()
            assert (matrix.double() - scale * wanted.double()).abs().max() <= 1e-4 * largest


def test_kaldis_penalty_is_what_differs_between_two_cases() -> None:
    """`penalty` is `range` with the penalty, so that it has an effect that the tolerance above would not hide."""
    with_it, without = case("penalty"), case("range")
    (key,) = with_it.table
    difference = with_it.matrices[f"{key}-deriv"] - without.matrices[f"{key}-deriv"]
    assert difference.abs().max() > 0.02 * with_it.matrices[f"{key}-deriv"].abs().max()


def minibatch(cyclic: bool = False, weight: float = 0.5) -> PreparedNumerator:
    fsts = [random_cycles(n, 4, PDFS) if cyclic else random_layers(n, FRAMES, PDFS) for n in range(SEQUENCES)]
    return of_fsts(fsts, cyclic, weight)


def of_fsts(fsts: list[Fst], cyclic: bool, weight: float = 0.5) -> PreparedNumerator:
    examples = [Supervision(weight, 1, FRAMES, PDFS, cyclic, (fst,)) for fst in fsts]
    return prepare_numerator(supervision_graphs(examples), PDFS)


def a_denominator(leaky: float = 0.1) -> Denominator:
    return Denominator(denominator_graph(random_denominator(4, 8, PDFS), PDFS), leaky)


def outputs(dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
    return random_outputs(1, SEQUENCES, FRAMES, PDFS, scale=scale).to(dtype)


@pytest.mark.parametrize("cyclic", [False, True])
def test_derivatives_by_finite_differences(cyclic: bool) -> None:
    numerator, denominator, output = minibatch(cyclic), a_denominator(), outputs()
    options = ChainOptions(0.01, XENT, 0.1)
    found = chain_objective(denominator, numerator, output, options, xent=output.log_softmax(2))
    assert found.derivative is not None and found.xent_derivative is not None

    def value(moved: Tensor) -> float:
        ours = chain_objective(denominator, numerator, moved, options, derivatives=False)
        assert ours.derivative is None and ours.xent is None
        return (ours.objf + ours.l2).item()

    step = 1e-5
    for index in range(output.numel()):
        change = torch.zeros_like(output)
        change.view(-1)[index] = step
        slope = (value(output + change) - value(output - change)) / (2 * step)
        assert abs(slope - found.derivative.view(-1)[index].item()) <= 1e-7
    assert found.xent is not None
    along = (found.xent_derivative * output.log_softmax(2)).sum().item()
    assert found.xent.item() == pytest.approx(along / XENT, rel=1e-12)


def test_penalty_weights_and_l2(dtype: torch.dtype) -> None:
    """Each of them is what it adds to the derivative, and is in no objective but l2 in its own."""
    numerator, denominator, output = minibatch(), a_denominator(), outputs(dtype, 40.0)
    xent, deriv_weights = output.log_softmax(2), torch.rand(SEQUENCES, FRAMES).to(dtype)

    def given(options: ChainOptions, **more: Any) -> ChainObjective:
        return chain_objective(denominator, numerator, output, options, xent=xent, **more)

    plain = given(ChainOptions(0.0, XENT, 0.1, 0.02))
    assert plain.derivative is not None and plain.xent_derivative is not None and plain.l2.item() == 0.0
    penalised = given(ChainOptions(0.0, XENT, 0.1, 0.02), penalise=True)
    assert penalised.derivative is not None
    beyond = output.clamp(-30, 30) - output
    assert beyond.count_nonzero() > 10
    torch.testing.assert_close(penalised.derivative, plain.derivative + 0.04 * beyond)
    with_l2 = given(ChainOptions(0.003, XENT, 0.1, 0.02))
    assert with_l2.derivative is not None
    torch.testing.assert_close(with_l2.derivative, plain.derivative - 0.5 * 0.003 * output)
    assert with_l2.l2.item() == pytest.approx(-0.25 * 0.003 * output.double().square().sum().item(), rel=1e-6)
    weighted = given(ChainOptions(0.003, XENT, 0.1, 0.02), deriv_weights=deriv_weights)
    assert weighted.derivative is not None and weighted.xent_derivative is not None
    torch.testing.assert_close(weighted.derivative, with_l2.derivative * deriv_weights.unsqueeze(2))
    torch.testing.assert_close(weighted.xent_derivative, plain.xent_derivative * deriv_weights.unsqueeze(2))
    ignored = given(ChainOptions(0.003, XENT, 0.1, 0.02, False), deriv_weights=deriv_weights)
    assert ignored.derivative is not None and torch.equal(ignored.derivative, with_l2.derivative)
    for other in (penalised, with_l2, weighted, ignored):
        assert other.objf == plain.objf and other.xent == plain.xent
    assert plain.weight == 0.5 * SEQUENCES * FRAMES
    no_xent = given(ChainOptions(0.0, 0.0, 0.1))
    assert no_xent.xent == plain.xent and no_xent.xent_derivative is None


@pytest.fixture(params=["a CPU", "a device that is not waited for"])
def _waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "a CPU":
        monkeypatch.setattr(objective, "_asking_is_free", lambda value: False)


@pytest.mark.usefixtures("_waiting")
@pytest.mark.parametrize(
    ("cyclic", "what"), [(False, "NaN"), (False, "inf"), (True, "NaN"), (True, "inf"), (True, "no path")]
)
def test_failure(dtype: torch.dtype, cyclic: bool, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """-10 a frame, no derivative but that of l2, which unconstrained numerators have only if they are finite."""
    numerator, output = minibatch(cyclic), outputs(dtype, 20.0)
    if what == "no path":
        numerator = of_fsts([make_fst([float("inf"), 0.0], [[(1, 0.0, 1)], []]), *minibatch_fsts()], True)
    else:
        output[1, 2] = float("nan" if what == "NaN" else "inf")
    options = ChainOptions(0.01, XENT, 0.1)
    found = chain_objective(
        a_denominator(), numerator, output, options, xent=outputs(dtype).log_softmax(2), penalise=True
    )
    assert found.failed and found.objf.item() == -10.0 * found.weight
    assert found.xent is not None and found.xent.item() == 0.0
    assert found.xent_derivative is not None and not found.xent_derivative.any()
    assert found.derivative is not None
    if cyclic:
        assert found.l2.item() == 0.0 and not found.derivative.any()
    else:
        torch.testing.assert_close(found.derivative, -0.5 * 0.01 * output, equal_nan=True)
    assert "not finite or was not computed well: it is taken as -10 a frame" in caplog.text


def minibatch_fsts() -> list[Fst]:
    return [random_cycles(n, 4, PDFS) for n in range(1, SEQUENCES)]


@pytest.mark.usefixtures("_waiting")
def test_without_failure_nothing_is_lost(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    for cyclic in (False, True):
        found = chain_objective(a_denominator(), minibatch(cyclic), outputs(dtype), ChainOptions(0.01, XENT, 0.1))
        assert not found.failed and found.objf.item() > -10.0 * found.weight and found.l2.item() < 0.0
        assert found.derivative is not None and found.derivative.count_nonzero() == found.derivative.numel()
        wanted = chain_objective(a_denominator(), minibatch(cyclic), outputs(), ChainOptions(0.01, XENT, 0.1))
        assert wanted.derivative is not None
        torch.testing.assert_close(found.derivative.double(), wanted.derivative, rtol=1e-5, atol=2e-6)
    assert not caplog.records


@pytest.mark.parametrize(
    ("factor", "failed", "warned"),
    [(1.0, False, False), (1.005, False, True), (2.0, True, True), (float("nan"), True, False)],
)
def test_sums_of_the_denominator_that_are_off(
    factor: float, failed: bool, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Sums over 3 sequences may be off by 2 before the minibatch fails, and each by 0.001 before there is a warning."""
    call: Callable[..., DenominatorSums] = Denominator.__call__

    def off(self: Denominator, *arguments: Any) -> DenominatorSums:
        sums = call(self, *arguments)
        assert sums.state_sums is not None
        return DenominatorSums(sums.log_probs, sums.state_sums * factor, sums.pdf_sums)

    monkeypatch.setattr(Denominator, "__call__", off)
    found = chain_objective(a_denominator(), minibatch(), outputs(), ChainOptions(leaky_hmm_coefficient=0.1))
    assert bool(found.failed) == failed
    assert ("of 3 sequences are off by" in caplog.text) == warned
    assert ("taken as -10 a frame" in caplog.text) == failed
    assert found.derivative is not None and bool(found.derivative.any()) == (not failed)


def test_an_objective_may_be_above_0_where_outputs_are_out_of_range() -> None:
    """The numerator is not limited; within the limits no objective of a graph that the denominator has is above 0."""
    fst = make_fst([0.0, 0.0], [[(1, 0.7, 0), (2, 0.7, 1)], [(1, 0.7, 0), (2, 0.7, 1)]])
    denominator = Denominator(denominator_graph(fst, 2), 1e-5)
    path = make_fst(
        [*[float("inf")] * FRAMES, 0.0], [*([(1, 0.7, n + 1)] for n in range(FRAMES)), []]
    )  # fmt: skip
    numerator = prepare_numerator(supervision_graphs([Supervision(1.0, 1, FRAMES, 2, False, (path,))]), 2)
    output = torch.zeros(1, FRAMES, 2, dtype=torch.float64)
    options = ChainOptions(leaky_hmm_coefficient=1e-5)
    for value, sign in ((25.0, -1.0), (31.5, 1.0)):
        output[:, :, 0] = value
        assert np.sign(chain_objective(denominator, numerator, output, options).objf.item()) == sign


def test_the_coefficient_is_the_denominators() -> None:
    with pytest.raises(ValueError, match="denominator of"):
        chain_objective(a_denominator(0.1), minibatch(), outputs(), ChainOptions())
