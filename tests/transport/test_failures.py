"""Learners whose communication fails, dies or is stopped: the run ends, and the rank at fault is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kaldi_mpi import launch
from tests.paths import REPO

PROGRAM = """
import os, sys, threading, time
import numpy as np
from kaldi_mpi.errors import DataError
from kaldi_mpi import log
from kaldi_mpi.transport.guard import guarded
from kaldi_mpi.processes import die_with_parent
from kaldi_mpi.transport.mpi import MpiWorld
die_with_parent()
world = MpiWorld()
log.set_up("learner", world.rank)
messages, rank = world.messages, world.rank
def handler(source, numbers, payload):
    {handler}
with guarded(world):
    world.barrier()
    messages.on_message(0, handler)
    if rank == 0:
        messages.post(lambda: messages.send(0, 1, (), None))
    {main}
    world.close()
"""
HERE = "open(f'{rank}.pid', 'w').write(str(os.getpid())); os.rename(f'{rank}.pid', f'rank.{rank}')"
FOREVER = "messages.wait(lambda: False)"


def command(main: str, handler: str = "pass", num_learners: int = 3) -> list[str]:
    return [
        *[sys.executable, "-m", "kaldi_mpi", "launch", "-n", str(num_learners), "--"],
        *[sys.executable, "-c", PROGRAM.format(main=main, handler=handler)],
    ]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("main", "handler", "message"),
    [
        (FOREVER, "raise ValueError('no such piece')",
         "learner rank 1 failed: ValueError: no such piece (on its communication thread)"),
        ("while True: pass", "raise DataError('torn', file='x')",
         "learner rank 1 failed: x: torn (on its communication thread)"),
        (FOREVER, "world.abort(1)", "learner rank 1 failed: it ended the run with status 1"),
        ("threading.Thread(target=lambda: rank == 2 and world.abort(1)).start(); messages.wait(lambda: False)", "pass",
         "learner rank 2 failed: it ended the run with status 1"),
        ("threading.Thread(target=lambda: rank == 2 and 1 / 0).start(); messages.wait(lambda: False)", "pass",
         "learner rank 2 failed: ZeroDivisionError"),
        ("rank == 2 and 1 / 0; world.sum_(np.zeros(10**6, np.float32))", "pass",
         "learner rank 2 failed: ZeroDivisionError"),
        ("rank == 2 and os._exit(3); world.sum_(np.zeros(10**6, np.float32))", "pass", "learner rank 2 "),
        ("sys.exit(2 * (rank == 2)) if rank else world.barrier()", "pass", "learner rank 2 failed: SystemExit: 2"),
    ],
    ids=["handler", "busy", "abort-handler", "abort-thread", "thread", "sum", "left", "exit"],
)  # fmt: skip
def test_the_rank_at_fault_is_named_and_all_end(tmp_path: Path, main: str, handler: str, message: str) -> None:
    result = subprocess.run(
        command(main, handler), env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1, result.stderr
    said = [line for line in result.stderr.splitlines() if "ERROR (kaldi-mpi-launch" in line]
    if "_exit" in main and not names_the_dead():
        # All are dead at once, and nobody says who was first: either they are found so, or mpiexec has ended already.
        ends = ("was killed or crashed without a word", "mpiexec ended the run; see its messages above")
        assert said and all(line.endswith(ends) for line in said), result.stderr
    else:
        assert len(said) == 1 and message in said[0], result.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_without_trouble_ends_well(tmp_path: Path) -> None:
    result = subprocess.run(
        command("world.sum_(np.zeros(10**6, np.float32))"), env=environment(), cwd=tmp_path,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0 and "ERROR" not in result.stderr, result.stderr


@pytest.mark.parametrize(
    "main", [FOREVER, "while True: world.sum_(np.zeros(10**5, np.float32))"], ids=["listening", "summing"]
)
@pytest.mark.parametrize("what", ["kill-learner", "terminate-launcher"])
def test_ended_from_outside(tmp_path: Path, main: str, what: str) -> None:
    process = subprocess.Popen(
        command(f"{HERE}\n    {main}"),
        env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"rank.{rank}").exists() for rank in range(3)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    pids = [int((tmp_path / f"rank.{rank}").read_text()) for rank in range(3)]
    if what == "kill-learner":
        os.kill(pids[1], signal.SIGKILL)
    else:
        process.terminate()
    _, said = process.communicate(timeout=30)
    if what == "kill-learner":
        assert process.returncode == 1
        assert f"learner rank 1 (process {pids[1]} on " in said or not names_the_dead(), said
    else:
        assert process.returncode == 128 + signal.SIGTERM and "stopped: signal SIGTERM" in said
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def names_the_dead() -> bool:
    """Whether mpiexec tells which process went first; MPICH ends the others so fast that it may name another."""
    return launch.mpi_vendor(launch.find_mpiexec()) == "openmpi"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
