"""Normalisation of rows, and of columns over a minibatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.config import Options
from kaldi_mpi.models.passes import batch_norm, batch_norm_backward

# 2^-66: nnet3's floor of the mean square in NormalizeComponent.
_NORM_FLOOR = 2.0**-66
# Of batch-norm's statistics, after each minibatch (nnet3-train's --batchnorm-stats-scale).
_STATISTICS_SCALE = 0.8


class Normalize(ComponentModule):
    """y = x target_rms / sqrt(mean(x^2)), over the columns of each block.

    Args:
        dim: columns of the input.
        block_dim: of a block; None: all are one.
        add_log_stddev: a further column a block has the log of its root mean square.
    """

    kind = "NormalizeComponent"

    def __init__(
        self, dim: int, target_rms: float = 1.0, block_dim: int | None = None, add_log_stddev: bool = False
    ) -> None:
        self.block_dim = dim if block_dim is None else block_dim
        if self.block_dim < 1 or dim % self.block_dim:
            raise ValueError(f"block-dim {self.block_dim} does not divide dim {dim}")
        super().__init__(dim, dim + (dim // self.block_dim if add_log_stddev else 0))
        self.target_rms, self.add_log_stddev = target_rms, add_log_stddev

    def forward(self, x: Tensor, call: Call) -> Tensor:
        blocks = x if self.block_dim == self.input_dim else x.unflatten(-1, (-1, self.block_dim))
        mean_square = blocks.square().mean(dim=-1, keepdim=True) / self.target_rms**2
        # Below the floor the derivative of the norm counts as 0, which is what clamping's is.
        factor = mean_square.clamp_min(_NORM_FLOOR).rsqrt()
        y = blocks * factor
        if self.add_log_stddev:
            y = torch.cat([y, self.target_rms_log() - factor.log()], dim=-1)
        return y if y.dim() == x.dim() else y.flatten(-2)

    def target_rms_log(self) -> float:
        return float(torch.tensor(self.target_rms).log())


class BatchNorm(ComponentModule):
    """z = target_rms (x - mean) / sqrt(variance + epsilon), by column of a block.

    In training mean and (biased) variance are those of the rows of the call; otherwise those that were kept. What is
    kept after each minibatch is 0.8 of the sums so far and of the minibatch's, so that it is about the mean over the
    last five (nnet3-train's --batchnorm-stats-scale). Mean and variance are kept rather than sums, so that they are
    numbers of the size of activations when learners average them; `count` stays with each learner.

    Attributes:
        block_dim: columns; a row of the input has one or several blocks, which all count.
        moments: (2 * block_dim,) float32, mean and variance. `FlatParameters` keeps it beside the parameters.
        count: of rows in it, 0-dim float64.
        pending: what the minibatch adds: sums of x and of x^2, and the number of rows; None: nothing.
    """

    kind = "BatchNormComponent"
    row_wise = False
    moments: Tensor
    count: Tensor

    def __init__(self, dim: int, block_dim: int | None = None, epsilon: float = 1e-3, target_rms: float = 1.0) -> None:
        super().__init__(dim, dim)
        self.block_dim = dim if block_dim is None else block_dim
        if self.block_dim < 1 or dim % self.block_dim:
            raise ValueError(f"block-dim {self.block_dim} does not divide dim {dim}")
        if epsilon <= 0 or target_rms <= 0:
            raise ValueError(f"epsilon {epsilon}, target-rms {target_rms}: both must be above 0")
        self.epsilon, self.target_rms = epsilon, target_rms
        self.register_buffer("moments", torch.zeros(2 * self.block_dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.pending: tuple[Tensor, int] | None = None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        flat = x.reshape(-1, self.block_dim)
        if self.mode.batch_statistics:
            z: Tensor = _OverRows.apply(flat, self, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
            return z.view(x.shape)
        mean, variance = self.moments.to(x.dtype).split(self.block_dim)
        scale = self.target_rms * (variance + self.epsilon).rsqrt()
        return ((flat - mean) * scale).view(x.shape)

    def _add(self, means: Tensor, rows: int) -> None:
        if self.pending is None:
            self.pending = means * rows, rows
        else:
            self.pending = self.pending[0] + means * rows, self.pending[1] + rows

    def take_change(self) -> Tensor:
        """How the minibatch changes `moments`, which stay as they are; `count` moves on."""
        if self.pending is None:
            return torch.zeros_like(self.moments)
        sums, rows = self.pending
        self.pending = None
        total = self.count + rows
        old, variance = self.moments.split(self.block_dim)
        of_x, of_squares = sums.split(self.block_dim)
        share = (self.count / total).to(sums.dtype)
        mean = share * old + of_x / total
        square = share * (variance + old * old) + of_squares / total
        changed = torch.cat([mean, (square - mean * mean).clamp_min(0.0)]).to(self.moments.dtype)
        self.count.copy_(total * _STATISTICS_SCALE)
        return changed - self.moments

    def take_sums(self) -> Tensor:
        """What has been collected since the last call: rows, sums of x and of x^2, (1 + 2 * block_dim,) float64."""
        sums, rows = self.pending if self.pending is not None else (torch.zeros_like(self.moments), 0)
        self.pending = None
        return torch.cat([torch.tensor([rows], dtype=torch.float64), sums.double().cpu()])

    def set_sums(self, sums: Tensor) -> None:
        """Take mean, variance and count of such sums; nothing changes if there are no rows."""
        rows = float(sums[0])
        if rows > 0:
            mean, square = (sums[1:] / rows).split(self.block_dim)
            self.moments.copy_(torch.cat([mean, (square - mean * mean).clamp_min(0.0)]))
            self.count.fill_(rows)


class _OverRows(torch.autograd.Function):
    """`BatchNorm` by the rows' own mean and variance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: BatchNorm, trains: bool) -> Tensor:
        z, mean, mean_square, scale = batch_norm(x.contiguous(), module.epsilon, module.target_rms)
        if module.mode.collect or (module.mode.store and trains):
            module._add(torch.cat([mean, mean_square]), len(x))
        ctx.target_rms = module.target_rms
        ctx.save_for_backward(z, scale)
        return z

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        z, scale = ctx.saved_tensors
        return batch_norm_backward(derivatives[0], z, scale, ctx.target_rms), None, None


def _normalize(options: Options, init: Initializer) -> Normalize:
    dim = options.integer("dim", -1)
    dim = dim if dim > 0 else options.positive("input-dim")
    block_dim = options.integer("block-dim", dim)
    return Normalize(dim, options.number("target-rms", 1.0), block_dim, options.flag("add-log-stddev", False))


def _batch_norm(options: Options, init: Initializer) -> BatchNorm:
    dim = options.positive("dim")
    block_dim = options.integer("block-dim", dim)
    component = BatchNorm(dim, block_dim, options.number("epsilon", 1e-3), options.number("target-rms", 1.0))
    component.attributes["TestMode"] = options.flag("test-mode", False)
    return component


MAKERS = {Normalize.kind: _normalize, BatchNorm.kind: _batch_norm}
