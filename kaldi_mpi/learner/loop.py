"""The training loop of one persistent learner.

A learner keeps its model, its optimiser and its place in the data from the first minibatch to the last.
All learners walk through the same global steps; what passes between them, and when, is the strategy's
business. An iteration is the stretch between two validations; its number names log files, as in Kaldi.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from kaldi_mpi.averaging import Step, Strategy
from kaldi_mpi.learner.evaluate import Pass, Score, compute_prob, with_parameters
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.schedule import ExponentialRate
from kaldi_mpi.loader import ChunkShape, Corpus, Minibatch, MinibatchReader
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.report.iteration import IterationLogs
from kaldi_mpi.report.log import logger
from kaldi_mpi.report.progress import Progress
from kaldi_mpi.transport.world import World


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to train, in steps that are the same on every rank.

    Attributes:
        num_steps: global steps (one minibatch a learner) of the whole training.
        steps_per_iteration: between two validations.
        num_epochs: what `num_steps` amount to.
        chunks_per_minibatch: chunks a learner and step.
        min_deriv_time, max_deriv_time: times, relative to a chunk's first label, outside which there are no
            derivatives (Kaldi's ``--optimization.min-deriv-time`` and ``max-deriv-time-relative``).
    """

    num_steps: int
    steps_per_iteration: int
    num_epochs: float
    chunks_per_minibatch: int
    min_deriv_time: int | None = None
    max_deriv_time: int | None = None


