"""Trainings of the digits recipe for the tables: one call is one training, decoded and scored.

The recipe's own scripts do the work, in egs/digits/s5, with its data, alignments and graph (made by its stages
1 to 3 where they are not there yet). A training that is finished is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).resolve().parent.parent / "egs" / "digits" / "s5"


@dataclasses.dataclass(frozen=True)
class Training:
    """What to train.

    Attributes:
        name: of its directory below the recipe's exp/.
        num_learners: N.
        strategy: as for ``--strategy``.
        options: of train.sh, besides.
        chunks: per minibatch, over all learners.
        seed: of model and data.
        epochs: of the share of the data.
        share: of the recipe's training utterances that is used, every round(1 / share)-th one.
        rates: effective learning rates, first and last.
        xconfig: the network, None for the recipe's.
    """

    name: str
    num_learners: int
    strategy: str
    options: tuple[str, ...] = ()
    chunks: int = 32
    seed: int = 0
    epochs: float = 5
    share: float = 1.0
    rates: tuple[float, float] = (0.01, 0.0005)
    xconfig: str | None = None


def environment() -> dict[str, str]:
    """This Python first on the PATH, one thread a process."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return os.environ | one | {"PATH": path, "VIRTUAL_ENV": str(Path(sys.executable).parent.parent)}


def run(command: str, log: Path | None = None, recipe: Path = RECIPE) -> str:
    """Run a line of bash in the recipe's directory, or a copy's; returns what it printed.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    done = subprocess.run(
        ["bash", "-c", f"set -e; . ./path.sh; {command}"],
        cwd=recipe, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if log is not None:
        log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{command}\nended with status {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def gmm() -> str:
    """The recipe's GMM system, which gives alignments and graph."""
    return "tri1" if os.environ.get("KALDI_ROOT") else "mono"


def prepare(share: float) -> Path:
    """The recipe's data, alignments and graph; returns the data directory of that share of the training set."""
    if not (RECIPE / "exp" / f"{gmm()}_ali" / "final.mdl").exists():
        print("preparing the recipe's data, alignments and graph", flush=True)
        run("./run.sh --stop-stage 3")
    return subset("train_hires", share)


def subset(name: str, share: float) -> Path:
    """The data directory of every round(1 / share)-th utterance of data/NAME, made anew."""
    source = RECIPE / "data" / name
    if share == 1.0:
        return source
    every = round(1 / share)
    target = source.with_name(f"{name}_1of{every}")
    target.mkdir(exist_ok=True)
    for file in ("feats.scp", "utt2spk", "text"):
        lines = (source / file).read_text().splitlines(keepends=True)
        (target / file).write_text("".join(lines[::every]))
    return target


def train(what: Training) -> dict[str, Any]:
    """Train, if it has not been done; returns its log/summary.json."""
    data = prepare(what.share).relative_to(RECIPE)
    folder = RECIPE / "exp" / what.name
    summary = folder / "log" / "summary.json"
    if not summary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = [
            f"--num-learners {what.num_learners}",
            f"--strategy {what.strategy}",
            f"--chunks-per-minibatch {what.chunks}",
            f"--seed {what.seed}",
            f"--num-epochs {what.epochs}",
            f"--initial-lrate {what.rates[0]} --final-lrate {what.rates[1]}",
            f"--train-opts '{' '.join(what.options)}'",
            *([f"--xconfig {what.xconfig}"] if what.xconfig else []),
        ]
        run(f"local/train_lstm.sh {' '.join(options)} {data} exp/{gmm()}_ali exp/{what.name}", folder / "train.out")
    result: dict[str, Any] = json.loads(summary.read_text())
    return result


def word_error_rate(what: Training, share: float = 1.0, num_jobs: int = 2) -> float:
    """Decode a share of the recipe's test utterances and score, if it has not been done; per cent."""
    data = subset("test_hires", share).relative_to(RECIPE)
    decoded = f"exp/{what.name}/decode_test"
    if not list((RECIPE / decoded).glob("wer_*")):
        run(f"decode.sh --nj {num_jobs} exp/{gmm()}/graph {data} {decoded}")
    best = run(f"python3 -m kaldi_mpi best-wer {decoded}")
    return float(best.split()[1])
