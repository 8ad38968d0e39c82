"""What a training leaves in its log directory, and tells while it runs.

``log/train.ITER.JOB.log`` (one a learner), ``log/compute_prob_valid.ITER.log`` and
``log/compute_prob_train.ITER.log``, with the lines that Kaldi's scripts read (``steps/nnet3/report``,
``steps/info/nnet3_dir_info.pl``); ``log/summary.json``, the figures of the whole training, for tables and benchmarks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import kaldi_mpi
from kaldi_mpi.files import atomic_write
from kaldi_mpi.learner.batches import DeviceBatches
from kaldi_mpi.learner.progress import Progress
from kaldi_mpi.learner.schedule import ExponentialRate, Phase
from kaldi_mpi.learner.scores import ChainScore, Score, Term, mean_and_l2
from kaldi_mpi.log import logger
from kaldi_mpi.transport.world import World


class IterationLogs:
    """Writes the files below `folder`, which must exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def train(self, iteration: int, rank: int, sums: Mapping[str, Sequence[float]]) -> None:
        """What ``nnet3-train`` says at its end, for this learner's share of one iteration.

        Args:
            iteration: from 0.
            rank: of the learner; Kaldi's jobs count from 1.
            sums: of each output: its objective, the weight of the frames that it is of, and l2.
        """
        lines = []
        for name, (objective, weight, l2) in (sums or {"output": (0.0, 0.0, 0.0)}).items():
            frames = round(weight)
            mean, mean_l2 = (objective / frames, l2 / frames) if frames else (0.0, 0.0)
            lines += [
                f"Overall average objective function for '{name}' is {mean_and_l2(mean, mean_l2)} "
                f"over {frames} frames.",
                f"[this line is to be parsed by a script:] log-prob-per-frame={mean:.6g}",
            ]
        self._write(f"train.{iteration}.{rank + 1}.log", "nnet3-train", lines)

    def compute_prob(self, which: str, iteration: int | str, score: Score | ChainScore) -> None:
        """What ``nnet3-compute-prob`` says of the ``valid`` or ``train`` set; also goes to the main log."""
        for line in score.lines()[:2]:
            logger.info("%s, iteration %s: %s", which, iteration, line)
        self._write(f"compute_prob_{which}.{iteration}.log", "nnet3-compute-prob", score.lines())

    def combine(self, lines: Sequence[str]) -> None:
        """What ``nnet3-combine`` says."""
        self._write("combine.log", "nnet3-combine", lines)

    def _write(self, name: str, program: str, lines: Sequence[str]) -> None:
        with atomic_write(self._folder / name, "w", sync=False) as stream:
            for line in lines:
                stream.write(f"LOG ({program}[kaldi_mpi-{kaldi_mpi.__version__}]) {line}\n")


