#!/usr/bin/env python3
"""Runs jobs on this machine: a local launcher with the interface of Kaldi's run.pl.

    run.py [--max-jobs-run N] [--mem 4G] [--gpu 1] ... [JOB=1:4] LOG COMMAND ARGUMENT...

One bash runs "COMMAND ARGUMENT..." for each JOB, the name JOB being replaced by the number in the command
and in LOG. Arguments with spaces are quoted; the others are passed as they are, so that '\\|' and '>' given as
arguments connect programs. LOG takes the output between the header and footer lines that Kaldi's scripts
look for. The status is 0 if all jobs succeeded. Options meant for queues are accepted and ignored.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import FrameType

NAME = "run.py"
_POLL_SECONDS = 0.1


class UsageError(Exception):
    """The command line cannot be used."""


@dataclass
class Task:
    """What to run: `command` for bash and `log`, both with `job_name` to be replaced by each number."""

    command: str
    log: str
    job_name: str | None
    first: int
    last: int
    max_jobs: int

    def of(self, text: str, number: int) -> str:
        """`text` with the job's number filled in."""
        return text.replace(self.job_name, str(number)) if self.job_name else text


def parse(arguments: list[str]) -> Task:
    """Read the command line; options and the job range may come in either order."""
    rest, max_jobs, job_name, first, last = list(arguments), 0, None, 1, 1
    for _ in range(2):
        while len(rest) >= 2 and rest[0].startswith("-"):
            option = rest.pop(0)
            if option == "-V":
                continue
            value = rest.pop(0)
            if option in ("--max-jobs-run", "-tc"):
                if not value.isdigit() or int(value) < 1:
                    raise UsageError(f"invalid option {option} {value}")
                max_jobs = min(max_jobs or int(value), int(value))
            elif option == "-pe" and rest:  # -pe smp 4
                rest.pop(0)
        if rest and (match := re.fullmatch(r"([A-Za-z_]\w*)=(\d+)(?::(\d+))?", rest[0])):
            job_name, first = match.group(1), int(match.group(2))
            last = int(match.group(3) or first)
            if not 1 <= first <= last:
                raise UsageError(f"invalid job range {rest[0]}")
            rest.pop(0)
    if len(rest) < 2:
        raise UsageError("usage: run.py [options] [JOB=1:N] LOG COMMAND ARGUMENT...")
    log, command = rest[0], " ".join(_quote(argument) for argument in rest[1:])
    if first < last and job_name and job_name not in log:
        raise UsageError(f"several jobs cannot share the log {log}: it must contain {job_name}")
    return Task(command, log, job_name, first, last, max_jobs or _default_jobs(last - first + 1))


def _quote(argument: str) -> str:
    # run.pl's rule, on which Kaldi's scripts rely: what has no space reaches bash as it is.
    if argument and not re.search(r"\s", argument):
        return argument
    return f"'{argument}'" if '"' in argument else f'"{argument}"'


def _default_jobs(wanted: int) -> int:
    # As run.pl: as many as processors, but rather a few more at once than a small rest afterwards.
    processors = os.cpu_count() or 1
    return wanted if wanted < 1.4 * processors else processors


class Runner:
    """Runs the jobs of a task; interrupted or terminated, it ends them and fails.

    The first signal asks the jobs to end (SIGTERM), another one does not ask (SIGKILL).
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._running: set[subprocess.Popen[bytes]] = set()
        self._signals = 0  # that came; the handler does no more than count them, in whatever it has interrupted
        self._stops = 0  # how many of them have been acted on

    def run(self) -> list[int]:
        """Run all jobs; returns the numbers of those that failed."""
        task = self._task
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's & leave them
                signal.signal(number, self._note)
        numbers = range(task.first, task.last + 1)
        with ThreadPoolExecutor(task.max_jobs) as pool:
            jobs = [pool.submit(self._run_job, number) for number in numbers]
            while wait(jobs, timeout=_POLL_SECONDS).not_done:
                while self._stops < self._signals:
                    self._stop()
        return [number for number, job in zip(numbers, jobs, strict=True) if not job.result()]

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _stopping(self) -> bool:
        return self._stops > 0

    def _stop(self) -> None:
        how = signal.SIGKILL if self._stopping() else signal.SIGTERM
        self._stops += 1
        for process in list(self._running):
            _signal_group(process, how)

    def _run_job(self, number: int) -> bool:
        command, log = self._task.of(self._task.command, number), self._task.of(self._task.log, number)
        if self._stopping():
            return False
        os.makedirs(os.path.dirname(log) or ".", exist_ok=True)
        start = time.time()
        with open(log, "wb", buffering=0) as stream:
            stream.write(f"# {command}\n# Started at {time.ctime(start)}\n#\n".encode())
            # A process group of its own, so that a signal reaches all of the job's programs.
            process = subprocess.Popen(
                ["bash", "-c", f"( {command}\n)"],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._running.add(process)
            if self._stopping():
                _signal_group(process, signal.SIGTERM)
            status = process.wait()
            self._running.discard(process)
        end, seconds = time.ctime(), int(time.time()) - int(start)
        how = f"code {status}" if status >= 0 else f"code 0; signal {-status}"
        with open(log, "ab") as stream:
            stream.write(
                f"# Accounting: time={seconds} threads=1\n"
                f"# Ended ({how}) at {end}, elapsed time {seconds} seconds\n".encode()
            )
        return status == 0


def _signal_group(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.killpg(process.pid, how)


def main() -> int:
    """Run the command line; returns the status."""
    try:
        task = parse(sys.argv[1:])
        failed = Runner(task).run()
    except UsageError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{NAME}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    if not failed:
        return 0
    if task.first == task.last:
        print(f"{NAME}: job failed, log is in {task.of(task.log, task.first)}", file=sys.stderr)
    else:
        count = task.last - task.first + 1
        logs = ", ".join(task.of(task.log, number) for number in failed[:3])
        more = ", ..." if len(failed) > 3 else ""
        print(f"{NAME}: {len(failed)} / {count} failed, log is in {logs}{more}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
