"""Whatever dies between train.sh and a learner: all end, the log says why, and the same command goes on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kaldi_mpi import leftovers
from kaldi_mpi.processes import STOPPED
from tests.paths import REPO, kaldi_root
from tests.programs.chain import run, tree
from tests.toy import Toy, environment, make_toy

RUN = str(REPO / "steps_mpi" / "run.py")
LIMIT = 20.0  # seconds, on a machine that also does something else; `tests.programs.chain` has 5


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"), num_utterances=24)


def leftovers_there(toy: Toy) -> set[Path]:
    """Files and directories that MPI and launchers make while they run."""
    return {*Path("/dev/shm").glob("*"), *Path(tempfile.gettempdir()).glob("ompi.*"), *toy.work.glob("*/.learners.*")}


@pytest.mark.parametrize(
    ("place", "how", "log"),
    [
        ("start", signal.SIGTERM, "asked to stop: signal SIGTERM to train.sh (process {pid}); learners write a"),
        ("start", signal.SIGKILL, "asked to stop: train.sh (process {pid}), by which it was started, is gone"),
        # start, which lives, and the launcher both see it
        pytest.param("cmd", signal.SIGKILL, " (process {pid})", marks=pytest.mark.thorough),
        pytest.param(
            "shell",
            signal.SIGKILL,
            "asked to stop: bash (process {pid}), by which it was started, is gone",
            marks=pytest.mark.thorough,
        ),
        ("launch", signal.SIGHUP, "asked to stop: signal SIGHUP; learners write a checkpoint and end"),
        ("learner", signal.SIGUSR1, "stopped: signal SIGUSR1 to learner rank "),
    ],
)
def test_a_request(toy: Toy, place: str, how: signal.Signals, log: str) -> None:
    """Learners leave a checkpoint, and the exit status says so."""
    ended = run(toy, f"{place}-{how.name}", place, how, RUN, 0.3, random.Random(1), LIMIT)
    assert not ended.left
    assert log.format(pid=ended.pid) in ended.log, ended.log
    assert ended.checkpoint and "the same command goes on from the checkpoint" in ended.log
    if (place, how) == ("start", signal.SIGKILL):
        assert ended.status == -signal.SIGKILL
    else:
        assert ended.status == STOPPED and "train.sh: stopped (" in ended.said, ended.said


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("launch", "the learners' launcher (process {pid} on {host}) was killed by signal 9 (SIGKILL)"),
        ("mpiexec", "mpiexec was killed by signal 9 (SIGKILL)"),
        ("learner", "(process {pid} on {host}) was killed or crashed without a word"),
    ],
)
def test_a_death_below_the_launcher(toy: Toy, place: str, words: str) -> None:
    """Nobody is left to write a checkpoint; log and console name who was killed; nothing stays in shared memory."""
    before = leftovers_there(toy)
    ended = run(toy, f"{place}-killed", place, signal.SIGKILL, RUN, 0.3, random.Random(1), LIMIT)
    assert not ended.left and ended.status == 1
    words = words.format(pid=ended.pid, host=os.uname().nodename)
    assert words in ended.said and words in ended.log, ended.said
    if place == "launch":  # which would have removed it
        assert leftovers_there(toy) != before
        leftovers.sweep(toy.work / f"{place}-killed")
    assert leftovers_there(toy) == before


@pytest.mark.kaldi
@pytest.mark.parametrize("place", ["start", "cmd", "launch"])
def test_under_kaldis_own_launcher(toy: Toy, place: str) -> None:
    """run.pl, which dies without ending what it has started."""
    pl = str(kaldi_root() / "egs/wsj/s5/utils/parallel/run.pl")
    ended = run(toy, f"{place}-run.pl", place, signal.SIGKILL, pl, 0.3, random.Random(1), LIMIT)
    assert not ended.left and ended.status != 0
    assert place == "launch" or ended.checkpoint


_QSUB = """\
#!/bin/bash
# A queue of this host: the job runs in a session of its own, below nobody that has asked for it.
setsid bash "${@: -1}" > /dev/null 2>&1 < /dev/null &
echo 'Your job 17 ("job") has been submitted'
"""


def those_of(folder: Path) -> dict[int, str]:
    """All processes of a training, wherever they hang: they have its directory in their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in words:
                found[int(path.parent.name)] = words
    return found


@pytest.mark.kaldi
@pytest.mark.parametrize(
    ("place", "how"), [("start", signal.SIGKILL), ("start", signal.SIGTERM), ("mpiexec", signal.SIGKILL)]
)
def test_under_queue_pl(toy: Toy, tmp_path: Path, place: str, how: signal.Signals) -> None:
    """The job is no descendant of train.sh's: only the file of its starter tells the launcher that it is gone."""
    for name, text in (("qsub", _QSUB), ("qstat", "#!/bin/bash\nexit 0\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    folder = toy.experiment(f"queue-{place}-{how.name}")
    pl = kaldi_root() / "egs/wsj/s5/utils/parallel/queue.pl"
    process = subprocess.Popen(
        [
            *[str(REPO / "steps_mpi" / "train.sh"), "--python", sys.executable, "--cmd", str(pl), "--num-learners=2"],
            *toy.options(folder, "--trainer.num-epochs=100000"),
        ],
        env=environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, cwd=folder, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not (folder / "log" / "train.0.2.log").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    launcher = next(
        pid for pid, words in those_of(folder).items() if words.startswith(f"{sys.executable} -m kaldi_mpi launch ")
    )
    assert launcher not in tree(process.pid)
    pid = process.pid
    if place == "mpiexec":
        pid = next(child for child, (parent, _) in tree(launcher).items() if parent == launcher)
    os.kill(pid, how)
    deadline = time.monotonic() + LIMIT
    while those_of(folder) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.05)
    assert not those_of(folder)
    said = process.communicate(timeout=10)[1]
    assert process.returncode != 0
    if place == "start":
        assert (folder / "checkpoint" / "current.json").exists()
    else:
        assert "mpiexec was killed by signal 9 (SIGKILL)" in said
