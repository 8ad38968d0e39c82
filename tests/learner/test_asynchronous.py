"""Learners that do not wait for each other, in real MPI ranks: nothing is lost, everybody ends with one model."""

from __future__ import annotations

import collections
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kaldi_mpi.averaging import NAMES
from kaldi_mpi.averaging.journal import JournalEvent, read_journal
from kaldi_mpi.learner.options import parse
from kaldi_mpi.learner.run import train as train_here
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import SoloWorld, World
from tests.learner.test_training import parameters
from tests.toy import Toy, environment, launch_command, make_toy, train

ASYNCHRONOUS = ("adpsgd-fixed", "adpsgd-random", "expair", "easgd", "asgd")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


def run(toy: Toy, name: str, num_learners: int, *options: str) -> tuple[Path, dict[str, Any], str]:
    """Train; returns the directory, its summary and the log."""
    folder = toy.experiment(name)
    result = train(num_learners, toy.options(folder, *options))
    assert result.returncode == 0, result.stderr
    return folder, json.loads((folder / "log" / "summary.json").read_text()), result.stderr


def own_frames(summary: dict[str, Any]) -> list[int]:
    return [learner["own_frames"] for learner in summary["learners"]]


@pytest.mark.parametrize(("strategy", "num_learners"), list(zip(ASYNCHRONOUS, (2, 3, 4, 3, 2), strict=True)))
def test_every_frame_is_trained_on_once_an_epoch(toy: Toy, strategy: str, num_learners: int) -> None:
    folder, summary, log = run(toy, f"once-{strategy}", num_learners, f"--strategy={strategy}")
    assert sum(own_frames(summary)) == 2 * 2091, "frames of two epochs of the toy"
    valid = [v["valid"] for v in summary["validations"]]
    assert valid[-1] > valid[0] + 0.1
    assert np.isfinite(parameters(folder)).all()
    assert "traceback" not in log.lower()
    journals = [read_journal(folder / "journal" / f"learner.{rank}") for rank in range(num_learners)]
    steps = [int((j["event"] == JournalEvent.STEP).sum()) for j in journals]
    assert sum(steps) == 2 * 20, "minibatches of two epochs"
    assert all((np.diff(j["own_steps"][j["event"] == JournalEvent.STEP]) == 1).all() for j in journals)


def test_one_learner_is_plain_sgd_under_every_strategy(toy: Toy) -> None:
    """Bit for bit: with nobody to mix with, no strategy changes anything."""
    needs_frames = {"periodic", "bmuf"}
    models = {}
    for name in NAMES:
        folder = toy.experiment(f"alone-{name}")
        more = ["--frames-per-average=300"] if name in needs_frames else []
        train_here(parse(toy.options(folder, f"--strategy={name}", *more)), SoloWorld())
        models[name] = parameters(folder).tobytes()
    assert len(set(models.values())) == 1, {name: hash(model) for name, model in models.items()}


def test_strategies_follow_one_another(toy: Toy) -> None:
    spelled = "allreduce:0.5ep,expair:1ep,adpsgd-delay1:0.5ep"
    _, summary, log = run(toy, "sequence", 3, f"--strategy={spelled}")
    assert sum(own_frames(summary)) == pytest.approx(2 * 2091, abs=3 * 12 * 10)  # phases end at whole global steps
    for name in ("allreduce", "expair", "adpsgd-delay1"):
        assert f"strategy {name}" in log
    assert summary["strategy"] == "allreduce:0.5ep,expair:1ep,adpsgd-delay1:0.5ep"


@pytest.mark.parametrize("strategy", ["expair", "adpsgd-delay1"])
def test_learners_of_a_super_learner_act_as_one(toy: Toy, strategy: str) -> None:
    _, summary, _ = run(toy, f"super-{strategy}", 4, f"--strategy={strategy}", "--super-learner-size=2")
    assert sum(own_frames(summary)) == 2 * 2091
    valid = [v["valid"] for v in summary["validations"]]
    assert valid[-1] > valid[0] + 0.1


def test_one_super_learner_of_all_is_allreduce(toy: Toy) -> None:
    reference, _, _ = run(toy, "plain-allreduce", 2, "--strategy=allreduce")
    folder, _, _ = run(toy, "super-of-all", 2, "--strategy=adpsgd-random", "--super-learner-size=2")
    np.testing.assert_allclose(parameters(folder), parameters(reference), rtol=1e-5, atol=1e-6)


