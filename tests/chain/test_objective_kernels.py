"""The Triton kernels of denominator and numerators, through Triton's interpreter, against PyTorch's operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kaldi_mpi.chain import denominator, device, numerator
from kaldi_mpi.chain.denominator_graph import DenominatorGraph, denominator_graph
from kaldi_mpi.chain.denominator_torch import forward_backward, graph_tensors
from kaldi_mpi.chain.numerator_torch import sum_paths
from kaldi_mpi.formats.fst import Fst
from tests.chain.graphs import random_cycles, random_denominator, random_layers, random_outputs, seeds
from tests.chain.test_numerator import prepared
from tests.paths import REPO

CPU = torch.device("cpu")
# The kernels sum in another order, in float32; occupations are at most 1, log-probabilities grow with the frames.
ROUNDING = 5e-6


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1", "tests/conftest.py sets it before anything imports Triton"
    pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module")
def of_denominator(_interpreter: None) -> ModuleType:
    from kaldi_mpi.chain import denominator_kernels

    return denominator_kernels


@pytest.fixture(scope="module")
def of_numerator(_interpreter: None) -> ModuleType:
    from kaldi_mpi.chain import numerator_kernels

    return numerator_kernels


def compare(kernels: ModuleType, graph: DenominatorGraph, outputs: Tensor, leaky: float, checked: int) -> None:
    found, wanted = torch.empty_like(outputs), torch.empty_like(outputs, dtype=torch.float64)
    arranged, on_cpu = kernels.arrange(graph, CPU), graph_tensors(graph, CPU, torch.float64)
    ours = kernels.forward_backward(arranged, outputs, leaky, found, -1.5, checked)
    theirs = forward_backward(on_cpu, outputs.double(), leaky, wanted, -1.5, checked)
    assert (ours.log_probs - theirs.log_probs).abs().max() <= ROUNDING * outputs.shape[1]
    assert (found - wanted).abs().max() <= ROUNDING
    for sums in (ours.state_sums, ours.pdf_sums):
        assert sums.shape == (checked, len(outputs)) and (sums - 1.0).abs().max() <= 1e-5
    alone = kernels.forward_backward(arranged, outputs, leaky, None, 1.0)
    assert torch.equal(alone.log_probs, ours.log_probs) and alone.state_sums is None


@given(seeds, st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1e-5, 0.1, 0.999]))
@settings(max_examples=8, deadline=None)
def test_denominator(
    of_denominator: ModuleType, seed: int, states: int, sequences: int, frames: int, leaky: float
) -> None:
    graph = denominator_graph(random_denominator(seed, states, 7), 7)
    compare(of_denominator, graph, random_outputs(seed, sequences, frames, 7, scale=10.0).float(), leaky, frames)


def test_denominator_of_rows_of_any_length(of_denominator: ModuleType) -> None:
    """More states and pdfs than a tile has, some without arcs, and rows of several tiles."""
    states, pdfs = 2500, 1500
    generator = np.random.default_rng(4)
    degrees = np.full(states, 2)
    degrees[7], degrees[11] = 2400, 1024
    ends = np.concatenate([generator.permutation(states)[:degree] for degree in degrees])
    ends[np.cumsum(degrees) - 1] = 3  # a row of 2500 arcs into state 3
    labels = (1 + (generator.integers(1, 900, len(ends)) + ends) % 1100).astype(np.int32)
    graph = denominator_graph(
        Fst(
            0, np.full(states, np.inf, np.float32), np.cumsum([0, *degrees]), labels, labels,
            generator.uniform(0.5, 3.0, len(ends)).astype(np.float32), ends.astype(np.int32),
        ),
        pdfs,
    )  # fmt: skip
    assert np.bincount(graph.arc_groups).max() < len(ends) and (np.diff(graph.first_group) == 0).any()
    compare(of_denominator, graph, random_outputs(1, 2, 3, pdfs).float(), 0.1, 2)


def test_denominator_limits_outputs(of_denominator: ModuleType) -> None:
    graph = denominator_graph(random_denominator(3, 12, 7), 7)
    outputs = random_outputs(3, 2, 4, 7, scale=40.0).float()
    outputs[0, 1, 2], outputs[1, 2, 3], outputs[1, 3, 4] = float("nan"), float("inf"), -float("inf")
    compare(of_denominator, graph, outputs, 0.1, 4)


@given(seeds, st.integers(1, 4), st.integers(1, 3), st.booleans())
@settings(max_examples=12, deadline=None)
def test_numerators(of_numerator: ModuleType, seed: int, frames: int, sequences: int, cyclic: bool) -> None:
    fsts = [
        random_cycles(seed + n, 4, 5) if cyclic else random_layers(seed + n, frames, 5) for n in range(sequences)
    ]  # fmt: skip
    arcs = prepared(fsts, frames, cyclic).on(CPU)
    scores = random_outputs(seed, arcs.num_entries, scale=20.0).float()
    for ours, theirs in zip(of_numerator.sum_paths(arcs, scores, True), sum_paths(arcs, scores, True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-7)
    assert of_numerator.sum_paths(arcs, scores, False)[1] is None


def test_numerators_of_more_states_than_lanes(of_numerator: ModuleType) -> None:
    for cyclic in (False, True):
        fst = random_cycles(3, 300, 5) if cyclic else random_layers(3, 3, 5, width=600)
        assert len(fst.finals) > 2 * of_numerator.LANES
        arcs = prepared([fst], 3, cyclic).on(CPU)
        scores = random_outputs(3, arcs.num_entries).float()
        for ours, theirs in zip(of_numerator.sum_paths(arcs, scores, True), sum_paths(arcs, scores, True), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-7)


@pytest.mark.parametrize("what", [float("nan"), -float("inf")], ids=str)
def test_numerators_without_a_path_or_of_nan(of_numerator: ModuleType, what: float) -> None:
    for cyclic in (False, True):
        fsts = [random_cycles(n, 4, 5) if cyclic else random_layers(n, 3, 5) for n in range(2)]
        numerators = prepared(fsts, 3, cyclic)
        arcs, scores = numerators.on(CPU), random_outputs(3, len(numerators.entries)).float()
        scores[: numerators.first_entry[1]] = what
        ours, theirs = of_numerator.sum_paths(arcs, scores, True), sum_paths(arcs, scores, True)
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
        torch.testing.assert_close(ours[1], theirs[1], equal_nan=True, rtol=1e-6, atol=1e-7)
        assert not torch.isfinite(ours[0][0]) and torch.isfinite(ours[0][1])


@pytest.mark.parametrize("part", [denominator, numerator])
def test_a_trial_finds_what_is_wrong(
    part: ModuleType, of_denominator: ModuleType, of_numerator: ModuleType, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    kernels = of_denominator if part is denominator else of_numerator
    name = "forward_backward" if part is denominator else "sum_paths"
    assert device.try_kernels(CPU, kernels, part.trial) is kernels
    assert not caplog.records
    right = getattr(kernels, name)

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        if part is numerator:
            return found[0] + 0.01, found[1]
        arguments[3].mul_(1.01)
        return found

    monkeypatch.setattr(kernels, name, wrong)
    assert device.try_kernels(CPU, kernels, part.trial) is None
    what = part.__name__.rpartition(".")[2]
    assert f"{what} on cpu by PyTorch's operations, several times slower: Triton's kernels cannot" in caplog.text
    assert "results differ by 0.0" in caplog.text

    def unfit(*arguments: Any) -> Any:
        raise RuntimeError("a compiler's long tale\nno such target")

    monkeypatch.setattr(kernels, name, unfit)
    assert device.try_kernels(CPU, kernels, part.trial) is None
    assert caplog.messages[-1].endswith("cannot be used: no such target")


def test_a_cpu_has_none() -> None:
    assert device.kernels_for(CPU, denominator.KERNELS, denominator.trial) is None


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int, tmp_path: Path) -> None:
    """To machine code, by the compiler that Triton brings; that needs no GPU, but a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chain.compile_kernels", str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["_forward", "_backward", "_layered", "_cyclic"]
