"""An affine transform whose backward pass keeps rows for the natural gradient in place of a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaldi_mpi.models.components.base import ComponentModule
from kaldi_mpi.models.natural_gradient import NaturalGradient


class Rows:
    """Rows of an affine or linear component, of all its calls in a minibatch, and their two preconditioners.

    nnet3 preconditions [x 1] (x, without a bias) and the derivatives at the output, each as one matrix over all calls
    (``consolidate-model-update``); the order of the rows does not matter.

    Args:
        rank_in, rank_out, update_period, num_samples_history: of the preconditioners.
        alpha: of both, or of input and output.
    """

    def __init__(
        self,
        rank_in: int,
        rank_out: int,
        update_period: int,
        num_samples_history: float,
        alpha: float | tuple[float, float],
    ) -> None:
        of_in, of_out = alpha if isinstance(alpha, tuple) else (alpha, alpha)
        self.input = NaturalGradient(rank_in, update_period, num_samples_history, of_in)
        self.output = NaturalGradient(rank_out, update_period, num_samples_history, of_out)
        self._kept: list[tuple[list[Tensor], Tensor]] = []

    def keep(self, x: Tensor | Sequence[Tensor], derivative: Tensor) -> None:
        """Add the rows of one call: (..., input_dim) and the loss's derivative at the output, (..., output_dim).

        Columns of x may come apart, as (..., D1), (..., D2) and so on; in each call in the same way.
        """
        parts = [x] if isinstance(x, Tensor) else x
        flat = [part.reshape(-1, part.shape[-1]) for part in parts]
        self._kept.append((flat, derivative.reshape(-1, derivative.shape[-1])))

    def drop(self) -> None:
        """Forget what was kept."""
        self._kept.clear()

    @torch.no_grad()
    def add_gradient(self, linear: Tensor, bias: Tensor | None) -> None:
        """Add the preconditioned gradient to `linear` (output_dim, input_dim) and `bias` (output_dim,)."""
        if not self._kept:
            return
        calls, self._kept = self._kept, []
        x = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*(x for x, _ in calls), strict=True)]
        derivative = torch.cat([d for _, d in calls]) if len(calls) > 1 else calls[0][1]
        rows = self.input.split(x, ones=bias is not None, against=derivative.shape[1])
        derivatives = self.output.split([derivative], against=linear.shape[1])
        gradient = rows.product(derivatives.x[0])
        if rows.w is not None:
            gradient.addmm_(gradient @ rows.w.t(), rows.w, alpha=-1)
        if derivatives.w is not None:
            gradient.addmm_(derivatives.w.t(), derivatives.w @ gradient, alpha=-1)
        factor = rows.factor * derivatives.factor
        linear.addcmul_(gradient[:, : linear.shape[1]], factor)
        if bias is not None:
            bias.addcmul_(gradient[:, -1], factor)

    def freeze(self, freeze: bool) -> None:
        self.input.frozen = self.output.frozen = freeze

    def state_dict(self) -> dict[str, Any]:
        return {"input": self.input.state_dict(), "output": self.output.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.input.load_state_dict(state["input"], device)
        self.output.load_state_dict(state["output"], device)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Rows, x: Tensor, linear: Tensor, bias: Tensor | None) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, linear)
        return functional.linear(x, linear, bias)

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        (derivative,) = derivatives
        x, linear = ctx.saved_tensors
        ctx.rows.keep(x, derivative)
        return None, derivative @ linear if ctx.needs_input_grad[1] else None, None, None


def kept(rows: Rows, x: Tensor, linear: Tensor, bias: Tensor | None) -> Tensor:
    """x linear' + bias, whose backward pass gives `rows` to keep and `linear` and `bias` no gradient."""
    output: Tensor = _Kept.apply(rows, x, linear, bias)  # type: ignore[no-untyped-call]
    return output


class RowTrained(ComponentModule):
    """A component whose `rows` are preconditioned; what makes them is the component's own."""

    rows: Rows

    def make_rows(self) -> Rows:
        """The preconditioners, by the component's settings."""
        raise NotImplementedError

    def trained_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weights (output_dim, columns) and bias, as `Rows.add_gradient` takes their gradients."""
        raise NotImplementedError

    def use_natural_gradient(self) -> None:
        self.rows = self.make_rows()
        self.natural_gradient = True

    def finish_gradient(self) -> None:
        if self.natural_gradient:
            linear, bias = self.trained_parameters()
            assert linear.grad is not None
            self.rows.add_gradient(linear.grad, None if bias is None else bias.grad)

    def freeze_natural_gradient(self, freeze: bool) -> None:
        if self.natural_gradient:
            self.rows.freeze(freeze)

    def training_state(self) -> dict[str, Any]:
        return self.rows.state_dict() if self.natural_gradient else {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        if self.natural_gradient:
            self.rows.load_state_dict(state, self.trained_parameters()[0].device)
