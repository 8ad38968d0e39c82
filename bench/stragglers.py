"""What one slow learner costs: the time of an epoch, by strategy and slowdown.

``python bench/stragglers.py [--ranks 4 8] [--slowdowns 5 10 100] ...`` runs real trainings under mpiexec on a
synthetic corpus, with a network so small that nearly all of a step is a fixed device time in which the core is free
(``--inject device:20ms``): the learners' speed is then their own, not that of the few cores that they share.
Learner 2 is made slow (``--inject slow:100x@rank2``). Undisturbed and disturbed runs take turns.

Measured is the time from the first minibatch to the final model, from the training's own log; it goes through the
same data with and without the slow learner. Its factor over the undisturbed time would be N/(N - 1) if the slow
learner did nothing at all and the others took its share without a loss; the bound stands at 1.1 times that.
The synchronous ``adpsgd-delay1`` is run for contrast: all wait for the slow one at each step.

Beside the measured factors stand the published ones (arXiv 2110.11199, 16 GPUs, 1/16 of the learners slow, so that
its bound is nearer to 1). The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.toy import FEAT_DIM, NUM_PDFS, Toy, environment, launch_command, make_toy

SLOW_RANK = 2
GOSSIP = ["adpsgd-fixed", "adpsgd-random", "expair"]
PUBLISHED = {
    "adpsgd-fixed": {"5": 1.1, "10": 1.1, "100": 1.3},
    "adpsgd-random": {"5": 1.1, "10": 1.1, "100": 1.2},
    "adpsgd-delay1": {"5": 4.1, "10": 8.7, "100": 91.7},
}
XCONFIG = f"""\
input dim={FEAT_DIM} name=input
fixed-affine-layer name=lda input=Append(-1,0,1) affine-transform-file={{lda}}
output-layer name=output dim={NUM_PDFS} max-change=1.5
"""


class Bench:
    """Runs trainings on one corpus.

    Args:
        options: of the command line.
        work: a folder for corpus and models.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options = options
        self._toy: Toy = make_toy(work, num_utterances=options.utterances)
        self._runs = 0

    def seconds(self, strategy: str, ranks: int, slowdown: float | None, epochs: float) -> float:
        """The time of one training, in which learner 2 is `slowdown` times slower (None: as fast as the others)."""
        self._runs += 1
        folder = self._toy.experiment(f"run{self._runs}")
        xconfig = XCONFIG.format(lda=folder / "configs" / "lda.mat")
        (folder / "configs" / "network.xconfig").write_text(xconfig)
        inject = f"device:{self._options.device_ms}ms"
        if slowdown is not None:
            inject += f",slow:{slowdown:g}x@rank{SLOW_RANK}"
        options = self._toy.options(
            folder,
            f"--strategy={strategy}",
            f"--inject={inject}",
            f"--trainer.num-epochs={epochs:g}",
            f"--trainer.rnn.num-chunk-per-minibatch={self._options.chunks}",
            "--trainer.samples-per-iter=100000000",
            "--trainer.optimization.initial-effective-lrate=0.0001",
            "--trainer.optimization.final-effective-lrate=0.0001",
            "--egs.chunk-left-context=1",
            "--egs.opts=--num-utts-subset 12",
            "--checkpoint-interval=0",
        )
        done = subprocess.run(
            launch_command(ranks, options), env=environment(), cwd=folder, capture_output=True, text=True, check=False
        )
        said = re.search(r"trained on (\d+) frames in ([\d.]+) s", done.stdout + done.stderr)
        if done.returncode != 0 or said is None:
            raise SystemExit(f"bench/stragglers.py: a training failed:\n{done.stdout}{done.stderr}")
        slow = "undisturbed" if slowdown is None else f"{slowdown:g} times slower"
        line = f"{ranks} ranks, {strategy}, {slow}: {said[1]} frames in {said[2]} s"
        print(line, file=sys.stderr, flush=True)
        return float(said[2])

    def factors(self, strategy: str, ranks: int, slowdowns: Sequence[float], epochs: float) -> dict[str, float]:
        """The factor of each slowdown: disturbed runs between undisturbed ones, over those; medians."""
        undisturbed = [self.seconds(strategy, ranks, None, epochs)]
        disturbed: dict[str, list[float]] = {f"{slowdown:g}": [] for slowdown in slowdowns}
        for _ in range(self._options.rounds):
            for slowdown, seconds in disturbed.items():
                seconds.append(self.seconds(strategy, ranks, float(slowdown), epochs))
            undisturbed.append(self.seconds(strategy, ranks, None, epochs))
        usual = statistics.median(undisturbed)
        return {slowdown: round(statistics.median(seconds) / usual, 3) for slowdown, seconds in disturbed.items()}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time of an epoch with one slow learner, by strategy.")
    add = parser.add_argument
    add("--ranks", type=int, nargs="*", default=[4, 8], help="learners; each number is run")
    add("--slowdowns", type=float, nargs="*", default=[5, 10, 100], help="of one learner")
    add("--strategies", nargs="*", default=GOSSIP, help="to measure")
    add("--contrast", type=float, nargs="*", default=[5], help="slowdowns for adpsgd-delay1, 4 ranks")
    add("--device-ms", type=float, default=20, help="device time of a step")
    add("--utterances", type=int, default=1000, help="of the corpus, about 40 frames each")
    add("--chunks", type=int, default=1, help="of 10 frames in a learner's minibatch")
    add("--steps", type=int, default=600, help="undisturbed steps of each learner in a training")
    add("--rounds", type=int, default=1, help="disturbed runs for each figure; their median counts")
    return parser.parse_args(arguments)


def main() -> int:
    """Run everything and print the table."""
    options = parse(sys.argv[1:])
    factors: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="stragglers.") as folder:
        bench = Bench(options, Path(folder))
        # About 4.3 chunks an utterance: an "epoch" here is as long as asked for, whatever the number of learners.
        per_epoch = 4.3 * options.utterances / options.chunks
        for ranks in options.ranks:
            epochs = options.steps * ranks / per_epoch
            of_ranks = factors.setdefault(f"{ranks} ranks", {})
            for strategy in options.strategies:
                of_ranks[strategy] = bench.factors(strategy, ranks, options.slowdowns, epochs)
            if ranks == 4 and options.contrast:
                of_ranks["adpsgd-delay1"] = bench.factors("adpsgd-delay1", ranks, options.contrast, epochs / 3)
    bound = {f"{ranks} ranks": round(1.1 * ranks / (ranks - 1), 3) for ranks in options.ranks}
    columns = sorted({float(s) for rows in factors.values() for row in rows.values() for s in row})
    print(f"{'':10}{'time of an epoch, one learner slower by':32}" + "".join(f"{c:>7g}x" for c in columns))
    for ranks_name, rows in factors.items():
        for strategy, row in rows.items():
            cells = "".join(f"{row.get(f'{c:g}', float('nan')):8.3f}" for c in columns)
            print(f"{ranks_name:10}{strategy:20}{'bound ' + str(bound[ranks_name]):12}{cells}")
    for strategy, row in PUBLISHED.items():
        cells = "".join(f"{row.get(f'{c:g}', float('nan')):8.3f}" for c in columns)
        print(f"{'published':10}{strategy:20}{'16 GPUs':12}{cells}")
    result = {
        "epoch_factor": factors,
        "bound": bound,
        "published": PUBLISHED,
        "device_ms": options.device_ms,
        "steps": options.steps,
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
