"""The Triton kernels of the LSTM's step, through Triton's interpreter, against PyTorch's operations."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kaldi_mpi.models import lstm_device
from kaldi_mpi.models.lstm import lstm, small_layer
from kaldi_mpi.models.lstm_backward import LstmSettings
from kaldi_mpi.models.lstm_device import Means, means_for, try_means

CPU = torch.device("cpu")
CELL, IN = 6, 4


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    assert os.environ["TRITON_INTERPRET"] == "1", "tests/conftest.py sets it before anything imports Triton"
    pytest.importorskip("triton", reason="Triton is not installed")
    from kaldi_mpi.models import lstm_kernels

    return lstm_kernels


class Keeper:
    """Repairs some units, and keeps no rows."""

    def __init__(self) -> None:
        self.amounts = torch.linspace(-0.1, 0.1, 5 * CELL).view(5, CELL)

    def repair(self) -> Tensor:
        return self.amounts

    def store(self, values: Tensor, derivatives: Tensor, rows: int) -> None:
        self.stored = values, derivatives, rows

    def keep_gates(self, x: Tensor, derivative: Tensor) -> bool:
        return False

    def keep_projection(self, m: Tensor, derivative: Tensor) -> bool:
        return False


def results(settings: LstmSettings, projection: int, masked: bool, repaired: bool, low: int | None) -> list[Tensor]:
    """Output, and gradients of everything."""
    generator = torch.Generator().manual_seed(3)
    frames, batch = 7, 5
    shapes: dict[str, tuple[int, ...]] = {
        "x": (frames, batch, IN), "w_all": (4 * CELL, IN + (projection or CELL)), "bias": (4 * CELL,),
        "peepholes": (3, CELL),
    }  # fmt: skip
    more: dict[str, Any] = {}
    if projection:
        shapes |= {"w_rp": (projection + 1, CELL), "b_rp": (projection + 1,)}
    values: dict[str, Any] = {
        name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()
    }
    if masked:
        more["mask"] = (torch.rand(frames, batch, 3, generator=generator) < 0.7).float() / 0.7
    if repaired:
        more["keeper"] = Keeper()
    output = lstm(**values, settings=settings, first=-2, min_deriv_time=low, **more)
    weights = torch.randn(output.shape, generator=generator)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), list(values.values()))]


@pytest.mark.parametrize("delay", [-1, -2, 3])
@pytest.mark.parametrize("projection", [0, 3])
@pytest.mark.parametrize(("masked", "repaired", "low"), [(False, False, None), (True, False, -1), (True, True, None)])
@pytest.mark.parametrize("limits", [(30.0, 15.0), (0.7, 0.4), (0.0, 0.0)], ids=str)
def test_kernels_give_what_pytorch_gives(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, delay: int, projection: int, masked: bool,
    repaired: bool, low: int | None, limits: tuple[float, float],
) -> None:  # fmt: skip
    settings = LstmSettings(delay, 0.9, limits[0], limits[1], zeroing_interval=3)
    wanted = results(settings, projection, masked, repaired, low)
    monkeypatch.setitem(lstm_device._MEANS, CPU, Means(kernels))
    for ours, theirs in zip(results(settings, projection, masked, repaired, low), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def tried(kernels: ModuleType, caplog: pytest.LogCaptureFixture) -> str:
    """What is said of the kernels as they are; they are used if nothing is."""
    caplog.clear()
    wanted = small_layer(CPU)
    try_means(CPU, Means(kernels), small_layer, wanted, kernels.ERRORS, "by PyTorch's operations")
    said = [record.getMessage() for record in caplog.records]
    assert means_for(CPU, small_layer) == (Means() if said else Means(kernels))
    lstm_device._MEANS[CPU] = Means()
    return "".join(said)


def test_a_trial_finds_what_is_wrong(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(lstm_device._MEANS, CPU, Means())
    assert tried(kernels, caplog) == ""

    def limited_wrongly(*arguments: Any) -> Tensor:
        return limit(*arguments) * 0.9

    limit = kernels.limit
    monkeypatch.setattr(kernels, "limit", limited_wrongly)
    assert "LSTM on cpu by PyTorch's operations: Triton's kernels cannot be used: results differ by" in tried(
        kernels, caplog
    )

    def unfit(*arguments: Any) -> Tensor:
        raise RuntimeError("a compiler's long tale\nno such target")

    monkeypatch.setattr(kernels, "forward", unfit)
    assert tried(kernels, caplog).endswith("Triton's kernels cannot be used: no such target")


def test_a_cpu_has_none_of_its_own() -> None:
    assert means_for(CPU, small_layer) == Means()
