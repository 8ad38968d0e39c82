"""What checkpoints and watching cost: the step in which one is taken, and the frames per second of a training.

``python bench/checkpoints.py [--dim 3640]`` trains one learner, through the code that ships, on a synthetic corpus:

1. a network of about 40 million parameters, with a checkpoint after every few steps. Each step in which a state is
   copied, and each one while the thread writes it, is compared with those in which neither happens (medians). What
   a checkpoint costs is the sum of what these steps take longer; over ten minutes, a checkpoint each, it is a share
   of the frames.
2. a small network with steps of a few milliseconds, with and without the files that the launcher watches
   (`transport.beat`), in turns; and the processor time that writing them takes, as a share of the training's, which
   is far below what the turns can tell apart.

The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kaldi_mpi.learner.checkpoint import Checkpoints
from kaldi_mpi.learner.options import parse
from kaldi_mpi.learner.run import settle_process, train
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.transport.beat import Beat
from kaldi_mpi.transport.status import STATUS_DIR_ENV
from kaldi_mpi.transport.world import SoloWorld
from tests.toy import FEAT_DIM, NUM_PDFS, Toy, make_toy

MINUTES = 10  # between two checkpoints, for the share
XCONFIG = f"""\
input dim={FEAT_DIM} name=input
fixed-affine-layer name=lda input=Append(-1,0,1) affine-transform-file={{lda}}
relu-layer name=a dim={{dim}}
relu-layer name=b dim={{dim}}
relu-layer name=c dim={{dim}}
relu-layer name=d dim={{dim}}
output-layer name=output dim={NUM_PDFS} max-change=1.5
"""


class Clock:
    """When steps begin, when a state is handed over, and when it has been written."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.saves: list[float] = []
        self.written: list[float] = []

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """While the block runs."""
        compute, save, write = LearnerStep.compute, Checkpoints.save, Checkpoints._write

        def timed_compute(*arguments: Any) -> None:
            self.steps.append(time.perf_counter())
            compute(*arguments)

        def timed_save(*arguments: Any) -> None:
            self.saves.append(time.perf_counter())
            save(*arguments)

        def timed_write(*arguments: Any) -> None:
            write(*arguments)
            self.written.append(time.perf_counter())

        with (
            mock.patch.object(LearnerStep, "compute", timed_compute),
            mock.patch.object(Checkpoints, "save", timed_save),
            mock.patch.object(Checkpoints, "_write", timed_write),
        ):
            yield

    def kinds(self, first: int) -> tuple[list[float], list[float], list[float]]:
        """Seconds of usual steps, of those that save, and of those while a file is written; from step `first` on."""
        usual, saving, writing = [], [], []
        for begin, end in list(zip(self.steps, self.steps[1:], strict=False))[first:]:
            if any(begin <= at < end for at in self.saves):
                saving.append(end - begin)
            elif any(at < end and begin < done for at, done in zip(self.saves, self.written, strict=False)):
                writing.append(end - begin)
            else:
                usual.append(end - begin)
        return usual, saving, writing


def run(toy: Toy, name: str, dim: int, *options: str) -> tuple[Clock, float]:
    """One training; its clock, and its frames per second."""
    folder = toy.experiment(name)
    (folder / "configs" / "network.xconfig").write_text(XCONFIG.format(lda=folder / "configs" / "lda.mat", dim=dim))
    clock = Clock()
    plain = ("--egs.chunk-left-context=1", "--egs.opts=--num-utts-subset 12", "--trainer.prior-subset-size=12")
    with clock.watch():
        train(parse(toy.options(folder, *plain, *options)), SoloWorld())
    summary = json.loads((folder / "log" / "summary.json").read_text())
    return clock, summary["frames"] / (clock.steps[-1] - clock.steps[0])


