"""Every kind of fault under every strategy: how long until the run ended or went on, what was said, what came out.

``python -m tests.programs.faults [--strategies expair ...] [--kinds kill ...]`` trains with three learners, one of
which fails in the middle, and prints a line for each: the seconds beside the undisturbed training, the line that told
of the fault, and the final model: its log-likelihood, and whether it has the very bytes of the undisturbed one.
Partitions need root. The exit status is 1 if a training did not end well.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from kaldi_mpi.testing.failing import Failures, fail
from kaldi_mpi.testing.partition import Network
from tests.toy import Toy, environment, make_toy

RANKS = 3
STRATEGIES = {
    "allreduce": (), "periodic": ("--frames-per-average=300",), "bmuf": ("--frames-per-average=300",),
    "adpsgd-delay1": (), "adpsgd-fixed": (), "adpsgd-random": (), "expair": (), "easgd": (), "asgd": (),
}  # fmt: skip
WAITS = ("allreduce", "periodic", "bmuf", "adpsgd-delay1")
KINDS = {
    "kill": "kill",
    "stop": "stop",
    "stop, 5 s": "stop, continue after 5 s",
    "slow, 5 s": "slow, continue after 5 s",
    "partition, 4 s": "partition, continue after 4 s",
}
TELLS = re.compile(
    r"starting again from the last checkpoint.*|learner rank 1 on \S+ has been silent.*|"
    r"learner rank 1 on host .* has not moved.*"
)


class Run(NamedTuple):
    """One training."""

    seconds: float
    status: int
    said: str
    model: bytes
    log_likelihood: str


def train(toy: Toy, name: str, strategy: str, how: str | None, network: Network | None) -> Run:
    """With rank 1 failing by `how`; None: with nobody."""
    folder = toy.experiment(name)
    options = toy.options(
        folder, f"--strategy={strategy}", *STRATEGIES[strategy], "--trainer.num-epochs=16",
        "--trainer.samples-per-iter=60", "--inject=device:40ms", "--lost-after=2",
    )  # fmt: skip
    cut = network is not None and how is not None and how.startswith("partition")
    wrapper = [str(network.wrapper)] if cut and network is not None else []
    command = [
        *[sys.executable, "-m", "kaldi_mpi", "launch", "-n", str(RANKS), "--restarts=1", "--on-hang=end", "--"],
        *[*wrapper, sys.executable, "-m", "kaldi_mpi", "train", *options],
    ]
    around = environment() | (network.environment if cut and network is not None else {})
    failures = [fail(rank=1).at(step=20).by(how)] if how else []
    began = time.monotonic()
    with Failures(folder, failures, network.cut if network is not None else None) as struck:
        done = subprocess.run(command, env=around, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    seconds = time.monotonic() - began
    assert how is None or struck.struck, "it was over before"
    found = TELLS.findall(done.stderr)
    scores = re.findall(r"valid, iteration final: Overall log-likelihood for 'output' is (\S+)", done.stderr)
    model = folder / "final.mdl"
    return Run(
        seconds, done.returncode, found[0] if found else "", model.read_bytes() if model.exists() else b"",
        scores[-1] if scores else done.stderr[-500:],
    )  # fmt: skip


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Every kind of fault under every strategy.")
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults.") as name, Network.where_possible(RANKS, Path(name)) as network:
        toy = make_toy(Path(name))
        for strategy in options.strategies:
            usual = train(toy, strategy, strategy, None, network)
            print(f"{strategy:14} undisturbed     {usual.seconds:5.1f} s, {usual.log_likelihood}", flush=True)
            for kind in options.kinds:
                if kind.startswith("partition") and network is None:
                    continue
                run = train(toy, f"{strategy}-{kind.replace(' ', '')}", strategy, KINDS[kind], network)
                failed += run.status != 0
                same = ", the same bytes" if run.model == usual.model else ""
                print(
                    f"{strategy:14} {kind:15} {run.seconds - usual.seconds:+5.1f} s, status {run.status}, "
                    f"{run.log_likelihood}{same}: {run.said[:160]}",
                    flush=True,
                )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
