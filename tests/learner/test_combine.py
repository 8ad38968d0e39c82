"""The final combination, averages, shrinking and saturation, against a real Kaldi's (golden/training)."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.combine import add_to_mean, combine, models_to_combine, tensors_of
from kaldi_mpi.learner.objective import log_likelihood
from kaldi_mpi.learner.shrinking import Shrinking
from kaldi_mpi.loader import Minibatch
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.models.components import BatchNorm
from kaldi_mpi.nnet3 import from_torch, read_nnet, to_torch
from tests.learner.golden_training import FOLDER, arrays, minibatches, relative_error
from tests.paths import golden, kaldi_root


def cases() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(golden(f"{FOLDER}/combine/combine.json").read_text())
    return found


def read(name: str) -> AcousticModel:
    return to_torch(read_nnet(golden(f"{FOLDER}/{name}.raw")))


@torch.no_grad()
def mean_objective(model: AcousticModel, batches: list[Minibatch[torch.Tensor]]) -> float:
    """Per frame, in whatever mode the model is."""
    scores = [
        float(log_likelihood(model(batch.feats, batch.first, batch.shape.width), batch).double()) for batch in batches
    ]
    return sum(scores) / sum(batch.weight for batch in batches)


def as_combining(batches: list[Minibatch[torch.Tensor]], model: AcousticModel) -> float:
    model.eval()
    with model.mode.evaluating(dropout=False):
        return mean_objective(model, batches)


@pytest.mark.parametrize("name", ["all", "prefix", "two_evaluations", "lstm"])
def test_combination_is_kaldis(name: str) -> None:
    torch.set_num_threads(1)
    case = cases()[name]
    archive, _, first = case["egs"].partition(", first ")
    batches = minibatches(archive)[: int(first) if first else None]
    said: list[str] = []
    best, _ = combine(
        [functools.partial(read, model) for model in case["models"]],
        functools.partial(as_combining, batches),
        int(case["options"].rpartition("=")[2] or 30),
        said.append,
    )
    lines = [line for line in case["log"] if "Overall" not in line]
    for ours, theirs in zip(said, lines, strict=True):
        assert words_of(ours)[0] == words_of(theirs)[0]
        assert words_of(ours)[1] == pytest.approx(words_of(theirs)[1], rel=2e-5)
    kaldis = arrays(read_nnet(golden(f"{FOLDER}/combine/{name}.raw")))
    mine = arrays(from_torch(best))
    for key, value in kaldis.items():
        # Where there is batch-norm, all statistics are computed anew: below. The last is for nnet3-info alone.
        anew = ("Stats", "ValueAvg", "DerivAvg", "OderivRms") if name != "lstm" else ("SelfRepairProb",)
        if value.size and not key[1].startswith(anew):
            assert relative_error(mine[key], value) < 1e-6, key


def words_of(line: str) -> tuple[str, list[float]]:
    """A line of nnet3-combine without its figures, and these."""
    words = line.split()
    numbers = [word for word in words if "." in word]
    return " ".join(word for word in words if "." not in word), [float(word) for word in numbers]


def test_batch_norm_of_the_combined_model_is_computed_anew() -> None:
    """The sums over all examples, without nnet3-train's fading."""
    torch.set_num_threads(1)
    case = cases()["prefix"]
    mean = read(case["models"][0])
    add_to_mean(mean, read(case["models"][1]), 2)
    mean.eval()
    with torch.no_grad(), mean.mode.evaluating(collect=True):
        for batch in minibatches(case["egs"]):
            mean(batch.feats, batch.first, batch.shape.width)
    theirs = read_nnet(golden(f"{FOLDER}/combine/prefix.raw")).components
    modules = [module for module in mean.by_name.values() if isinstance(module, BatchNorm)]
    assert len(modules) == 2
    for module in modules:
        module.set_sums(module.take_sums())
        kaldi = theirs[module.name].values
        ours = from_torch(mean).components[module.name].values
        assert ours["Count"] == kaldi["Count"]
        for token in ("StatsMean", "StatsVar"):
            assert relative_error(ours[token], kaldi[token]) < 1e-5


