"""Checkpoints that are damaged, of another training, or in use: what is taken instead, or the line that is said."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.learner.checkpoint import Checkpoints
from kaldi_mpi.learner.lock import run_lock
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import World
from tests.toy import environment, launch_command, make_toy, train

FACTS = {"--seed": "1", "the features": "abc", "the number of learners": "2"}


def state(rank: int, step: int) -> dict[str, Any]:
    return {"parameters": np.full(5000, rank + 10.0 * step, np.float32), "step": step, "strategies": [None, {"x": 1}]}


def save(folder: Path, *steps: int, kept: int = 2) -> None:
    def rank(world: World) -> None:
        checkpoints = Checkpoints(folder, world, FACTS, kept)
        for step in steps:
            checkpoints.save(step, state(world.rank, step))
            checkpoints.wait()

    run_world(2, rank)


def load(folder: Path, facts: dict[str, str] = FACTS, size: int = 2) -> list[Any]:
    def rank(world: World) -> Any:
        return Checkpoints(folder, world, facts if world.rank == 0 else None).load()

    return run_world(size, rank)


def steps_of(states: list[Any]) -> list[int]:
    for rank, one in enumerate(states):
        assert (
            np.array_equal(one["parameters"], state(rank, one["step"])["parameters"]) and one["strategies"][1]["x"] == 1
        )
    return [one["step"] for one in states]


def test_the_newest_is_taken_and_the_oldest_goes(tmp_path: Path) -> None:
    assert load(tmp_path) == [None, None]
    save(tmp_path, 4, 8, 12)
    assert steps_of(load(tmp_path)) == [12, 12]
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"current.json", *(f"learner.{rank}.{step}.pt" for rank in (0, 1) for step in (8, 12))}
    (tmp_path / "one").mkdir()
    save(tmp_path / "one", 4, 8, kept=1)
    assert len(list((tmp_path / "one" / "checkpoint").iterdir())) == 3


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    other = path.with_name("learner.0.12.pt")
    own, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(own)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (flip, "learner.1.12.pt: its bytes ("),
    (swap, "learner.1.12.pt: its bytes ("),
    (lambda path: path.write_bytes(b""), "learner.1.12.pt: its bytes (0) are not those that were written"),
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "learner.1.12.pt: its bytes ("),
    (Path.unlink, "learner.1.12.pt: No such file or directory"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_the_one_before_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], message: str
) -> None:
    save(tmp_path, 8, 12)
    damage(tmp_path / "checkpoint" / "learner.1.12.pt")
    with caplog.at_level(logging.WARNING):
        assert steps_of(load(tmp_path)) == [8, 8]
    assert message in caplog.text and "going on from the checkpoint before, of step 8" in caplog.text
    flip(tmp_path / "checkpoint" / "learner.0.8.pt")
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert message in str(error.value) and "learner.0.8.pt: its bytes (" in str(error.value)
    assert "give --resume=false to begin anew" in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"step": 12}', '{"checkpoints": [], "facts": {}}', "\x00"])
def test_a_file_that_says_nothing(tmp_path: Path, content: str) -> None:
    save(tmp_path, 12)
    (tmp_path / "checkpoint" / "current.json").write_text(content)
    with pytest.raises(DataError, match=r"current\.json: it is not what a checkpoint has \(.*--resume=false"):
        load(tmp_path)


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").touch()
    with pytest.raises(DataError, match="checkpoint: a file where the directory of checkpoints should be"):
        load(tmp_path)


def test_another_training_is_told_in_what(tmp_path: Path) -> None:
    save(tmp_path, 12)
    other = {"--seed": "2", "the features": "def", "the number of learners": "3", "--new": "x"}
    with pytest.raises(ConfigError) as error:
        load(tmp_path, other, size=3)
    said = str(error.value)
    for words in (
        "--new was None, is x", "--seed was 1, is 2", "the features have changed", "the number of learners was 2, is 3",
        "go on as it began, or give another --dir, or --resume=false",
    ):  # fmt: skip
        assert words in said
    assert steps_of(load(tmp_path)) == [12, 12]  # and it is still there


def test_what_is_not_kept_by_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before stays whole."""
    save(tmp_path, 8)

    def lossy(path: Path, *words: Any) -> Any:
        return atomic_write(path if path.suffix == ".json" else path.with_suffix(".lost"), *words)

    with monkeypatch.context() as patch:
        patch.setattr("kaldi_mpi.learner.checkpoint.atomic_write", lossy)
        (tmp_path / "checkpoint" / "learner.0.12.pt").write_bytes(b"old")
        (tmp_path / "checkpoint" / "learner.1.12.pt").write_bytes(b"old")
        with pytest.raises(DataError, match=r"learner\.[01]\.12\.pt: what was read back is not what was written"):
            save(tmp_path, 12)
    assert steps_of(load(tmp_path)) == [8, 8]


