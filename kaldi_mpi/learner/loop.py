"""One persistent learner: what it keeps from the first minibatch to the last, and its way through the phases.

A learner keeps its model, its optimiser and its place in the data. What passes between learners, and when,
is the strategy's business: `synchronous` walks through the same steps on all ranks, `asynchronous` takes
tickets and waits for nobody. An iteration is the stretch between two validations; its number names log
files, as in Kaldi.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.learner.asynchronous import AsynchronousPhase
from kaldi_mpi.learner.data import Data
from kaldi_mpi.learner.evaluate import Pass, Score, compute_prob, with_parameters
from kaldi_mpi.learner.faults import Injector
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.loader_report import LoaderReport
from kaldi_mpi.learner.logs import IterationLogs
from kaldi_mpi.learner.objective import log_likelihood
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.plan import Phase, Plan
from kaldi_mpi.learner.progress import Progress
from kaldi_mpi.learner.reading import Reading
from kaldi_mpi.learner.schedule import ExponentialRate
from kaldi_mpi.learner.summary import Summary
from kaldi_mpi.learner.synchronous import run_synchronous
from kaldi_mpi.loader import Minibatch
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.transport.world import World


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a learner works with besides its model: logs, checkpoints, disturbances.

    Attributes:
        logs: where Kaldi's scripts look for this learner's objective and the validations (rank 0's).
        progress: rank 0's bar, None elsewhere.
        save: writes a checkpoint; called by all ranks after a validation where the plan says so.
        injector: disturbances on purpose.
        journal_dir: where exchanges are journaled, None for nowhere.
        wire: number type of parameters on their way (``--transfer-dtype``).
        piece_size: parameters of a piece.
    """

    logs: IterationLogs
    injector: Injector
    save: Callable[[], None]
    progress: Progress | None = None
    journal_dir: Path | None = None
    wire: str = "float32"
    piece_size: int = 4 * 2**20


