"""The final combination: the mean of the last models, of as many as give the best objective (nnet3-combine).

    mean <- (i-1)/i mean + 1/i M_i          M_1, M_2, ... newest first, in float32; statistics alike
    objective at i = 1, wherever (i-2) mod q = q-1, and at i = k;       q = ceil(k / evaluations)

The best of the means so evaluated wins, the earlier one at ties.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from kaldi_mpi.models import AcousticModel
from kaldi_mpi.models.components import BatchNorm


@dataclasses.dataclass(frozen=True)
class Combined:
    """What came out.

    Attributes:
        count: of models in the mean.
        first, best: the objective of the newest model alone, and that of the mean.
    """

    count: int
    first: float
    best: float


def models_to_combine(num_iterations: int, iterations_per_epoch: float, most: int) -> list[int]:
    """The iterations whose models the final combination may take, ascending (``get_model_combine_iters``).

    They are `most`, if half of all are as many; where half an epoch has more, `most` or a few more of those, evenly
    spaced.
    """
    wanted = min(int(iterations_per_epoch / 2) + 1, num_iterations // 2)
    if wanted > most:
        found = set(range(num_iterations - wanted + 1, num_iterations + 1, wanted // most))
    else:
        found = set(range(num_iterations - min(most, num_iterations // 2) + 1, num_iterations + 1))
    return sorted(found | {num_iterations})


def tensors_of(model: AcousticModel) -> list[Tensor]:
    """What is averaged: parameters, activation statistics, and batch-norm's moments."""
    parts: list[Tensor] = []
    for module in model.by_name.values():
        parts += [parameter.data for parameter in module.parameters()]
        parts += module.statistics()
        if isinstance(module, BatchNorm):
            parts.append(module.moments)
    return parts


def add_to_mean(mean: AcousticModel, model: AcousticModel, count: int) -> None:
    """Make `mean`, of `count` - 1 models, that of `count` with `model`, in place."""
    for average, part in zip(tensors_of(mean), tensors_of(model), strict=True):
        if average.shape == part.shape:  # a model that has stored nothing has no sums to add
            average.mul_((count - 1.0) / count).add_(part.to(average.dtype), alpha=1.0 / count)


def combine(
    read: Sequence[Callable[[], AcousticModel]],
    score: Callable[[AcousticModel], float],
    max_evaluations: int,
    tell: Callable[[str], None],
) -> tuple[AcousticModel, Combined]:
    """The best mean of the newest models.

    Args:
        read: gives the models, newest first; each is called once, and all models are of one network.
        score: the objective of a model per frame; a NaN or an infinity counts as minus infinity.
        max_evaluations: how often `score` may be called, beside the first call, for about so many models.
        tell: is given nnet3-combine's lines.
    """

    def objective(model: AcousticModel) -> float:
        value = score(model)
        return value if math.isfinite(value) else -math.inf

    mean = read[0]()
    first = best = objective(mean)
    tell(f"objective function using the last model is {first:.6g}")
    count, winner = 1, [part.clone() for part in tensors_of(mean)]
    step = -(-len(read) // max_evaluations)
    for number, read_next in enumerate(read[1:], start=1):
        add_to_mean(mean, read_next(), number + 1)
        if (number - 1) % step == step - 1 or number == len(read) - 1:
            value = objective(mean)
            tell(f"Combining last {number + 1} models, objective function is {value:.6g}")
            if value > best:
                count, best, winner = number + 1, value, [part.clone() for part in tensors_of(mean)]
    tell(f"Combining {count} nnets, objective function changed from {first:.6g} to {best:.6g}")
    for part, own in zip(tensors_of(mean), winner, strict=True):
        part.copy_(own)
    return mean, Combined(count, first, best)