def _hold(folder: Path, ready: Any) -> None:
    with run_lock(folder):
        ready.set()
        time.sleep(60)


def test_one_run_a_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ready = multiprocessing.get_context("spawn").Event()
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    in_use = rf"is in use: process {holder.pid} on {os.uname().nodename} \(since "
    with pytest.raises(ConfigError, match=in_use), run_lock(tmp_path):
        pass
    holder.kill()
    holder.join()
    with caplog.at_level(logging.WARNING), run_lock(tmp_path):
        assert f"of process {holder.pid} on {os.uname().nodename}" in caplog.text and "which is gone" in caplog.text
    caplog.clear()
    with run_lock(tmp_path):
        assert not caplog.text
    assert not (tmp_path / ".lock").exists()


def test_real_runs(tmp_path: Path) -> None:
    """A second run in the same directory, other data, another number of learners; then the same command goes on."""
    toy = make_toy(tmp_path)
    folder = toy.experiment("exp")
    options = toy.options(folder, "--trainer.num-epochs=30", "--strategy=allreduce")
    process = subprocess.Popen(
        launch_command(2, options), env=environment(), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (folder / "log" / "train.0.1.log").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # the launcher alone: the learners go on
    second = train(2, [*options, "--trainer.srand=5"])
    assert second.returncode == 1 and f"{folder} is in use: process " in second.stderr
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    step = json.loads((folder / "checkpoint" / "current.json").read_text())["step"]

    other = train(3, [*options, "--trainer.srand=5"])
    assert other.returncode == 1 and "the number of learners was 2, is 3" in other.stderr
    assert "--seed was 0, is 5" in other.stderr, other.stderr
    feats = toy.feat_dir / "feats.scp"
    whole = feats.read_text()
    feats.write_text("".join(whole.splitlines(keepends=True)[:-10]))
    less = train(2, options)
    assert less.returncode == 1 and "the features have changed" in less.stderr, less.stderr
    feats.write_text(whole)
    again = train(2, options)
    assert again.returncode == 0 and f"going on at step {step}" in again.stderr
    shutil.rmtree(toy.work)


def test_another_number_of_learners_goes_on_from_one_model(tmp_path: Path) -> None:
    """Where all have the same parameters; where they differ it is refused, and the reason is said."""

    def save_shared(world: World) -> None:
        checkpoints = Checkpoints(tmp_path, world, FACTS)
        checkpoints.save(8, {"state": {"parameters": np.ones(10, np.float32) * world.rank}})
        checkpoints.save(12, {"state": {"parameters": np.ones(10, np.float32)}})
        checkpoints.wait()

    run_world(2, save_shared)

    def load_one(world: World) -> tuple[int, Any]:
        checkpoints = Checkpoints(tmp_path, world, FACTS | {"the number of learners": str(world.size)})
        state = checkpoints.load()
        return checkpoints.num_ranks, state["state"]["parameters"].tolist()

    for size in (1, 3):
        assert run_world(size, load_one) == [(2, [1.0] * 10)] * size
    for rank in (0, 1):
        (tmp_path / "checkpoint" / f"learner.{rank}.12.pt").unlink()
    current = tmp_path / "checkpoint" / "current.json"
    said = json.loads(current.read_text())
    current.write_text(json.dumps(said | {"step": 8, "checkpoints": said["checkpoints"][1:]}))
    with pytest.raises(ConfigError, match="the number of learners, whose models differ at step 8, was 2, is 3"):
        run_world(3, load_one)


def test_real_runs_with_other_numbers_of_learners(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    folder = toy.experiment("exp")
    options = toy.options(folder, "--strategy=allreduce", "--trainer.num-epochs=4", "--trainer.samples-per-iter=24")
    died = train(2, [*options, "--inject=kill@rank1@step20,device:20ms"])
    assert died.returncode == 1 and (folder / "checkpoint" / "current.json").exists()
    more = train(3, options)
    assert more.returncode == 0, more.stderr
    assert "3 learners go on where 2 have saved their state: learning rates are those of 3 from here on" in more.stderr
    assert (folder / "final.mdl").exists()
    shutil.rmtree(toy.work)


def test_checkpoints_by_time(tmp_path: Path) -> None:
    """In the middle of iterations, behind the learners' back; a run that is killed goes on from there."""
    toy = make_toy(tmp_path)
    for strategy in ("allreduce", "expair"):
        folder = toy.experiment(strategy)
        options = toy.options(
            folder, f"--strategy={strategy}", "--trainer.num-epochs=8", "--trainer.samples-per-iter=1000000",
            "--checkpoint-minutes=0.01",
        )  # fmt: skip
        died = train(2, [*options, "--inject=kill@rank1@step60,device:20ms"])
        assert died.returncode == 1
        step = json.loads((folder / "checkpoint" / "current.json").read_text())["step"]
        assert step > 0
        again = train(2, options)
        assert again.returncode == 0 and f"going on at step {step}" in again.stderr, again.stderr
    shutil.rmtree(toy.work)


def test_a_full_disk_and_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """The run ends with one line that names the file; the checkpoint before is still whole."""
    save(tmp_path, 8)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # what a full disk does, half-way through a file
        with pytest.raises(DataError, match=r"checkpoint/learner\.[01]\.12\.pt: cannot write: File too large"):
            save(tmp_path, 12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert steps_of(load(tmp_path)) == [8, 8]
    assert not list((tmp_path / "checkpoint").glob(".*"))
    (tmp_path / "other").write_text("in the way")
    with pytest.raises(DataError, match=r"other/checkpoint: cannot write: Not a directory"):
        save(tmp_path / "other", 4)


def test_a_full_disk_at_a_checkpoint_ends_the_run(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    folder = toy.experiment("full")
    options = toy.options(folder, "--strategy=expair", "--trainer.samples-per-iter=24", "--inject=device:10ms")
    program = (
        "import resource, signal, sys\n"
        "from kaldi_mpi.learner import run\n"
        "from kaldi_mpi.learner.checkpoint import Checkpoints\n"
        "write = Checkpoints._write\n"
        "def limited(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "    write(*arguments)\n"
        "Checkpoints._write = limited\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "run.main(sys.argv[1:])\n"
    )
    launch = launch_command(2, options)
    command = [*launch[: launch.index("--") + 1], sys.executable, "-c", program, *options]
    result = subprocess.run(
        command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert re.search(
        r"learner rank [01] failed: .*checkpoint/learner\.[01]\.\d+\.pt: cannot write: File too large", result.stderr
    )
    shutil.rmtree(toy.work)


def test_who_writes_after_it_was_lost_holds_nobody_up(tmp_path: Path) -> None:
    """A rank may stand still between its copy and its file; the others have a checkpoint without it meanwhile."""

    def rank(world: World) -> None:
        checkpoints = Checkpoints(tmp_path, world, FACTS)
        if world.rank == 0:
            world.messages.post(lambda: checkpoints.lost(1))
            checkpoints.save(8, state(0, 8))
            deadline = time.monotonic() + 30
            while not (tmp_path / "checkpoint" / "current.json").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        world.barrier()
        if world.rank == 1:
            checkpoints.save(8, state(1, 8))
        world.barrier()
        checkpoints.wait()
        if world.rank == 0:
            world.messages.post(lambda: checkpoints.back(1))
        checkpoints.save(12, state(world.rank, 12))
        checkpoints.wait()

    run_world(2, rank)
    said = json.loads((tmp_path / "checkpoint" / "current.json").read_text())
    assert [one["step"] for one in said["checkpoints"]] == [12, 8] and said["checkpoints"][1]["files"][1] is None
