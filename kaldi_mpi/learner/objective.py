"""What a minibatch's outputs are worth: the objective that is trained on, and the accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from kaldi_mpi.learner.scores import ChainScore, Score, Term
from kaldi_mpi.loader import Minibatch
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.transport.world import World


@dataclasses.dataclass(frozen=True)
class DerivativeTimes:
    """Times, relative to a chunk's first and last label, outside which there are no derivatives.

    As ``train_rnn.py`` derives nnet3-train's ``--optimization.min-deriv-time`` and ``max-deriv-time-relative`` from
    ``--trainer.deriv-truncate-margin``.
    """

    first: int | None = None
    last_relative: int | None = None

    @classmethod
    def of_margin(cls, margin: int | None, left_context: int, right_context: int) -> DerivativeTimes:
        """Those of a network with these contexts; None: derivatives go everywhere."""
        return cls() if margin is None else cls(-(margin + left_context), margin + right_context)

    def within(self, width: int) -> tuple[int | None, int | None]:
        """The first and the last time with derivatives in a chunk of `width` labelled frames."""
        return self.first, None if self.last_relative is None else width - 1 + self.last_relative


class Objective(Protocol):
    """What a network is trained for."""

    def train(
        self, model: AcousticModel, feats: Tensor, batch: Minibatch[Tensor], derivatives: DerivativeTimes
    ) -> Mapping[str, Term]:
        """Add the gradients of a minibatch that has frames, of its loss summed over them, to the model's.

        Args:
            feats: the minibatch's features, as the network shall have them.

        Returns:
            what each output came to, the main one first.
        """

    def forward(self, model: AcousticModel, batch: Minibatch[Tensor]) -> None:
        """Compute all outputs that `train` computes, for the sake of statistics; without gradient."""

    def score(
        self, model: AcousticModel, batches: Iterable[Minibatch[Tensor]], world: World, by_class: bool = False
    ) -> Score | ChainScore:
        """The mean objective over all learners' `batches`, the same on all; without gradient.

        Args:
            by_class: whether the accuracy of each class is wanted, too.
        """


class FrameObjective:
    """Cross-entropy of labelled frames, or the quadratic objective of a raw network's targets."""

    def train(
        self, model: AcousticModel, feats: Tensor, batch: Minibatch[Tensor], derivatives: DerivativeTimes
    ) -> Mapping[str, Term]:
        """See `Objective`."""
        width = batch.shape.width
        first, last = derivatives.within(width)
        output = model(feats, batch.first, width, ivectors=batch.ivectors, min_deriv_time=first, max_deriv_time=last)
        objective, weight = objective_of(model.objective, output, batch)
        (-objective).backward()
        return {"output": Term(objective.detach(), weight)}

    @torch.no_grad()
    def forward(self, model: AcousticModel, batch: Minibatch[Tensor]) -> None:
        """See `Objective`."""
        model(batch.feats, batch.first, batch.shape.width, ivectors=batch.ivectors)

    @torch.no_grad()
    def score(
        self, model: AcousticModel, batches: Iterable[Minibatch[Tensor]], world: World, by_class: bool = False
    ) -> Score:
        """See `Objective`; where it is linear, with the accuracy. Labels count by their weights."""
        linear = model.objective == "linear"
        classes = model.output_dim if by_class and linear else 0
        sums = np.zeros(3 + 2 * classes)
        for batch in batches:
            output = model(batch.feats, batch.first, batch.shape.width, ivectors=batch.ivectors)
            if not linear:
                objective, count = objective_of(model.objective, output.double(), batch)
                sums[0] += objective.item()
                sums[2] += float(count)
                continue
            weights = label_weights(batch).double()
            sums[0] += (label_scores(output, batch).double() * weights).sum().item()
            sums[1] += right_weight(output, batch).item()
            sums[2] += batch.weight
            if classes:
                sums[3:] += right_weight_by_class(output, batch).cpu().numpy().reshape(-1)
        sums = world.sum_float64(sums)
        mean, correct, total = sums[:3].tolist()
        if not linear:
            return Score(mean / max(total, 1e-20), None, round(total))
        right, weight = sums[3:].reshape(2, classes)
        by_pdf = tuple(float(r / w) if w else -1.0 for r, w in zip(right, weight, strict=True)) if by_class else None
        return Score(mean / max(total, 1e-20), correct / max(total, 1e-20), round(total), by_pdf)


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
