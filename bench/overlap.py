"""Does a learner ever wait for data? Steps a second with the loader over steps a second with data in memory.

``python bench/overlap.py [--ranks 2] [--device-ms 16] ...`` writes a synthetic corpus (see synthetic_corpus.py) and
starts itself under mpiexec. Each rank's step is a device time of fixed length, a sleep that leaves the core free,
after a copy of the minibatch's features, which stands for the one to the device. Blocks of steps take turns:

    memory    the minibatches of the block were read beforehand
    loader    they come from the rank's MinibatchReader, which begins the block with nothing read ahead: the first
              steps, as many as it has buffers, do not count

The device's clock is its own: a step ends at the end of the last one plus the seconds that the host took (getting
the minibatch and copying it) plus the device time. A sleep that lasts too long does not count, as the next one is
shorter by that; each second of the loader's does count. It is the same in both blocks.

    efficiency     steps a second with the loader over those from memory; medians of the blocks, mean of the ranks
    waited_share   the loader's own counter of seconds that the learner waited, over the time

Then the same with a loader that reads the disk at half the speed that the learner needs: its efficiency and
waited_share should both be about one half. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from synthetic_corpus import SyntheticCorpus, write_corpus

from kaldi_mpi.errors import KaldiMpiError
from kaldi_mpi.launch import launch
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from kaldi_mpi.transport.guard import guarded
from kaldi_mpi.transport.status import NUM_LEARNERS_ENV

Feats = NDArray[np.float32]


class Block(NamedTuple):
    """What a block of steps took on this rank: seconds a step, and the seconds a step waited for data."""

    step: float
    waited: float


class Device:
    """Takes a fixed time for each step, in which the host's core is free.

    Args:
        seconds: of a step.
        like: a minibatch, for the size of the device's copy.
    """

    def __init__(self, seconds: float, like: Feats) -> None:
        self._seconds, self._copy = seconds, np.zeros_like(like)
        self._free_at = 0.0

    def start(self) -> float:
        """Begin a block; returns the time."""
        self._free_at = time.perf_counter()
        return self._free_at

    def step(self, get: Callable[[], Feats]) -> float:
        """Get a minibatch and compute; returns the time at which the device is done."""
        began = time.perf_counter()
        feats = get()
        np.copyto(self._copy[: len(feats)], feats)
        self._free_at += time.perf_counter() - began + self._seconds
        time.sleep(max(0.0, self._free_at - time.perf_counter()))
        return self._free_at


class Learner:
    """One rank.

    Args:
        world: of the ranks.
        corpus: on disk.
        options: of the command line.
    """

    def __init__(self, world: Any, corpus: Corpus, options: argparse.Namespace) -> None:
        self.world, self.options, self.corpus = world, options, corpus
        self.shape = ChunkShape(options.width, options.left, options.right)
        with self.reader() as reader:
            # Whole minibatches only: an epoch's last one is smaller.
            whole = (m.feats.copy() for m in reader if len(m.feats) == options.chunks)
            self.in_memory: list[Feats] = list(itertools.islice(whole, options.steps))
        self.device = Device(options.device_ms / 1e3, self.in_memory[0])

    def reader(self, **more: Any) -> MinibatchReader:
        """This rank's reader, of endless epochs."""
        options = self.options
        return MinibatchReader(
            self.corpus,
            self.shape,
            options.chunks,
            seed=1,
            rank=self.world.rank,
            size=self.world.size,
            threads=options.threads,
            **more,
        )

    def from_memory(self) -> Block:
        """A block with all minibatches in memory."""
        data = [self.in_memory[i % len(self.in_memory)] for i in range(self.options.steps)]
        self.world.barrier()
        began = end = self.device.start()
        for feats in data:
            end = self.device.step(lambda feats=feats: feats)  # type: ignore[misc]
        return Block((end - began) / len(data), 0.0)

    def from_loader(self, reader: MinibatchReader) -> Block:
        """A block with the loader: what it read ahead in the pause is used up before it counts."""

        def get() -> Feats:
            return next(reader).feats

        self.world.barrier()
        began = self.device.start()
        for _ in range(self.options.depth):
            began = self.device.step(get)
        end, waited = began, reader.counters().consumer_waited
        for _ in range(self.options.steps):
            end = self.device.step(get)
        waited = reader.counters().consumer_waited - waited
        return Block((end - began) / self.options.steps, waited / self.options.steps)

    def blocks(self, reader: MinibatchReader, rounds: int) -> tuple[list[Block], list[Block]]:
        """Blocks from memory and from the loader in turn."""
        memory, loader = [], []
        for _ in range(rounds):
            memory.append(self.from_memory())
            loader.append(self.from_loader(reader))
        return memory, loader


