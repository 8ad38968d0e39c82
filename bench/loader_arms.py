"""What bench/loader.py compares: the loader, and others that pack the same chunks into minibatches.

Every arm is a function without arguments that goes through its minibatches once and returns a `Cost`. CPU seconds are
those of all threads and of child processes that have ended.
"""

from __future__ import annotations

import dataclasses
import itertools
import resource
import subprocess
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import kaldi_native_io
import numpy as np
from numpy.typing import NDArray
from synthetic_corpus import SyntheticCorpus, kaldi_tool

from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from kaldi_mpi.loader.plan import DEFAULT_MEMORY

Packed = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What going through some minibatches took.

    Attributes:
        frames: labelled frames.
        wall: seconds.
        cpu: CPU seconds of all threads and children.
    """

    frames: int
    wall: float
    cpu: float

    @property
    def per_second(self) -> float:
        """Frames a second."""
        return self.frames / self.wall

    @property
    def per_cpu_second(self) -> float:
        """Frames a second and core."""
        return self.frames / self.cpu


Arm = Callable[[], Cost]


def cpu_seconds() -> float:
    """Of this process, all threads, and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def timed(action: Callable[[], int]) -> Cost:
    """Run what returns its number of frames."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    frames = action()
    return Cost(frames, time.perf_counter() - wall, cpu_seconds() - cpu)


class Chunk(NamedTuple):
    """One chunk of a minibatch.

    Attributes:
        utterance: its index in the corpus.
        start: time of its first label.
        first: the labelled frames are first .. end-1.
        end: see `first`.
    """

    utterance: int
    start: int
    first: int
    end: int


def chunks_of(corpus: SyntheticCorpus, labels: NDArray[np.int64]) -> list[Chunk]:
    """The chunks of a minibatch, known by labels that are positions in the corpus: (B, width)."""
    begins = np.concatenate([[0], np.cumsum(corpus.num_frames, dtype=np.int64)])
    labelled = labels >= 0
    at = labelled.argmax(axis=1)
    last = labels.shape[1] - 1 - labelled[:, ::-1].argmax(axis=1)
    positions = labels[np.arange(len(labels)), at]
    utterances = np.searchsorted(begins, positions, side="right") - 1
    first = positions - begins[utterances]
    found = zip(
        utterances.tolist(), (first - at).tolist(), first.tolist(), (first + last - at + 1).tolist(), strict=True
    )
    return [Chunk(*chunk) for chunk in found]


class Packer:
    """Packs chunks into a minibatch by NumPy, as a script in Python would.

    Args:
        shape: of the chunks.
        labels: of all frames of the corpus, one after the other.
        begins: (utterances,), where the labels of each utterance begin.
    """

    def __init__(self, shape: ChunkShape, labels: NDArray[np.int32], begins: NDArray[np.int64]) -> None:
        self._shape, self._labels, self._begins = shape, labels, begins.tolist()

    def pack(self, chunks: Sequence[Chunk], features_of: Callable[[int], NDArray[np.float32]]) -> Packed:
        """One minibatch: feats (B, rows, dim) and labels (B, width), in new arrays."""
        shape, rows = self._shape, self._shape.rows
        feats = np.empty((len(chunks), rows, features_of(chunks[0].utterance).shape[1]), np.float32)
        labels = np.full((len(chunks), shape.width), -1, np.int64)
        for out, marks, chunk in zip(feats, labels, chunks, strict=True):
            matrix = features_of(chunk.utterance)
            begin = chunk.start - shape.left + shape.label_delay
            end, length = begin + rows, len(matrix)
            if begin >= 0 and end <= length:
                out[:] = matrix[begin:end]
            else:
                low, high = max(begin, 0), min(end, length)
                out[low - begin : high - begin] = matrix[low:high]
                out[: low - begin] = matrix[0]
                out[high - begin :] = matrix[-1]
            at = self._begins[chunk.utterance]
            marks[chunk.first - chunk.start : chunk.end - chunk.start] = self._labels[at + chunk.first : at + chunk.end]
        return feats, labels


class Utterances:
    """Decoded utterances, each kept until the last chunk that needs it has been packed.

    Knowing the plan makes this the best cache that there can be: an utterance is read and decoded once.

    Args:
        corpus: on disk.
        plan: minibatches to come, in order.
        sequential: read them one after the other from a script file in the order of need, instead of by key.
        folder: for that script file.
    """

    def __init__(
        self, corpus: SyntheticCorpus, plan: Sequence[Sequence[Chunk]], sequential: bool, folder: Path
    ) -> None:
        self._keys = corpus.keys
        self._left: dict[int, int] = {}
        for minibatch in plan:
            for chunk in minibatch:
                self._left[chunk.utterance] = self._left.get(chunk.utterance, 0) + 1
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._sequential: Iterator[tuple[str, NDArray[np.float32]]] | None = None
        if sequential:
            lines = corpus.feats_scp.read_text(encoding="utf-8").splitlines(keepends=True)
            script = folder / "order.scp"  # a dict has the order in which its keys came
            script.write_text("".join(lines[i] for i in self._left), encoding="utf-8")
            self._sequential = iter(kaldi_native_io.SequentialFloatMatrixReader(f"scp:{script}"))
        else:
            self._by_key: Any = kaldi_native_io.RandomAccessFloatMatrixReader(f"scp:{corpus.feats_scp}")

    def __call__(self, utterance: int) -> NDArray[np.float32]:
        """The features of an utterance."""
        matrix = self._kept.get(utterance)
        if matrix is None:
            if self._sequential is not None:
                _, matrix = next(self._sequential)
            else:
                matrix = self._by_key[self._keys[utterance]]
            # Both readers use the matrix that they hand out again for the next utterance.
            matrix = self._kept[utterance] = np.array(matrix)
        return matrix

    def done_with(self, chunks: Sequence[Chunk]) -> None:
        """Forget what no later chunk needs."""
        for chunk in chunks:
            left = self._left[chunk.utterance] = self._left[chunk.utterance] - 1
            if left == 0:
                del self._kept[chunk.utterance]


class RecentUtterances:
    """Decoded utterances, of which the ones used last are kept in so much memory: what a script does that does not
    know which chunks will come.

    Args:
        corpus: on disk.
        limit: bytes of features.
    """

    def __init__(self, corpus: SyntheticCorpus, limit: int) -> None:
        self._keys, self._limit, self._bytes = corpus.keys, limit, 0
        self._kept: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._by_key: Any = kaldi_native_io.RandomAccessFloatMatrixReader(f"scp:{corpus.feats_scp}")

    def __call__(self, utterance: int) -> NDArray[np.float32]:
        """The features of an utterance."""
        matrix = self._kept.get(utterance)
        if matrix is not None:
            self._kept.move_to_end(utterance)
            return matrix
        matrix = self._kept[utterance] = np.array(self._by_key[self._keys[utterance]])
        self._bytes += matrix.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return matrix


class Arms:
    """All arms over one corpus and one chunk shape; each packs the same minibatches.

    Args:
        corpus: on disk.
        shape: of the chunks.
        chunks: in a minibatch.
        minibatches: of the epoch's first ones; all of it if there are fewer.
        folder: for small files.
    """

    def __init__(self, corpus: SyntheticCorpus, shape: ChunkShape, chunks: int, minibatches: int, folder: Path) -> None:
        self.on_disk, self.shape, self.chunks, self.folder = corpus, shape, chunks, folder
        labels = corpus.numbered_labels()
        self.corpus = Corpus.open(corpus.feats_scp, labels)
        begins = np.concatenate([[0], np.cumsum(corpus.num_frames[:-1], dtype=np.int64)])
        self.packer = Packer(shape, np.arange(corpus.total_frames, dtype=np.int32), begins)
        with self.reader(1) as reader:
            self.minibatches = min(minibatches, reader.steps_per_epoch)
            delivered = itertools.islice(reader, self.minibatches)
            self.plan = [chunks_of(corpus, minibatch.labels) for minibatch in delivered]
        self.frames = sum(chunk.end - chunk.first for minibatch in self.plan for chunk in minibatch)

    def reader(self, threads: int) -> MinibatchReader:
        """The loader, from the first epoch's begin."""
        return MinibatchReader(self.corpus, self.shape, self.chunks, seed=1, threads=threads, num_epochs=1)

    def packed(self, plan: Sequence[Sequence[Chunk]], sequential: bool) -> Iterator[Packed]:
        """Minibatches by kaldi_native_io and NumPy."""
        features_of = Utterances(self.on_disk, plan, sequential, self.folder)
        for chunks in plan:
            yield self.packer.pack(chunks, features_of)
            features_of.done_with(chunks)

    def check(self, minibatches: int = 3) -> None:
        """The loader and kaldi_native_io deliver the same."""
        with self.reader(1) as reader:
            for ours, (feats, labels) in zip(reader, self.packed(self.plan[:minibatches], False), strict=False):
                np.testing.assert_array_equal(ours.labels, labels)
                np.testing.assert_allclose(ours.feats, feats, atol=2e-5, rtol=1e-5)

    def ours(self, threads: int) -> Cost:
        """The loader: threads are started, the order is drawn, and minibatches taken one after the other."""

        def take() -> int:
            frames = 0
            with self.reader(threads) as reader:
                for _ in range(self.minibatches):
                    frames += next(reader).frames
            return frames

        return timed(take)

    def kaldi_native_io(self, sequential: bool) -> Cost:
        """kaldi_native_io and NumPy in one thread."""
        return timed(lambda: sum(int((labels >= 0).sum()) for _, labels in self.packed(self.plan, sequential)))

    def same_memory(self, minibatches: int, limit: int = DEFAULT_MEMORY) -> Cost:
        """The same with as much memory for decoded features as the loader has for its own."""

        def pack() -> int:
            features_of = RecentUtterances(self.on_disk, limit)
            packed = (self.packer.pack(chunks, features_of) for chunks in self.plan[:minibatches])
            return sum(int((labels >= 0).sum()) for _, labels in packed)

        return timed(pack)

    def data_loader(self, workers: int) -> Cost:
        """The same, sequentially, in worker processes of a PyTorch DataLoader, each with an equal run of minibatches.

        They come in another order, but no utterance is decoded by two workers for want of a common cache, except
        where the runs meet. The time of starting the workers is not counted: the clock starts with the first
        minibatch, which is not counted either. CPU time is all of it.
        """
        import torch
        from torch.utils.data import DataLoader, IterableDataset, get_worker_info

        arms = self

        class Dataset(IterableDataset):  # type: ignore[type-arg]
            """The minibatches of one worker."""

            def __iter__(self) -> Iterator[tuple[Any, Any]]:
                info = get_worker_info()
                worker = info.id if info is not None else 0
                count = len(arms.plan)
                mine = arms.plan[count * worker // workers : count * (worker + 1) // workers]
                folder = arms.folder / f"worker{worker}"
                folder.mkdir(exist_ok=True)
                features_of = Utterances(arms.on_disk, mine, True, folder)
                for chunks in mine:
                    feats, labels = arms.packer.pack(chunks, features_of)
                    features_of.done_with(chunks)
                    yield torch.from_numpy(feats), torch.from_numpy(labels)

        cpu, frames, began = cpu_seconds(), 0, 0.0
        for _, labels in DataLoader(Dataset(), batch_size=None, num_workers=workers, prefetch_factor=4):
            if began:
                frames += int((labels >= 0).sum())
            else:
                began = time.perf_counter()
        wall = time.perf_counter() - began
        cpu = (cpu_seconds() - cpu) * frames / self.frames
        return Cost(frames, wall, cpu)

    def lhotse(self, minibatches: int) -> Arm:
        """Cuts of lhotse over the same features, one for each chunk; made beforehand. ImportError without lhotse."""
        from lhotse import Features, MonoCut

        shift, manifests = 0.01, {}
        for key, length in zip(self.on_disk.keys, self.on_disk.num_frames.tolist(), strict=True):
            manifests[key] = Features(
                type="kaldi-mfcc",
                num_frames=length,
                num_features=self.corpus.feat_dim,
                frame_shift=shift,
                sampling_rate=16000,
                start=0.0,
                duration=round(length * shift, 2),
                storage_type="kaldiio",
                storage_path=str(self.on_disk.feats_scp),
                storage_key=key,
                recording_id=key,
                channels=0,
            )
        plan = self.plan[:minibatches]
        cuts: list[Any] = []
        for chunk in (chunk for minibatch in plan for chunk in minibatch):
            begin = chunk.start - self.shape.left + self.shape.label_delay
            low = max(begin, 0)
            high = min(begin + self.shape.rows, int(self.on_disk.num_frames[chunk.utterance]))
            features = manifests[self.on_disk.keys[chunk.utterance]]
            start, duration = round(low * shift, 2), round((high - low) * shift, 2)
            cuts.append(MonoCut(f"cut{len(cuts)}", start, duration, 0, features=features))

        def pack() -> int:
            todo, frames = iter(cuts), 0
            for chunks in plan:
                feats = np.empty((len(chunks), self.shape.rows, self.corpus.feat_dim), np.float32)
                for out, chunk in zip(feats, chunks, strict=True):
                    matrix = next(todo).load_features()
                    before = max(0, self.shape.left - self.shape.label_delay - chunk.start)
                    out[before : before + len(matrix)] = matrix
                    out[:before] = matrix[0]
                    out[before + len(matrix) :] = matrix[-1]
                    frames += chunk.end - chunk.first
            return frames

        return lambda: timed(pack)


def kaldi_pipes(egs: Path, minibatch: int, frames: int) -> Cost:
    """What train_rnn.py feeds nnet3-train with, over all archives in turn; minibatches go to /dev/null."""
    copy, shuffle, merge = (kaldi_tool(f"nnet3-{name}-egs") for name in ("copy", "shuffle", "merge"))

    def read() -> int:
        for archive in sorted(egs.glob("egs.*.ark")):
            pipe = (
                f"set -o pipefail; {copy} ark:{archive} ark:- | {shuffle} --buffer-size=5000 --srand=1 ark:- ark:- | "
                f"{merge} --minibatch-size={minibatch} ark:- ark:/dev/null"
            )
            subprocess.run(["bash", "-c", pipe], check=True, stderr=subprocess.DEVNULL)
        return frames

    return timed(read)


def plain_copies(arrays: int, values: int) -> float:
    """Bytes a CPU second of copying minibatches from memory, one after the other, into four buffers in turn."""
    source = np.ones((arrays, values), np.float32)
    buffers = np.empty((4, values), np.float32)
    buffers[:] = 0.0
    began = time.thread_time()
    for i in range(arrays):
        np.copyto(buffers[i % 4], source[i])
    return source.nbytes / (time.thread_time() - began)
