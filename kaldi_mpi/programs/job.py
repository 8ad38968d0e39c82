"""The job that trains, from its start to its end: progress, signals on their way to it, and how it ended.

The job may run on another host, and what runs it ($cmd) may die before it does: so it is asked to stop by a file, and
it has ended when its launcher has.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from kaldi_mpi.learner.progress import follow
from kaldi_mpi.processes import STOPPED, NotedSignals, Process, Starter

_END_SECONDS = 60.0  # for learners to write a checkpoint and end, where $cmd is gone before them
_REASON_LINES = 5


def run_job(name: str, folder: Path, make_job: Callable[[Path], Sequence[str]], log: Path) -> tuple[int, list[str]]:
    """Run a job and show its progress.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP ask its learners for a checkpoint and their end; a second one ends them.

    Args:
        name: of this program.
        folder: the training's directory.
        make_job: the job's command, by the path of the file that its launcher is to watch (``--starter``).
        log: the job's; what only this process knows of its end is written behind it.

    Returns:
        its exit status (`STOPPED`: it can go on), and what there is to say, in lines.
    """
    with contextlib.suppress(FileNotFoundError):
        (folder / "progress.json").unlink()
    _sweep(folder / "log")
    with (
        Starter(folder / "log" / f".starter.{socket.gethostname()}.{os.getpid()}", name) as starter,
        NotedSignals() as signals,
    ):
        process = subprocess.Popen(make_job(starter.path))
        asked = 0

        def running() -> bool:
            nonlocal asked
            if len(signals.came) > asked:
                asked = len(signals.came)
                starter.stop(f"signal {signals.name} to {name} (process {os.getpid()})", now=asked > 1)
                if asked > 1:
                    process.terminate()
            starter.beat()
            return process.poll() is None

        follow(folder / "progress.json", running)
        died = []
        if process.returncode < 0:
            program = Path(str(process.args[0])).name  # type: ignore[index]
            died.append(f"{program} (process {process.pid}) was killed by {_signal(-process.returncode)}")
            starter.stop(died[0])
        launcher = starter.wait_for_launcher(_END_SECONDS)
    if launcher is not None and launcher.status == STOPPED:
        why = died[0] if died else f"signal {signals.name}" if signals.came else f"its job was; see {log}"
        return STOPPED, [f"stopped ({why}); the same command goes on from the checkpoint"]
    if process.returncode == 0 and (launcher is None or launcher.status == 0):
        return 0, []
    if launcher is not None and launcher.status is None:
        codes = re.findall(r"^# Ended \(code (\d+)", "\n".join(lines_of(log)), re.MULTILINE)
        how = f"by {_signal(int(codes[-1]) - 128)}" if codes and int(codes[-1]) > 128 else "or crashed"
        died.append(f"the learners' launcher (process {launcher.pid} on {launcher.host}) was killed {how}")
    if died:
        with open(log, "a", encoding="utf-8") as stream:
            stream.writelines(f"ERROR ({name}) {line}\n" for line in died)
    return 128 + signals.came[0] if signals.came else 1, reason(log)


def reason(log: Path) -> list[str]:
    """The last lines of a log that say why a training failed."""
    lines = lines_of(log)
    telling = [line for line in lines if re.match("(ERROR|WARNING) ", line) or "Error" in line]
    return (telling or lines or ["(there is no log: the job was not started)"])[-_REASON_LINES:]


def lines_of(log: Path) -> list[str]:
    """Of a file that may not be there."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _sweep(folder: Path) -> None:
    """Remove what starters have left that were killed on this host."""
    for path in folder.glob(f".starter.{socket.gethostname()}.*"):
        pid = path.name.removesuffix(".launcher").rpartition(".")[2]
        if pid.isdecimal() and Process.of(int(pid)) is None:
            path.unlink(missing_ok=True)
