"""Repeats what a real nnet3-chain-train and nnet3-chain-compute-prob did, with the learner's own step and loader."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kaldi_mpi.chain.denominator import Denominator
from kaldi_mpi.chain.denominator_graph import denominator_graph
from kaldi_mpi.chain.objective import ChainOptions
from kaldi_mpi.formats.fst import read_fst
from kaldi_mpi.formats.tokens import read_matrix
from kaldi_mpi.learner.batches import DeviceBatches
from kaldi_mpi.learner.chain_objective import LfMmi
from kaldi_mpi.learner.faults import Injector
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.objective import DerivativeTimes
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.state import TrainingState
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.learner.validate import Pass, lda_statistics
from kaldi_mpi.loader import ChainExamples, MinibatchReader, MinibatchRule
from kaldi_mpi.models import AcousticModel, build_model
from kaldi_mpi.models.chance import Chance
from kaldi_mpi.models.xconfig import parse_xconfig_text
from kaldi_mpi.nnet3 import read_am, read_nnet, to_torch
from kaldi_mpi.transport.world import SoloWorld
from tests.learner.golden_training import NEVER, FixedRate, arrays, parameters
from tests.paths import golden

PDFS = 56
_CHUNKS = 8


class Recorded(Chance):
    """What chance decided in a run of Kaldi, by minibatch and component (the .chance file)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.minibatch = 0
        lines = path.read_text().splitlines() if path.exists() else []
        self._done = {(int(line.split()[1]), line.split()[2]) for line in lines}

    def decide(self, component: str, what: str, probability: float) -> bool:
        return what == "orthonormal" and (self.minibatch, component) in self._done

    decide_together = decide


@functools.lru_cache(maxsize=4)
def denominator(leaky: float) -> Denominator:
    path = golden("chain/den.fst")
    return Denominator(denominator_graph(read_fst(path), PDFS, str(path)), leaky)


def options_of(words: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z0-9-]+)=(\S+)", words))


def objective_of(options: dict[str, str]) -> LfMmi:
    leaky = float(options.get("leaky-hmm-coefficient", "1e-5"))
    chosen = ChainOptions(
        l2_regularize=float(options.get("l2-regularize", 0)),
        xent_regularize=float(options.get("xent-regularize", 0)),
        leaky_hmm_coefficient=leaky,
        apply_deriv_weights=options.get("apply-deriv-weights", "true") == "true",
    )
    return LfMmi(denominator(leaky), chosen)


def batches(archive: str, size: int) -> DeviceBatches:
    """Minibatches of `size` in the archive's order, without frame shifts."""
    examples = ChainExamples.open(golden(f"chain/{archive}"), shifts=False)
    return DeviceBatches(MinibatchReader(examples, None, MinibatchRule.of(size), seed=0, shuffle=False, num_epochs=1))


def trained(name: str, count: int, folder: Path) -> tuple[AcousticModel, AcousticModel, str]:
    """The model after `count` minibatches of a case, that of its start, and the learner's log."""
    words = golden(f"chain/train/{name}.{count}.opts").read_text()
    net, archive = words.split()[:2]
    options = options_of(words)
    model, start = (to_torch(read_nnet(golden(f"chain/{net}"))) for _ in range(2))
    chance = Recorded(golden("chain/train/start.1.opts").with_name(f"{name}.{count}.chance"))
    flat = FlatParameters.of_model(model)
    model.use_natural_gradient()
    model.train()
    model.mode.chance = chance
    for module in model.by_name.values():
        module.zero_statistics()
    (folder / "log").mkdir(parents=True, exist_ok=True)
    own = next(c.learning_rate / c.learning_rate_factor for c in model.by_name.values() if c.updatable)
    rate = FixedRate(own, own, NEVER)
    momentum, limit = float(options.get("momentum", 0)), float(options.get("max-param-change", 2))
    state = TrainingState(model, flat, KaldiSgd(flat, momentum, limit), [])
    log = TrainingLog(folder, 0, rate, 1.0)
    learner = LearnerStep(
        state, rate, 1, DerivativeTimes(), log, Injector((), 0),
        l2_factor=float(options.get("l2-regularize-factor", 1)), objective=objective_of(options),
    )  # fmt: skip
    with batches(archive, _CHUNKS) as given:
        for number, batch in zip(range(count), given, strict=False):
            chance.minibatch = number
            learner.begin(batch, len(batch.labels))
            learner.compute(batch)
            learner.update(None, together=False)
    log.end_iteration(0)
    return model, start, (folder / "log" / "train.0.1.log").read_text()


def spread() -> dict[str, tuple[float, float]]:
    """How far Kaldi with other BLAS kernels is from itself: of the parameters, of their change."""
    lines = golden("chain/train/spread.txt").read_text().splitlines()[1:]
    return {line.split()[0]: (float(line.split()[1]), float(line.split()[2])) for line in lines}


