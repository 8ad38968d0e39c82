"""Minibatches of networks of every kind, trained by a real nnet3-train and by the learner's own step.

golden/training has fourteen networks in depth; here is one of each family that it lacks, from nnet3-init on, with all
that chance decides switched off: no dropout, no self-repair, no constraint.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kaldi_mpi.formats.tokens import write_matrix
from kaldi_mpi.learner.faults import Injector
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.objective import DerivativeTimes
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.state import TrainingState
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.nnet3 import read_nnet, to_torch
from tests.kaldi import nnet3
from tests.learner.golden_training import NEVER, FixedRate, arrays, minibatches, parameters
from tests.models.kaldi_xconfig import kaldi_lines
from tests.paths import golden

pytestmark = pytest.mark.kaldi

RATE, COUNT = 0.002, 3
INPUT = "input dim=12 name=input\n"
OUTPUT = "output-layer name=output dim=15 max-change=1.5 param-stddev=0.2\n"  # not 0: all below it learns at once
RECURRENT = "cell-dim=16 delay=-2"
PROJECTED = f"{RECURRENT} recurrent-projection-dim=4 non-recurrent-projection-dim=4"

# name -> layers; examples of recurrent networks reach further to the left.
RNN = {
    "gru": f"gru-layer name=a {RECURRENT}\n",
    "pgru": f"pgru-layer name=a {PROJECTED}\n",
    "norm-pgru": f"norm-pgru-layer name=a {PROJECTED} dropout-proportion=0.0\n",
    "opgru": f"opgru-layer name=a {PROJECTED}\n",
    "norm-opgru": f"norm-opgru-layer name=a {PROJECTED} dropout-proportion=0.0\n",
    "fast-gru": f"fast-gru-layer name=a {RECURRENT}\n",
    "fast-pgru": f"fast-pgru-layer name=a {PROJECTED}\n",
    "fast-norm-pgru": f"fast-norm-pgru-layer name=a {PROJECTED} dropout-proportion=0.0\n",
    "fast-opgru": f"fast-opgru-layer name=a {PROJECTED}\n",
    "fast-norm-opgru": f"fast-norm-opgru-layer name=a {PROJECTED} dropout-proportion=0.0\n",
    "lstm": f"lstm-layer name=a {RECURRENT} decay-time=20\n",
    "lstmp": f"lstmp-layer name=a {PROJECTED} dropout-proportion=0.0\n",
    "lstm-batchnorm": f"fast-lstm-batchnorm-layer name=a {RECURRENT}\n",
    "lstmb": f"lstmb-layer name=a {RECURRENT} bottleneck-dim=8\n",
    "fast-lstmp-dropout": f"fast-lstmp-layer name=a {PROJECTED} dropout-proportion=0.0\n",
}
FF = {
    "stats": "relu-layer name=a dim=16\nstats-layer name=b config=mean+stddev(-4:1:2:4)\n",
    "stats-count": "relu-layer name=a dim=16\nstats-layer name=b config=mean+count(-4:2:2:4) input=a\n",
    "attention": (
        "relu-layer name=a dim=24\n"
        "attention-relu-batchnorm-layer name=b num-heads=2 value-dim=6 key-dim=4 num-left-inputs=2 num-right-inputs=1 "
        "num-left-inputs-required=1 num-right-inputs-required=1 time-stride=2\n"
    ),
    "attention-renorm": (
        "relu-layer name=a dim=24\n"
        "attention-renorm-layer name=b num-heads=3 value-dim=6 key-dim=4 num-left-inputs=1 num-right-inputs=1 "
        "num-left-inputs-required=0 num-right-inputs-required=0 time-stride=1 output-context=false\n"
    ),
    "conv-renorm": (
        "conv-relu-renorm-layer name=a height-in=12 height-out=6 height-subsample-out=2 num-filters-out=4 "
        "height-offsets=-1,0,1 time-offsets=-1,0,1 required-time-offsets=0\n"
    ),
    "res-block": (
        "conv-relu-batchnorm-layer name=a height-in=12 height-out=12 num-filters-out=4 height-offsets=-1,0,1 "
        "time-offsets=0\n"
        "res-block name=b num-filters=4 height=12 time-period=1 num-bottleneck-filters=2\n"
        "channel-average-layer name=c input=Append(1,3) dim=12\n"
    ),
    "idct": "idct-layer name=a dim=12 cepstral-lifter=22 affine-transform-file=IDCT\nrelu-layer name=b dim=16\n",
    "delta": "delta-layer name=a\nrelu-layer name=b dim=16\n",
    "so": "relu-batchnorm-so-layer name=a dim=16\ntanh-layer name=b dim=16\nsigmoid-layer name=c dim=12\n",
    "linear": "linear-component name=a dim=8\naffine-component name=b dim=16 l2-regularize=0.01\n"
    "scale-component name=c\nbatchnorm-component name=d\n",
    "tdnnf": "tdnnf-layer name=a dim=12 bottleneck-dim=6 time-stride=2\n",
    "xent": "relu-layer name=a dim=16\nprefinal-layer name=b big-dim=16 small-dim=8\n",
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str] | str]:
    """final.config of every network, as Kaldi's own modules make it."""
    nets = {**RNN, **FF}
    texts = [INPUT + text.replace("IDCT", "idct.mat") + OUTPUT for text in nets.values()]
    return dict(zip(nets, kaldi_lines(texts, tmp_path_factory.mktemp("configs")), strict=True))