class Learner:
    """One rank's training.

    Args:
        world: the learners.
        model: the same on all ranks at the start; on this learner's device.
        strategy, optimiser, rate: what to do with gradients and parameters.
        train, valid, diagnostic: utterances to train on, held out, and of the training set to watch.
        shape: how chunks are cut.
        plan: how long.
        seed: order of the data.
        logs: where Kaldi's scripts look for this learner's objective and the validations (rank 0's).
        progress: rank 0's bar, None elsewhere.
        on_iteration: called after each validation with the iteration's number; saves checkpoints.
        loader_threads: reading threads.
    """

    def __init__(
        self,
        world: World,
        model: AcousticModel,
        flat: FlatParameters,
        strategy: Strategy,
        optimiser: KaldiSgd,
        rate: ExponentialRate,
        train: Corpus,
        valid: Corpus,
        diagnostic: Corpus,
        shape: ChunkShape,
        plan: Plan,
        *,
        seed: int,
        logs: IterationLogs,
        progress: Progress | None = None,
        on_iteration: Callable[[int], None] | None = None,
        loader_threads: int = 1,
    ) -> None:
        self.world, self.model, self.flat = world, model, flat
        self.strategy, self.optimiser, self.rate = strategy, optimiser, rate
        self.train, self.valid, self.diagnostic = train, valid, diagnostic
        self.shape, self.plan = shape, plan
        self.step = 0  # the next one to take
        self.frames = 0  # trained on, over all learners
        self.scores: list[Score] = []  # of the held-out set, one each iteration
        self._seed, self._logs, self._progress = seed, logs, progress
        self._on_iteration = on_iteration
        self._loader_threads = loader_threads
        self._pass = Pass(shape, plan.chunks_per_minibatch, world, flat.values.device)
        self._objective = 0.0  # own sum of log-probabilities in this iteration
        self._objective_frames = 0

    def run(self) -> None:
        """Train from the present step to the last; afterwards all learners hold the final model."""
        self.model.train()
        if self.step == 0:
            self._validate(0)
        started = time.monotonic()
        with MinibatchReader(
            self.train,
            self.shape,
            self.plan.chunks_per_minibatch,
            seed=self._seed,
            rank=self.world.rank,
            size=self.world.size,
            threads=self._loader_threads,
            first_step=self.step,
        ) as reader:
            while self.step < self.plan.num_steps:
                self._take(next(reader), reader.plan.chunks_of_step(self.step))
                last = self.step == self.plan.num_steps
                if last:
                    self.flat.mix(self.flat.values, self.strategy.finish)
                if self.step % self.plan.steps_per_iteration == 0 or last:
                    self._end_iteration(last)
            counters = reader.counters()
        if self.world.rank == 0:
            seconds = time.monotonic() - started
            logger.info(
                "trained on %d frames in %.1f s, %.0f frames/s over %d learner(s); waited %.2f s for data; "
                "%d averagings, %.3g MB sent by each learner",
                self.frames, seconds, self.frames / max(seconds, 1e-9), self.world.size,
                counters.consumer_waited, self.strategy.num_averages, self.strategy.bytes_sent / 1e6,
            )  # fmt: skip
            for line in self.optimiser.report():
                logger.info("%s", line)

    def objective(self, minibatch: Minibatch) -> torch.Tensor:
        """The sum over the minibatch's labelled frames of the log-probability of the right pdf-id."""
        output = self.model(
            self._pass.features(minibatch),
            self._pass.first(),
            self.shape.width,
            min_deriv_time=self.plan.min_deriv_time,
            max_deriv_time=self.plan.max_deriv_time,
        )
        labels = torch.from_numpy(minibatch.labels).to(output.device)
        return -functional.nll_loss(
            output.reshape(-1, output.shape[2]), labels.reshape(-1), ignore_index=-1, reduction="sum"
        )

    def _take(self, minibatch: Minibatch, global_chunks: int) -> None:
        """One global step, which has `global_chunks` chunks over all learners."""
        step = Step(minibatch.step, minibatch.frames, minibatch.global_frames)
        self.flat.gradients.zero_()
        if minibatch.frames:
            objective = self.objective(minibatch)
            (-objective).backward()
            self._objective += objective.item()
            self._objective_frames += minibatch.frames
        if self.world.size > 1:
            self.flat.mix(self.flat.gradients, lambda g: self.strategy.combine_gradients(g, step))
        together = self.strategy.moves_together
        if minibatch.frames or together:
            chunks = global_chunks if together else len(minibatch.labels)
            rate = self.rate.actual(self.frames, self.world.size)
            self.optimiser.step(rate, chunks / self.world.size)
        if self.strategy.note(step):
            self.flat.mix(self.flat.values, self.strategy.mix_parameters)
        self.step += 1
        self.frames += step.global_frames
        if self._progress is not None:
            self._progress.update(
                self.frames,
                self.rate.total_frames,
                self.plan.num_epochs,
                self._objective / max(1, self._objective_frames),
                self.scores[-1].log_likelihood if self.scores else None,
                self.rate.effective(self.frames),
                last=self.step == self.plan.num_steps,
            )

    def _end_iteration(self, last: bool) -> None:
        """Log what this learner reached in the iteration, and validate the mean of all models."""
        iteration = -(-self.step // self.plan.steps_per_iteration)
        self._logs.train(iteration - 1, self.world.rank, self._objective, self._objective_frames)
        self._objective, self._objective_frames = 0.0, 0
        self._validate("final" if last else iteration)
        if self._on_iteration is not None and not last:
            self._on_iteration(iteration)

    def _validate(self, name: int | str) -> None:
        mean = self.strategy.mean_model(self.flat.to_numpy())
        with with_parameters(self.model, self.flat, mean):
            valid = compute_prob(self.model, self.valid, self._pass)
            diagnostic = compute_prob(self.model, self.diagnostic, self._pass)
        self.scores.append(valid)
        if not np.isfinite(valid.log_likelihood):
            logger.warning("validation %s: the log-likelihood is not finite", name)
        if self.world.rank == 0:
            self._logs.compute_prob("valid", name, valid)
            self._logs.compute_prob("train", name, diagnostic)

    def state_dict(self) -> dict[str, Any]:
        """This learner's whole state between two steps; with it, a new run goes on bit for bit."""
        return {
            "step": self.step,
            "frames": self.frames,
            "scores": [dataclasses.astuple(score) for score in self.scores],
            "parameters": self.flat.values.cpu().clone(),
            "optimiser": self.optimiser.state_dict(),
            "strategy": self.strategy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.step, self.frames = state["step"], state["frames"]
        self.scores = [Score(*score) for score in state["scores"]]
        self.flat.load(state["parameters"].numpy())
        self.optimiser.load_state_dict(state["optimiser"])
        self.strategy.load_state_dict(state["strategy"])