def deviations(
    ours: dict[tuple[str, str], NDArray[np.float32]],
    theirs: dict[tuple[str, str], NDArray[np.float32]],
    begun: dict[tuple[str, str], NDArray[np.float32]],
) -> tuple[float, float, Any]:
    """The largest difference over the largest parameter, that over the largest change, and where it is."""
    worst: tuple[float, float, Any] = (0.0, 0.0, None)
    names = ("LinearParams", "BiasParams", "Params")
    for key, value in theirs.items():
        if key[1] not in names or not value.size:
            continue
        off = float(np.abs(ours[key] - value).max())
        change = float(np.abs(value - begun[key]).max())
        if change:
            worst = max(worst, (off / change, off / float(np.abs(value).max()), key), key=lambda found: found[0])
    return worst[1], worst[0], worst[2]


CASES = [
    ("plain", 1), ("plain_xent", 1), ("free", 1), ("free", 4), ("free", 16), ("start", 1), ("start", 4), ("start", 16),
    ("derivw", 4), ("zero", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "count"), CASES)
def test_training_is_kaldis(name: str, count: int, tmp_path: Path) -> None:
    """Within ten times what Kaldi with other BLAS kernels is from itself."""
    model, start, log = trained(name, count, tmp_path)
    theirs = read_nnet(golden(f"chain/train/{name}.{count}.raw"))
    of_parameters, of_change, where = deviations(parameters(model), arrays(theirs), parameters(start))
    allowed = spread()[f"{name}.{count}"]
    assert of_parameters <= 10 * allowed[0] and of_change <= 10 * allowed[1], (of_parameters, of_change, where, allowed)
    said = golden(f"chain/train/{name}.{count}.log").read_text()
    pattern = (
        r"Overall average objective function for '([a-z-]+)' is ([^ ]+)(?: \+ ([^ ]+) = ([^ ]+))? over (\d+) frames"
    )
    for ours, other in zip(sorted(re.findall(pattern, log)), sorted(re.findall(pattern, said)), strict=True):
        assert ours[0] == other[0] and ours[4] == other[4]
        np.testing.assert_allclose([float(n or 0) for n in ours[1:4]], [float(n or 0) for n in other[1:4]], rtol=2e-4)


def table() -> Iterator[tuple[str, str, str, str]]:
    """(net, examples, options, the line) of prob/table.txt."""
    try:
        lines = golden("chain/prob/table.txt").read_text().splitlines()
    except pytest.skip.Exception:
        return
    for line in lines:
        match = re.fullmatch(r"(\S+) (\S+) \[(.*)\] (Overall .*)", line)
        assert match is not None, line
        yield match[1], match[2], match[3], match[4]


def test_every_figure_of_compute_prob() -> None:
    rows = list(table())
    if not rows:
        pytest.skip("needs shared/golden/chain, which is not beside this checkout")
    assert len(rows) == 26
    for net, archive, words, line in rows:
        options = options_of(words)
        path = golden(f"chain/{'model/' if net.endswith('.mdl') else ''}{net}")
        model = to_torch(read_am(path).nnet if net.endswith(".mdl") else read_nnet(path))
        model.eval()
        with (
            batches(archive, 1) as given,
            model.mode.evaluating(dropout=False)
            if (options.get("batchnorm-test-mode") == "false")
            else torch.no_grad(),
        ):
            score = objective_of(options).score(model, given, SoloWorld())
        theirs = re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", line)
        ours = next(mine for mine in score.lines() if mine.split("'")[1] == line.split("'")[1])
        found = re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", ours)
        np.testing.assert_allclose([float(n) for n in found], [float(n) for n in theirs], rtol=1e-5, err_msg=line)


def test_lda_statistics_are_kaldis() -> None:
    """Of the golden recipe with an LDA layer: the supervision's occupation is a frame's label."""
    config = parse_xconfig_text(
        "input dim=40 name=input\n"
        "fixed-affine-layer name=lda input=Append(-1,0,1) affine-transform-file=lda.mat\n"
        f"output-layer name=output include-log-softmax=false dim={PDFS}\n"
    )
    model = build_model(config, seed=0, transforms={"lda.mat": np.eye(120, 121, dtype=np.float32)})
    examples = ChainExamples.open(golden("chain/train/egs.ark"), shifts=False)

    class Data:
        def batches(self, *_: object, **__: object) -> DeviceBatches:
            return batches("train/egs.ark", 16)

    how = Pass(Data(), SoloWorld(), torch.device("cpu"))  # type: ignore[arg-type]
    stats = lda_statistics(model, "lda", examples, how, 10**6, 0)
    text = golden("chain/lda/stats.txt").read_text()
    counts = np.array([float(word) for word in re.findall(r"<ZERO_ACCS>  \[ ([^\]]*)\]", text)[0].split()])
    # Features are rounded to 1/64 here: sums over them hold for any number of learners.
    np.testing.assert_allclose(stats.counts, counts, rtol=1e-5)
    # Rows have either sign.
    ours, theirs = (matrix.T @ matrix for matrix in (stats.estimate(), read_matrix(golden("chain/lda/lda.mat"))))
    assert float(np.abs(ours - theirs).max()) < 2e-3 * float(np.abs(theirs).max())
