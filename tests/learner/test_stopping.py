"""A training that is asked to stop in the middle of an iteration, and goes on: as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kaldi_mpi.learner.stopping import Stopping
from kaldi_mpi.processes import STOPPED
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import World
from tests.toy import Toy, environment, launch_command, make_toy, train

# Gates with dropout and iterations with rates of their own; iterations of eleven steps, in which most stops fall.
OPTIONS = (
    "--trainer.num-epochs=40",
    "--trainer.samples-per-iter=130",
    "--trainer.optimization.proportional-shrink=2",
    "--trainer.optimization.momentum=0.5",
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


def stopped_at(folder: Path, num_learners: int, options: list[str]) -> int:
    """Start a training, ask it to stop after a while, and return the step of the checkpoint that it has left."""
    process = subprocess.Popen(
        launch_command(num_learners, options), env=environment(), cwd=folder, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (folder / "log" / "train.0.1.log").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == STOPPED, said
    assert not (folder / "final.mdl").exists()
    return int(json.loads((folder / "checkpoint" / "current.json").read_text())["step"])


@pytest.mark.parametrize(
    ("num_learners", "strategy"),
    [
        (1, ()),
        (2, ("--strategy=allreduce",)),
        pytest.param(2, ("--strategy=bmuf", "--frames-per-average=300"), marks=pytest.mark.thorough),
    ],
)
def test_the_same_bytes(toy: Toy, num_learners: int, strategy: tuple[str, ...]) -> None:
    name = f"{num_learners}-{len(strategy)}"
    undisturbed = toy.experiment(f"undisturbed-{name}")
    assert train(num_learners, toy.options(undisturbed, *OPTIONS, *strategy)).returncode == 0
    folder = toy.experiment(f"stopped-{name}")
    options = toy.options(folder, *OPTIONS, *strategy)
    step = stopped_at(folder, num_learners, options)
    again = train(num_learners, options)
    assert again.returncode == 0 and f"going on at step {step}" in again.stderr, again.stderr
    assert (folder / "final.mdl").read_bytes() == (undisturbed / "final.mdl").read_bytes()
    for log in ("train.1.1.log", "compute_prob_valid.2.log"):
        assert (folder / "log" / log).read_text() == (undisturbed / "log" / log).read_text()


@pytest.mark.parametrize(
    "strategy",
    [
        ("--strategy=expair",),
        ("--strategy=easgd", "--dedicated-server=true"),
        pytest.param(("--strategy=adpsgd-fixed", "--super-learner-size=2"), marks=pytest.mark.thorough),
    ],
)
def test_strategies_that_wait_for_nobody(toy: Toy, strategy: tuple[str, ...]) -> None:
    """They stop at a step, and each minibatch is trained on once."""
    folder = toy.experiment(f"stopped-{strategy[0][11:]}")
    options = toy.options(folder, *OPTIONS, *strategy)
    ranks = 4 if "super" in strategy[-1] else 3
    step = stopped_at(folder, ranks, options)
    again = train(ranks, options)
    assert again.returncode == 0 and f"going on at step {step}" in again.stderr, again.stderr
    assert (folder / "final.mdl").exists()


def test_all_agree_on_one_step() -> None:
    """Whoever hears of it first, and however seldom they ask."""

    class Hears(Stopping):
        """A learner that hears of it at a step of its own."""

        def look(self) -> str:
            self._asked = "asked" if self._clock() >= 0.4 + 0.25 * self._world.rank else ""
            return self._asked

    def learner(world: World) -> int:
        steps = [0]
        stopping = Hears(world, clock=lambda: steps[0] * 0.01)
        while not stopping.agree():
            steps[0] += 1
            assert steps[0] < 2000
        return steps[0]

    steps = run_world(3, learner)
    assert len(set(steps)) == 1 and 40 <= steps[0] <= 40 + 25
