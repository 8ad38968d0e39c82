"""What learners do with their data: shapes, weights, i-vectors, copies to a device, options."""

from __future__ import annotations

import builtins
import collections
import dataclasses
import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kaldi_native_io
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.learner.batches import Batch, DeviceBatches, page_locked
from kaldi_mpi.learner.dataset import Dataset
from kaldi_mpi.learner.export import write_cmvn_opts
from kaldi_mpi.learner.objective import label_scores, log_likelihood, right_weight
from kaldi_mpi.learner.options import TrainOptions, parse
from kaldi_mpi.learner.run import train
from kaldi_mpi.learner.schedule import TicketMap
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.loader import (
    Chunking,
    ChunkShape,
    Corpus,
    Minibatch,
    MinibatchRule,
    parse_cmvn_opts,
    read_alignments,
    to_pdfs,
)
from kaldi_mpi.nnet3 import read_am, to_torch
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import SoloWorld
from tests.learner.opened import open_data, transitions_of
from tests.toy import FEAT_DIM, XCONFIG, Toy, make_toy

IVECTOR_DIM, FRAMES = 3, 2091


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    folder = toy.work / "ivectors"
    folder.mkdir()
    rng = np.random.default_rng(4)
    lengths = {key: len(feats) for key, feats in features_of(toy).items()}
    with kaldi_native_io.FloatMatrixWriter(
        f"ark,scp:{folder}/ivector_online.ark,{folder}/ivector_online.scp"
    ) as writer:
        for key, frames in lengths.items():
            writer.write(key, rng.normal(size=(-(-frames // 10), IVECTOR_DIM)).astype(np.float32))
    (folder / "ivector_period").write_text("10\n")
    (folder / "final.ie.id").write_text("8a7d\n")
    return toy


def features_of(toy: Toy) -> dict[str, np.ndarray]:
    with kaldi_native_io.SequentialFloatMatrixReader(f"scp:{toy.feat_dir}/feats.scp") as reader:
        return {key: np.array(value) for key, value in reader}


def experiment(toy: Toy, name: str) -> Path:
    """A model directory whose network takes an i-vector."""
    folder = toy.experiment(name)
    text = XCONFIG.format(lda=folder / "configs" / "lda.mat")
    text = text.replace("Append(-1,0,1)", "Append(-1,0,1,ReplaceIndex(ivector, t, 0))")
    (folder / "configs" / "network.xconfig").write_text(f"input dim={IVECTOR_DIM} name=ivector\n{text}")
    return folder


SEVERAL = (
    "--egs.chunk-width=10,7",
    "--egs.chunk-left-context-initial=2",
    "--trainer.rnn.num-chunk-per-minibatch=16=6/19=4,5/15=3:4",
)


@pytest.mark.parametrize(("strategy", "learners"), [("allreduce", 3), ("adpsgd-random", 3), ("expair", 1)])
def test_every_frame_is_trained_on_once_an_epoch(
    toy: Toy, strategy: str, learners: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two widths, another context at the beginning of utterances, i-vectors, and a rule of minibatch sizes."""
    seen: collections.Counter[tuple[bytes, int]] = collections.Counter()
    shapes: set[tuple[ChunkShape, int]] = set()
    lock, compute = threading.Lock(), LearnerStep.compute_gradients

    def record(self: LearnerStep, batch: Batch, **how: bool) -> None:
        assert batch.ivectors is not None and batch.ivectors.shape == (len(batch.feats), IVECTOR_DIM)
        assert batch.feats.shape[1:] == (batch.shape.rows, FEAT_DIM)
        centre = batch.feats[:, -batch.first :][:, : batch.shape.width].numpy()
        labels = batch.labels.numpy()
        with lock:
            seen.update((frame.tobytes(), int(label)) for frame, label in zip(centre[labels >= 0], labels[labels >= 0]))  # noqa: B905
            shapes.add((batch.shape, len(labels)))
        compute(self, batch, **how)

    monkeypatch.setattr(LearnerStep, "compute_gradients", record)
    folder = experiment(toy, f"{strategy}-{learners}")
    options = parse(
        toy.options(folder, f"--strategy={strategy}", f"--feat.online-ivector-dir={toy.work}/ivectors", *SEVERAL)
    )
    run_world(learners, lambda world: train(options, world))

    held_out = (folder / "valid_uttlist").read_text().split()
    data, _ = open_data(options)
    corpus: Any = data.train
    frames = (
        (frame.tobytes(), int(label))
        for key in corpus.utterances
        for frame, label in zip(corpus.features(key), corpus.labels(key), strict=True)
    )
    assert seen == {frame: 2 * count for frame, count in collections.Counter(frames).items()}
    assert sum(seen.values()) == 2 * FRAMES and not set(corpus.utterances) & set(held_out)
    largest = {shape: max(chunks for other, chunks in shapes if other == shape) for shape, _ in shapes}
    assert {(shape.width, shape.left, shape.right) for shape in largest} >= {(10, 6, 3), (7, 6, 3), (10, 2, 3)}
    assert all(largest[shape] <= {19: 5, 16: 6, 15: 4, 12: 4}[shape.rows] for shape in largest), "the rule"
    assert largest[ChunkShape(10, 6, 3)] == 5

    summary = json.loads((folder / "log" / "summary.json").read_text())
    assert sum(learner["own_frames"] for learner in summary["learners"]) == 2 * FRAMES
    assert all(learner["bytes_read"] > 0 for learner in summary["learners"])
    valid = [v["valid"] for v in summary["validations"]]
    assert valid[-1] > valid[0] + 0.1
    model = to_torch(read_am(folder / "final.mdl").nnet)
    assert model.ivector_dim == IVECTOR_DIM
    assert model.components[0].linear.shape == (3 * FEAT_DIM + IVECTOR_DIM,) * 2
    assert (folder / "final.ie.id").read_text() == "8a7d\n"


def test_data_and_network_must_agree_on_ivectors(toy: Toy) -> None:
    ivectors = f"--feat.online-ivector-dir={toy.work}/ivectors"
    for folder, more, says in (
        (experiment(toy, "needs"), [], r"takes an i-vector of dim=3, but the data have none \(--feat.online-ivec"),
        (toy.experiment("has"), [ivectors], "takes no i-vector, but the data have i-vectors of 3"),
    ):
        with pytest.raises(ConfigError, match=says):
            train(parse(toy.options(folder, *more)), SoloWorld())
    with pytest.raises(DataError, match=r"ivector_online\.scp: no such file \(needed in --feat\.online-ivector-dir\)"):
        missing = f"--feat.online-ivector-dir={toy.feat_dir}"
        train(parse(toy.options(experiment(toy, "missing"), missing)), SoloWorld())


def test_bad_utterances_are_left_out_if_that_is_allowed(
    toy: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose header cannot be read, found at once, and one whose features cannot, found while training."""
    data = tmp_path / "data"
    shutil.copytree(toy.feat_dir, data)
    entries = dict(line.split() for line in (toy.feat_dir / "feats.scp").read_text().splitlines())
    archive = bytearray((data / "feats.ark").read_bytes())
    good = parse(toy.options(toy.experiment("good"), "--trainer.num-epochs=0.1"))
    train(good, SoloWorld())
    held_out = set((Path(good.dir) / "valid_uttlist").read_text().split())
    watched = set((Path(good.dir) / "train_subset_uttlist").read_text().split())
    header, nan = [key for key in entries if key not in held_out | watched][:2]
    offset = int(entries[header].rpartition(":")[2])
    archive[offset + 2 : offset + 4] = b"??"
    # CM: token, then the minimum as a float.
    offset = int(entries[nan].rpartition(":")[2])
    archive[offset + 5 : offset + 9] = np.float32(np.nan).tobytes()
    (data / "feats.ark").write_bytes(archive)
    (data / "feats.scp").write_text(
        "".join(f"{key} {data}/feats.ark:{value.rpartition(':')[2]}\n" for key, value in entries.items())
    )

    def run(name: str, allowed: int) -> Path:
        folder = toy.experiment(name)
        more = (f"--feat-dir={data}", "--trainer.num-epochs=1", f"--skip-bad-utterances={allowed}")
        train(parse(toy.options(folder, *more)), SoloWorld())
        return folder

    for allowed in (0, 1):
        with pytest.raises(DataError, match=header if allowed == 0 else nan):
            run(f"bad-{allowed}", allowed)
    with caplog.at_level(logging.WARNING, "kaldi_mpi"):
        assert (run("bad-2", 2) / "final.mdl").exists()
    assert all(any(key in message for message in caplog.messages) for key in (header, nan))


def test_a_training_with_several_shapes_goes_on_bit_for_bit(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = LearnerStep.compute_gradients

    def die(self: LearnerStep, batch: Batch, **how: bool) -> None:
        if batch.step == 37:
            raise InterruptedError
        compute(self, batch, **how)

    def run(name: str) -> bytes:
        folder = toy.work / name
        ivectors = f"--feat.online-ivector-dir={toy.work}/ivectors"
        train(parse(toy.options(folder, ivectors, *SEVERAL)), SoloWorld())
        return (folder / "final.mdl").read_bytes()

    for name in ("undisturbed", "disturbed"):
        experiment(toy, name)
    monkeypatch.setattr(LearnerStep, "compute_gradients", die)
    with pytest.raises(InterruptedError):
        run("disturbed")
    monkeypatch.setattr(LearnerStep, "compute_gradients", compute)
    assert json.loads((toy.work / "disturbed" / "checkpoint" / "current.json").read_text())["step"] > 20
    assert run("disturbed") == run("undisturbed")


def test_each_file_is_read_once(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are three parts, of which the diagnostic one lies in another."""
    options = parse(toy.options(toy.experiment("once")))
    opened: collections.Counter[str] = collections.Counter()

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def spy(path: Any, *args: Any, **kwargs: Any) -> Any:
            opened[Path(path).name if isinstance(path, str | Path) else ""] += 1
            return original(path, *args, **kwargs)

        return spy

    for module, name in ((builtins, "open"), (os, "open")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    data, _ = open_data(options)
    assert {name: opened[name] for name in ("feats.scp", "cmvn.scp", "utt2spk", "ali.1.gz")} == dict.fromkeys(
        ("feats.scp", "cmvn.scp", "utt2spk", "ali.1.gz"), 1
    )
    train, valid, diagnostic = (set(part.utterances) for part in (data.train, data.valid, data.diagnostic))  # type: ignore[attr-defined]
    assert diagnostic < train and not valid & train and len(train | valid) == 60


# Objective and accuracy.


def random_batch(weights: bool, targets: int) -> tuple[torch.Tensor, Batch]:
    rng = np.random.default_rng(targets)
    shape = (4, 6, targets) if targets > 1 else (4, 6)
    pdfs = np.stack([rng.permutation(5)[:targets] for _ in range(24)]).reshape(shape)
    labels = np.where(rng.random(shape) < 0.3, -1, pdfs)
    given = np.where(labels >= 0, rng.random(shape), 7.0).astype(np.float32)
    batch = Minibatch(
        feats=torch.zeros(4, 9, 2), labels=torch.from_numpy(labels),
        weights=torch.from_numpy(given) if weights else None, ivectors=None, shape=ChunkShape(6, 2, 1),
        frames=24, global_frames=24, weight=0.0, epoch=0, step=0,
    )  # fmt: skip
    output = torch.from_numpy(rng.normal(size=(4, 6, 5))).float().log_softmax(2).requires_grad_()
    return output, batch


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("targets", [1, 3])
def test_objective_and_accuracy_by_hand(weights: bool, targets: int) -> None:
    output, batch = random_batch(weights, targets)
    wanted = right = 0.0
    gradient = torch.zeros_like(output)
    for b, t in itertools.product(range(4), range(6)):
        labels = batch.labels[b, t].reshape(-1).tolist()
        row = [1.0] * targets if batch.weights is None else batch.weights[b, t].reshape(-1).tolist()
        pairs = [(label, weight) for label, weight in zip(labels, row, strict=True) if label >= 0]
        for label, weight in pairs:
            wanted += weight * output[b, t, label].item()
            gradient[b, t, label] += weight
        if pairs and max(pairs, key=lambda pair: pair[1])[0] == int(output[b, t].argmax()):
            right += sum(weight for _, weight in pairs)
    objective = log_likelihood(output, batch)
    objective.backward()
    assert objective.item() == pytest.approx(wanted, rel=1e-5)
    assert output.grad is not None and torch.allclose(output.grad, gradient, atol=1e-6)
    assert right_weight(output, batch).item() == pytest.approx(right, rel=1e-5)


def test_weights_of_one_change_nothing() -> None:
    output, batch = random_batch(False, 1)
    ones = dataclasses.replace(batch, weights=torch.ones(4, 6))
    assert torch.allclose(log_likelihood(output, batch), log_likelihood(output, ones), rtol=1e-6)
    assert label_scores(output, batch).sum().item() == pytest.approx(log_likelihood(output, ones).item(), rel=1e-6)


# Copies to a device.


class Stream:
    """Does what is queued as late as the events allow."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.done = 0

    def point(self) -> Point:
        return Point(self, len(self.work))


@dataclasses.dataclass
class Point:
    """An event."""

    stream: Stream
    length: int

    def synchronize(self) -> None:
        with LOCK:
            while self.stream.done < self.length:
                self.stream.done += 1
                self.stream.work[self.stream.done - 1]()


LOCK = threading.RLock()


class LateStreams:
    """A device whose streams are as far apart as they may be; `without` leaves out one of the waits."""

    def __init__(self, without: str = "") -> None:
        self.side, self.compute, self.without = Stream(), Stream(), without
        self.num_pinned = 0

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        self.num_pinned += 1
        return torch.empty(size, dtype=dtype)

    def empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((size,), -9, dtype=dtype)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        with LOCK:
            self.side.work.append(lambda: _copy(to, source))

    def copied(self) -> Point:
        with LOCK:
            return Point(self.side, 0) if self.without == "copied" else self.side.point()

    def computed(self) -> Point:
        with LOCK:
            return self.compute.point()

    def compute_after(self, event: Any) -> None:
        with LOCK:
            self.compute.work.append(event.synchronize)

    def copy_after(self, event: Any) -> None:
        with LOCK:
            if self.without != "copy_after":
                self.side.work.append(event.synchronize)


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    to.copy_(source)


class OneBuffer:
    """A reader that fills the same buffer again as soon as it has it back."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.step, self.closed = count, error, 0, False
        self.feats, self.labels = np.zeros((4, 9, 2), np.float32), np.zeros((4, 6), np.int64)

    def __next__(self) -> Minibatch[NDArray[Any]]:
        if self.step == self.count:
            if self.error is not None:
                raise self.error
            raise StopIteration
        with LOCK:
            self.feats[...], self.labels[...] = self.step, self.step
        self.step += 1
        size = 2 + self.step % 3
        return Minibatch(
            self.feats[:size], self.labels[:size], 6 * size, 24, 6.0 * size, 0, self.step - 1, ChunkShape(6, 2, 1),
            weights=np.full((size, 6), self.step, np.float32) if self.step > 4 else None,
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True


def computed_on(streams: LateStreams, count: int) -> list[tuple[int, int, float, float]]:
    """Step, chunks, mean feature and mean weight that the steps of a late learner see."""
    got: list[tuple[int, int, float, float]] = []
    with DeviceBatches(OneBuffer(count), streams) as feed:  # type: ignore[arg-type]
        for batch in feed:

            def use(b: Batch = batch) -> None:
                weight = 1.0 if b.weights is None else float(b.weights.mean())
                got.append((b.step, len(b.labels), float(b.feats.mean() + b.labels.double().mean()) / 2, weight))

            with LOCK:
                streams.compute.work.append(use)
    streams.computed().synchronize()
    return got


def test_copies_wait_for_steps_and_buffers_for_copies() -> None:
    wanted = [(k, 2 + (k + 1) % 3, float(k), float(k + 1) if k > 3 else 1.0) for k in range(9)]
    assert computed_on(LateStreams(), 9) == wanted
    # The test would notice: without one of the waits, steps see what was written over their data.
    for wait in ("copied", "copy_after"):
        assert computed_on(LateStreams(without=wait), 9) != wanted


def test_errors_of_the_reader_come_out_of_the_feed() -> None:
    reader = OneBuffer(2, DataError("broken", file="a.ark"))
    with DeviceBatches(reader, LateStreams()) as feed:  # type: ignore[arg-type]
        assert [next(feed).step, next(feed).step] == [0, 1]
        for _ in range(2):
            with pytest.raises(DataError, match=r"a\.ark: broken"):
                next(feed)
    assert reader.closed
    with DeviceBatches(OneBuffer(0), LateStreams()) as feed:  # type: ignore[arg-type]
        assert list(feed) == [] and list(feed) == []


def test_a_feed_is_closed_while_its_thread_waits_for_room() -> None:
    feed = DeviceBatches(OneBuffer(50), LateStreams())  # type: ignore[arg-type]
    next(feed)
    feed.close()
    feed.close()


def toy_dataset(toy: Toy, chunking: ChunkShape | Chunking, rule: str) -> Dataset:
    """All utterances of the toy, to train on."""
    how = (f"--feat.online-ivector-dir={toy.work}/ivectors", f"--trainer.rnn.num-chunk-per-minibatch={rule}")
    options = parse(toy.options(toy.work / "none", *how, "--trainer.srand=3"))
    labels = dict(read_alignments(toy.ali_dir))
    pdfs = to_pdfs(labels, transitions_of(options).tid_to_pdf)
    corpus = Corpus.open(toy.feat_dir / "feats.scp", pdfs, online_ivector_dir=toy.work / "ivectors")
    return Dataset(corpus, corpus, corpus, corpus, chunking, options.data)


def batches(feed: DeviceBatches) -> list[list[torch.Tensor | None]]:
    with feed:
        return [
            [None if t is None else t.to("cpu", copy=True) for t in (b.feats, b.labels, b.weights, b.ivectors)]
            for b in feed
        ]


def assert_same_batches(one: list[list[torch.Tensor | None]], two: list[list[torch.Tensor | None]]) -> None:
    assert len(one) == len(two) > 4
    for mine, theirs in zip(one, two, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_page_locked_buffers_hold_the_same_minibatches(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_dataset(toy, Chunking((10, 7), 6, 3, left_initial=2), "16=6/19=4")
    cpu = torch.device("cpu")
    plain = batches(data.batches(data.train, cpu, rank=1, size=2, num_epochs=1))
    streams = LateStreams()
    monkeypatch.setattr("kaldi_mpi.learner.dataset.streams_of", lambda _: streams)
    copied = []
    with data.batches(data.train, cpu, rank=1, size=2, num_epochs=1) as feed:
        for batch in feed:
            streams.computed().synchronize()
            copied.append(
                [None if t is None else t.clone() for t in (batch.feats, batch.labels, batch.weights, batch.ivectors)]
            )
    assert_same_batches(plain, copied)
    assert streams.num_pinned == 4 * 3  # features, labels and i-vectors of each of the reader's buffers
    assert page_locked(streams)(5, np.int64).dtype == np.int64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_copies_are_the_same_minibatches(toy: Toy) -> None:
    data = toy_dataset(toy, Chunking((10, 7), 6, 3, left_initial=2), "16=6/19=4")
    plain, copied = (
        batches(data.batches(data.train, torch.device(name), rank=0, size=1, num_epochs=2)) for name in ("cpu", "cuda")
    )
    assert_same_batches(plain, copied)


# Steps and tickets.


@pytest.mark.parametrize(("units", "rule"), [(1, "5"), (3, "5"), (3, "16=2/19=7"), (4, "16=1/19=40"), (2, "500")])
def test_tickets_of_several_shapes_end_the_epoch_with_the_steps(toy: Toy, units: int, rule: str) -> None:
    data = toy_dataset(toy, Chunking((10, 7, 4), 6, 3, left_initial=2), rule)
    steps, tickets = (data.plan(size).steps_per_epoch for size in (units, 1))
    where = TicketMap(units, steps, tickets)
    numbers = [where.ticket(step) for step in range(2 * steps + 1)]
    assert (numbers[0], numbers[steps], numbers[-1]) == (0, tickets, 2 * tickets)
    gaps = {b - a for a, b in itertools.pairwise(numbers)}
    assert min(gaps) >= 1 and max(gaps) <= units


# Options.


def test_options_of_a_recurrent_network() -> None:
    base = ["--feat-dir=f", "--ali-dir=a", "--dir=d"]
    options = parse(base)
    assert (options.data.chunk_widths, options.data.chunk_left_context) == ((20,), 40)
    assert options.data.minibatch == MinibatchRule.of(100)
    assert (options.momentum, options.samples_per_iter, options.data.memory) == (0.5, 20000, 128 * 2**20)
    more = ["--egs.chunk-width=150,110,90", "--trainer.rnn.num-chunk-per-minibatch=128=64:128,256/256=32,64"]
    options = parse([*base, *more, "--egs.chunk-right-context-final=0", "--feat.online-ivector-dir="])
    assert options.data.chunk_widths == (150, 110, 90)
    assert options.data.minibatch == MinibatchRule(((128, 256), (256, 64)))
    assert (options.data.chunk_left_context_initial, options.data.chunk_right_context_final) == (-1, 0)
    assert options.data.online_ivector_dir is None
    assert parse(["--egs.dir=e", "--ali-dir=a", "--dir=d"]).data.feat_dir is None


def test_options_of_a_feed_forward_network() -> None:
    base = ["--feat-dir=f", "--ali-dir=a", "--dir=d", "--egs.frames-per-eg=8"]
    options = parse(base)
    assert (options.data.chunk_widths, options.data.chunk_left_context) == ((8,), 0)
    assert options.data.single_frames and options.data.minibatch == MinibatchRule.of(512)
    assert (options.momentum, options.samples_per_iter) == (0.0, 400000)
    options = parse([*base, "--trainer.optimization.minibatch-size=256,128", "--trainer.samples-per-iter=80"])
    assert (options.data.minibatch, options.samples_per_iter) == (MinibatchRule.of(256), 80)
    assert not parse(base[:-1]).data.single_frames
    for other in ("chunk-width=20", "chunk-left-context-initial=0", "chunk-right-context-final=0"):
        with pytest.raises(ConfigError, match=f"--egs.frames-per-eg and --egs.{other[:-3]}"):
            parse([*base, f"--egs.{other}"])


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--egs.chunk-width=20,x", "expected widths above 0"),
        ("--egs.chunk-width=20,0", "expected widths above 0"),
        ("--trainer.rnn.num-chunk-per-minibatch=64=", "num-chunk-per-minibatch"),
        ("--trainer.optimization.minibatch-size=512", "needs --egs.frames-per-eg"),
        ("--egs.chunk-left-context-initial=-2", "expected a number from -1"),
        ("--skip-bad-utterances=-1", "expected a number from 0"),
        ("--loader-memory=0", "expected a number from 1"),
        ("--feat-dir=", "--feat-dir is needed"),
    ],
)
def test_bad_options_are_named(option: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(["--feat-dir=f", "--ali-dir=a", "--dir=d", option])
    with pytest.raises(ConfigError, match="exclude each other"):
        parse(["--feat-dir=f", "--ali-dir=a", "--dir=d", "--egs.frames-per-eg=8", "--egs.chunk-width=20"])


@pytest.mark.parametrize(("given", "means"), [("--norm-vars=true --skip-dims=0", True), ("--norm-means=false", False)])
def test_normalisation_reaches_the_features_and_the_model_directory(toy: Toy, given: str, means: bool) -> None:
    folder = toy.experiment(f"cmvn.{means}")
    options = parse(toy.options(folder, f"--feat.cmvn-opts={given}"))

    def features_of(how: TrainOptions) -> NDArray[np.float32]:
        train = open_data(how)[0].train
        assert isinstance(train, Corpus)
        return np.concatenate([train.features(key) for key in train.utterances])

    features = features_of(options)
    raw = features_of(parse(toy.options(folder, "--feat.cmvn-opts=--norm-means=false")))
    np.testing.assert_array_equal(features[:, 0], raw[:, 0])  # skipped, or nothing is done
    assert (not np.allclose(features[:, 1:], raw[:, 1:])) == means
    write_cmvn_opts(folder, options.data.cmvn)
    again = parse_cmvn_opts((folder / "cmvn_opts").read_text())
    assert again == options.data.cmvn
