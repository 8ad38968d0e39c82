"""The passes in C against what they stand for, written in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kaldi_mpi.models import passes

# Around a block of 32 rows and a tile of 1024 columns.
SHAPES = [(1, 1), (31, 3), (33, 5), (64, 1024), (70, 1025), (5, 2100)]


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours.double(), wanted.double(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_forward_and_backward(shape: tuple[int, int]) -> None:
    x, derivative, rms = matrix(shape, 1), matrix(shape, 2), 0.7
    z, mean, mean_square, scale = passes.batch_norm(x, 1e-3, rms)
    exact = x.double().requires_grad_()
    variance, wanted_mean = torch.var_mean(exact, dim=0, correction=0)
    wanted = (exact - wanted_mean) * rms / (variance + 1e-3).sqrt()
    close(mean, wanted_mean)
    close(mean_square, exact.square().mean(0))
    close(scale, rms / (variance + 1e-3).sqrt())
    close(z, wanted)
    wanted.backward(derivative.double())
    assert exact.grad is not None
    error = (passes.batch_norm_backward(derivative, z, scale, rms).double() - exact.grad).abs().max()
    assert error <= 1e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sums", [False, True])
def test_relu(shape: tuple[int, int], sums: bool) -> None:
    x = matrix(shape, 3)
    x[0, 0] = 0.0
    y, kept = passes.relu(x, sums)
    assert torch.equal(y, torch.relu(x))
    assert (kept is not None) == sums
    if kept is not None:
        close(kept[0], torch.relu(x).double().sum(0))
        close(kept[1], (x > 0).double().sum(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("squares", [False, True])
def test_relu_backward(shape: tuple[int, int], repaired: bool, squares: bool) -> None:
    y, derivative = torch.relu(matrix(shape, 4)), matrix(shape, 5)
    add = matrix((1, shape[1]), 6)[0] if repaired else None
    out, kept = passes.relu_backward(derivative, y, add, squares)
    assert torch.equal(out, torch.where(y > 0, derivative, 0.0) + (0.0 if add is None else add))
    assert (kept is not None) == squares
    if kept is not None:
        close(kept / len(y), derivative.double().square().mean(0))


def test_what_is_not_a_number_stays() -> None:
    x = torch.tensor([[float("nan"), -1.0, float("inf")]])
    for sums in (False, True):
        assert torch.isnan(passes.relu(x, sums)[0]).tolist() == [[True, False, False]]
    back, _ = passes.relu_backward(x, torch.ones(1, 3), None, squares=True)
    assert torch.equal(torch.isnan(back), torch.isnan(x))
    assert torch.isnan(passes.batch_norm(x.repeat(3, 1), 1e-3, 1.0)[0][:, 0]).all()


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.t().contiguous().t()], ids=["float64", "columns"])
def test_other_tensors_get_the_same(change: object) -> None:
    """float64, and rows that do not lie one after another, take PyTorch's way."""
    assert callable(change)
    x, derivative = matrix((40, 6), 7), matrix((40, 6), 8)
    for ours, others in zip(passes.batch_norm(x, 1e-3, 1.0), passes.batch_norm(change(x), 1e-3, 1.0), strict=True):
        close(ours, others)
    z, _, _, scale = passes.batch_norm(x, 1e-3, 1.0)
    close(
        passes.batch_norm_backward(derivative, z, scale, 1.0),
        passes.batch_norm_backward(change(derivative), change(z), scale.to(change(z).dtype), 1.0),
    )
    (y, of_y), (other, of_other) = passes.relu(x, True), passes.relu(change(x), True)
    assert of_y is not None and of_other is not None
    close(y, other)
    close(torch.stack(of_y), torch.stack(of_other))
    back, squares = passes.relu_backward(derivative, y, scale, True)
    back_other, squares_other = passes.relu_backward(change(derivative), change(y), scale.to(change(y).dtype), True)
    assert squares is not None and squares_other is not None
    close(back, back_other)
    close(squares, squares_other)