def test_learners_of_a_super_learner_begin_iterations_together(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """They shrink by what their leader has seen: of another model theirs would be gradients of."""
    begun: dict[int, list[tuple[int, float | None]]] = collections.defaultdict(list)
    begin, local = LearnerStep.begin_iteration, threading.local()

    def record(self: LearnerStep, number: int, frames: int, saturation: float | None = None) -> None:
        if saturation is not None:  # between the steps of an asynchronous phase
            begun[local.rank].append((number, saturation))
        begin(self, number, frames, saturation)

    monkeypatch.setattr(LearnerStep, "begin_iteration", record)
    shrinking = ("--trainer.optimization.shrink-value=0.9", "--trainer.optimization.shrink-saturation-threshold=0.01")
    options = toy.options(toy.experiment("super-shrink"), "--strategy=expair", "--super-learner-size=2", *shrinking)

    def one(world: World) -> None:
        local.rank = world.rank
        train_here(parse(options), world)

    run_world(4, one)
    assert set(begun) == {0, 1, 2, 3}
    assert begun[0] == begun[1] and begun[2] == begun[3] and begun[0] != begun[2]
    assert any(saturation for _, saturation in begun[0])


def test_super_learners_must_fit(toy: Toy) -> None:
    result = train(3, toy.options(toy.experiment("unfit"), "--strategy=expair", "--super-learner-size=2"))
    assert result.returncode != 0
    assert "--super-learner-size 2: 3 learners cannot be put into groups of 2" in result.stderr


@pytest.mark.parametrize("strategy", ["easgd", "asgd"])
def test_a_dedicated_server_learns_nothing(toy: Toy, strategy: str) -> None:
    folder, summary, _ = run(toy, f"server-{strategy}", 3, f"--strategy={strategy}", "--dedicated-server=true")
    assert summary["num_learners"] == 2
    assert sum(own_frames(summary)) == 2 * 2091
    served = read_journal(folder / "journal" / "learner.2")
    assert JournalEvent.CENTRE in served["event"] and JournalEvent.STEP not in served["event"]


def test_a_dedicated_server_beside_a_phase_without_one(toy: Toy) -> None:
    """It has a part in the checkpoints all the same."""
    options = ("--strategy=expair:1ep,easgd:1ep", "--dedicated-server=true", "--trainer.samples-per-iter=24")
    _, summary, log = run(toy, "beside", 3, *options)
    assert sum(own_frames(summary)) == pytest.approx(2 * 2091, abs=3 * 12 * 10) and "strategy easgd" in log


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_models_travel_in_16_bits_and_in_pieces(toy: Toy, wire: str) -> None:
    wide = run(toy, f"wide-{wire}", 2, "--strategy=expair")[1]
    options = ("--strategy=expair", f"--transfer-dtype={wire}", "--piece-size=100")
    folder, summary, _ = run(toy, f"narrow-{wire}", 2, *options)
    pieces = read_journal(folder / "journal" / "learner.0")["piece"]
    assert set(pieces) == set(range(16)), "1501 parameters in pieces of 100"
    assert summary["validations"][-1]["valid"] > wide["validations"][0]["valid"] + 0.1


def test_a_slow_learner_takes_fewer_tickets_and_a_jittery_one_does_no_harm(toy: Toy) -> None:
    options = ("--strategy=adpsgd-fixed", "--inject=device:10ms,slow:10x@rank1,jitter:20%@rank2", "--journal=false")
    folder, summary, _ = run(toy, "slow", 3, *options)
    frames = own_frames(summary)
    assert sum(frames) == 2 * 2091
    assert frames[1] < min(frames[0], frames[2]) / 2
    assert not list((folder / "journal").iterdir())


def test_validation_in_mid_phase_stops_nobody(toy: Toy) -> None:
    """Without checkpoints, the validations of a phase come from snapshots; a paused learner does not hold them up."""
    options = ("--strategy=expair", "--checkpoint-interval=0", "--inject=device:5ms", "--trainer.samples-per-iter=24")
    folder, summary, log = run(toy, "snapshots", 2, *options)
    names = [v["iteration"] for v in summary["validations"]]
    assert names == [*range(11), "final"]
    assert all(v["spread"] >= 0 for v in summary["validations"][:-1])
    assert all((folder / "log" / f"compute_prob_valid.{name}.log").exists() for name in names)
    assert "iteration 3: Overall log-likelihood" in log


@pytest.mark.parametrize("strategy", ["expair", "asgd"])
def test_a_killed_training_goes_on_from_its_checkpoint(toy: Toy, strategy: str) -> None:
    folder = toy.experiment(f"killed-{strategy}")
    options = toy.options(
        folder, f"--strategy={strategy}", "--checkpoint-interval=1", "--trainer.num-epochs=4",
        "--trainer.samples-per-iter=24",
    )  # fmt: skip
    died = train(2, [*options, "--inject=device:20ms,kill@rank1@step20"])
    assert died.returncode != 0
    assert "learner rank 1" in died.stderr and "was killed" in died.stderr
    saved = json.loads((folder / "checkpoint" / "current.json").read_text())
    assert saved["step"] > 0
    went_on = train(2, options)
    assert went_on.returncode == 0, went_on.stderr
    assert f"going on at step {saved['step']}" in went_on.stderr
    summary = json.loads((folder / "log" / "summary.json").read_text())
    # Each has saved in its own time: what was done before the slowest of them is not all before the step, and the other
    # way round, by a few minibatches of about 100 frames (`test_what_a_checkpoint_leaves_over` is exact).
    assert sum(own_frames(summary)) == pytest.approx(summary["frames"], abs=8 * 120)
    assert summary["frames"] < 4 * 2091
    assert [v["iteration"] for v in summary["validations"]][-1] == "final"
    assert not (folder / "checkpoint").exists()


def test_a_paused_learner_ends_with_the_others(toy: Toy) -> None:
    _, summary, _ = run(toy, "paused", 3, "--strategy=adpsgd-random", "--inject=device:5ms,pause:1s@rank2@step2")
    assert sum(own_frames(summary)) == 2 * 2091
    assert summary["seconds"] >= 1


def test_killed_by_its_user_it_ends_at_once(toy: Toy) -> None:
    """A second TERM while communication threads are at work: no rank is left behind."""
    folder = toy.experiment("terminated")
    options = toy.options(folder, "--strategy=expair", "--inject=device:200ms", "--trainer.num-epochs=50")
    process = subprocess.Popen(
        launch_command(3, options), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    journal = folder / "journal" / "learner.0"
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert journal.exists(), "it never began"
    process.terminate()
    time.sleep(0.5)
    process.terminate()
    _, log = process.communicate(timeout=30)
    assert process.returncode != 0
    assert b"stopped: signal SIGTERM" in log
