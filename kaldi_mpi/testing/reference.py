"""Every strategy again, in float64, all learners in one process: the yardstick for the real ones.

Nothing here shares code with the strategies or the optimiser; each function is its rule written down as
plainly as NumPy allows. Tests run the real learners under mpiexec and compare with these.

The problem is given as ``gradient(w, learner, step) -> (g, frames)``: the gradient of the loss summed over
the frames of that learner's minibatch at parameters w, and the number of those frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Gradient = Callable[[Vector, int, int], tuple[Vector, int]]


def kaldi_step(
    delta: Vector,
    gradient: Vector,
    rate: float,
    momentum: float,
    max_change: Sequence[tuple[slice, float]],
    max_param_change: float,
) -> tuple[Vector, Vector]:
    """One step of Kaldi's optimiser: returns the change to add to the parameters and the next delta.

    ``nnet3-train`` adds the gradient step to a running `delta`, applies (1 - momentum) times it within the
    limits of each component and of the whole, and keeps momentum times it.

    Args:
        delta: (P,) running sum.
        gradient: (P,) of the loss, which falls.
        rate: actual learning rate.
        momentum: in [0, 1).
        max_change: for each component the slice of its parameters and the largest norm of its change.
        max_param_change: the largest norm of the whole change (0: no limit).
    """
    delta = delta - rate * gradient
    change = (1 - momentum) * delta
    for where, limit in max_change:
        norm = float(np.linalg.norm(change[where]))
        if limit > 0 and norm > limit:
            change[where] *= limit / norm
    norm = float(np.linalg.norm(change))
    if max_param_change > 0 and norm > max_param_change:
        change *= max_param_change / norm
    return change, momentum * delta


def allreduce(
    start: Vector,
    gradient: Gradient,
    num_learners: int,
    rates: Sequence[float],
    momentum: float = 0.0,
    max_change: Sequence[tuple[slice, float]] = (),
    max_param_change: float = 0.0,
) -> Vector:
    """One model that is trained on the N-fold minibatch, which is what ``allreduce`` must equal.

    Args:
        start: (P,) initial parameters.
        gradient: the problem.
        num_learners: N.
        rates: the effective learning rate of each step.
        momentum, max_change, max_param_change: as in `kaldi_step`.
    """
    w, delta = start.copy(), np.zeros_like(start)
    for step, rate in enumerate(rates):
        total = sum((gradient(w, i, step)[0] for i in range(num_learners)), np.zeros_like(w))
        change, delta = kaldi_step(delta, total, rate, momentum, max_change, max_param_change)
        w = w + change
    return w


def periodic(
    start: Vector,
    gradient: Gradient,
    num_learners: int,
    rates: Sequence[float],
    frames_per_average: int,
    momentum: float = 0.0,
    max_change: Sequence[tuple[slice, float]] = (),
    max_param_change: float = 0.0,
) -> Vector:
    """N models trained apart with N times the rate, averaged by frames each `frames_per_average` frames.

    Args: as in `allreduce`; `frames_per_average` counts over all learners.
    """
    models = [start.copy() for _ in range(num_learners)]
    deltas = [np.zeros_like(start) for _ in range(num_learners)]
    seen = [0] * num_learners

    def average() -> None:
        mean = sum((n * w for n, w in zip(seen, models, strict=True)), np.zeros_like(start)) / sum(seen)
        for i in range(num_learners):
            models[i], seen[i] = mean.copy(), 0

    for step, rate in enumerate(rates):
        for i in range(num_learners):
            g, frames = gradient(models[i], i, step)
            if frames:
                change, deltas[i] = kaldi_step(
                    deltas[i], g, num_learners * rate, momentum, max_change, max_param_change
                )
                models[i] = models[i] + change
            seen[i] += frames
        if sum(seen) >= frames_per_average:
            average()
    if sum(seen):
        average()
    return models[0]


def bmuf(
    start: Vector,
    gradient: Gradient,
    num_learners: int,
    rates: Sequence[float],
    frames_per_average: int,
    block_momentum: float | None = None,
    block_learning_rate: float = 1.0,
    nesterov: bool = False,
    reset_momentum: bool = True,
    momentum: float = 0.0,
    max_change: Sequence[tuple[slice, float]] = (),
    max_param_change: float = 0.0,
) -> Vector:
    """As `periodic`, but with equal weights, and the mean is followed with block momentum.

    Args: as in `periodic`; `block_momentum` None: 1 - 1/N. Learners use (1 - block_momentum) N times the rate.
    """
    eta = 1 - 1 / num_learners if block_momentum is None else block_momentum
    models = [start.copy() for _ in range(num_learners)]
    deltas = [np.zeros_like(start) for _ in range(num_learners)]
    centre, block_delta, block_start, seen = start.copy(), np.zeros_like(start), start.copy(), 0
    for step, rate in enumerate(rates):
        for i in range(num_learners):
            g, frames = gradient(models[i], i, step)
            seen += frames
            if frames:
                actual = (1 - eta) * num_learners * rate
                change, deltas[i] = kaldi_step(deltas[i], g, actual, momentum, max_change, max_param_change)
                models[i] = models[i] + change
        if seen and (seen >= frames_per_average or step == len(rates) - 1):
            block_delta = eta * block_delta + block_learning_rate * (
                sum(models, np.zeros_like(start)) / num_learners - block_start
            )
            centre = centre + block_delta
            block_start = centre + eta * block_delta if nesterov else centre
            models, seen = [block_start.copy() for _ in models], 0
            if reset_momentum:
                deltas = [np.zeros_like(start) for _ in models]
    return centre


def delay1(
    start: Vector,
    gradient: Gradient,
    num_learners: int,
    rates: Sequence[float],
    momentum: float = 0.0,
    max_change: Sequence[tuple[slice, float]] = (),
    max_param_change: float = 0.0,
) -> Vector:
    """The mean of the models and the gradient at each own model, at the same time; then the step from the mean."""
    models = [start.copy() for _ in range(num_learners)]
    deltas = [np.zeros_like(start) for _ in range(num_learners)]
    for step, rate in enumerate(rates):
        mean = sum(models, np.zeros_like(start)) / num_learners
        for i, w in enumerate(models):
            g, frames = gradient(w, i, step)
            models[i] = mean.copy()
            if frames:
                change, deltas[i] = kaldi_step(
                    deltas[i], g, num_learners * rate, momentum, max_change, max_param_change
                )
                models[i] = mean + change
    return sum(models, np.zeros_like(start)) / num_learners
