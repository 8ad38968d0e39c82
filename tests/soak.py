"""Many short real trainings with everything at random: does each of them end, and end well?

``make soak`` or ``python -m tests.soak [--starts 200] [--seed 0] [--only 17]``

Each start trains the toy in 1 to 5 real ranks under mpiexec, with a random strategy (or several in turn), random
settings, random disturbances, and a deadline. One in ten has a learner killed on purpose: then the run must end too,
and name it. A start is made again, alone, by its number and the seed. When one hangs, all its threads' stacks are
written down before it is ended.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kaldi_mpi.averaging import NAMES
from kaldi_mpi.averaging.settings import SETTINGS
from tests.toy import Toy, environment, launch_command, make_toy

GROUPABLE = ("adpsgd-fixed", "adpsgd-random", "adpsgd-delay1", "expair")
SERVED = ("easgd", "asgd")


@dataclasses.dataclass(frozen=True)
class Start:
    """One training: its options, and the rank that is killed in it (-1 for none)."""

    num_learners: int
    options: list[str]
    killed: int


def draw(seed: int, number: int) -> Start:
    """The start of this number; the same in every run with the seed."""
    rng = random.Random(f"{seed}/{number}")
    num_learners = rng.randint(1, 5)
    names = [rng.choice(NAMES) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    epochs = [rng.choice((0.25, 0.5, 1)) for _ in names]
    spelled = ",".join(f"{name}:{length}ep" for name, length in zip(names, epochs, strict=True))
    options = [
        f"--strategy={spelled}",
        f"--trainer.num-epochs={sum(epochs)}",
        f"--trainer.srand={rng.randrange(10**6)}",
    ]

    def useful(field: str) -> bool:
        return bool(set(names) & set(SETTINGS[field][0].users or names))

    if set(names) & {"periodic", "bmuf"} or (useful("frames_per_average") and rng.random() < 0.2):
        options.append(f"--frames-per-average={rng.choice((1, 150, 1000, 10**6))}")
    if useful("piece_size") and rng.random() < 0.5:
        options.append(f"--piece-size={rng.choice((37, 100, 500))}")
    if useful("transfer_dtype") and rng.random() < 0.4:
        options.append(f"--transfer-dtype={rng.choice(('float16', 'bfloat16'))}")
    if rng.random() < 0.3:
        options.append("--trainer.optimization.momentum=0.5")
    if "expair" in names:
        options.append(f"--exchanges-per-step={rng.randint(1, 4)}")
    if "asgd" in names and rng.random() < 0.5:
        options.append(f"--staleness-bound={rng.randint(0, 3)}")
    if num_learners == 4 and all(name in GROUPABLE for name in names) and rng.random() < 0.5:
        options.append("--super-learner-size=2")
    if num_learners > 1 and all(name in SERVED for name in names) and rng.random() < 0.5:
        options.append("--dedicated-server=true")
    rank, step = rng.randrange(num_learners), rng.randint(1, 5)
    disturbances = ["device:2ms"] * (rng.random() < 0.5)
    disturbances += [f"slow:{rng.choice((2, 10))}x@rank{rank}"] * (rng.random() < 0.3)
    disturbances += ["jitter:200%"] * (rng.random() < 0.3)
    disturbances += [f"pause:300ms@rank{rank}@step{step}"] * (rng.random() < 0.3)
    killed = rank if rng.random() < 0.1 and "--dedicated-server=true" not in options else -1
    disturbances += [f"kill@rank{rank}@step0"] * (killed >= 0)
    if disturbances:
        options.append(f"--inject={','.join(disturbances)}")
    return Start(num_learners, options, killed)


def run(start: Start, toy: Toy, name: str, deadline: float) -> str:
    """Make one start; returns what went wrong with it, or nothing."""
    folder = toy.experiment(name)
    log = folder / "soak.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            launch_command(start.num_learners, toy.options(folder, *start.options)),
            env=environment() | {"PYTHONFAULTHANDLER": "1"}, cwd=folder, stdout=stream, stderr=stream,
        )  # fmt: skip
        try:
            status = process.wait(deadline)
            hung = False
        except subprocess.TimeoutExpired:
            hung = True
            for path in folder.glob(".learners.*/rank.*"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(json.loads(path.read_text())["pid"], signal.SIGABRT)
            try:
                status = process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
    said = log.read_text(errors="replace")
    if hung:
        return f"did not end within {deadline:.0f} s"
    if start.killed >= 0:
        named = f"learner rank {start.killed} (process"
        return "" if status == 1 and named in said else f"rank {start.killed} was killed, but not named (exit {status})"
    if status != 0 or not (folder / "final.mdl").exists():
        return f"ended with status {status}, {'with' if (folder / 'final.mdl').exists() else 'without'} a model"
    return "" if "Traceback" not in said else "told of an exception"


def main() -> int:
    """The command line; returns the number of starts that went wrong, at most 100."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--starts", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="just the start of this number")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds for each (default 120)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak."))
    toy = make_toy(work / "toy")
    failed = 0
    began = time.monotonic()
    numbers = range(options.starts) if options.only is None else [options.only]
    for number in numbers:
        start = draw(options.seed, number)
        since = time.monotonic()
        trouble = run(start, toy, f"start.{number}", options.deadline)
        print(
            f"{number}: {start.num_learners} learner(s), {shlex.join(start.options)}: "
            f"{trouble or 'well'}, {time.monotonic() - since:.1f} s", flush=True,
        )  # fmt: skip
        if trouble:
            failed += 1
            print(f"   see {work / 'toy' / f'start.{number}' / 'soak.log'}", flush=True)
    if not failed:
        shutil.rmtree(work)
    print(f"{len(numbers) - failed} of {len(numbers)} starts went well, in {time.monotonic() - began:.0f} s")
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
