"""What faults cost: trainings of 8 learners that are killed, stopped, slowed down and cut off at random, by strategy.

``python bench/chaos.py [--seconds 600] [--every 25] [--strategies expair ...]`` runs each strategy twice on the same
work: undisturbed, and with a fault every `--every` seconds on a random rank, rank 0 included:

    stop        SIGSTOP, and SIGCONT after 2 to 8 s
    slow        stopped for 49 fiftieths of the time, for 5 to 10 s
    partition   its network is cut off for 3 to 6 s (needs root and `ip`: a network namespace for each rank)
    kill        SIGKILL; the launcher starts all again from the last checkpoint (``--restarts``)

As in bench/stragglers.py nearly all of a step is a fixed device time in which the core is free, so that eight learners
are not at the mercy of a few cores. Times are of the whole command, start and final model included: the share of the
undisturbed throughput is the undisturbed time over the disturbed one. The last line of standard output is one JSON
object: ``throughput_share`` by strategy, ``faults`` (how many, by strategy and kind), and both final log-likelihoods.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kaldi_mpi.leftovers import PREFIX
from kaldi_mpi.testing.failing import Failure, Failures
from kaldi_mpi.testing.partition import Network
from kaldi_mpi.transport.beat import read_beats
from kaldi_mpi.transport.status import read_status
from tests.toy import FEAT_DIM, NUM_PDFS, Toy, environment, make_toy

# How often of a hundred, and for how long.
KINDS = {"stop": (45, 2.0, 8.0), "slow": (25, 5.0, 10.0), "partition": (20, 3.0, 6.0), "kill": (10, 0.0, 0.0)}
CHUNKS_OF_AN_UTTERANCE = 4.3
XCONFIG = f"""\
input dim={FEAT_DIM} name=input
fixed-affine-layer name=lda input=Append(-1,0,1) affine-transform-file={{lda}}
relu-layer name=tdnn1 dim=32
output-layer name=output dim={NUM_PDFS} max-change=1.5
"""


class Chaos:
    """Faults at random while the block runs, once the training is under way.

    Args:
        folder: the run's working directory.
        ranks: of the run.
        every: seconds between two faults, on the average.
        kinds: that there may be.
        seed: of the draws.
        network: None: there are no partitions.
    """

    def __init__(
        self, folder: Path, ranks: int, every: float, kinds: Sequence[str], seed: int, network: Network | None
    ) -> None:
        self._folder, self._ranks, self._every, self._kinds = folder, ranks, every, kinds
        self._random = random.Random(seed)
        self._failures = Failures(folder, [], None if network is None else network.cut)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._busy_until = dict.fromkeys(range(ranks), 0.0)

    def __enter__(self) -> Failures:
        self._failures.__enter__()
        self._thread.start()
        return self._failures

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._failures.__exit__()

    def _pids(self) -> dict[int, int]:
        """The processes of all ranks, once all have begun to train."""
        for place in self._folder.glob(f"{PREFIX}*"):
            beats = read_beats(place)
            if len(beats) == self._ranks and all(beat.watched for beat in beats.values()):
                return {int(s["rank"]): int(s["pid"]) for s in read_status(place)}
        return {}

    def _run(self) -> None:
        while not self._over.wait(self._random.uniform(0.5, 1.5) * self._every):
            how = self._random.choices(self._kinds, [KINDS[kind][0] for kind in self._kinds])[0]
            rank = self._random.randrange(self._ranks)
            seconds = self._random.uniform(*KINDS[how][1:])
            while not (pids := self._pids()) or self._busy_until[rank] > time.monotonic():
                if self._over.wait(0.2):
                    return
            self._busy_until[rank] = time.monotonic() + seconds
            print(f"  {how} of rank {rank} for {seconds:.1f} s", file=sys.stderr, flush=True)
            self._failures.strike(Failure(rank, 0, how, seconds if seconds else None), pids[rank])


class Bench:
    """Trainings on one corpus.

    Args:
        options: of the command line.
        work: a folder for corpus and models.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options, self._work = options, work
        self._toy: Toy = make_toy(work, num_utterances=options.utterances)
        self._runs = 0

    def run(self, strategy: str, seed: int | None, network: Network | None) -> tuple[float, float, dict[str, int]]:
        """One training, disturbed unless `seed` is None: its seconds, its log-likelihood, the faults by kind."""
        given = self._options
        self._runs += 1
        folder = self._toy.experiment(f"run{self._runs}")
        (folder / "configs" / "network.xconfig").write_text(XCONFIG.format(lda=folder / "configs" / "lda.mat"))
        steps = given.seconds / (given.device_ms / 1000 + 0.012)  # a step's own work, about
        per_epoch = CHUNKS_OF_AN_UTTERANCE * given.utterances / given.chunks
        options = self._toy.options(
            folder,
            f"--strategy={strategy}",
            f"--inject=device:{given.device_ms:g}ms",
            f"--trainer.num-epochs={steps * given.ranks / per_epoch:g}",
            f"--trainer.rnn.num-chunk-per-minibatch={given.chunks}",
            # An iteration, and a checkpoint, every five seconds or so.
            f"--trainer.samples-per-iter={round(5 / (given.device_ms / 1000 + 0.012)) * given.chunks}",
            "--trainer.optimization.initial-effective-lrate=0.003",
            "--trainer.optimization.final-effective-lrate=0.0003",
            "--egs.chunk-left-context=1",
            "--egs.opts=--num-utts-subset 12",
            f"--lost-after={given.lost_after:g}",
            "--journal=false",
        )
        wrapper = [] if network is None else [str(network.wrapper)]
        command = [
            *[sys.executable, "-m", "kaldi_mpi", "launch", "-n", str(given.ranks), "--restarts=1000", "--", *wrapper],
            *[sys.executable, "-m", "kaldi_mpi", "train", *options],
        ]
        kinds = [kind for kind in KINDS if kind != "partition" or network is not None]
        chaos: contextlib.AbstractContextManager[Failures] = (
            contextlib.nullcontext(Failures(folder, []))
            if seed is None
            else Chaos(folder, given.ranks, given.every, kinds, seed, network)
        )
        around = environment() | (network.environment if network is not None else {})
        began = time.monotonic()
        with chaos as failures:
            done = subprocess.run(command, env=around, cwd=folder, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
        said = re.search(r"valid, iteration final: Overall log-likelihood for 'output' is (\S+)", done.stderr)
        (self._work / f"run{self._runs}.log").write_text(done.stderr)
        if done.returncode != 0 or said is None or not (folder / "final.mdl").exists():
            raise SystemExit(f"bench/chaos.py: a training failed:\n{done.stderr[-6000:]}")
        faults = dict(collections.Counter(failure.how for failure, _ in failures.struck))
        print(
            f"{strategy}, {'disturbed' if seed is not None else 'undisturbed'}: {seconds:.1f} s, "
            f"log-likelihood {said[1]}, faults {faults}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return seconds, float(said[1]), faults


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Throughput of trainings under faults, by strategy.")
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="learners")
    add("--strategies", nargs="*", default=["expair", "adpsgd-fixed", "adpsgd-random", "allreduce"], help="to run")
    add("--seconds", type=float, default=600, help="of an undisturbed training, about")
    add("--every", type=float, default=25, help="seconds between two faults, on the average")
    add("--device-ms", type=float, default=200, help="device time of a step")
    add("--lost-after", type=float, default=2, help="the trainings' --lost-after")
    add("--utterances", type=int, default=1000, help="of the corpus, about 40 frames each")
    add("--chunks", type=int, default=4, help="of 10 frames in a learner's minibatch")
    add("--seed", type=int, default=1, help="of the faults, the same for all strategies")
    return parser.parse_args(arguments)


def main() -> int:
    """Run everything and print the figures."""
    options = parse(sys.argv[1:])
    shares: dict[str, float] = {}
    faults: dict[str, dict[str, int]] = {}
    quality: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="chaos.") as name,
        Network.where_possible(options.ranks, Path(name)) as network,
    ):
        bench = Bench(options, Path(name))
        for strategy in options.strategies:
            usual, before, _ = bench.run(strategy, None, network)
            seconds, after, faults[strategy] = bench.run(strategy, options.seed, network)
            shares[strategy], quality[strategy] = round(usual / seconds, 3), [before, after]
            print(
                f"{strategy:16} share {shares[strategy]:.3f}, {sum(faults[strategy].values())} faults "
                f"{faults[strategy]}, log-likelihood {before:.4f} undisturbed, {after:.4f} disturbed",
                flush=True,
            )
    print(json.dumps({"throughput_share": shares, "faults": faults, "log_likelihood": quality}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
