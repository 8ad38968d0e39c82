"""All strategies on the digits recipe, side by side: ``make strategies``.

Every strategy trains one LSTM (strategies.xconfig: the recipe's with half the cells and without limits on the change
per minibatch, which would hide what strategies do) on the same frames, with 4 and 8 learners and three seeds each.
The table gives, as means over the seeds: held-out log-probability per frame of the final model (the mean of the
learners), its word error rate (with the range over seeds), the models' spread (their mean squared distance from
their mean) at the last validation, megabytes sent and seconds waited for others by a learner, and the seconds of
the training. The last line is one JSON object with the same figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from digits import RECIPE, Training, train, word_error_rate

XCONFIG = Path(__file__).resolve().parent / "strategies.xconfig"

# Rows of the table: label -> strategy and its options. K is given in frames over all learners.
STRATEGIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "allreduce": ("allreduce", ()),
    "periodic, K = 10k": ("periodic", ("--frames-per-average=10000",)),
    "bmuf, K = 10k": ("bmuf", ("--frames-per-average=10000",)),
    "easgd": ("easgd", ()),
    "asgd": ("asgd", ()),
    "adpsgd-fixed": ("adpsgd-fixed", ()),
    "adpsgd-random": ("adpsgd-random", ()),
    "adpsgd-random, super-learners of 2": ("adpsgd-random", ("--super-learner-size=2",)),
    "adpsgd-delay1": ("adpsgd-delay1", ()),
    "expair": ("expair", ()),
}


def measure(label: str, num_learners: int, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One training and its figures."""
    strategy, more = STRATEGIES[label]
    name = "".join(c if c.isalnum() else "-" for c in label)
    what = Training(
        name=f"strategies/{name}.{num_learners}.{seed}",
        num_learners=num_learners,
        strategy=strategy,
        options=("--checkpoint-interval=0", "--trainer.max-param-change=0", "--trainer.prior-subset-size=2000", *more),
        chunks=options.chunks,
        seed=seed,
        epochs=options.epochs,
        share=options.share,
        rates=(options.rate, options.rate / 3),
        xconfig=str(XCONFIG),
    )
    summary = train(what)
    learners = summary["learners"]
    spreads = [v["spread"] for v in summary["validations"][1:] if v["spread"] is not None]
    return {
        "valid": summary["validations"][-1]["valid"],
        "wer": word_error_rate(what, options.test_share),
        "spread": spreads[-1],
        "mb_sent": sum(one["bytes_sent"] for one in learners) / len(learners) / 1e6,
        "seconds_waited": sum(one["seconds_waited"] for one in learners) / len(learners),
        "seconds": summary["seconds"],
        "frames": summary["frames"],
    }


def table(results: dict[str, dict[int, list[dict[str, float]]]], learners: list[int]) -> str:
    """The results as a table in Markdown."""
    heads = ["log-prob", "WER % (range)", "spread", "MB sent", "s waited", "s"]
    lines = [
        "| strategy | " + " | ".join(f"{head}, {n}" for n in learners for head in heads) + " |",
        "|---" * (1 + len(heads) * len(learners)) + "|",
    ]
    for label, by_learners in results.items():
        cells = [label]
        for n in learners:
            runs = by_learners[n]
            mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            wers = [run["wer"] for run in runs]
            cells += [
                f"{mean['valid']:.4f}", f"{mean['wer']:.2f} ({min(wers):.2f}-{max(wers):.2f})", f"{mean['spread']:.2g}",
                f"{mean['mb_sent']:.0f}", f"{mean['seconds_waited']:.1f}", f"{mean['seconds']:.0f}",
            ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learners", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--chunks", type=int, default=64, help="per minibatch, over all learners")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--share", type=float, default=0.5, help="of the recipe's training utterances")
    parser.add_argument("--test-share", type=float, default=1 / 3, help="of its test utterances")
    parser.add_argument("--rate", type=float, default=0.001, help="effective learning rate at the start")
    options = parser.parse_args()
    results: dict[str, dict[int, list[dict[str, float]]]] = {}
    for seed in options.seeds:
        for n in options.learners:
            for label in options.strategies:
                figures = measure(label, n, seed, options)
                results.setdefault(label, {}).setdefault(n, []).append(figures)
                print(f"seed {seed}, {n} learners, {label}: {json.dumps(figures)}", flush=True)
    text = table(results, options.learners)
    (RECIPE / "exp" / "strategies" / "table.md").write_text(text + "\n")
    print(text)
    shown: dict[str, Any] = {"strategies": results, "share": options.share, "epochs": options.epochs}
    print(json.dumps(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