def test_a_mean_of_models_is_nnet3_averages() -> None:
    """Parameters and activation statistics; batch-norm's moments are averaged otherwise, and computed anew."""
    names = cases()["average"]["models"]
    mean = read(names[0])
    for number, name in enumerate(names[1:], start=2):
        add_to_mean(mean, read(name), number)
    ours, theirs = arrays(from_torch(mean)), arrays(read_nnet(golden(f"{FOLDER}/combine/average.raw")))
    for key, value in theirs.items():
        if value.size and not key[1].startswith("Stats"):
            assert relative_error(ours[key], value) < 1e-6, key


def test_a_tie_and_nonsense_leave_the_earlier_mean() -> None:
    values = iter([-1.0, -1.0, math.nan, -2.0])
    model = "dnn/16.m0"
    best, found = combine([lambda: read(model), *[lambda: read("dnn/8.m0")] * 3], lambda _: next(values), 30, print)
    assert (found.count, found.best) == (1, -1.0)
    for ours, theirs in zip(tensors_of(best), tensors_of(read(model)), strict=True):
        assert torch.equal(ours, theirs)
    values = iter([math.nan, -5.0])
    _, found = combine([lambda: read(model)] * 2, lambda _: next(values), 30, print)
    assert (found.count, found.best) == (2, -5.0)


def test_both_modes_of_batch_norm_give_kaldis_objective() -> None:
    figures = json.loads(golden(f"{FOLDER}/test_mode/figures.json").read_text())
    batches = minibatches("combine.ark")
    for net in ("dnn", "tdnnf"):
        model = read(f"{net}/16.m0")
        model.eval()
        assert mean_objective(model, batches) == pytest.approx(figures[f"{net} batchnorm-test-mode=true"], abs=1e-5)
        ours = as_combining(batches, model)
        assert ours == pytest.approx(figures[f"{net} batchnorm-test-mode=false"], abs=1e-5)


@pytest.mark.parametrize("net", ["dnn", "tdnnf", "conv"])
def test_outputs_in_both_modes_are_kaldis(net: str) -> None:
    """nnet3-compute's (test mode), and nnet3-compute-from-egs' (training mode, by minibatch)."""
    import kaldi_native_io

    model = read(f"{net}/16.m0")
    model.eval()
    folder = f"{FOLDER}/test_mode"
    with kaldi_native_io.SequentialFloatMatrixReader(f"ark:{golden(f'{folder}/feats.ark')}") as reader:
        feats = {key: np.array(value) for key, value in reader}
    with kaldi_native_io.SequentialFloatMatrixReader(f"ark:{golden(f'{folder}/{net}.test.ark')}") as reader:
        wanted = {key: np.array(value) for key, value in reader}
    assert wanted
    for key, value in wanted.items():
        ours = model.whole_utterance(torch.from_numpy(feats[key])).numpy()
        np.testing.assert_allclose(ours, value, rtol=0, atol=2e-4)
    with kaldi_native_io.SequentialFloatMatrixReader(f"ark:{golden(f'{folder}/{net}.train.ark')}") as reader:
        (trained,) = (np.array(value) for _, value in reader)
    batch = minibatches("combine.ark")[0]
    with torch.no_grad(), model.mode.evaluating(dropout=False):
        output = model(batch.feats, batch.first, batch.shape.width)
    assert (
        relative_error(output.exp().reshape(trained.shape).numpy(), np.exp(trained)) < 1e-4
        or relative_error(output.exp().reshape(trained.shape).numpy(), trained) < 1e-4
    )


