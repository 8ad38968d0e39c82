"""Signals to each process between train.sh and a learner: does everything end, how soon, and with which words?

``python -m tests.programs.chain [--repeat 30] [--cmd run.pl] [--seed 0]``

Each time the toy is trained by steps_mpi/train.sh with two learners, and one signal is sent, at a random moment of the
training, to one of

    start     train.sh, which is `kaldi-mpi start`
    cmd       run.py, or run.pl
    shell     the bash by which that runs the job
    launch    the launcher
    mpiexec
    learner   of a random rank

bash takes no notice of SIGINT while the program that it has started lives. All else ends well if no process of that
tree is left within 5 s and start's exit status is not 0. The last line is one JSON object: by process and signal, the
most seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.paths import REPO
from tests.toy import Toy, environment, make_toy

PLACES = ("start", "cmd", "shell", "launch", "mpiexec", "learner")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL)
LIMIT = 5.0


@dataclasses.dataclass
class Ended:
    """How a run ended.

    Attributes:
        seconds: from the signal until no process was left.
        left: processes that were left after `LIMIT`, as their command lines.
        status: start's; negative: it was killed.
        said: on start's standard error.
        log: train.log.
        checkpoint: whether one was left.
        pid: of the process that got the signal.
    """

    seconds: float
    left: list[str]
    status: int
    said: str
    log: str
    checkpoint: bool
    pid: int


def tree(root: int) -> dict[int, tuple[int, str]]:
    """All descendants of a process, and itself: pid -> (parent, command line)."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(path.name)] = parent, words
    found = {root: parents.get(root, (0, ""))}
    while more := {p: v for p, v in parents.items() if v[0] in found and p not in found}:
        found |= more
    return found


def running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def find(place: str, processes: dict[int, tuple[int, str]], root: int, rng: random.Random) -> int:
    """The process of that name in the tree below `root`."""

    def those(words: str) -> list[int]:
        return sorted(pid for pid, (_, line) in processes.items() if words in line and pid != root)

    launch = next(pid for pid in those(" -m kaldi_mpi launch ") if "bash" not in processes[pid][1].split()[0]
                  and "run." not in processes[pid][1].split(" -m ")[0])  # fmt: skip
    if place == "launch":
        return launch
    if place == "shell":
        return processes[launch][0]
    if place == "cmd":
        return next(pid for pid, (parent, _) in processes.items() if parent == root)
    if place == "mpiexec":
        return next(pid for pid, (parent, _) in processes.items() if parent == launch)
    if place == "learner":
        mpiexec = find("mpiexec", processes, root, rng)
        return rng.choice(sorted(set(tree(mpiexec)) - {mpiexec}))
    return root


def run(
    toy: Toy,
    name: str,
    place: str,
    how: signal.Signals,
    cmd: str,
    wait: float,
    rng: random.Random,
    limit: float = LIMIT,
) -> Ended:
    """One training, one signal `wait` seconds after its first iteration."""
    folder = toy.experiment(name)
    options = [option for option in toy.options(folder, "--trainer.num-epochs=100000") if "--cmd" not in option]
    process = subprocess.Popen(
        [str(REPO / "steps_mpi" / "train.sh"), "--python", sys.executable, "--cmd", cmd, "--num-learners=2", *options],
        env=environment(), cwd=folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (folder / "log" / "train.0.2.log").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    time.sleep(wait)
    processes = tree(process.pid)
    pid = find(place, processes, process.pid, rng)
    began = time.monotonic()
    os.kill(pid, how)
    left = set(processes)
    while left and time.monotonic() - began < limit:
        time.sleep(0.02)
        process.poll()
        left = {one for one in left if running(one)}
    seconds = time.monotonic() - began
    words = [f"{one}: {processes[one][1][:100]}" for one in sorted(left)]
    for one in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    said = process.communicate(timeout=30)[1]
    log = (folder / "log" / "train.log").read_text(errors="replace")
    return Ended(seconds, words, process.returncode, said, log, (folder / "checkpoint" / "current.json").exists(), pid)


def main() -> int:
    """Repeat all; returns 0 if all ended well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--places", nargs="+", default=PLACES, choices=PLACES)
    parser.add_argument("--cmd", default=str(REPO / "steps_mpi" / "run.py"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # nohup, and the & of a script's shell, have their children ignore these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    rng, bad = random.Random(options.seed), 0
    most: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="chain.") as work:
        toy = make_toy(Path(work), num_utterances=24)
        for number in range(options.repeat):
            for place in options.places:
                for how in SIGNALS:
                    if (place, how) == ("shell", signal.SIGINT):
                        continue
                    ended = run(toy, f"{place}-{how.name}-{number}", place, how, options.cmd, rng.random() * 2, rng)
                    name = f"{place} {how.name}"
                    most[name] = max(most.get(name, 0.0), ended.seconds)
                    if ended.left or ended.status == 0:
                        bad += 1
                        print(f"{number} {name}: status {ended.status}, left {ended.left}\n{ended.said}", flush=True)
                    else:
                        print(f"{number} {name}: {ended.seconds:.2f} s, status {ended.status}", flush=True)
                    shutil.rmtree(toy.work / f"{place}-{how.name}-{number}")
    print(json.dumps({"repeat": options.repeat, "bad": bad, "seconds": {k: round(v, 2) for k, v in most.items()}}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
