"""How fast the loader is, beside other ways to the same minibatches, and beside a plain copy of their bytes.

``python bench/loader.py [--hours 5] [--threads 1 2] ...`` writes a synthetic corpus (see synthetic_corpus.py) and
goes through the same minibatches (the same chunks in the same shuffled order, from the page cache) with

    ours         MinibatchReader with so many threads
    knio         kaldi_native_io and NumPy in one thread, by random access with a cache of recently used utterances, as
                 large as the loader's memory
    knio, any memory
                 the same with all the memory that it wants: an utterance is decoded once and kept until its last
                 chunk has been packed (the order is known beforehand: no cache is better); by random access or
                 sequentially in the order of need, whichever is faster
    DataLoader   as knio, sequentially, in so many workers of a PyTorch DataLoader
    lhotse       a cut for each chunk, if lhotse is installed
    pipes        nnet3-copy-egs | nnet3-shuffle-egs | nnet3-merge-egs on egs of the corpus, beside our reader of the
                 same egs, if KALDI_ROOT is set
    memcpy       minibatches copied from memory into four buffers in turn

Repetitions of all take turns; medians count. A ratio "per core" is one of frames over CPU seconds, of all threads
and processes: it is what vs_kaldi_native_io (and _any_memory), vs_lhotse and vs_kaldi_pipes are. vs_dataloader is of
frames over seconds, with as many workers as threads. share_of_memcpy: float bytes delivered a CPU second over those
copied.

Then single frames beside whole chunks, of features and (if KALDI_ROOT is set) of egs: what train_dnn.py's minibatches
cost. ``--single-frames`` measures this alone.

Then the first for full (FM) instead of compressed (CM) features, and without context: what decompression, packing
and context cost. Where `perf` is installed, a profile of one thread by function follows.

The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from loader_arms import Arm, Arms, Cost, kaldi_pipes, plain_copies, timed
from synthetic_corpus import DIM, FRAMES_PER_HOUR, SyntheticCorpus, write_corpus, write_egs

from kaldi_mpi.errors import KaldiMpiError
from kaldi_mpi.loader import ChunkShape, Corpus, Examples, MinibatchReader, Source

Costs = dict[str, list[Cost]]


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def in_turn(arms: dict[str, Arm], rounds: int, seconds: float) -> Costs:
    """Run all arms in turn, so many times, or fewer when the time is over; each once before, uncounted."""
    for arm in arms.values():
        arm()
    costs: Costs = {name: [] for name in arms}
    began = time.perf_counter()
    for number in range(rounds):
        for name, arm in arms.items():
            costs[name].append(arm())
        if number >= 2 and time.perf_counter() - began > seconds:
            break
    return costs


def rate(costs: Sequence[Cost], per_core: bool) -> float:
    """The median of frames a second, or a CPU second."""
    return statistics.median(cost.per_cpu_second if per_core else cost.per_second for cost in costs)


def compare(arms: Arms, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """The loader with so many threads against the arms in Python; medians."""
    runs: dict[str, Arm] = {
        "ours": lambda: arms.ours(threads),
        # Many misses of its cache: a part of the minibatches says how fast.
        "knio": lambda: arms.same_memory(max(1, arms.minibatches // 6)),
        "any memory, random": lambda: arms.kaldi_native_io(False),
        "any memory, sequential": lambda: arms.kaldi_native_io(True),
        "DataLoader": lambda: arms.data_loader(threads),
    }
    reason = None
    try:
        # It decodes the whole utterance for each chunk: a part of the minibatches says how fast.
        runs["lhotse"] = arms.lhotse(max(1, arms.minibatches // 50))
    except ImportError as error:
        reason = str(error)
        say(f"lhotse: {reason}")
    costs = in_turn(runs, options.rounds, options.seconds)
    print(f"\n{threads} reader thread{'s' * (threads > 1)}: medians of {len(costs['ours'])} rounds, million frames")
    print(f"{'':24}{'a second':>10}{'a CPU second':>14}{'CPU s / s':>11}")
    for name, of_arm in costs.items():
        busy = statistics.median(cost.cpu / cost.wall for cost in of_arm)
        print(f"{name:24}{rate(of_arm, False) / 1e6:10.3f}{rate(of_arm, True) / 1e6:14.3f}{busy:11.2f}")

    def fastest(names: str, per_core: bool) -> float:
        return max(rate(of_arm, per_core) for name, of_arm in costs.items() if name.startswith(names))

    ours, ours_per_core = rate(costs["ours"], False), rate(costs["ours"], True)
    return {
        "frames_per_second": round(ours),
        "frames_per_cpu_second": round(ours_per_core),
        "vs_kaldi_native_io": round(ours_per_core / fastest("knio", True), 2),
        "vs_kaldi_native_io_wall": round(ours / fastest("knio", False), 2),
        "vs_kaldi_native_io_any_memory": round(ours_per_core / fastest("any memory", True), 2),
        "vs_dataloader": round(ours / fastest("DataLoader", False), 2),
        "vs_dataloader_per_core": round(ours_per_core / fastest("DataLoader", True), 2),
        "vs_lhotse": round(ours_per_core / fastest("lhotse", True), 1) if "lhotse" in costs else None,
    }


def compare_pipes(folder: Path, threads: int, options: argparse.Namespace) -> float | None:
    """Our reader of egs against Kaldi's pipes, per core; None without a Kaldi."""
    corpus = write_corpus(folder, options.egs_hours)
    egs = write_egs(corpus, width=options.width, left=options.left, right=options.right)
    if egs is None:
        say("vs_kaldi_pipes: KALDI_ROOT is not set, or has no nnet3 programs")
        return None
    examples = Examples.open(egs)

    def ours() -> int:
        with MinibatchReader(examples, None, options.chunks, seed=1, threads=threads, num_epochs=1) as reader:
            return sum(minibatch.frames for minibatch in reader)

    frames = examples.total_frames
    arms: dict[str, Arm] = {
        "ours": lambda: timed(ours),
        "pipes": lambda: kaldi_pipes(egs, options.chunks, frames),
    }
    costs = in_turn(arms, options.rounds, options.seconds / 3)
    print(f"\negs, {threads} reader thread{'s' * (threads > 1)}: million frames")
    for name, of_arm in costs.items():
        print(f"{name:24}{rate(of_arm, False) / 1e6:10.3f}{rate(of_arm, True) / 1e6:14.3f}")
    return round(rate(costs["ours"], True) / rate(costs["pipes"], True), 2)


