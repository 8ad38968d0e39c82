"""Trainings of feed-forward networks: minibatches are of single frames, out of features or of examples; passes not."""

from __future__ import annotations

import collections
import json
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.batches import Batch
from kaldi_mpi.learner.options import parse
from kaldi_mpi.learner.run import train
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.learner.validate import Pass, compute_prob
from kaldi_mpi.loader import ChunkShape, Corpus, Examples, MinibatchRule
from kaldi_mpi.nnet3 import read_nnet
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import SoloWorld
from tests.egs_data import Chunk, chunk_example, float_matrix, write_egs
from tests.learner.opened import open_all, open_data
from tests.paths import kaldi_root
from tests.toy import FEAT_DIM, NUM_PDFS, Toy, make_toy

CPU = torch.device("cpu")
XCONFIG = f"""\
input dim={FEAT_DIM} name=input
relu-layer name=tdnn1 dim=8 input=Append(-2,0,1)
relu-layer name=tdnn2 dim=8 input=Append(-1,0,3)
output-layer name=output dim={NUM_PDFS} max-change=1.5
"""
LEFT, RIGHT, WIDTH = 3, 4, 8


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


def options(toy: Toy, name: str, *more: str) -> list[str]:
    """Of a training on features."""
    folder = toy.experiment(name)
    (folder / "configs" / "network.xconfig").write_text(XCONFIG)
    theirs = ("--egs.chunk", "--trainer.rnn", "--trainer.samples")
    kept = [option for option in toy.options(folder) if not option.startswith(theirs)]
    size = ["--trainer.optimization.minibatch-size=64", "--trainer.samples-per-iter=640"]
    return [*kept, f"--egs.frames-per-eg={WIDTH}", *size, *more]


@pytest.fixture(scope="module")
def egs(toy: Toy) -> Path:
    """Examples of 8 frames, with more context than the network needs, out of the features."""
    data, _ = open_data(parse(options(toy, "cut", "--egs.chunk-left-context=2", "--egs.chunk-right-context=1")))
    folder = toy.work / "egs"
    (folder / "info").mkdir(parents=True)
    parts = {"egs.1.ark": data.train, "valid_diagnostic.egs": data.valid, "train_diagnostic.egs": data.diagnostic}
    for name, source in parts.items():
        examples: dict[str, bytes] = {}
        with data.batches(source, CPU, rank=0, size=1, trains=False, shuffle=False, num_epochs=1) as batches:
            for batch in batches:
                for feats, labels in zip(batch.feats.numpy().copy(), batch.labels.tolist(), strict=True):
                    pairs = [[] if label < 0 else [(label, 1.0)] for label in labels]
                    chunk = Chunk(feats, batch.shape.left, pairs, matrices={"input": float_matrix(feats)})
                    examples[f"eg-{len(examples)}"] = chunk_example(chunk, num_pdfs=NUM_PDFS)
        write_egs(folder / name, examples)
    info = {
        "num_archives": 1, "feat_dim": FEAT_DIM, "ivector_dim": 0, "left_context": LEFT + 2, "right_context": RIGHT + 1,
        "left_context_initial": -1, "right_context_final": -1, "frames_per_eg": WIDTH,
    }  # fmt: skip
    for key, value in info.items():
        (folder / "info" / key).write_text(f"{value}\n")
    (folder / "cmvn_opts").write_text("--norm-means=true\n")
    return folder


