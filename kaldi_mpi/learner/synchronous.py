"""A phase in which all learners walk through the same global steps."""

from __future__ import annotations

import functools
from collections.abc import Generator

from kaldi_mpi.averaging import Synchronous, synchronous_step
from kaldi_mpi.learner.dataset import Dataset
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.schedule import Phase, Plan
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.learner.stopping import Stopping
from kaldi_mpi.learner.validate import IterationEnd, spread_of
from kaldi_mpi.loader import ChunkPlan
from kaldi_mpi.transport.world import World


def run_synchronous(
    phase: Phase,
    world: World,
    dataset: Dataset,
    chunks: ChunkPlan,
    plan: Plan,
    learner: LearnerStep,
    log: TrainingLog,
    stopping: Stopping,
) -> Generator[IterationEnd | None]:
    """Train from the learner's present step to the phase's end, after which all models are equal.

    Yields where an iteration ends, with the learner between two steps; and None where the learners have agreed to stop,
    or to write a checkpoint, in the middle of one.

    Args:
        chunks: which chunks make up each step, of `dataset.train` and all learners.
    """
    strategy, state = phase.strategy, learner.state
    assert isinstance(strategy, Synchronous)
    learner.begin_phase(strategy.rate_factor, phase.super_learner)
    batches = dataset.batches(
        dataset.train, state.flat.values.device, rank=world.rank, size=world.size, first_step=state.step, plan=chunks
    )
    with log.loader.watch(batches):
        if state.step in (phase.first_step, state.begun_at):
            strategy.begin(state.flat.to_numpy())
        while state.step < phase.end_step:
            batch = next(batches)
            learner.begin(batch, chunks.chunks_of_step(state.step))
            compute = functools.partial(learner.compute, batch)
            met = synchronous_step(strategy, learner, compute, batch.frames, batch.global_frames)
            state.step += 1
            state.frames += batch.global_frames
            log.show_progress(state.frames, last=state.step == plan.num_steps)
            spread = None
            if state.step == phase.end_step:
                own = state.flat.to_numpy()
                spread = spread_of(own, strategy.mean_model(own), world)
                state.flat.mix(state.flat.values, strategy.finish)
            agreed = met and stopping.agree()
            if plan.ends_iteration(state.step):
                own = state.flat.to_numpy()
                mean = strategy.mean_model(own)
                yield IterationEnd(mean, spread_of(own, mean, world) if spread is None else spread)
            elif agreed:
                yield None
