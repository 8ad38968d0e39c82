"""What a minibatch's outputs are worth: the objective that is trained on, and the accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from kaldi_mpi.loader import Minibatch


def objective_of(kind: str, output: Tensor, batch: Minibatch[Tensor]) -> tuple[Tensor, Tensor | float]:
    """The objective of a minibatch, summed over its frames, and what its mean is taken over; both 0-dim.

    As ComputeObjectiveFunction of nnet3: ``linear`` is the sum of targets times outputs, over the sum of targets;
    ``quadratic`` minus half the squared difference of targets and outputs, over the number of frames.

    Args:
        kind: the output node's objective.
        output: (B, W, outputs).
    """
    if kind == "linear":
        return log_likelihood(output, batch), batch.weight
    there = labelled_rows(batch)
    targets = torch.zeros_like(output)
    targets.scatter_add_(2, _by_row(batch.labels).clamp_min(0), label_weights(batch).to(output.dtype))
    squares = (targets - output).square().sum(dim=2)
    return -0.5 * torch.where(there, squares, torch.zeros_like(squares)).sum(), there.sum()


def log_likelihood(output: Tensor, batch: Minibatch[Tensor]) -> Tensor:
    """The sum over all labels of weight times log-probability, as a scalar.

    Args:
        output: (B, W, pdfs) log-probabilities.
    """
    if batch.weights is None and batch.labels.dim() == 2:
        return -functional.nll_loss(
            output.reshape(-1, output.shape[2]), batch.labels.reshape(-1), ignore_index=-1, reduction="sum"
        )
    return (label_scores(output, batch) * label_weights(batch)).sum()


def label_scores(output: Tensor, batch: Minibatch[Tensor]) -> Tensor:
    """The log-probability of each label, (B, W, K); 0 where there is none."""
    labels = _by_row(batch.labels)
    scores = output.gather(2, labels.clamp_min(0))
    return torch.where(labels >= 0, scores, torch.zeros_like(scores))


def label_weights(batch: Minibatch[Tensor]) -> Tensor:
    """The weight of each label, (B, W, K) float32; 0 where there is none."""
    there = _by_row(batch.labels) >= 0
    if batch.weights is None:
        return there.to(torch.float32)
    weights = _by_row(batch.weights)
    return torch.where(there, weights, torch.zeros_like(weights))


def labelled_rows(batch: Minibatch[Tensor]) -> Tensor:
    """(B, W) bool: frames that have a label."""
    return (_by_row(batch.labels) >= 0).any(dim=2)


def right_weight(output: Tensor, batch: Minibatch[Tensor]) -> Tensor:
    """The weight of all rows whose most probable pdf-id is the one of most weight, as in nnet3-compute-prob."""
    weights = label_weights(batch)
    best = _by_row(batch.labels).gather(2, weights.argmax(dim=2, keepdim=True)).squeeze(2)
    return (weights.sum(dim=2, dtype=torch.float64) * (output.argmax(dim=2) == best)).sum()


def right_weight_by_class(output: Tensor, batch: Minibatch[Tensor]) -> Tensor:
    """The same by pdf-id, (2, pdfs) float64: of the rows that are right, and of all that should be it."""
    weights = label_weights(batch)
    best = _by_row(batch.labels).gather(2, weights.argmax(dim=2, keepdim=True)).squeeze(2).clamp_min(0)
    of_row = weights.sum(dim=2, dtype=torch.float64)
    sums = torch.zeros(2, output.shape[2], dtype=torch.float64, device=output.device)
    sums[0].index_add_(0, best.reshape(-1), (of_row * (output.argmax(dim=2) == best)).reshape(-1))
    sums[1].index_add_(0, best.reshape(-1), of_row.reshape(-1))
    return sums


def _by_row(values: Tensor) -> Tensor:
    return values if values.dim() == 3 else values.unsqueeze(2)
