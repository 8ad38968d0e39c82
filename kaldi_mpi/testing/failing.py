"""Faults from outside, for tests and for the chaos run: learners that are killed, stopped, slowed or cut off.

    fail(rank=2).at(step=100).by("kill")
    fail(rank=1).at(step=50).by("stop, continue after 5 s")

`Failures` looks at the files that learners and launcher keep anyway (`transport.status`, `transport.beat`) for the
process of a rank and how far it is, and strikes with signals. A beat is a second old at most, so "at step 100" means:
when it has been seen that step 100 is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kaldi_mpi.leftovers import PREFIX
from kaldi_mpi.transport.beat import read_beats
from kaldi_mpi.transport.status import read_status

_LOOK_SECONDS = 0.05
_HOW = re.compile(r"(kill|partition|stop|slow)(?:, continue after ([\d.]+) s)?")
_SLOW_PERIOD, _SLOW_SHARE = 0.2, 0.02  # stopped but for a fiftieth of the time


@dataclasses.dataclass(frozen=True)
class Failure:
    """One fault: `how` is ``kill``, ``stop``, ``slow`` or ``partition``; `seconds` that it lasts, None: for good."""

    rank: int
    step: int
    how: str
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class _When:
    rank: int
    step: int

    def by(self, how: str) -> Failure:
        """What happens: "kill", "stop", "slow" or "partition", or one of the last three ", continue after 5 s".

        Raises:
            ValueError: it is none of these.
        """
        found = _HOW.fullmatch(how)
        if found is None or (found[1] == "kill" and found[2]):
            raise ValueError(f"a rank cannot fail by {how!r}")
        return Failure(self.rank, self.step, found[1], float(found[2]) if found[2] else None)


@dataclasses.dataclass(frozen=True)
class _Who:
    rank: int

    def at(self, step: int) -> _When:
        """When: it has done so many minibatches."""
        return _When(self.rank, step)


def fail(rank: int) -> _Who:
    """Have this rank fail; go on with `at` and `by`."""
    return _Who(rank)


class Failures:
    """Carries them out while the block runs; at its end all that can be are healed.

    Attributes:
        struck: those that have happened, each with the time (`time.monotonic`).

    Args:
        folder: in which the launcher makes its status directory: the working directory of the run.
        failures: what is to happen.
        cut: cuts a rank's links off, or (False) mends them; None: there are no partitions.
    """

    def __init__(
        self, folder: Path, failures: Sequence[Failure], cut: Callable[[int, bool], None] | None = None
    ) -> None:
        self._folder, self._open, self._cut = folder, list(failures), cut
        self.struck: list[tuple[Failure, float]] = []
        self._healing: list[tuple[float, Failure, int]] = []
        self._slow: dict[int, float] = {}  # processes that are slowed, until when
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="failures", daemon=True)

    def __enter__(self) -> Failures:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for entry in self._healing:
            self._heal(entry[1], entry[2])

    def _run(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            now = time.monotonic()
            for entry in [entry for entry in self._healing if entry[0] <= now]:
                self._healing.remove(entry)
                self._heal(entry[1], entry[2])
            if self._open:
                self._look()

    def _look(self) -> None:
        for place in self._folder.glob(f"{PREFIX}*"):
            moves = {rank: beat.moves for rank, beat in read_beats(place).items()}
            pids = {int(s["rank"]): int(s["pid"]) for s in read_status(place)}
            for failure in [f for f in self._open if moves.get(f.rank, -1) >= f.step and f.rank in pids]:
                self._open.remove(failure)
                self.strike(failure, pids[failure.rank])

    def strike(self, failure: Failure, pid: int) -> None:
        """Do it now, to this process."""
        self.struck.append((failure, time.monotonic()))
        if failure.how == "partition":
            if self._cut is None:
                raise ValueError("nothing here can cut a rank off")
            self._cut(failure.rank, True)
        elif failure.how == "slow":
            thread = threading.Thread(target=self._slow_down, args=(pid, failure.seconds), daemon=True)
            thread.start()
            return
        else:
            _signal(pid, signal.SIGKILL if failure.how == "kill" else signal.SIGSTOP)
        if failure.how != "kill":
            lasts = float("inf") if failure.seconds is None else failure.seconds
            self._healing.append((time.monotonic() + lasts, failure, pid))

    def _heal(self, failure: Failure, pid: int) -> None:
        if failure.how == "partition" and self._cut is not None:
            self._cut(failure.rank, False)
        else:
            _signal(pid, signal.SIGCONT)

    def _slow_down(self, pid: int, seconds: float | None) -> None:
        end = time.monotonic() + (seconds or float("inf"))
        while time.monotonic() < end and not self._over.is_set() and _signal(pid, signal.SIGSTOP):
            time.sleep(_SLOW_PERIOD * (1 - _SLOW_SHARE))
            _signal(pid, signal.SIGCONT)
            time.sleep(_SLOW_PERIOD * _SLOW_SHARE)


def _signal(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
