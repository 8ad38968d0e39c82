"""Repeats what a real nnet3-train did to the small networks of golden/training, with the learner's own step."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.learner.faults import Injector
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.objective import DerivativeTimes
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.schedule import ExponentialRate
from kaldi_mpi.learner.state import TrainingState
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.loader import ChunkShape, Minibatch
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.models.chance import Chance
from kaldi_mpi.nnet3 import from_torch, read_nnet, to_torch
from kaldi_mpi.testing.examples import Example, read_examples
from tests.paths import golden

FOLDER = "training"
NEVER = 10**9


class Recorded(Chance):
    """What chance decided in a run of Kaldi, by component and minibatch (run.json)."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self._case, self.minibatch = case, 0

    def decide(self, component: str, what: str, probability: float) -> bool:
        return self.minibatch in self._case.get(what, {}).get(component, ())

    decide_together = decide


class FixedRate(ExponentialRate):
    """One rate for all minibatches, which may be 0."""

    def effective(self, frames: int) -> float:
        return self.initial


def run_of(net: str) -> dict[str, Any]:
    run: dict[str, Any] = json.loads(golden(f"{FOLDER}/{net}/run.json").read_text())
    return run


@functools.lru_cache(maxsize=4)
def minibatches(name: str) -> list[Minibatch[torch.Tensor]]:
    """The merged examples of an archive; each is a minibatch."""
    return [minibatch_of(example, step) for step, (_, example) in enumerate(read_examples(golden(f"{FOLDER}/{name}")))]


def minibatch_of(example: Example, step: int) -> Minibatch[torch.Tensor]:
    given, wanted = example["input"], example["output"]
    count = int(given.indexes[:, 0].max()) + 1
    times, out_times = given.indexes[:, 1].reshape(count, -1), wanted.indexes[:, 1].reshape(count, -1)
    rows = given.matrix
    assert isinstance(rows, np.ndarray) and not isinstance(wanted.matrix, np.ndarray)
    feats = torch.from_numpy(np.array(rows, np.float32)).view(count, times.shape[1], -1)
    labels = np.array([row[0][0] for row in wanted.matrix.rows]).reshape(count, -1)
    assert (out_times[0] == np.arange(labels.shape[1])).all()
    shape = ChunkShape(labels.shape[1], -int(times[0, 0]), int(times[0, -1]) - labels.shape[1] + 1)
    return Minibatch(
        feats, torch.from_numpy(labels), labels.size, labels.size, float(labels.size), 0, step, shape, None, None
    )


def case_of(net: str, name: str) -> dict[str, Any]:
    case: dict[str, Any] = next(case for case in run_of(net)["cases"] if case["name"] == name)
    return case


def trained(net: str, name: str, folder: Path, natural_gradient: bool = True) -> Iterator[tuple[int, AcousticModel]]:
    """(K, model after K minibatches) of a case, for all minibatches."""
    run, case = run_of(net), case_of(net, name)
    model = to_torch(read_nnet(golden(f"{FOLDER}/{net}/{case['start']}")))
    chance = Recorded(case)
    flat = FlatParameters.of_model(model)
    if natural_gradient:
        model.use_natural_gradient()
    model.train()
    model.mode.chance = chance
    for module in model.by_name.values():
        module.zero_statistics()
    rates = (c.learning_rate / c.learning_rate_factor for c in model.by_name.values() if c.learning_rate_factor)
    own = next(rates)
    rate = FixedRate(own, own, NEVER)
    state = TrainingState(model, flat, KaldiSgd(flat, case["momentum"], case["max_param_change"]), [])
    (folder / "log").mkdir(exist_ok=True)
    low, high = case["min_deriv_time"], case["max_deriv_time_relative"]
    learner = LearnerStep(
        state,
        rate,
        1,
        DerivativeTimes(None if low <= -NEVER else low, None if high >= NEVER else high),
        TrainingLog(folder, 0, rate, 1.0),
        Injector((), 0),
        l2_factor=case["l2_factor"],
        backstitch_scale=case["backstitch"],
    )
    for number, batch in enumerate(minibatches(run["egs"])):
        chance.minibatch = number
        learner.begin(batch, len(batch.labels))
        learner.compute(batch)
        learner.update(None, together=False)
        yield number + 1, model


def parameters(model: AcousticModel) -> dict[tuple[str, str], NDArray[np.float32]]:
    """All arrays of a model's file, by component and token."""
    return arrays(from_torch(model))


def arrays(nnet: Any) -> dict[tuple[str, str], NDArray[np.float32]]:
    return {
        (name, token): np.asarray(value)
        for name, component in nnet.components.items()
        for token, value in component.values.items()
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
    }


def relative_error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