def summary(world: Any, memory: Sequence[Block], loader: Sequence[Block]) -> dict[str, float]:
    """Medians of the blocks, means over the ranks; the same on all ranks."""
    median = statistics.median
    mine = [median(b.step for b in memory), median(b.step for b in loader), median(b.waited / b.step for b in loader)]
    rows = np.array(world.gather(mine))
    return {
        "steps_per_second_memory": round(float(np.mean(1 / rows[:, 0])), 3),
        "steps_per_second": round(float(np.mean(1 / rows[:, 1])), 3),
        "efficiency": round(float(np.mean(rows[:, 0] / rows[:, 1])), 4),
        "waited_share": round(float(np.mean(rows[:, 2])), 4),
    }


def run(world: Any, options: argparse.Namespace) -> None:
    """All measurements, on all ranks; rank 0 prints."""
    folder = Path(options.folder)
    frames = np.load(folder / "num_frames.npy")
    keys = [line.split()[0] for line in (folder / "feats.scp").read_text(encoding="utf-8").splitlines()]
    corpus = Corpus.open(folder / "feats.scp", SyntheticCorpus(folder, keys, frames).numbered_labels())
    learner = Learner(world, corpus, options)
    with learner.reader(depth=options.depth) as reader:
        memory, loader = learner.blocks(reader, options.rounds)
        counters = reader.counters()
    usual = summary(world, memory, loader)
    # Each rank reads what all ranks need of a pool. Small pools, for an even flow.
    per_frame = int(corpus.unit_bytes.sum()) / corpus.total_frames
    frames_per_second = usual["steps_per_second_memory"] * options.chunks * options.width * world.size
    slow_rate, memory_bytes = int(per_frame * frames_per_second / 2), options.slow_memory
    with learner.reader(depth=options.depth, memory=memory_bytes, bytes_per_second=slow_rate) as reader:
        learner.from_loader(reader)  # what was read before there was a demand is used up
        slow = [learner.from_loader(reader)]
    slowed = summary(world, memory, slow)
    frames_per_second = usual["steps_per_second"] * options.chunks * options.width * world.size
    if world.rank == 0:
        print(f"{'':20}{'steps/s':>9}{'from memory':>13}{'efficiency':>12}{'waited':>8}")
        for name, row in (("loader", usual), ("at half the speed", slowed)):
            print(
                f"{name:20}{row['steps_per_second']:9.2f}{row['steps_per_second_memory']:13.2f}"
                f"{row['efficiency']:12.4f}{row['waited_share']:8.4f}"
            )
        print(f"{frames_per_second:.0f} labelled frames a second over {world.size} ranks; rank 0: {counters}")
        result = {
            "efficiency": usual["efficiency"],
            "waited_share": usual["waited_share"],
            "frames_per_second": round(frames_per_second),
            "slowed": {"efficiency": slowed["efficiency"], "waited_share": slowed["waited_share"]},
            "ranks": world.size,
            "threads": options.threads,
            "device_ms": options.device_ms,
            "chunk": [options.width, options.left, options.right],
            "chunks": options.chunks,
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
        }
        print(json.dumps(result), flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Does a learner ever wait for data?")
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="learners")
    add("--device-ms", type=float, default=16.0, help="device time of a step")
    add("--steps", type=int, default=150, help="of a block")
    add("--rounds", type=int, default=5, help="blocks of each kind")
    add("--hours", type=float, default=10.0, help="of the corpus: more than the loader has in memory at a time")
    add("--width", type=int, default=20, help="labelled frames of a chunk")
    add("--left", type=int, default=40, help="context before")
    add("--right", type=int, default=7, help="context after")
    add("--chunks", type=int, default=128, help="in a rank's minibatch")
    add("--threads", type=int, default=1, help="reader threads of a rank")
    add("--depth", type=int, default=4, help="buffers of a rank's reader")
    add("--slow-memory", type=int, default=2**22, help="bytes of data that the slowed loader has in memory")
    add("--folder", help=argparse.SUPPRESS)  # where the corpus is, for the ranks
    return parser.parse_args(arguments)


def main() -> int:
    """Start the ranks, or be one of them."""
    options = parse(sys.argv[1:])
    if NUM_LEARNERS_ENV not in os.environ:
        with tempfile.TemporaryDirectory(prefix="overlap.") as folder:
            corpus = write_corpus(Path(folder), options.hours, alignments=False)
            np.save(corpus.folder / "num_frames.npy", corpus.num_frames)
            command = [sys.executable, "-m", "mpi4py", __file__, *sys.argv[1:], "--folder", folder]
            return launch(command, options.ranks)
    from kaldi_mpi.processes import die_with_parent
    from kaldi_mpi.transport.mpi import MpiWorld

    die_with_parent()
    world = MpiWorld()
    with guarded(world):
        run(world, options)
        world.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KaldiMpiError as error:
        sys.exit(f"bench/overlap.py: {error}")