def large(toy: Toy, options: argparse.Namespace) -> dict[str, Any]:
    """The first part."""
    per_checkpoint = options.steps_per_checkpoint
    chunks = options.chunks
    # A validation ends an iteration, and would be in the step in which the state is taken: by time there are none.
    clock, _ = run(
        toy, "large", options.dim, f"--trainer.rnn.num-chunk-per-minibatch={chunks}",
        f"--trainer.num-epochs={options.steps * chunks / (4.3 * options.utterances):g}",
        "--trainer.samples-per-iter=100000000", "--checkpoint-interval=0",
        f"--checkpoint-minutes={per_checkpoint * options.step_seconds / 60:g}",
    )  # fmt: skip
    usual, saving, writing = clock.kinds(first=3)
    if not (usual and saving and writing):
        raise SystemExit("bench/checkpoints.py: too few steps; give more with --steps")
    median = statistics.median(usual)
    extra = sum(seconds - median for seconds in (*saving, *writing)) / len(saving)
    print(
        f"usual step {median:.2f} s ({len(usual)}), one that saves {statistics.median(saving):.2f} s ({len(saving)}), "
        f"while a file is written {statistics.median(writing):.2f} s ({len(writing)})",
        file=sys.stderr,
    )
    return {
        "step_with_checkpoint": round(statistics.median(saving) / median, 3),
        "longest_step_with_checkpoint": round(max(saving) / median, 3),
        "step_while_writing": round(statistics.median(writing) / median, 3),
        "seconds_of_a_checkpoint": round(extra, 3),
        "share_of_the_frames": round(extra / (60 * MINUTES), 5),
    }


def watching(toy: Toy, rounds: int) -> tuple[float, float]:
    """The second part.

    Returns:
        Frames per second watched over those unwatched, the median of the rounds' ratios; and the seconds of processor
        time that a second of being watched takes.
    """
    ratios, spent, lasted = [], 0.0, 0.0
    write = Beat._write

    def timed(*arguments: Any) -> None:
        nonlocal spent
        began = time.thread_time()
        write(*arguments)
        spent += time.thread_time() - began

    options = ("--trainer.num-epochs=40", "--trainer.samples-per-iter=100000000", "--checkpoint-interval=0")
    for number in range(rounds):
        speeds = {}
        for watched in (True, False) if number % 2 else (False, True):
            with tempfile.TemporaryDirectory() as folder:
                around = {STATUS_DIR_ENV: folder} if watched else {}
                with mock.patch.dict("os.environ", around), mock.patch.object(Beat, "_write", timed):
                    began = time.monotonic()
                    speeds[watched] = run(toy, f"small{number}{watched}", 64, *options)[1]
                    lasted += (time.monotonic() - began) * watched
        ratios.append(speeds[True] / speeds[False])
    print("watched over unwatched:", " ".join(f"{ratio:.3f}" for ratio in ratios), file=sys.stderr)
    return round(statistics.median(ratios), 4), round(spent / lasted, 6)


def parse_own(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="What checkpoints and watching cost.")
    add = parser.add_argument
    add("--dim", type=int, default=3640, help="of four hidden layers; 3640 makes 40 million parameters")
    add("--steps", type=int, default=48, help="of the large network")
    add("--chunks", type=int, default=64, help="of 10 frames in a minibatch of the large network")
    add("--step-seconds", type=float, default=2.0, help="of such a step, about")
    add("--steps-per-checkpoint", type=int, default=8, help="about")
    add("--utterances", type=int, default=300, help="of the corpus, about 40 frames each")
    add("--rounds", type=int, default=7, help="of the second part")
    return parser.parse_args(arguments)


def main() -> int:
    """Run both parts and print the figures."""
    options = parse_own(sys.argv[1:])
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    settle_process()
    with tempfile.TemporaryDirectory(prefix="checkpoints.") as name:
        toy = make_toy(Path(name), num_utterances=options.utterances)
        found = large(toy, options)
        found["watched_over_unwatched"], found["share_of_watching"] = watching(toy, options.rounds)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
