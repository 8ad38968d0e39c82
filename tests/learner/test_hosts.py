"""Several hosts, made of one: a remote one is a namespace with a host name of its own, and a program in ssh's place."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kaldi_mpi.hosts import on_hosts
from kaldi_mpi.launch import find_mpiexec, mpi_vendor
from tests.toy import Toy, environment, launch_command, make_toy

SSH = """\
#!/bin/bash
host=$1; shift
if [ -e "$0.no_$host" ]; then
    echo "ssh: connect to host $host port 22: No route to host" >&2
    exit 255
fi
exec unshare --uts bash -c 'hostname "$0"; exec bash -c "$1"' "$host" "$*"
"""
OPTIONS = (
    "--trainer.num-epochs=12",
    "--trainer.rnn.num-chunk-per-minibatch=4",
    "--trainer.samples-per-iter=60",
    "--inject=device:20ms",
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    """A program in its place; a file beside it, ``reach.no_HOST``, takes a host away."""
    tried = (
        subprocess.run(["unshare", "--uts", "true"], check=False, capture_output=True) if os.geteuid() == 0 else None
    )
    if tried is None or tried.returncode or shutil.which("hostname") is None:
        pytest.skip("hosts with names of their own need root, unshare and hostname")
    if mpi_vendor(find_mpiexec()) != "openmpi":
        pytest.skip("Open MPI alone lets its ssh be replaced in this way")
    path = tmp_path / "reach"  # called ssh, it would be given options
    path.write_text(SSH)
    path.chmod(0o755)
    return path


def on_two_hosts(ssh: Path, options: list[str]) -> list[str]:
    """The command that trains with two learners here and two on another host."""
    command = launch_command(4, options)
    at = command.index("--")
    hosts = f"--prtemca plm_ssh_agent {ssh} --host {os.uname().nodename}:2,other:2"
    return [*command[:at], f"--mpiexec-opts={hosts}", "--restarts=1", *command[at:]]


def daemons() -> list[int]:
    """Open MPI's process on the other host, which all learners there are children of."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if Path(words[0].decode(errors="replace")).name == "prted" and b"--tree-spawn" in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(
    "strategy", ["expair", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("allreduce", "easgd"))]
)
def test_a_host_is_gone(toy: Toy, ssh: Path, strategy: str) -> None:
    """The others go on from the last checkpoint, all of them with the models that they had."""
    folder = toy.experiment(f"gone-{strategy}")
    command = on_two_hosts(ssh, toy.options(folder, *OPTIONS, f"--strategy={strategy}"))
    with subprocess.Popen(
        command, env=environment(), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (folder / "checkpoint" / "current.json").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        (ssh.parent / "reach.no_other").touch()
        for pid in daemons():
            os.kill(pid, signal.SIGKILL)
        _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "no answer from other: going on with 2 of 4 learners" in log
    assert "2 learners go on where 4 have saved their state" in log
    summary = json.loads((folder / "log" / "summary.json").read_text())
    assert len(summary["learners"]) == 2 and summary["validations"][-1]["iteration"] == "final"
    valid = [v["valid"] for v in summary["validations"]]
    assert valid[-1] > valid[0] + 0.1
    assert re.search(r"going on at step \d+", log)


@pytest.mark.thorough
def test_a_learner_dies_on_a_host_that_is_there(toy: Toy, ssh: Path) -> None:
    """All start again."""
    folder = toy.experiment("there")
    command = on_two_hosts(ssh, toy.options(folder, *OPTIONS, "--strategy=allreduce"))
    with subprocess.Popen(
        command, env=environment(), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (folder / "checkpoint" / "current.json").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        statuses = [json.loads(path.read_text()) for path in folder.glob(".learners.*/rank.*")]
        there = [status for status in statuses if status["host"] == "other"]
        assert len(there) == 2
        os.kill(there[0]["pid"], signal.SIGKILL)
        _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "no answer" not in log and "starting again from the last checkpoint (1 of 1)" in log
    assert len(json.loads((folder / "log" / "summary.json").read_text())["learners"]) == 4


def test_hosts_are_named_anew() -> None:
    hosts = {"a": 2, "c": 1}
    assert on_hosts("openmpi", ["--hostfile", "h", "--host", "a:2,b:2"], hosts) == [
        "--hostfile",
        "h",
        "--host",
        "a:2,c:1",
    ]
    assert on_hosts("openmpi", ["-H", "a:2,b:2", "--x", "1"], hosts) == ["--x", "1", "--host", "a:2,c:1"]
    assert on_hosts("openmpi", ["--host=a,b"], hosts) == ["--host", "a:2,c:1"]
    assert on_hosts("mpich", ["-f", "h", "-hosts", "a,b"], hosts) == ["-f", "h", "-hosts", "a:2,c:1"]