@pytest.mark.parametrize("net", ["lstm", "blstm", "misc"])
def test_saturation_is_kaldis(net: str) -> None:
    """get_saturation.pl reads figures of three or four digits."""
    figures = json.loads(golden(f"{FOLDER}/test_mode/figures.json").read_text())
    name = next(name for name in ("16.m0", "16.m5") if golden(f"{FOLDER}/{net}/{name}.raw").exists())
    assert read(f"{net}/{name}").saturation() == pytest.approx(figures[f"{net} saturation"], abs=2e-3)


def test_shrinking_scales_what_nnet3_copy_scales(tmp_path: Path) -> None:
    """All parameters, peepholes included; through the learner's step, which then makes no change of its own."""
    from kaldi_mpi.learner.faults import Injector
    from kaldi_mpi.learner.flat import FlatParameters
    from kaldi_mpi.learner.logs import TrainingLog
    from kaldi_mpi.learner.objective import DerivativeTimes
    from kaldi_mpi.learner.optimiser import KaldiSgd
    from kaldi_mpi.learner.state import TrainingState
    from kaldi_mpi.learner.step import LearnerStep
    from tests.learner.golden_training import FixedRate

    case = cases()["shrunk"]
    theirs = arrays(read_nnet(golden(f"{FOLDER}/combine/shrunk.raw")))
    batch = minibatches("rnn.ark")[0]
    (tmp_path / "log").mkdir()
    for asynchronous in (False, True):
        model = read(case["models"][0])
        flat = FlatParameters.of_model(model)
        model.train()
        rate = FixedRate(0.0, 0.0, 1)
        state = TrainingState(model, flat, KaldiSgd(flat, 0.0, 2.0), [])
        learner = LearnerStep(
            state, rate, 1, DerivativeTimes(), TrainingLog(tmp_path, 0, rate, 1.0), Injector((), 0),
            shrinking=Shrinking(case["scale"], 0.5),
        )  # fmt: skip
        learner.begin_iteration(3, 0)  # its saturation is 0.66
        before = flat.values.clone()
        if asynchronous:
            change = torch.zeros_like(flat.values)
            learner.compute(batch)
            learner.change(0, 1, change)
            flat.values.copy_(before + change)
        else:
            learner.begin(batch, 1)
            learner.compute(batch)
            learner.update(None, together=False)
        ours = arrays(from_torch(model))
        trained = [key for key in theirs if key[1] in ("LinearParams", "BiasParams", "Params") and theirs[key].size]
        assert len(trained) >= 4
        for key in trained:
            assert relative_error(ours[key], theirs[key]) < 1e-6, key


def test_when_parameters_shrink() -> None:
    """The conditions of train_rnn.py."""
    by_saturation = Shrinking(0.99, 0.4)
    assert by_saturation.scale(0.01, True, 0.0) == 0.99
    assert by_saturation.scale(0.01, False, 0.41) == 0.99
    assert by_saturation.scale(0.01, False, 0.4) == 1.0
    proportional = Shrinking(1.0, 0.4, 10.0)
    assert proportional.scale(0.01, False, 0.9) == pytest.approx(0.9)
    assert Shrinking(0.95, 0.4, 10.0).scale(0.01, False, 0.9) == pytest.approx(0.9)  # the smaller one
    assert not Shrinking().acts
    with pytest.raises(ConfigError, match="proportional-shrink 60: too large, at a learning rate of"):
        Shrinking(1.0, 0.4, 60.0).scale(0.01, False, 0.0)


@pytest.mark.kaldi
def test_which_models_are_combined() -> None:
    import sys

    sys.path.insert(0, str(kaldi_root() / "egs/wsj/s5/steps"))
    try:
        from libs.nnet3.train.common import get_model_combine_iters  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    for iterations in (1, 2, 3, 7, 40, 200, 333):
        for archives in (1, 5, 60, 170, 1000):
            for jobs in (1, 4, 16):
                for most in (1, 3, 20):
                    theirs = get_model_combine_iters(iterations, 4, archives, most, jobs)
                    assert models_to_combine(iterations, archives / jobs, most) == sorted(theirs | {iterations})