class Learner:
    """One rank's training.

    Args:
        world: the learners.
        model: the same on all ranks at the start; on this learner's device.
        flat: its parameters.
        optimiser, rate: what to do with gradients.
        data: utterances to train on, held out, and of the training set to watch.
        reading: how chunks are cut and read.
        plan: how long.
        phases: under which strategies, without gaps from step 0 to the plan's last.
        around: logs and the rest.
    """

    def __init__(
        self,
        world: World,
        model: AcousticModel,
        flat: FlatParameters,
        optimiser: KaldiSgd,
        rate: ExponentialRate,
        data: Data,
        reading: Reading,
        plan: Plan,
        phases: Sequence[Phase],
        *,
        around: Surroundings,
    ) -> None:
        self.world, self.model, self.flat = world, model, flat
        self.optimiser, self.rate = optimiser, rate
        self.reading, self.plan, self.phases = reading, plan, phases
        self.around = around
        self.step = 0  # the next one to take
        self.frames = 0  # trained on, over all learners
        self.own_frames = 0  # by this learner, in this run
        self.data = data
        self.loader = LoaderReport(world.rank)
        self.summary = Summary()
        self.pass_ = Pass(reading, world, flat.values.device)
        self._objective = 0.0  # own sum of log-probabilities in this iteration
        self._objective_weight = 0.0  # and of the labels' weights

    def run(self) -> None:
        """Train from the present step to the last; afterwards all learners hold the final model."""
        self.model.train()
        if self.step == 0:
            self.validate(0, self.flat.to_numpy(), 0.0)
        started, traffic, first_frames = time.monotonic(), self._traffic(), self.frames
        for phase in self.phases:
            if self.step >= phase.end_step:
                continue
            if len(self.phases) > 1 and self.world.rank == 0:
                logger.info("from step %d: strategy %s", phase.first_step, phase.strategy.name)
            if phase.strategy.asynchronous and (phase.peers or self.world).size > 1:
                AsynchronousPhase(self, phase).run()
            else:
                run_synchronous(self, phase)
        waited, sent = (now - before for now, before in zip(self._traffic(), traffic, strict=True))
        self._report(time.monotonic() - started, waited, int(sent), self.frames - first_frames)

    def _traffic(self) -> tuple[float, int]:
        """Seconds waited for other learners and bytes sent to them, in all the worlds in which this one meets them."""
        worlds = [self.world, *(world for phase in self.phases for world in (phase.peers, phase.group) if world)]
        unique = {id(world): world for world in worlds}.values()
        return sum(world.seconds_waited for world in unique), sum(world.bytes_sent for world in unique)

    def _report(self, seconds: float, waited: float, sent: int, frames: int) -> None:
        averages = sum(phase.strategy.num_averages for phase in self.phases)
        mine = {
            "own_frames": self.own_frames, "seconds_waited": waited, "averages": averages, "bytes_sent": sent,
            **self.loader.totals(),
        }  # fmt: skip
        by_learner = self.world.gather(mine)
        if self.world.rank != 0:
            return
        self.summary.finish(seconds, frames, by_learner)
        logger.info(
            "trained on %d frames in %.2f s, %.0f frames/s over %d learner(s); waited %.2f s for data, "
            "%.2f s for other learners; %d averagings, %.3g MB sent by each learner",
            frames, seconds, frames / max(seconds, 1e-9), self.world.size, self.loader.waited, waited,
            averages, sent / 1e6,
        )  # fmt: skip
        for line in self.optimiser.report():
            logger.info("%s", line)

    def objective(self, batch: Minibatch[torch.Tensor]) -> torch.Tensor:
        """The sum over the minibatch's labels of weight times log-probability."""
        width = batch.shape.width
        output = self.model(
            batch.feats,
            batch.first,
            width,
            ivectors=batch.ivectors,
            min_deriv_time=self.plan.min_deriv_time,
            max_deriv_time=self.plan.max_deriv_time(width),
        )
        return log_likelihood(output, batch)

    def compute_gradients(self, batch: Minibatch[torch.Tensor]) -> None:
        """Fill the flat gradients, of the loss summed over the minibatch's frames (zero if it has none)."""
        self.flat.gradients.zero_()
        if batch.frames:
            objective = self.objective(batch)
            (-objective).backward()
            self._objective += objective.item()
            self._objective_weight += batch.weight
            self.own_frames += batch.frames

    def show_progress(self, frames: int, last: bool = False) -> None:
        """Rank 0's bar, with `frames` trained on over all learners."""
        if self.around.progress is not None:
            self.around.progress.update(
                frames,
                self.rate.total_frames,
                self.plan.num_epochs,
                self._objective / max(1.0, self._objective_weight),
                self.summary.last_valid(),
                self.rate.effective(frames),
                last=last,
            )

    def log_training(self, iteration: int) -> None:
        """Write what this learner's objective was since the last call, as that of `iteration` (from 0)."""
        self.around.logs.train(iteration, self.world.rank, self._objective, round(self._objective_weight))
        self._objective = self._objective_weight = 0.0
        self.loader.log(iteration)

    def end_iteration(self, mean: NDArray[np.float32], spread: float, asynchronous: bool) -> None:
        """With `self.step` steps done on all ranks: log, validate the mean of all models, save."""
        iteration = self.plan.iteration(self.step)
        self.log_training(iteration - 1)
        self.validate("final" if self.step == self.plan.num_steps else iteration, mean, spread)
        if self.plan.saves(self.step, asynchronous):
            self.around.save()

    def validate(self, name: int | str, mean: NDArray[np.float32], spread: float | None) -> None:
        """Evaluate `mean` on all ranks together; `spread` is the models' mean squared distance from it."""
        with with_parameters(self.model, self.flat, mean):
            valid = compute_prob(self.model, self.data.valid, self.pass_)
            diagnostic = compute_prob(self.model, self.data.diagnostic, self.pass_)
        self.note_scores(name, valid, diagnostic, spread)

    def note_scores(self, name: int | str, valid: Score, diagnostic: Score, spread: float | None) -> None:
        """Keep and log the scores of a validation."""
        self.summary.validation(name, valid.log_likelihood, diagnostic.log_likelihood, spread)
        if not np.isfinite(valid.log_likelihood):
            logger.warning("validation %s: the log-likelihood is not finite", name)
        if self.world.rank == 0:
            self.around.logs.compute_prob("valid", name, valid)
            self.around.logs.compute_prob("train", name, diagnostic)
            if spread:
                logger.info("iteration %s: the models' mean squared distance from their mean is %.4g", name, spread)

    def state_dict(self) -> dict[str, Any]:
        """This learner's whole state between two steps; with it, a new run goes on bit for bit."""
        return {
            "step": self.step,
            "frames": self.frames,
            "summary": self.summary.state_dict(),
            "parameters": self.flat.values.cpu().clone(),
            "optimiser": self.optimiser.state_dict(),
            "strategies": [phase.strategy.state_dict() for phase in self.phases],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.step, self.frames = state["step"], state["frames"]
        self.summary.load_state_dict(state["summary"])
        self.flat.load(state["parameters"].numpy())
        self.optimiser.load_state_dict(state["optimiser"])
        for phase, saved in zip(self.phases, state["strategies"], strict=True):
            phase.strategy.load_state_dict(saved)