def without_chance(line: str) -> str:
    """The line with nothing in it that a draw decides."""
    line = re.sub(r"self-repair-scale=\S+", "", re.sub(r"orthonormal-constraint=\S+", "", line))
    repairs = ("Relu", "Sigmoid", "Tanh", "RectifiedLinear", "Nonlinearity")
    if line.startswith("component name=") and any(f"{word}Component" in line for word in repairs):
        line += " self-repair-scale=0.0"
    return line


@pytest.mark.parametrize("name", [*RNN, *FF])
def test_minibatches_are_nnet3_trains(configs: dict[str, list[str] | str], tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    lines = configs[name]
    assert isinstance(lines, list), lines
    rng = np.random.default_rng(2)
    write_matrix(tmp_path / "idct.mat", rng.standard_normal((12, 13)) * 0.3)
    text = "\n".join(without_chance(line) for line in lines).replace("idct.mat", str(tmp_path / "idct.mat"))
    (tmp_path / "final.config").write_text(text + "\n")
    nnet3("nnet3-init", "--srand=5", str(tmp_path / "final.config"), str(tmp_path / "init.raw"))
    nnet3("nnet3-copy", f"--learning-rate={RATE}", str(tmp_path / "init.raw"), str(tmp_path / "0.raw"))
    archive = golden(f"training/{'rnn' if name in RNN else 'ff'}.ark")
    nnet3("nnet3-copy-egs", f"ark:{archive}", f"ark,scp:{tmp_path}/egs.ark,{tmp_path}/egs.scp")
    first = (tmp_path / "egs.scp").read_text().splitlines(keepends=True)[:COUNT]
    (tmp_path / "first.scp").write_text("".join(first))
    nnet3(
        "nnet3-train", "--use-gpu=no", "--srand=7", "--momentum=0.3", "--max-param-change=2.0",
        str(tmp_path / "0.raw"), f"scp:{tmp_path}/first.scp", str(tmp_path / "1.raw"),
    )  # fmt: skip

    model = train(tmp_path, archive.name)
    before, theirs, ours = (
        arrays(read_nnet(tmp_path / "0.raw")), arrays(read_nnet(tmp_path / "1.raw")), parameters(model)
    )  # fmt: skip
    checked = 0
    for key, value in theirs.items():
        if key[1] not in ("LinearParams", "BiasParams", "Params", "Scales", "Offsets", "StatsMean", "StatsVar", "w_h"):
            continue
        if not value.size:
            continue
        change = np.abs(value - before[key]).max() if value.shape == before[key].shape else np.abs(value).max()
        if not change:
            continue
        checked += 1
        off = np.abs(ours[key] - value).max()
        assert off <= bound(name, key) * change + 1e-6, (key, off, change)
    assert checked >= 2


def bound(name: str, key: tuple[str, str]) -> float:
    """How far from Kaldi's, by the largest change. Seen: below 0.001, and more in what is ill-conditioned.

    Peepholes are (features that differ by 1e-7 move lstmb's by up to 6 %), and convolutions of few filters
    (golden/training says so), and what is below an attention's softmax.
    """
    if key[0].endswith("lstm_nonlin"):
        return 0.1
    if name in ("attention", "res-block"):
        return 0.03
    return 0.002


def train(folder: Path, archive: str) -> AcousticModel:
    """The learner's own steps over the same minibatches."""
    model = to_torch(read_nnet(folder / "0.raw"))
    flat = FlatParameters.of_model(model)
    model.use_natural_gradient()
    model.train()
    for module in model.by_name.values():
        module.zero_statistics()
    rate = FixedRate(RATE, RATE, NEVER)
    (folder / "log").mkdir()
    state = TrainingState(model, flat, KaldiSgd(flat, 0.3, 2.0), [])
    log = TrainingLog(folder, 0, rate, 1.0)
    learner = LearnerStep(state, rate, 1, DerivativeTimes(), log, Injector((), 0))
    for batch in minibatches(archive)[:COUNT]:
        learner.begin(batch, len(batch.labels))
        learner.compute(batch)
        learner.update(None, together=False)
    return model
