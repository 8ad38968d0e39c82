"""The large-batch experiment of the papers, in small: where does each strategy stop converging?

The digits LSTM is trained on the same frames with larger and larger minibatches. Kaldi's gradients are sums over
frames, so one effective learning rate for all sizes *is* the linear scaling rule: ten times the minibatch, ten
times the step. There are no limits on the change (max-change), which would hide a divergence, and no warm-up.

A training converges, for this table, when its held-out log-probability gains at least three quarters of what
synchronous training gains with the smallest minibatch, in the mean over the seeds. The last line is one JSON object:
the log-probabilities by seed, and the largest minibatch at which each strategy converges (arXiv 2002.01119 and
2112.01433 do this with 16 learners on 2000 hours).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from digits import Training, train

STRATEGIES = ("allreduce", "adpsgd-delay1", "adpsgd-fixed", "adpsgd-random", "expair")
XCONFIG = Path(__file__).resolve().parent / "large_batch.xconfig"
SHARE_OF_GAIN = 0.75


def held_out(strategy: str, chunks: int, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Held-out log-probability per frame before and after one training."""
    what = Training(
        name=f"large_batch/{strategy}.{options.learners}.{chunks}.{options.rate}.{seed}",
        num_learners=options.learners,
        strategy=strategy,
        options=("--checkpoint-interval=0", "--trainer.max-param-change=0"),
        chunks=chunks,
        seed=seed,
        epochs=options.epochs,
        share=options.share,
        rates=(options.rate, options.rate / 3),
        xconfig=str(XCONFIG),
    )
    try:
        validations = train(what)["validations"]
    except RuntimeError as error:
        if "training has diverged" not in str(error):
            raise
        return float("nan"), float("nan")
    return validations[0]["valid"], validations[-1]["valid"]


def main() -> int:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learners", type=int, default=4)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 96, 128], help="over all learners")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--share", type=float, default=0.25, help="of the recipe's training utterances")
    parser.add_argument("--rate", type=float, default=0.001, help="effective learning rate, per frame")
    options = parser.parse_args()
    ends: dict[str, dict[int, list[float]]] = {strategy: {} for strategy in options.strategies}
    starts = []
    for seed in options.seeds:
        for chunks in options.chunks:
            for strategy in options.strategies:
                before, end = held_out(strategy, chunks, seed, options)
                ends[strategy].setdefault(chunks, []).append(end)
                starts.append(before)
                print(f"seed {seed}, {strategy}, {chunks} chunks: {before:.4f} -> {end:.4f}", flush=True)
    start = statistics.mean(value for value in starts if not math.isnan(value))
    best = statistics.mean(ends[options.strategies[0]][options.chunks[0]])
    least = start + SHARE_OF_GAIN * (best - start)
    print(f"\nconverged: at least {least:.4f}\n")
    print("| strategy | " + " | ".join(f"{chunks} chunks" for chunks in options.chunks) + " | largest that converges |")
    print("|---" * (len(options.chunks) + 2) + "|")
    largest: dict[str, int | None] = {}
    for strategy, by_chunks in ends.items():
        means = {chunks: statistics.mean(values) for chunks, values in by_chunks.items()}
        largest[strategy] = max((chunks for chunks, mean in means.items() if mean >= least), default=None)
        cells = [
            f"{means[chunks]:.2f} ({min(by_chunks[chunks]):.2f} .. {max(by_chunks[chunks]):.2f})" for chunks in means
        ]
        print(f"| {strategy} | " + " | ".join(cells) + f" | {largest[strategy]} |")
    print(json.dumps({"largest_batch": largest, "held_out": ends, "least": least, "learners": options.learners}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
