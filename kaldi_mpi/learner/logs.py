"""The small log files of each iteration, under the names and with the lines that Kaldi's scripts read.

``log/train.ITER.JOB.log`` (one a learner), ``log/compute_prob_valid.ITER.log`` and
``log/compute_prob_train.ITER.log``: read by ``steps/nnet3/report``, ``steps/info/nnet3_dir_info.pl`` and by
people.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import kaldi_mpi
from kaldi_mpi.files import atomic_write
from kaldi_mpi.log import logger


class HasLines(Protocol):
    """A result that can tell itself in Kaldi's words."""

    def lines(self) -> list[str]:
        """The lines, without the LOG prefix."""


class IterationLogs:
    """Writes the files below `folder`, which must exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def train(self, iteration: int, rank: int, objective: float, frames: int) -> None:
        """What ``nnet3-train`` says at its end, for this learner's share of one iteration.

        Args:
            iteration: from 0.
            rank: of the learner; Kaldi's jobs count from 1.
            objective: log-probability summed over `frames`.
            frames: labelled frames.
        """
        mean = objective / frames if frames else 0.0
        line = f"Overall average objective function for 'output' is {mean:.6g} over {frames} frames."
        parsed = f"[this line is to be parsed by a script:] log-prob-per-frame={mean:.6g}"
        self._write(f"train.{iteration}.{rank + 1}.log", "nnet3-train", [line, parsed])

    def compute_prob(self, which: str, iteration: int | str, score: HasLines) -> None:
        """What ``nnet3-compute-prob`` says of the ``valid`` or ``train`` set; also goes to the main log."""
        for line in score.lines():
            logger.info("%s, iteration %s: %s", which, iteration, line)
        self._write(f"compute_prob_{which}.{iteration}.log", "nnet3-compute-prob", score.lines())

    def _write(self, name: str, program: str, lines: Sequence[str]) -> None:
        with atomic_write(self._folder / name, "w", sync=False) as stream:
            for line in lines:
                stream.write(f"LOG ({program}[kaldi_mpi-{kaldi_mpi.__version__}]) {line}\n")
