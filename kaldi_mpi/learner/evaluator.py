"""Validation beside the training: rank 0's second thread, with a model of its own."""

from __future__ import annotations

import copy
import dataclasses
import queue
import threading
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.learner.evaluate import compute_prob
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.transport.world import SoloWorld

if TYPE_CHECKING:
    from kaldi_mpi.learner.loop import Learner

_Job = tuple[int, NDArray[np.float32], float | None]


class Evaluator:
    """Evaluates mean models one after the other and hands the scores to the learner's summary and logs.

    Args:
        learner: rank 0's; its model's structure is copied, its parameters are not touched.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._model = copy.deepcopy(learner.model)
        self._flat = FlatParameters.of_model(self._model)
        self._pass = dataclasses.replace(learner.pass_, world=SoloWorld())
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="validation", daemon=True)
        self._thread.start()

    def start(self, iteration: int, mean: NDArray[np.float32], spread: float | None) -> None:
        """Queue the validation of `mean`, which ends `iteration`."""
        self._jobs.put((iteration, mean, spread))

    def drain(self) -> None:
        """Return when all that was queued is done."""
        self._jobs.join()

    def close(self) -> None:
        """End the thread after what is queued."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            iteration, mean, spread = job
            with torch.no_grad():
                self._flat.load(mean)
                self._model.eval()
                valid = compute_prob(self._model, self._learner.data.valid, self._pass)
                diagnostic = compute_prob(self._model, self._learner.data.diagnostic, self._pass)
            self._learner.note_scores(iteration, valid, diagnostic, spread)
            self._jobs.task_done()
