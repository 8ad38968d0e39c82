"""The learner's step against a real nnet3-train: parameters after 1, 4, 8 and 16 minibatches (golden/training)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kaldi_mpi.nnet3 import read_nnet
from tests.learner.golden_training import FOLDER, arrays, case_of, parameters, relative_error, trained
from tests.paths import golden

CASES = {
    "dnn": ("m0", "m5", "bs", "free"),
    "tdnn": ("m0", "m5"),
    "tdnnf": ("m0", "m5"),
    "lstm": ("m0", "m5", "lim"),
    "lstm_peephole": ("m0", "m5"),
    "lstm_repair": ("m0", "m5", "lim"),
    "lstmp": ("m0", "m5"),
    "blstm": ("m0", "m5", "lim"),
    "tdnn_lstm": ("m0", "m5"),
    "conv": ("m0", "m5"),
    "conv_default": ("m0", "m5"),
    "misc": ("m0", "m5"),
    "repair": ("m0", "m5"),
    "orthonormal": ("m0",),
}
# Largest errors seen over the recorded spread: 2.0 (orthonormal, a spread of 4e-8), 1.6 (repair, first minibatch).
# Rounding alone makes them; the spread is that of four BLAS kernels, not a bound on all there are. Of two nets the
# golden files' own README says that they are ill-conditioned, and that its program is within 5 (seen: 2.8, on an AMD).
STRICT, ILL_CONDITIONED, AT_16 = 2.5, 5.0, 10.0
TRAINED = ("LinearParams", "BiasParams", "Params", "Scales", "Offsets")


@pytest.mark.parametrize(("net", "name"), [(net, name) for net, names in CASES.items() for name in names])
def test_parameters_are_kaldis(tmp_path: Path, net: str, name: str) -> None:
    torch.set_num_threads(1)
    spread, checked = case_of(net, name)["spread"], 0
    for minibatches, model in trained(net, name, tmp_path):
        if str(minibatches) not in spread:
            continue
        ours = parameters(model)
        theirs = arrays(read_nnet(golden(f"{FOLDER}/{net}/{minibatches}.{name}.raw")))
        times = AT_16 if minibatches == 16 else ILL_CONDITIONED if net in ("lstm_peephole", "conv_default") else STRICT
        bound = times * spread[str(minibatches)]["parameters"]
        for key, value in theirs.items():
            if key[1] in TRAINED and value.size:
                assert relative_error(ours[key], value) <= bound, (key, minibatches)
                checked += 1
    assert checked >= 4


def test_statistics_are_kaldis(tmp_path: Path) -> None:
    """Batch-norm's mean, variance and count; and activations' where the record tells in which minibatches."""
    for minibatches, model in trained("dnn", "m0", tmp_path):
        if minibatches not in (1, 4, 8, 16):
            continue
        theirs = read_nnet(golden(f"{FOLDER}/dnn/{minibatches}.m0.raw")).components
        from kaldi_mpi.nnet3 import from_torch

        ours = from_torch(model).components
        for name in ("l1.batchnorm", "l2.batchnorm"):
            for token in ("StatsMean", "StatsVar"):
                mine, kaldi = ours[name].values[token], theirs[name].values[token]
                assert relative_error(mine, kaldi) < 1e-5, (name, token)
            assert ours[name].values["Count"] == pytest.approx(theirs[name].values["Count"], rel=1e-6)
        for name in ("l1.relu", "l2.relu"):
            for token in ("ValueAvg", "DerivAvg"):
                # A unit whose input rounds to another side of 0 counts in one row in 128.
                assert relative_error(ours[name].values[token], theirs[name].values[token]) < 1e-4, (name, token)
            assert ours[name].values["Count"] == theirs[name].values["Count"]


def test_without_natural_gradient_it_is_another_training(tmp_path: Path) -> None:
    (_, model), *_ = trained("dnn", "m0", tmp_path, natural_gradient=False)
    theirs = arrays(read_nnet(golden(f"{FOLDER}/dnn/1.m0.raw")))
    ours = parameters(model)
    assert relative_error(ours["output.affine", "LinearParams"], theirs["output.affine", "LinearParams"]) > 0.01
