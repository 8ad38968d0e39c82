"""Processes that end together: signals that are only noted, who started whom, and what asks for a run's end.

    train.sh (start) -> $cmd (run.pl, run.py, queue.pl) -> bash -> launch -> mpiexec -> learners

Whichever of these dies, the others end within seconds. Upwards each waits for the one that it started. Downwards:
mpiexec and learners are tied to their parents by the kernel; the launcher looks at all processes between itself and the
program that the user called, and at that program's `Starter` file, which shows on any host that it is still there and
whether it has been asked to stop. A stop is a request first: learners write a checkpoint and end by themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write

STOPPED = 75  # the exit status of a run that was asked to stop and left a checkpoint (sysexits.h: try again later)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_BEAT_SECONDS = 2.0
_LOOK_SECONDS = 0.1
_SILENT_SECONDS = 30.0  # without a beat of a starter on another host


class NotedSignals:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 while the block runs: noted, and nothing else.

    A handler runs in the middle of whatever the main thread does, a lock in its hand perhaps: it may only add to a
    list, which the program's loop looks at. Signals that are ignored, as nohup and a shell's & leave them, stay so.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self._before: list[tuple[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None]] = []

    def __enter__(self) -> NotedSignals:
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before.append((number, signal.signal(number, self._note)))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.came.append(number)

    @property
    def name(self) -> str:
        """Of the first that came; "": none has."""
        return signal.Signals(self.came[0]).name if self.came else ""


@dataclasses.dataclass(frozen=True)
class Process:
    """A process of this host; the time of its start tells it from a later one of the same number."""

    pid: int
    started: int
    name: str
    parent: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """None: there is no such process (or no /proc), or it is a zombie."""
        try:
            said = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        name, _, rest = said.partition("(")[2].rpartition(")")  # it may have parentheses of its own
        fields = rest.split()
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]), name, int(fields[1]))

    @property
    def is_running(self) -> bool:
        now = Process.of(self.pid)
        return now is not None and now.started == self.started


def state_of(pid: int, host: str) -> str:
    """The letter of /proc/PID/stat, X of one that is gone; "": it is on another host, or there is no /proc."""
    if host != os.uname().nodename or not Path("/proc/self/stat").exists():
        return ""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def ancestors(up_to: int) -> list[Process]:
    """The processes between this one and `up_to`, which is the last; [] if that is none of its ancestors."""
    found: list[Process] = []
    pid = os.getppid()
    while pid > 1 and (process := Process.of(pid)) is not None:
        found.append(process)
        if pid == up_to:
            return found
        pid = process.parent
    return []


def die_with_parent(how: int = signal.SIGKILL) -> None:
    """Have Linux send this process `how` when its parent dies. On other systems nothing happens.

    Without this, learners live on as orphans when mpiexec is killed.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # a libc without prctl: the old behaviour stays
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


@dataclasses.dataclass(frozen=True)
class Launcher:
    """What a launcher leaves: `status` is that of its exit; None: it was killed."""

    pid: int
    host: str
    status: int | None = None


def launcher_file(starter: Path) -> Path:
    """Beside a `Starter` file: held (flock) by the launcher as long as it lives, so that its death is seen anywhere."""
    return starter.with_name(f"{starter.name}.launcher")


class Starter:
    """The file by which the program that a user called is seen by the launcher, which may be on another host.

    Args:
        path: of the file; removed at the end.
        name: of the program, for others' words.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self._name = path, name
        self._beats, self._next = 0, 0.0
        self._stop, self._now = "", False

    def __enter__(self) -> Starter:
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        self._of_launcher.unlink(missing_ok=True)

    @property
    def _of_launcher(self) -> Path:
        return launcher_file(self.path)

    def wait_for_launcher(self, seconds: float) -> Launcher | None:
        """The launcher, when it has ended, or `seconds` have gone by; None: there was none.

        What the job ran under can be gone before it: run.pl, when it is killed.
        """
        end = time.monotonic() + seconds
        while True:
            self.beat()
            try:
                with open(self._of_launcher, "r+b") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return Launcher(**json.loads(stream.read()))
            except FileNotFoundError:
                return None
            except (BlockingIOError, ValueError):  # it is at work, or has just begun
                if time.monotonic() > end:
                    return None
            time.sleep(_LOOK_SECONDS)

    def stop(self, why: str, now: bool = False) -> None:
        """Ask for the run's end; `now`: without a checkpoint."""
        self._stop, self._now, self._next = why, now, 0.0
        self.beat()

    def beat(self) -> None:
        """To be called at least each second."""
        if time.monotonic() < self._next:
            return
        self._beats, self._next = self._beats + 1, time.monotonic() + _BEAT_SECONDS
        own = Process.of(os.getpid())
        said = {
            "name": self._name, "host": socket.gethostname(), "pid": os.getpid(), "started": own.started if own else 0,
            "beat": self._beats, "stop": self._stop, "now": self._now,
        }  # fmt: skip
        with atomic_write(self.path, "w", sync=False) as stream:
            json.dump(said, stream)


class StarterWatch:
    """The launcher's view of the program that the user called.

    Args:
        path: of the `Starter` file; None: nobody is to be watched.
        clock: in seconds.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._beat, self._heard = -1, clock()
        self._between: list[Process] = []
        self.now = False  # whether the end is wanted without a checkpoint
        self._held: IO[str] | None = None
        if path is not None:
            said = self._read()
            if said.get("host") == socket.gethostname():
                # Under a queue's daemon the program is none of the launcher's ancestors.
                starter = Process.of(int(str(said["pid"])))
                self._between = ancestors(int(str(said["pid"]))) or ([] if starter is None else [starter])

    def __enter__(self) -> StarterWatch:
        if self._path is not None:
            self._held = open(launcher_file(self._path), "w", encoding="utf-8")
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.ended(None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            self._held.close()

    def ended(self, status: int | None) -> None:
        """Leave word of the exit status."""
        if self._held is not None:
            self._held.seek(0)
            self._held.truncate()
            json.dump(dataclasses.asdict(Launcher(os.getpid(), socket.gethostname(), status)), self._held)
            self._held.flush()

    def reason(self) -> str:
        """Why the run is to end; "": it is not."""
        if self._path is None:
            return ""
        said = self._read()
        self.now = bool(said.get("now"))
        if said.get("stop"):
            return str(said["stop"])
        for process in self._between:
            if not process.is_running:
                name = said.get("name") if process.pid == said.get("pid") else process.name
                return f"{name} (process {process.pid}), by which it was started, is gone"
        beat = int(str(said.get("beat", self._beat)))
        if beat != self._beat:
            self._beat, self._heard = beat, self._clock()
        elif self._clock() - self._heard > _SILENT_SECONDS:
            where = f"{said['name']} (process {said['pid']} on {said['host']})" if said else "the program"
            return f"{where}, by which it was started, has not been heard of for {_SILENT_SECONDS:g} s"
        return ""

    def _read(self) -> dict[str, object]:
        assert self._path is not None
        try:
            found: dict[str, object] = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read what started the run ({error})", file=str(self._path)) from error
        return found
