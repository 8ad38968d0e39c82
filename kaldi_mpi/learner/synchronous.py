"""A phase in which all learners walk through the same global steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kaldi_mpi.averaging import Step, Strategy
from kaldi_mpi.learner.evaluate import spread_of
from kaldi_mpi.learner.plan import Phase
from kaldi_mpi.loader import Minibatch

if TYPE_CHECKING:
    from kaldi_mpi.learner.loop import Learner


def run_synchronous(learner: Learner, phase: Phase) -> None:
    """Train from the learner's present step to the phase's end, after which all models are equal."""
    plan, world = learner.plan, learner.world
    with learner.loader.watch(
        learner.reading.feed(
            learner.data.train,
            learner.flat.values.device,
            rank=world.rank,
            size=world.size,
            first_step=learner.step,
        )
    ) as feed:
        if learner.step == phase.first_step:
            phase.strategy.begin(learner.flat.to_numpy())
        while learner.step < phase.end_step:
            _take(learner, phase, next(feed), feed.reader.plan.chunks_of_step(learner.step))
            last = learner.step == phase.end_step
            spread = None
            if last:
                own = learner.flat.to_numpy()
                spread = spread_of(own, phase.strategy.mean_model(own), world)
                learner.flat.mix(learner.flat.values, phase.strategy.finish)
            if plan.ends_iteration(learner.step):
                own = learner.flat.to_numpy()
                mean = phase.strategy.mean_model(own)
                learner.end_iteration(mean, spread_of(own, mean, world) if spread is None else spread, False)


def _take(learner: Learner, phase: Phase, minibatch: Minibatch[torch.Tensor], global_chunks: int) -> None:
    """One global step, which has `global_chunks` chunks over all learners."""
    strategy, flat, size = phase.strategy, learner.flat, learner.world.size
    step = Step(minibatch.step, minibatch.frames, minibatch.global_frames)
    learner.around.injector.begin()
    if _overrides(strategy, "start_step"):
        flat.read(flat.values, lambda w: strategy.start_step(w, step))
    learner.compute_gradients(minibatch)
    learner.around.injector.end()
    if phase.group is not None and phase.sum_in_group is not None:
        phase.sum_in_group(flat.gradients)
        flat.gradients /= phase.group.size
    elif size > 1 and _overrides(strategy, "combine_gradients"):
        flat.mix(flat.gradients, lambda g: strategy.combine_gradients(g, step))
    base = strategy.base(step)
    moved = None if base is None else flat.on_device(base)
    together = strategy.moves_together or phase.group is not None
    if minibatch.frames or together:
        chunks = global_chunks if together else len(minibatch.labels)
        rate = learner.rate.actual(learner.frames, size) * strategy.rate_factor
        learner.optimiser.step(rate, chunks / size, base=moved)
    elif moved is not None:
        flat.values.copy_(moved)
    if strategy.note(step) and flat.mix(flat.values, strategy.mix_parameters):
        learner.optimiser.forget()
    learner.step += 1
    learner.frames += step.global_frames
    learner.show_progress(learner.frames, last=learner.step == learner.plan.num_steps)


def _overrides(strategy: Strategy, hook: str) -> bool:
    """Whether the strategy does anything at a hook; if not, a GPU's parameters need not be copied for it."""
    return getattr(type(strategy), hook) is not getattr(Strategy, hook)
