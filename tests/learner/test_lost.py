"""Learners that stand still: strategies that wait for nobody go on without them, and they come back."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kaldi_mpi.launch import find_mpiexec, mpi_vendor
from kaldi_mpi.testing.failing import Failures, fail
from tests.learner.test_training import parameters
from tests.toy import Toy, environment, launch_command, make_toy, train

OPTIONS = (
    "--trainer.num-epochs=12",
    "--trainer.samples-per-iter=24",  # an iteration and a checkpoint every few steps
    "--inject=device:20ms",
    "--lost-after=1.5",
)


def _more(*values: str | int) -> Any:
    return pytest.param(*values, marks=pytest.mark.thorough)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


def run(
    toy: Toy, name: str, ranks: int, failed: int, how: str, *options: str, status: int = 0
) -> tuple[Path, str, dict[str, Any]]:
    """Train while a rank fails; returns the directory, the log and the summary."""
    folder = toy.experiment(name)
    command = launch_command(ranks, toy.options(folder, *OPTIONS, *options))
    with Failures(folder, [fail(rank=failed).at(step=6).by(how)]) as failures:
        result = subprocess.run(
            command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
    assert failures.struck, "it was over before"
    assert result.returncode == status, result.stderr
    assert not list(folder.glob(".learners.*"))
    summary = folder / "log" / "summary.json"
    return folder, result.stderr, json.loads(summary.read_text()) if summary.exists() else {}


@pytest.mark.parametrize("strategy", ["adpsgd-random", _more("easgd"), _more("asgd")])
def test_a_stopped_learner_is_left_behind(toy: Toy, strategy: str) -> None:
    """Checkpoints, validations and the end do without it; all data are trained on."""
    folder, log, summary = run(toy, f"stop-{strategy}", 3, 1, "stop", f"--strategy={strategy}")
    assert re.search(r"learner rank 1 on \S+ has been silent for \d\.\d s: it is lost", log)
    assert "the mean of 2 of 3 learners; rank 1 did not answer" in log
    assert "finished without learner rank 1, which was lost" in log
    assert len(summary["learners"]) == 2
    valid = [v["valid"] for v in summary["validations"]]
    assert valid[-1] > valid[0] + 0.1 and np.isfinite(parameters(folder)).all()
    assert summary["validations"][-1]["iteration"] == "final"


@pytest.mark.parametrize("strategy", ["asgd", _more("expair")])
def test_a_stopped_learner_comes_back(toy: Toy, strategy: str) -> None:
    options = (f"--strategy={strategy}", "--trainer.num-epochs=20")
    _, log, summary = run(toy, f"back-{strategy}", 3, 1, "stop, continue after 3 s", *options)
    assert "it is lost" in log and "is back, with another learner's model" in log
    assert "the mean of 3 of 3 learners again" in log
    frames = [learner["own_frames"] for learner in summary["learners"]]
    assert len(frames) == 3 and frames[1] < min(frames[0], frames[2])
    # Its tickets went to others, and it may have computed them too, before it knew.
    assert 20 * 2091 <= sum(frames) <= 20 * 2091 + 3 * 120


def started(folder: Path, options: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        launch_command(3, options), env=environment(), cwd=folder, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)


def test_who_wakes_too_late_is_told_so(toy: Toy) -> None:
    folder = toy.experiment("late")
    options = toy.options(folder, *OPTIONS, "--strategy=expair", "--trainer.prior-subset-size=400000")
    process = started(folder, options)
    with Failures(folder, [fail(rank=2).at(step=6).by("stop")]):
        wait_for((folder / "42.mdl").exists, process)  # after the last iteration, when the others have met
    # The end of the block has let it go on.
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 0, log
    assert "this learner was silent for too long, and the others have ended without it" in log
    assert (folder / "final.mdl").exists()


@pytest.mark.parametrize("rank", [3, _more(2)])
def test_a_super_learner_is_lost_as_a_whole(toy: Toy, rank: int) -> None:
    """Its leader, or another of its learners."""
    options = ("--strategy=expair", "--super-learner-size=2")
    _, log, summary = run(toy, f"super-{rank}", 4, rank, "stop", *options)
    assert "learner rank 2 on" in log and "it is lost" in log
    assert "finished without learner rank 2, 3, which was lost" in log
    assert len(summary["learners"]) == 2


def test_with_a_dedicated_server(toy: Toy) -> None:
    _, log, summary = run(toy, "server", 4, 1, "stop", "--strategy=easgd", "--dedicated-server=true")
    assert "finished without learner rank 1, which was lost" in log
    assert len(summary["learners"]) == 2


def newest(current: Path) -> list[str | None]:
    files: list[str | None] = json.loads(current.read_text())["checkpoints"][0]["files"]
    return files


def test_a_checkpoint_without_a_lost_learner(toy: Toy) -> None:
    """Asked to stop, the others end with a checkpoint; the next run has all learners again."""
    folder = toy.experiment("stopped")
    options = toy.options(folder, *OPTIONS, "--strategy=expair", "--trainer.num-epochs=60")
    process = started(folder, options)
    current = folder / "checkpoint" / "current.json"
    with Failures(folder, [fail(rank=1).at(step=6).by("stop")]) as failures:
        wait_for(lambda: bool(failures.struck) and current.exists() and None in newest(current), process)
        process.terminate()
        log = process.communicate(timeout=60)[1]
    assert process.returncode == 75, log
    assert "the same command goes on from the checkpoint, with all of them" in log
    step = json.loads(current.read_text())["step"]
    short = toy.options(folder, *OPTIONS, "--strategy=expair", "--trainer.num-epochs=60", "--inject=")
    again = train(3, short)
    assert again.returncode == 0 and f"going on at step {step}" in again.stderr, again.stderr
    assert "learner rank 1 was lost: it goes on with the model of" in again.stderr


def ulfm(ranks: int, options: list[str]) -> list[str]:
    """The command that trains under an MPI that survives a death, and an mpiexec that does."""
    command = launch_command(ranks, options)
    return [*command[: command.index("--")], "--mpiexec-opts=--with-ft ulfm", *command[command.index("--") :]]


@pytest.mark.parametrize(("strategy", "failed"), [("expair", 1), _more("asgd", 2)])
def test_a_death_under_an_mpi_that_survives_it(toy: Toy, strategy: str, failed: int) -> None:
    if mpi_vendor(find_mpiexec()) != "openmpi":
        pytest.skip("Open MPI alone has --with-ft ulfm")
    folder = toy.experiment(f"death-{strategy}")
    command = ulfm(3, toy.options(folder, *OPTIONS, f"--strategy={strategy}"))
    with Failures(folder, [fail(rank=failed).at(step=6).by("kill")]) as failures:
        result = subprocess.run(
            command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
    assert failures.struck and result.returncode == 0, result.stderr
    assert f"finished without learner rank {failed}, which was lost" in result.stderr
    summary = json.loads((folder / "log" / "summary.json").read_text())
    assert len(summary["learners"]) == 2 and summary["validations"][-1]["iteration"] == "final"


def test_a_death_that_nobody_can_spare(toy: Toy) -> None:
    """Also under such an MPI: all learners meet in each step, so the run ends, and names the dead."""
    if mpi_vendor(find_mpiexec()) != "openmpi":
        pytest.skip("Open MPI alone has --with-ft ulfm")
    folder = toy.experiment("death-allreduce")
    command = ulfm(3, toy.options(folder, *OPTIONS, "--strategy=allreduce"))
    with Failures(folder, [fail(rank=1).at(step=6).by("kill")]):
        result = subprocess.run(
            command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
    assert result.returncode == 1
    assert re.search(r"learner rank 1 \(process \d+ on \S+\) was killed or crashed without a word", result.stderr)


def test_nobody_waits_for_a_slow_learner_at_a_checkpoint(toy: Toy) -> None:
    """Were it waited for, it would have done a step or two between any two of forty checkpoints."""
    folder = toy.experiment("slow")
    options = toy.options(folder, *OPTIONS, "--strategy=expair", "--inject=device:10ms,slow:100x@rank2")
    result = train(3, options)
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "log" / "summary.json").read_text())
    frames = [learner["own_frames"] for learner in summary["learners"]]
    assert sum(frames) == 12 * 2091 and frames[2] < 10 * 120
    assert [v["iteration"] for v in summary["validations"]] == [*range(43), "final"]