class Summary:
    """Collects the validations and, at the end, speed and communication.

    The file has ``validations`` (name, valid and train log-probability per frame, spread: the models' mean
    squared distance from their mean), ``seconds`` and ``frames`` of the (last) run, and ``learners``: for each
    its own frames, seconds waited for other learners and for data, averagings and bytes sent.
    """

    def __init__(self) -> None:
        self._validations: list[dict[str, Any]] = []
        self._end: dict[str, Any] = {}
        # For accuracy.report: of each iteration, its seconds and what was reported of the training's and held-out set.
        self._report: dict[str, list[float]] = {}
        self._began = time.monotonic()

    def report(self, name: int | str, train: float, valid: float) -> None:
        """Take down a line of ``accuracy.report``: what was reached by iteration `name`."""
        now = time.monotonic()
        if isinstance(name, int):
            self._report[str(name)] = [now - self._began, train, valid]
            self._began = now

    def write_report(self, path: Path) -> None:
        """``accuracy.report``, as Kaldi's programs leave it."""
        lines = ["%Iter\tduration\ttrain_objective\tvalid_objective\tdifference"]
        total = 0.0
        for name, (seconds, train, valid) in sorted(self._report.items(), key=lambda row: int(row[0])):
            total += seconds
            lines.append(f"{name}\t{seconds:.1f}\t{train:g}\t{valid:g}\t{valid - train:g}")
        lines.append(f"Total training time is {datetime.timedelta(seconds=round(total))}\n")
        with atomic_write(path, "w") as stream:
            stream.write("\n".join(lines))

    def validation(self, name: int | str, valid: float, train: float, spread: float | None) -> None:
        """Take down one validation."""
        self._validations.append({"iteration": name, "valid": valid, "train": train, "spread": spread})

    def last_valid(self) -> float | None:
        """The log-probability per frame of the last validation, None before the first."""
        return self._validations[-1]["valid"] if self._validations else None

    def finish(self, seconds: float, frames: int, by_learner: Sequence[Mapping[str, float]]) -> None:
        """Take down the end of a run: its seconds of training and its frames over all learners."""
        self._end = {"seconds": seconds, "frames": frames, "learners": [dict(figures) for figures in by_learner]}

    def write(self, path: Path, **more: Any) -> None:
        """Write it all as JSON, with `more` beside."""
        with atomic_write(path, "w") as stream:
            json.dump(more | self._end | {"validations": self._validations}, stream, indent=1)
            stream.write("\n")

    def state_dict(self) -> dict[str, Any]:
        """The validations so far."""
        return {
            "validations": list(self._validations),
            "report": {name: list(row) for name, row in self._report.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._validations = list(state["validations"])
        self._report = {name: list(row) for name, row in state["report"].items()}


@dataclasses.dataclass
class _Figures:
    waited: float = 0.0  # seconds that the learner waited
    readers_waited: float = 0.0  # seconds that the readers waited for space, or for a request
    bytes_read: int = 0
    frames: int = 0
    seconds: float = 0.0  # in which readers were open

    def __add__(self, other: _Figures) -> _Figures:
        return _Figures(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __sub__(self, other: _Figures) -> _Figures:
        return _Figures(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


class LoaderReport:
    """How the loader keeps up with one learner, in one phase after the other; rank 0 logs it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._past = _Figures()  # of readers that are closed
        self._told = _Figures()
        self._batches: DeviceBatches | None = None
        self._opened = 0.0

    @contextlib.contextmanager
    def watch(self, batches: DeviceBatches) -> Iterator[DeviceBatches]:
        """Count `batches` while the block runs, and close it at the end."""
        with batches:
            self._batches, self._opened = batches, time.monotonic()
            if self._rank == 0:
                memory = batches.counters().memory / 1e6
                logger.info("the loader begins with %.3g MB of memory: its buffers and the order of the data", memory)
            try:
                yield batches
            finally:
                self._past, self._batches = self._now(), None

    def _now(self) -> _Figures:
        if self._batches is None:
            return self._past
        counters = self._batches.counters()
        return self._past + _Figures(
            self._batches.waited,
            counters.readers_waited,
            counters.bytes_read,
            counters.frames,
            time.monotonic() - self._opened,
        )

    @property
    def waited(self) -> float:
        """Seconds that the learner waited for data, in all."""
        return self._now().waited

    def totals(self) -> dict[str, float]:
        """All of it, for a summary."""
        now = self._now()
        return {
            "seconds_waited_for_data": now.waited,
            "seconds_readers_waited": now.readers_waited,
            "bytes_read": now.bytes_read,
        }

    def log(self, iteration: int) -> None:
        """Log what was read since the last call, in `iteration`."""
        if self._rank != 0:
            return
        now = self._now()
        new, self._told = now - self._told, now
        memory = 0 if self._batches is None else self._batches.counters().memory
        logger.info(
            "iteration %d: rank 0 took %.0f frames/s; it waited %.2f s for data, its readers %.2f s for space; "
            "%.3g MB read, %.3g MB of memory",
            iteration, new.frames / max(new.seconds, 1e-9), new.waited, new.readers_waited, new.bytes_read / 1e6,
            memory / 1e6,
        )  # fmt: skip


class TrainingLog:
    """What one learner tells of its training; rank 0 shows progress and writes the validations.

    Args:
        folder: the training's directory, with its ``log``.
        rank: of the learner.
        rate: the learning rate, which knows how many frames there are.
        num_epochs: that those frames are.
        progress: rank 0's bar, None elsewhere.
    """

    def __init__(
        self, folder: Path, rank: int, rate: ExponentialRate, num_epochs: float, progress: Progress | None = None
    ) -> None:
        self._logs, self._rank = IterationLogs(folder / "log"), rank
        self._rate, self._num_epochs, self._progress = rate, num_epochs, progress
        self.loader, self.summary = LoaderReport(rank), Summary()
        self.own_frames = 0  # trained on by this learner, in this run
        self.learning_rate: float | None = None  # of the iteration; None: as the frames say
        # Own sums of each output in this iteration, on the learner's device: objective, weight, l2.
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]] = {}

    def add_objective(self, terms: Mapping[str, Term], frames: int) -> None:
        """What a minibatch's outputs came to, and its labelled frames."""
        for name, term in terms.items():
            objective, weight, l2 = self._sums.get(name, (torch.zeros((), dtype=torch.float64), 0.0, 0.0))
            objective = objective.to(term.objective.device, non_blocking=True) + term.objective.detach()
            self._sums[name] = objective, weight + term.weight, l2 + term.l2
        self.own_frames += frames

    def show_progress(self, frames: int, last: bool = False) -> None:
        """The bar, with `frames` trained on over all learners."""
        if self._progress is not None:
            self._progress.update(
                frames,
                self._rate.total_frames,
                self._num_epochs,
                self._mean_objective,
                self.summary.last_valid(),
                self._rate.effective(frames) if self.learning_rate is None else self.learning_rate,
                last=last,
            )

    def _mean_objective(self) -> float:
        objective, weight, _ = self._numbers().get("output", (0.0, 0.0, 0.0))
        return objective / max(1.0, weight)

    def _numbers(self) -> dict[str, tuple[float, float, float]]:
        return {name: (float(one[0]), float(one[1]), float(one[2])) for name, one in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """What has been added up since the last iteration, for a checkpoint in the middle of one."""
        return {
            "sums": {name: list(numbers) for name, numbers in self._numbers().items()},
            "summary": self.summary.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = {
            name: (torch.tensor(objective, dtype=torch.float64), weight, l2)
            for name, (objective, weight, l2) in state["sums"].items()
        }
        self.summary.load_state_dict(state["summary"])

    def end_iteration(self, iteration: int) -> None:
        """Write what this learner's objective was since the last call, as that of `iteration` (from 0)."""
        self._logs.train(iteration, self._rank, self._numbers())
        self._sums = {}
        self.loader.log(iteration)

    def combination(self, lines: Sequence[str]) -> None:
        """Write what the final combination found, in nnet3-combine's words."""
        self._logs.combine(lines)

    def validation(
        self, name: int | str, valid: Score | ChainScore, diagnostic: Score | ChainScore, spread: float | None
    ) -> None:
        """Keep and log the scores of a validation; `spread` is the models' mean squared distance from their mean."""
        self.summary.validation(name, valid.log_likelihood, diagnostic.log_likelihood, spread)
        self.summary.report(name, diagnostic.reported, valid.reported)
        if not math.isfinite(valid.log_likelihood):
            logger.warning("validation %s: the log-likelihood is not finite", name)
        if self._rank == 0:
            self._logs.compute_prob("valid", name, valid)
            self._logs.compute_prob("train", name, diagnostic)
            if spread:
                logger.info("iteration %s: the models' mean squared distance from their mean is %.4g", name, spread)


class Traffic:
    """Seconds waited for other learners and bytes sent to them, in all the worlds in which this one meets them.

    Args:
        world: the learners.
        phases: of the training, whose strategies count their averagings.
    """

    def __init__(self, world: World, phases: Sequence[Phase]) -> None:
        self._world, self._strategies = world, [phase.strategy for phase in phases]
        groups = [phase.super_learner.world for phase in phases if phase.super_learner is not None]
        worlds = [world, *(phase.peers for phase in phases), *groups]
        self._worlds = list({id(world): world for world in worlds}.values())
        self._began, self._before = time.monotonic(), self._now()

    def _now(self) -> tuple[float, int]:
        return sum(w.seconds_waited for w in self._worlds), sum(w.bytes_sent for w in self._worlds)

    def report(self, log: TrainingLog, frames: int) -> None:
        """Log what this run was, and keep it for the summary; `frames` were trained on, over all learners."""
        seconds = time.monotonic() - self._began
        waited, sent = (now - before for now, before in zip(self._now(), self._before, strict=True))
        averages = sum(strategy.num_averages for strategy in self._strategies)
        mine = {
            "own_frames": log.own_frames, "seconds_waited": waited, "averages": averages, "bytes_sent": int(sent),
            **log.loader.totals(),
        }  # fmt: skip
        by_learner = self._world.gather(mine)
        if self._world.rank != 0:
            return
        log.summary.finish(seconds, frames, by_learner)
        logger.info(
            "trained on %d frames in %.2f s, %.0f frames/s over %d learner(s); waited %.2f s for data, "
            "%.2f s for other learners; %d averagings, %.3g MB sent by each learner",
            frames, seconds, frames / max(seconds, 1e-9), self._world.size, log.loader.waited, waited,
            averages, sent / 1e6,
        )  # fmt: skip
