"""Training on an egs directory: the chunks of features give the same, checks as Kaldi's, files that it leaves."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.tokens import Reader
from kaldi_mpi.learner.batches import Batch
from kaldi_mpi.learner.dataset import Dataset
from kaldi_mpi.learner.options import parse
from kaldi_mpi.learner.run import train
from kaldi_mpi.learner.scores import Score
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.learner.validate import Pass, compute_prob, lda_statistics, mean_posterior
from kaldi_mpi.loader import Chunking
from kaldi_mpi.loader.examples import Examples
from kaldi_mpi.models import build_model, parse_xconfig
from kaldi_mpi.nnet3 import read_am, to_torch
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import SoloWorld
from tests.egs_data import Chunk, chunk_example, float_matrix, merged_example, write_egs
from tests.learner.opened import open_all, open_data
from tests.paths import kaldi_root
from tests.toy import NUM_PDFS, Toy, make_toy

CPU = torch.device("cpu")
CHUNKS = Chunking((10, 7), left=6, right=3)
CUT = ("--egs.chunk-width=10,7", "--egs.chunk-left-context=6")


@dataclasses.dataclass(frozen=True)
class Egs:
    """A toy with examples cut out of its features."""

    toy: Toy
    egs: Path

    def options(self, folder: Path, *more: str) -> list[str]:
        """Of a training on the examples alone."""
        kept = [option for option in self.toy.options(folder) if not option.startswith("--feat")]
        return [*kept, f"--egs.dir={self.egs}", *CUT, *more]


def cut(data: Dataset, source: Any, soften: bool) -> Iterator[Chunk]:
    """The chunks of a source; softened, some frames have two labels and some a weight below 1."""
    rng = np.random.default_rng(1)
    with data.batches(source, CPU, rank=0, size=1, shuffle=False, num_epochs=1) as batches:
        for batch in batches:
            for feats, labels in zip(batch.feats.numpy().copy(), batch.labels.tolist(), strict=True):
                pairs = [[] if label < 0 else [(label, 1.0)] for label in labels]
                if soften:
                    kind = rng.integers(0, 4, len(labels))
                    for row, which in zip(pairs, kind, strict=True):
                        if row and which == 1:
                            row[:] = [(row[0][0], 0.5)]
                        elif row and which == 2:
                            row[:] = sorted([(row[0][0], 0.75), ((row[0][0] + 1) % NUM_PDFS, 0.25)])
                yield Chunk(feats, batch.shape.left, pairs, matrices={"input": float_matrix(feats)})


def write(path: Path, chunks: Iterable[Chunk], merged: int = 1) -> None:
    """An archive of examples, with `merged` of the same shape in one."""
    together: dict[str, bytes] = {}
    waiting: dict[tuple[int, int], list[Chunk]] = {}
    for number, chunk in enumerate(chunks):
        group = waiting.setdefault((len(chunk.feats), chunk.left), [])
        group.append(chunk)
        if len(group) == merged:
            data = merged_example(group, num_pdfs=NUM_PDFS) if merged > 1 else chunk_example(chunk, num_pdfs=NUM_PDFS)
            together[f"eg-{number}"] = data
            group.clear()
    for number, group in enumerate(waiting.values()):
        together |= {f"rest-{number}-{i}": chunk_example(chunk, num_pdfs=NUM_PDFS) for i, chunk in enumerate(group)}
    write_egs(path, together)


def make_egs(toy: Toy, name: str, soften: bool = False) -> Egs:
    data, _ = open_data(parse(toy.options(toy.experiment(f"cut-{name}"), *CUT)))
    assert data.chunking == CHUNKS
    folder = toy.work / name
    (folder / "info").mkdir(parents=True)
    chunks = list(cut(data, data.train, soften))
    half = len(chunks) // 2
    write(folder / "egs.1.ark", chunks[:half])
    write(folder / "egs.2.ark", chunks[half:], merged=3)
    write(folder / "valid_diagnostic.egs", cut(data, data.valid, soften))
    write(folder / "train_diagnostic.egs", cut(data, data.diagnostic, soften), merged=4)
    info = {
        "num_archives": 2, "feat_dim": 6, "ivector_dim": 0, "left_context": 6, "right_context": 3,
        "left_context_initial": -1, "right_context_final": -1, "frames_per_eg": "10,7",
    }  # fmt: skip
    for key, value in info.items():
        (folder / "info" / key).write_text(f"{value}\n")
    (folder / "cmvn_opts").write_text("--norm-means=true\n")
    return Egs(toy, folder)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def hard(toy: Toy) -> Egs:
    return make_egs(toy, "hard")


@pytest.fixture(scope="module")
def soft(toy: Toy) -> Egs:
    return make_egs(toy, "soft", soften=True)


def test_examples_score_as_the_features_that_they_were_cut_from(hard: Egs) -> None:
    toy = hard.toy
    options = parse(toy.options(toy.experiment("scores"), *CUT))
    data, network = open_all(options)
    model = network.model
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.add_(noise, alpha=0.3)
    examples, _ = open_data(parse(hard.options(Path(options.dir))))
    assert examples.train.num_units > 100 and examples.train.total_frames == data.train.total_frames
    of_features, of_examples = (Pass(part, SoloWorld(), CPU) for part in (data, examples))
    for name in ("train", "valid", "diagnostic"):
        one = compute_prob(model, getattr(data, name), of_features)
        two = compute_prob(model, getattr(examples, name), of_examples)
        assert one.frames == two.frames
        assert isinstance(one, Score) and isinstance(two, Score) and one.accuracy == pytest.approx(two.accuracy)
        assert one.log_likelihood == pytest.approx(two.log_likelihood, rel=1e-6)
    one_prior, other_prior = (
        mean_posterior(model, s.train, how, 10**6, 0) for s, how in ((data, of_features), (examples, of_examples))
    )
    np.testing.assert_allclose(one_prior, other_prior, rtol=1e-6)
    stats = [
        lda_statistics(model, "lda", s.train, how, 10**6, 0)
        for s, how in ((data, of_features), (examples, of_examples))
    ]
    for one_, two_ in zip(*(s.arrays() for s in stats), strict=True):
        assert np.array_equal(one_, two_)  # sums of numbers that float64 holds exactly


@pytest.mark.parametrize(("strategy", "learners"), [("allreduce", 3), ("expair", 3)])
def test_every_example_is_trained_on_once_an_epoch(
    soft: Egs, strategy: str, learners: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: collections.Counter[bytes] = collections.Counter()
    lock, compute = threading.Lock(), LearnerStep.compute_gradients

    def record(self: LearnerStep, batch: Batch, **how: bool) -> None:
        assert batch.weights is not None and batch.labels.shape == batch.weights.shape == (*batch.labels.shape[:2], 2)
        with lock:
            parts = zip(batch.feats.numpy(), batch.labels.numpy(), batch.weights.numpy(), strict=True)
            seen.update(b"".join(part.tobytes() for part in chunk) for chunk in parts)
        compute(self, batch, **how)

    monkeypatch.setattr(LearnerStep, "compute_gradients", record)
    folder = soft.toy.experiment(f"{strategy}-{learners}")
    options = parse(soft.options(folder, f"--strategy={strategy}"))
    run_world(learners, lambda world: train(options, world))
    examples = Examples.open(soft.egs)
    chunks = [examples.chunk(unit) for unit in range(examples.num_units)]
    wanted = collections.Counter(c.feats.tobytes() + c.labels.tobytes() + c.weights.tobytes() for c in chunks)  # type: ignore[union-attr]
    assert seen == {chunk: 2 * count for chunk, count in wanted.items()}
    summary = json.loads((folder / "log" / "summary.json").read_text())
    assert sum(learner["own_frames"] for learner in summary["learners"]) == 2 * examples.total_frames
    valid = [v["valid"] for v in summary["validations"]]
    assert valid[-1] > valid[0] + 0.1
    assert to_torch(read_am(folder / "final.mdl").nnet).output_dim == NUM_PDFS
    assert (folder / "cmvn_opts").read_text() == "--norm-means=true\n", "what the directory says of its features"
    assert (folder / "tree").exists()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--egs.chunk-left-context=7", "have contexts of 6 and 3 frames; 7 and 3 are needed: 0 and 3 by the network"),
        ("--egs.chunk-right-context=1", "have contexts of 6 and 3 frames; 6 and 4 are needed"),
        (
            "--egs.chunk-left-context-initial=0",
            "contexts of -1 and -1 frames at the ends of utterances, .* ask for 0 and",
        ),
        ("--egs.chunk-width=10", "are of 10,7 frames, and --egs.chunk-width asks for 10"),
    ],
)
def test_examples_for_another_network_are_refused(hard: Egs, option: str, says: str) -> None:
    folder = hard.toy.work / "refused"
    if not folder.exists():
        hard.toy.experiment("refused")
    with pytest.raises(ConfigError, match=says):
        train(parse(hard.options(folder, option)), SoloWorld())


def test_a_directory_must_be_whole_and_fit(hard: Egs, tmp_path: Path) -> None:
    folder = hard.toy.experiment("broken")
    for name in ("valid_diagnostic.egs", "info/left_context"):
        (hard.egs / name).rename(tmp_path / "away")
        with pytest.raises(DataError, match=rf"{re.escape(name)}: no such file \(needed in --egs\.dir\)"):
            train(parse(hard.options(folder)), SoloWorld())
        (tmp_path / "away").rename(hard.egs / name)
    text = (folder / "configs" / "network.xconfig").read_text()
    (folder / "configs" / "network.xconfig").write_text(text.replace("dim=6 name=input", "dim=5 name=input"))
    with pytest.raises(ConfigError, match="the input has dim=5, but the features have 6"):
        train(parse(hard.options(folder)), SoloWorld())


@pytest.mark.kaldi
def test_kaldi_reads_the_model_and_gives_the_same_scores(soft: Egs) -> None:
    """nnet3-compute-prob, with soft targets and weights, over the held-out examples."""
    folder = soft.toy.experiment("kaldi")
    train(parse(soft.options(folder, "--trainer.compute-per-dim-accuracy=true")), SoloWorld())
    path = f"{kaldi_root()}/src/nnet3bin"
    assert "num-parameters" in shell(f"{path}/nnet3-am-info {folder}/final.mdl", folder)
    egs = f"ark:{path}/nnet3-merge-egs --minibatch-size=1:64 ark:{soft.egs}/valid_diagnostic.egs ark:- |"
    theirs = shell(f'{path}/nnet3-compute-prob --compute-per-dim-accuracy=true {folder}/final.mdl "{egs}"', folder)
    ours = (folder / "log" / "compute_prob_valid.final.log").read_text()
    for what in ("log-likelihood", "accuracy"):
        pattern = rf"Overall {what} for 'output' is (\S+) per frame, over (\S+) frames"
        found = [re.search(pattern, text) for text in (ours, theirs)]
        assert found[0] and found[1], theirs
        for group in (1, 2):
            assert float(found[0][group]) == pytest.approx(float(found[1][group]), abs=0.6 if group == 2 else 2e-4)
    by_class = [re.search(r"per-dim accuracy vector for 'output' is +\[ ([^]]+)\]", text) for text in (ours, theirs)]
    assert by_class[0] and by_class[1], theirs
    # The figures are not comparable: Kaldi forgets them with each minibatch, and prints those of the last.
    assert len(by_class[0][1].split()) == len(by_class[1][1].split()) == NUM_PDFS


@pytest.mark.parametrize("combines", ["true", "false"])
def test_a_raw_network_is_trained_on_examples(hard: Egs, combines: str) -> None:
    """As by train_raw_rnn.py: no alignments, no tree; final.raw and the models of iterations, the average output."""
    folder = hard.toy.experiment(f"raw-{combines}")
    kept = [option for option in hard.options(folder) if not option.startswith("--ali-dir")]
    options = ["--program=raw-rnn", *kept, f"--feat-dir={hard.toy.feat_dir}", "--targets-scp=none"]
    more = (f"--trainer.optimization.do-final-combination={combines}", "--compute-average-posteriors=true")
    train(parse([*options, *more, "--cleanup=false"]), SoloWorld())
    assert (folder / "final.raw").exists() and (folder / "1.raw").exists() and not list(folder.glob("*.mdl"))
    average = Reader(folder / "post.final.vec").vector()
    assert average.shape == (NUM_PDFS,) and average.sum() == pytest.approx(1.0, abs=1e-5)
    first, last = (
        float(
            re.findall(
                r"log-likelihood for 'output' is (\S+)", (folder / f"log/compute_prob_valid.{name}.log").read_text()
            )[0]
        )
        for name in ("0", "final")
    )
    assert last > first + 0.2
    (folder / "post.final.vec").unlink()
    train(parse([*options, *more, "--cleanup=false", f"--stage={len(list(folder.glob('[0-9]*.raw')))}"]), SoloWorld())
    assert np.allclose(Reader(folder / "post.final.vec").vector(), average, atol=1e-6), (
        "only the average output is left"
    )


def test_a_quadratic_objective_is_refused(hard: Egs) -> None:
    folder = hard.toy.experiment("quadratic")
    config = folder / "configs/network.xconfig"
    config.write_text(config.read_text().replace("output-delay=2", "output-delay=2 objective-type=quadratic"))
    with pytest.raises(ConfigError, match="output has objective=quadratic; an acoustic model's is linear"):
        train(parse(hard.options(folder)), SoloWorld())


def shell(command: str, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_a_network_of_examples_needs_no_features(hard: Egs) -> None:
    """The xconfig is the only thing that says how the network is; it is built as for features."""
    folder = hard.toy.experiment("no-features")
    options = parse(hard.options(folder))
    assert options.data.feat_dir is None
    data, network = open_data(options)
    assert (folder / "egs.index").exists()
    network.estimate_transforms(data, SoloWorld(), 10**6)
    model = network.model
    config = parse_xconfig(options.xconfig)
    transform = {str(folder / "configs" / "lda.mat"): np.zeros((18, 19), np.float32)}
    same = build_model(config, seed=0, transforms=transform)
    assert [p.shape for p in model.parameters()] == [p.shape for p in same.parameters()]
