"""Learners that stand still: who is named as the root, when, and what the run does about it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kaldi_mpi.hangs import Hang, HangWatch
from kaldi_mpi.transport.beat import Beat, Record, put_hang, read_beats
from tests.toy import Toy, environment, launch_command, make_toy

COMPUTING, WAITING = "computing minibatch 7", "waiting for sum of 5 (from rank 1)"


class Learners:
    """Records as learners would write them, and a clock."""

    def __init__(self, size: int, usual: float = 0.1, floor: float = 10.0) -> None:
        self.now = 0.0
        self.records = {
            rank: Record(rank, 100 + rank, "h", 0, 0, usual, COMPUTING, True, "log") for rank in range(size)
        }
        self.frozen: set[int] = set()
        self.still: set[int] = set()
        self.states: dict[int, str] = {}
        self.watch = HangWatch(size, lambda: self.now, floor, lambda record: self.states.get(record.rank, "S"))

    def set(self, rank: int, **changes: object) -> None:
        self.records[rank] = dataclasses.replace(self.records[rank], **changes)  # type: ignore[arg-type]

    def hang(self) -> Hang | None:
        return self.watch.hang

    def run(self, seconds: int) -> list[tuple[int, str]]:
        """Each second a beat and a move of those that are neither still nor frozen; returns when which line came."""
        said = []
        for _ in range(seconds):
            self.now += 1
            for rank, record in self.records.items():
                if rank not in self.frozen:
                    moves = record.moves + (rank not in self.still)
                    self.records[rank] = dataclasses.replace(record, beats=record.beats + 1, moves=moves)
            said += [(round(self.now), line) for line in self.watch.look(self.records)]
        return said


def all_wait_for(learners: Learners, root: int) -> None:
    for rank in set(learners.records) - {root}:
        learners.still.add(rank)
        learners.set(rank, doing=WAITING)


def test_a_stopped_learner_is_the_root() -> None:
    learners = Learners(3)
    assert learners.run(30) == []
    learners.frozen.add(1)
    learners.states[1] = "T"
    all_wait_for(learners, 1)
    ((when, line),) = learners.run(15)
    assert 40 <= when <= 43
    assert line == (
        "learner rank 1 on host h (process 101 is stopped) has not moved for 12 s, last in computing minibatch 7; "
        "rank 0, 2: waiting for sum of 5 (from rank 1)"
    )
    assert (hang := learners.hang()) is not None and hang.frozen == {1}


def test_the_line_comes_again_each_time_the_hang_is_twice_as_old() -> None:
    learners = Learners(2)
    learners.run(5)
    learners.still.add(1)
    all_wait_for(learners, 1)
    said = learners.run(100)
    assert [re.findall(r"moved for (\d+) s", line) for _, line in said] == [["12"], ["24"], ["48"], ["96"]]
    assert (hang := learners.hang()) is not None and hang.number == 4
    learners.still.clear()
    ((_, line),) = learners.run(5)
    assert line == "learners go on again" and learners.hang() is None
    learners.still.add(1)
    all_wait_for(learners, 1)
    assert len(learners.run(15)) == 1


@pytest.mark.parametrize(("usual", "first"), [(0.01, 10), (2.0, 40), (30.0, 600), (0.0, 60)])
def test_the_limit_is_a_multiple_of_the_usual_step(usual: float, first: int) -> None:
    """But no less than the floor; and where the usual step is not known yet, a minute."""
    learners = Learners(2, usual)
    learners.run(5)
    learners.still.add(1)
    all_wait_for(learners, 1)
    assert learners.run(first - 1) == []
    assert len(learners.run(3)) == 1


def test_a_learner_that_computes_for_ever_is_the_root() -> None:
    learners = Learners(3)
    learners.run(3)
    learners.still.add(2)
    learners.states[2] = "D"
    all_wait_for(learners, 2)
    ((_, line),) = learners.run(15)
    assert line.startswith("learner rank 2 on host h (process 102 is in an uninterruptible wait")
    assert (hang := learners.hang()) is not None and not hang.frozen


def test_where_all_wait_there_is_no_root() -> None:
    learners = Learners(2)
    learners.run(3)
    all_wait_for(learners, 0)
    learners.still.add(0)
    learners.set(0, doing="waiting for barrier (from rank 1)")
    ((_, line),) = learners.run(15)
    assert line.startswith(
        "no learner has moved for 11 s, all wait; rank 0: waiting for barrier (from rank 1); rank 1: "
    )


def test_where_others_go_on_it_is_no_hang() -> None:
    learners = Learners(3)
    learners.run(3)
    learners.frozen.add(1)
    learners.states[1] = "T"
    ((when, line),) = learners.run(200)
    assert 13 <= when <= 16 and learners.hang() is None
    assert line.startswith(
        "learner rank 1 on host h (process 101 is stopped) has not moved for 11 s, last in computing"
    )
    assert line.endswith("; the others go on")
    learners.frozen.clear()
    assert [line for _, line in learners.run(3)] == ["learner rank 1 on host h moves again"]
    # At a point where all meet, the others come to wait for it.
    learners.frozen.add(1)
    said = learners.run(20)
    all_wait_for(learners, 1)
    said += learners.run(20)
    assert [line.endswith("the others go on") for _, line in said] == [True, False]
    assert learners.hang() is not None


def test_what_is_no_hang() -> None:
    """Validation, and whatever else takes long between minibatches; one that ends; the launcher itself stopped."""
    learners = Learners(2)
    learners.run(5)
    learners.set(0, doing="the end of an iteration", watched=False)
    learners.still.add(0)
    all_wait_for(learners, 0)
    assert learners.run(1000) == []
    learners = Learners(2)
    learners.run(5)
    learners.still |= {0, 1}
    learners.run(5)
    learners.now += 300
    assert learners.run(4) == []
    del learners.records[0]
    assert learners.run(100) == []


@pytest.mark.parametrize(("state", "seconds"), [("T", 12), ("S", 62)])
def test_one_stopped_during_validation(state: str, seconds: int) -> None:
    """Nobody knows how long a validation takes: without a reason that is seen, others wait for a minute."""
    learners = Learners(2)
    for rank in range(2):
        learners.set(rank, watched=False, doing="the end of an iteration")
    learners.run(5)
    learners.frozen.add(1)
    learners.states[1] = state
    all_wait_for(learners, 1)
    when, line = learners.run(70)[0]
    assert seconds <= when - 5 <= seconds + 2
    assert f"(process 101 {'is stopped' if state == 'T' else 'gives no sign of life (state S)'})" in line


def test_the_dead_do_not_count() -> None:
    """Those who can do without them go on; whoever cannot has been ended by the launcher."""
    learners = Learners(3)
    learners.run(5)
    learners.frozen.add(1)
    learners.states[1] = "X"
    assert learners.run(100) == []
    learners.still |= {0, 2}
    ((_, line),) = learners.run(15)
    assert "rank 0" in line and "rank 1" not in line


class TestBeat:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Iterator[Path]:
        put_hang(tmp_path, 0, "")
        yield tmp_path

    def wait_for(self, path: Path) -> str:
        deadline = time.monotonic() + 10
        while not (path.exists() and "File " in path.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.1)
        return path.read_text()

    def test_the_record(self, folder: Path) -> None:
        clock = iter([0.0, 10.0, 10.2, 10.4])
        beat = Beat(3, folder, folder / "log", clock=lambda: next(clock))
        beat.moved("computing minibatch 1")
        assert beat.record().watched and beat.record().usual == 0
        beat.moved("computing minibatch 2")
        assert beat.record().usual == 10
        beat.end_watch("the end of an iteration")
        beat.moved("computing minibatch 3")
        assert beat.record().usual == 10, "what came between is no step"
        beat.moved("x" * 10000)
        assert beat.record().usual == pytest.approx(9.02)
        beat._write()
        assert read_beats(folder) == {3: beat.record()}
        beat.at("a")
        beat._write()
        assert read_beats(folder)[3].doing == "a" and read_beats(folder)[3].moves == 5

    def test_half_a_record_is_none(self, folder: Path) -> None:
        (folder / "beat.0").write_text('{"rank": 0, "pid"')
        (folder / "beat.1").write_text('{"rank": 1}')
        assert read_beats(folder) == {}

    def test_the_thread(self, folder: Path) -> None:
        """It beats, writes the stacks of all threads at each new hang, and leaves no record when it ends."""
        log = folder / "log"
        with Beat(0, folder, log, lambda: "waiting for what", lambda: ["an exchange"]) as beat:
            beat.moved("computing")
            while 0 not in read_beats(folder):
                time.sleep(0.01)
            beats = read_beats(folder)[0].beats
            put_hang(folder, 1, "rank 1 has not moved")
            said = self.wait_for(log / "hang.0")
            assert "rank 1 has not moved" in said and "waiting for what" in said and "test_the_thread" in said
            assert ": MainThread\n" in said and "an exchange" in said
            while read_beats(folder)[0].beats <= beats:  # the hang was written down with the same beat, or a later one
                time.sleep(0.01)
        assert read_beats(folder) == {} and said == (log / "hang.0").read_text()

    def test_without_a_launcher(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("KALDI_MPI_STATUS_DIR", raising=False)
        with Beat.of_environment(0, tmp_path) as beat:
            beat.moved("computing")
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"), num_utterances=24)


class Run:
    """A training under the launcher, that has begun; a block ends it."""

    def __init__(self, toy: Toy, name: str, launcher: list[str], *options: str) -> None:
        self.folder = toy.experiment(name)
        command = launch_command(2, toy.options(self.folder, *options))
        where = command.index("--")
        with open(self.said_to, "w") as said:
            self.process = subprocess.Popen(
                [*command[:where], *launcher, *command[where:]],
                env=environment(), cwd=self.folder, stdout=subprocess.DEVNULL, stderr=said,
            )  # fmt: skip
        self.wait_for(lambda: (self.folder / "log" / "train.0.1.log").exists())

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def said_to(self) -> Path:
        return self.folder / "said"

    @property
    def said(self) -> str:
        return self.said_to.read_text()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def pid(self, rank: int) -> int:
        (status,) = self.folder.glob(f".learners.*/rank.{rank}")
        return int(json.loads(status.read_text())["pid"])


LONG = ("--strategy=allreduce", "--trainer.num-epochs=100000")
# Enough for a hang of twelve seconds in its midst.
SHORT = ("--strategy=allreduce", "--trainer.num-epochs=40")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_stopped_process_ends_the_run(toy: Toy) -> None:
    with Run(toy, "end", ["--on-hang", "end"], *LONG) as run:
        pids = [run.pid(rank) for rank in range(2)]
        time.sleep(1.0)
        os.kill(pids[1], signal.SIGSTOP)
        began = time.monotonic()
        line = f"learner rank 1 on host {os.uname().nodename} (process {pids[1]} is stopped) has not moved for "
        run.wait_for(lambda: line in run.said, 30)
        assert 9 < time.monotonic() - began < 20
        assert run.process.wait(30) == 1
        (told,) = [text for text in run.said.splitlines() if "WARNING" in text and line in text]
        assert re.search(r"; rank 0: waiting for [\w ]+ \(.*rank 1.*\); stacks: .*/log/hang\.\*$", told), told
        assert "ended (--on-hang end): learner rank 1" in run.said.splitlines()[-1]
        assert not any(is_running(pid) for pid in pids) and not list(run.folder.glob(".learners.*"))
        mine = (run.folder / "log" / "hang.0").read_text()
        assert " in _train\n" in mine and "communication-0" in mine and "the last exchanges:" in mine
        assert ": state T, in the kernel at " in (run.folder / "log" / "hang.1").read_text()


def test_one_that_goes_on_again(toy: Toy) -> None:
    with Run(toy, "wait", [], *SHORT) as run:
        pid = run.pid(1)
        os.kill(pid, signal.SIGSTOP)
        run.wait_for(lambda: "/log/hang.*" in run.said, 30)
        time.sleep(4.0)
        assert run.process.poll() is None
        os.kill(pid, signal.SIGCONT)
        assert run.process.wait(60) == 0, run.said
        assert (run.folder / "final.mdl").exists() and "learners go on again" in run.said, run.said
        assert "written late: this process has done nothing for" in (run.folder / "log" / "hang.1").read_text()


def test_a_hang_and_a_death_are_started_again_from(toy: Toy) -> None:
    with Run(toy, "again", ["--on-hang", "end", "--restarts", "2"], *SHORT) as run:
        run.wait_for(lambda: (run.folder / "checkpoint" / "current.json").exists())
        pids = [run.pid(rank) for rank in range(2)]
        os.kill(pids[1], signal.SIGSTOP)
        run.wait_for(lambda: "starting again" in run.said, 40)
        assert not any(is_running(pid) for pid in pids)
        run.wait_for(
            lambda: run.said.count("going on at step") == 1 and len(list(run.folder.glob(".learners.*/beat.*"))) == 2
        )
        pid = run.pid(0)
        os.kill(pid, signal.SIGKILL)
        assert run.process.wait(60) == 0, run.said
        said = run.said
        assert "starting again from the last checkpoint (1 of 2): learner rank 1 on host " in said
        assert f"starting again from the last checkpoint (2 of 2): learner rank 0 (process {pid} on " in said
        assert said.count("going on at step") == 2 and (run.folder / "final.mdl").exists()


COUNTS = """
import os, sys, time
from mpi4py import MPI
from kaldi_mpi.errors import DataError
from kaldi_mpi.transport.guard import end_run
from kaldi_mpi.transport.mpi import MpiWorld
from kaldi_mpi.transport.status import Status
world = MpiWorld()
status = Status(world.rank)
if world.rank == 0:
    with open("starts", "a") as stream:
        print("start", file=stream)
world.barrier()
if world.rank == 1:
    {}
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("program", "starts", "said"),
    [
        ("os._exit(3)", 3, "learner rank 1 (process "),
        ("end_run(world, RuntimeError('broken'))", 3, "learner rank 1 failed: RuntimeError: broken"),
        ("end_run(world, DataError('no such file'))", 1, "learner rank 1 failed: no such file"),
    ],
    ids=["left", "failed", "user"],
)
def test_what_is_started_again(tmp_path: Path, program: str, starts: int, said: str) -> None:
    """Not what the user must mend; the rest up to K times."""
    command = [
        sys.executable, "-m", "kaldi_mpi", "launch", "-n", "2", "--restarts", "2", "--",
        sys.executable, "-c", COUNTS.format(program),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1 and len((tmp_path / "starts").read_text().split()) == starts, done.stderr
    assert said in done.stderr
    restarted = [line for line in done.stderr.splitlines() if "starting again" in line]
    assert len(restarted) == starts - 1 and all(said in line for line in restarted)
    assert not list(tmp_path.glob(".learners.*"))