def single_frames(corpus: SyntheticCorpus, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One thread with single frames beside whole chunks of `frames_per_eg`, in minibatches of as many frames."""
    width, size = options.frames_per_eg, options.minibatch_size
    whole, single = (ChunkShape(frames, options.frame_left, options.frame_right) for frames in (width, 1))
    sources: dict[str, Source] = {"features": Corpus.open(corpus.feats_scp, corpus.numbered_labels())}
    egs = write_egs(corpus, width=width, left=options.frame_left, right=options.frame_right)
    if egs is not None:
        sources["egs"] = Examples.open(egs)
    memory: dict[str, float] = {}

    def arm(name: str, shape: ChunkShape | None, minibatch: int, what: str) -> Arm:
        def take() -> int:
            with MinibatchReader(sources[name], shape, minibatch, seed=1, num_epochs=1) as reader:
                frames = sum(minibatch.frames for minibatch in reader)
                memory[f"{name}, {what}"] = reader.counters().memory / 1e6
            return frames

        return lambda: timed(take)

    arms: dict[str, Arm] = {}
    for name in sources:
        shape = None if name == "egs" else whole
        arms[f"{name}, chunks"] = arm(name, shape, max(1, size // width), "chunks")
        arms[f"{name}, single"] = arm(name, single, size, "single")
    costs = in_turn(arms, options.rounds, options.seconds)
    print(f"\nsingle frames and chunks of {width}, contexts {whole.left} and {whole.right}, one thread: million frames")
    print(f"{'':24}{'a second':>10}{'a CPU second':>14}{'MB':>8}")
    for name, of_arm in costs.items():
        print(f"{name:24}{rate(of_arm, False) / 1e6:10.3f}{rate(of_arm, True) / 1e6:14.3f}{memory[name]:8.1f}")
    return {
        name: {
            "frames_per_second": round(rate(costs[f"{name}, single"], False)),
            "frames_per_cpu_second": round(rate(costs[f"{name}, single"], True)),
            "vs_chunks": round(rate(costs[f"{name}, single"], True) / rate(costs[f"{name}, chunks"], True), 3),
            "memory_mb": round(memory[f"{name}, single"], 1),
            "memory_mb_chunks": round(memory[f"{name}, chunks"], 1),
        }
        for name in sources
    }


def limits(kinds: dict[str, Arms], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One thread beside a plain copy, for each kind of features and chunk: medians of interleaved runs."""
    values = {name: options.chunks * arms.shape.rows * DIM for name, arms in kinds.items()}
    copies: dict[str, list[float]] = {name: [] for name in kinds}
    runs: dict[str, list[Cost]] = {name: [] for name in kinds}
    for number in range(options.rounds + 1):
        for name, arms in kinds.items():
            cost = arms.ours(1)
            copied = plain_copies(max(8, (128 << 20) // (4 * values[name])), values[name])
            if number > 0:
                runs[name].append(cost)
                copies[name].append(copied)
    result = {}
    print("\none thread, and what a plain copy does; all per CPU second")
    print(f"{'':24}{'M frames':>10}{'GB of floats':>14}{'memcpy GB':>11}{'share':>8}{'ns a value':>12}")
    for name, arms in kinds.items():
        floats = 4.0 * DIM * arms.shape.rows * sum(len(minibatch) for minibatch in arms.plan)
        seconds = statistics.median(cost.cpu for cost in runs[name])
        copied = statistics.median(copies[name])
        share = floats / seconds / copied
        millions = arms.frames / seconds / 1e6
        nanoseconds = 4e9 * seconds / floats
        gigabytes = floats / seconds / 1e9
        print(f"{name:24}{millions:10.3f}{gigabytes:14.2f}{copied / 1e9:11.2f}{share:8.3f}{nanoseconds:12.3f}")
        result[name] = {
            "gigabytes_per_cpu_second": round(gigabytes, 3),
            "memcpy": round(copied / 1e9, 3),
            "share": round(share, 4),
        }
    return result


def profile(arms: Arms, folder: Path, seconds: float = 3.0) -> list[str]:
    """Functions by their share of one thread's CPU time, by perf; empty where it is not there or not allowed."""
    perf = shutil.which("perf")
    if perf is None:
        say("profile: perf is not installed")
        return []
    data = folder / "perf.data"
    command = [perf, "record", "--quiet", "--freq=997", f"--pid={os.getpid()}", f"--output={data}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as recording:
        time.sleep(0.5)
        began = time.perf_counter()
        while recording.poll() is None and time.perf_counter() - began < seconds:
            arms.ours(1)
        recording.terminate()
        _, complaint = recording.communicate()
    if not data.exists():
        say(f"profile: perf recorded nothing: {complaint.strip()[:200]}")
        return []
    command = [perf, "report", "--stdio", "--no-children", "--sort=symbol", "--percent-limit=1", f"--input={data}"]
    report = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [line.strip() for line in report.splitlines() if line.strip() and not line.startswith("#")][:15]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Speed of the loader beside other ways to the same minibatches.")
    add = parser.add_argument
    add("--hours", type=float, default=5.0, help="of the corpus")
    add("--egs-hours", type=float, default=0.5, help="of the corpus that Kaldi makes egs of")
    add("--threads", type=int, nargs="*", default=[1, 2], help="reader threads; each number is measured")
    add("--seconds", type=float, default=40.0, help="for each number of threads: no further round after this")
    add("--rounds", type=int, default=5, help="of all arms in turn, at most")
    add("--width", type=int, default=20, help="labelled frames of a chunk")
    add("--left", type=int, default=40, help="context before")
    add("--right", type=int, default=7, help="context after")
    add("--chunks", type=int, default=128, help="in a minibatch")
    add("--frames-per-eg", type=int, default=8, help="labelled frames of a chunk, beside single frames")
    add("--frame-left", type=int, default=16, help="context before a single frame")
    add("--frame-right", type=int, default=12, help="context after it")
    add("--minibatch-size", type=int, default=512, help="frames of a minibatch of single ones")
    add("--single-frames", action="store_true", help="measure these alone")
    add("--minibatches", type=int, default=1_000_000, help="of the epoch's first ones")
    add("--folder", type=Path, help="for the data; by default a temporary one")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything."""
    say(f"load of the machine: {os.getloadavg()[0]:.1f}")
    frames = single_frames(write_corpus(folder / "frames", options.egs_hours), options)
    if options.single_frames:
        return {"single_frames": frames, "hours": options.egs_hours, "cores": os.cpu_count()}
    corpus = write_corpus(folder / "cm", options.hours, alignments=False)
    full = write_corpus(folder / "fm", options.hours, alignments=False, compress=False)
    shape = ChunkShape(options.width, options.left, options.right)
    arms = Arms(corpus, shape, options.chunks, options.minibatches, folder)
    arms.check()
    say(f"{arms.frames} frames of {arms.frames / FRAMES_PER_HOUR:.2f} hours in {arms.minibatches} minibatches")
    result: dict[str, Any] = {}
    for threads in options.threads:
        found = compare(arms, threads, options)
        found["vs_kaldi_pipes"] = compare_pipes(folder / f"egs{threads}", threads, options)
        result.setdefault("by_threads", {})[str(threads)] = found
    bare = ChunkShape(options.width, 0, 0)
    kinds = {
        "CM, with context": arms,
        "CM, without": Arms(corpus, bare, options.chunks, options.minibatches, folder),
        "FM, with context": Arms(full, shape, options.chunks, options.minibatches, folder),
        "FM, without": Arms(full, bare, options.chunks, options.minibatches, folder),
    }
    result["limits"] = limits(kinds, options)
    for line in profile(arms, folder):
        print(f"  {line}")
    first = next(iter(result["by_threads"].values()))
    head = {key: value for key, value in first.items() if key.startswith("vs_")}
    return {
        **head,
        "share_of_memcpy": result["limits"]["CM, with context"]["share"],
        "frames_per_second": first["frames_per_second"],
        **result,
        "single_frames": frames,
        "hours": options.hours,
        "chunk": [options.width, options.left, options.right],
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    """Measure and print."""
    options = parse(sys.argv[1:])
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="loader.", dir=options.folder) as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KaldiMpiError as error:
        sys.exit(f"bench/loader.py: {error}")