@pytest.mark.parametrize(("strategy", "learners"), [("allreduce", 3), ("expair", 2)])
def test_every_frame_is_trained_on_once_an_epoch(
    toy: Toy, egs: Path, strategy: str, learners: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same frames with the same rows, whether out of features or of examples."""
    seen: collections.Counter[bytes] = collections.Counter()
    lock, compute = threading.Lock(), LearnerStep.compute_gradients

    def record(self: LearnerStep, batch: Batch, **how: bool) -> None:
        assert batch.shape == ChunkShape(1, LEFT, RIGHT) and batch.frames == len(batch.labels) <= 64
        with lock:
            parts = zip(batch.feats.numpy(), batch.labels.numpy(), strict=True)
            seen.update(feats.tobytes() + labels.tobytes() for feats, labels in parts)
        compute(self, batch, **how)

    monkeypatch.setattr(LearnerStep, "compute_gradients", record)
    of_source = []
    for name, more in (("features", []), ("examples", [f"--egs.dir={egs}"])):
        given = options(toy, f"{name}-{strategy}", f"--strategy={strategy}", *more)
        run_world(learners, lambda world, given=given: train(parse(given), world))  # type: ignore[misc]
        summary = json.loads((toy.work / f"{name}-{strategy}" / "log" / "summary.json").read_text())
        frames = sum(learner["own_frames"] for learner in summary["learners"])
        valid = [v["valid"] for v in summary["validations"]]
        assert valid[-1] > valid[0] + 0.1
        assert len(valid) > 3, "iterations are of 640 frames a learner"
        assert frames == sum(seen.values()) and frames % 2 == 0
        assert all(count % 2 == 0 for count in seen.values())
        of_source.append(seen.copy())
        seen.clear()
    assert of_source[0] == of_source[1]


def test_passes_take_whole_chunks_and_score_the_same(toy: Toy, egs: Path) -> None:
    data, network = open_all(parse(options(toy, "passes")))
    examples, _ = open_data(parse(options(toy, "passes-egs", f"--egs.dir={egs}")))
    whole = ChunkShape(WIDTH, LEFT, RIGHT)
    assert (data.chunking, data.single, data.train_chunking) == (whole, ChunkShape(1, LEFT, RIGHT), data.single)
    assert data.whole_minibatch == MinibatchRule.of(8)
    assert isinstance(data.train, Corpus) and isinstance(examples.train, Examples)
    assert data.plan(1).num_chunks == examples.plan(1).num_chunks == data.train.total_frames
    assert data.usual_minibatch(data.plan(2)) == examples.usual_minibatch(examples.plan(2)) == 64
    how = Pass(data, SoloWorld(), CPU)
    assert {batch.shape for batch in how.batches(data.valid)} == {whole}
    network.model.eval()
    total, frames = 0.0, 0
    with data.batches(data.valid, CPU, rank=0, size=1, num_epochs=1) as batches, torch.no_grad():
        for batch in batches:
            output = network.model(batch.feats, batch.first, 1)
            total += output[:, 0].gather(1, batch.labels).double().sum().item()
            frames += batch.frames
    scores = [compute_prob(network.model, d.valid, Pass(d, SoloWorld(), CPU)) for d in (data, examples)]
    for score in scores:
        assert score.frames == frames
        assert score.log_likelihood == pytest.approx(total / frames, rel=1e-6)


def test_examples_of_less_context_or_other_widths_are_refused(toy: Toy, egs: Path) -> None:
    given = options(toy, "refused", f"--egs.dir={egs}")
    with pytest.raises(ConfigError, match="have contexts of 5 and 5 frames; 6 and 4 are needed"):
        train(parse([*given, "--egs.chunk-left-context=3"]), SoloWorld())
    with pytest.raises(ConfigError, match=r"are of 8 frames, and --egs.frames-per-eg asks for 7"):
        train(parse([*given, "--egs.frames-per-eg=7"]), SoloWorld())


@pytest.mark.kaldi
def test_batch_norm_is_computed_anew_on_minibatches_as_large_as_nnet3_combines(toy: Toy, egs: Path) -> None:
    """Of whole examples, as many as a minibatch of training has frames: of fewer, which are alike, means are others."""
    given = options(toy, "batch-norm", f"--egs.dir={egs}", "--trainer.num-epochs=1")
    folder = toy.work / "batch-norm"
    (folder / "configs" / "network.xconfig").write_text(XCONFIG.replace("relu-layer", "relu-batchnorm-layer"))
    train(parse(given), SoloWorld())
    programs = kaldi_root() / "src/nnet3bin"
    command = (
        f"{programs}/nnet3-am-copy --raw=true {folder}/final.mdl {folder}/0.raw && {programs}/nnet3-combine "
        f"--use-gpu=no {folder}/0.raw 'ark:{programs}/nnet3-merge-egs --minibatch-size=1:64 "
        f"ark:{egs}/train_diagnostic.egs ark:- |' {folder}/1.raw"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = read_nnet(folder / "0.raw"), read_nnet(folder / "1.raw")
    for name in ("tdnn1.batchnorm", "tdnn2.batchnorm"):
        mine, other = (net.components[name].values for net in (ours, theirs))
        assert mine["Count"] == other["Count"]
        for token in ("StatsMean", "StatsVar"):
            np.testing.assert_allclose(mine[token], other[token], rtol=1e-4, atol=1e-5, err_msg=f"{name} {token}")
