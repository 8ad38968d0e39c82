"""Progress of a training: a bar on a terminal, plain lines elsewhere, and a small file for those who watch.

The file (DIR/progress.json) is what `follow` reads, so that a recipe whose ``$cmd`` sends the learners' output
to a log, or to another machine, still shows its user a bar.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from kaldi_mpi.files import atomic_write
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser
from kaldi_mpi.processes import NotedSignals

_BAR_CELLS = 24
_BAR_SECONDS = 0.5  # between two drawings of the bar, and two writings of the file
_LINE_SECONDS = 15.0  # between two plain lines


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One moment of a training.

    Attributes:
        frames, total_frames: labelled frames trained on so far, and in all, over all learners.
        num_epochs: the epochs that `total_frames` are.
        seconds: since the learners began to train (in this run).
        frames_per_second: over the last few seconds.
        log_prob: mean log-probability per frame on the training data since the last validation.
        valid_log_prob: at the last validation, None before the first.
        learning_rate: effective.
    """

    frames: int
    total_frames: int
    num_epochs: float
    seconds: float
    frames_per_second: float
    log_prob: float
    valid_log_prob: float | None
    learning_rate: float

    def words(self) -> str:
        """The figures as one line."""
        share = self.frames / self.total_frames
        left = (self.total_frames - self.frames) / self.frames_per_second if self.frames_per_second else None
        valid = "" if self.valid_log_prob is None else f"  valid {self.valid_log_prob:.4f}"
        return (
            f"epoch {share * self.num_epochs:.2f}/{self.num_epochs:g}  "
            f"{_short(self.frames)}/{_short(self.total_frames)} frames  {_short(self.frames_per_second)} frames/s  "
            f"log-prob {self.log_prob:.4f}{valid}  lr {self.learning_rate:.3g}  left {_clock(left)}"
        )

    def bar(self) -> str:
        """The figures behind a bar."""
        full = int(_BAR_CELLS * self.frames / self.total_frames)
        return (
            f"[{'#' * full}{'.' * (_BAR_CELLS - full)}] {100 * self.frames / self.total_frames:3.0f}%  {self.words()}"
        )


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Rank 0's view of the training, shown now and then.

    Args:
        path: the file for `follow`, or None for none.
        terminal: draw a bar on `stream`, redrawn in place; otherwise log plain lines.
        stream: where the bar goes.
        clock: the time in seconds.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        terminal: bool,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._terminal = terminal
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = clock()
        self._last_drawn = self._last_logged = self._start
        self._marks: collections.deque[tuple[float, int]] = collections.deque()

    def update(
        self,
        frames: int,
        total_frames: int,
        num_epochs: float,
        log_prob: Callable[[], float],
        valid_log_prob: float | None,
        learning_rate: float,
        last: bool = False,
    ) -> None:
        """Take note of where the training is; show it if it is time, or if this is the `last` call.

        Args:
            log_prob: is asked only if it is to be shown: on a GPU the answer is waited for.
        """
        now = self._clock()
        self._marks.append((now, frames))
        # Speed over the last minute: long enough to be calm through a validation, short enough to show a change.
        while len(self._marks) > 2 and now - self._marks[1][0] > 60.0:
            self._marks.popleft()
        if now - self._last_drawn < _BAR_SECONDS and not last:
            return
        self._last_drawn = now
        elapsed, done = now - self._marks[0][0], frames - self._marks[0][1]
        snapshot = Snapshot(
            frames, total_frames, num_epochs, now - self._start,
            done / elapsed if elapsed > 0 else 0.0, log_prob(), valid_log_prob, learning_rate,
        )  # fmt: skip
        if self._path is not None:
            with atomic_write(self._path, "w", sync=False) as stream:
                json.dump(dataclasses.asdict(snapshot), stream)
        if self._terminal:
            self._stream.write(f"\r\x1b[K{snapshot.bar()}" + ("\n" if last else ""))
            self._stream.flush()
        elif now - self._last_logged >= _LINE_SECONDS or last:
            self._last_logged = now
            logger.info("%s", snapshot.words())


def follow(
    path: Path,
    running: Callable[[], bool],
    stream: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Show the progress that another process writes to `path`, until `running` says no.

    A bar where `stream` (standard error by default) is a terminal; elsewhere a plain line each 15 seconds, and
    one at the end.
    """
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    shown: Snapshot | None = None
    last_shown = clock()
    while True:
        still_running = running()
        try:
            snapshot = Snapshot(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            snapshot = None
        due = terminal or not still_running or clock() - last_shown >= _LINE_SECONDS
        if snapshot is not None and snapshot != shown and due:
            shown, last_shown = snapshot, clock()
            stream.write(f"\r\x1b[K{snapshot.bar()}" if terminal else f"{snapshot.words()}\n")
            stream.flush()
        if not still_running:
            break
        sleep(_BAR_SECONDS)
    if terminal and shown is not None:
        stream.write("\n")


def main(arguments: Sequence[str]) -> int:
    """``kaldi-mpi progress FILE -- COMMAND``: run a command that trains elsewhere, and show its progress meanwhile.

    Returns the exit status of the command.
    """
    parser = Parser(prog="kaldi-mpi progress", description="Run a command that trains, and show its progress.")
    parser.add_argument("progress", type=Path, help="the training's progress.json; an old one is removed first")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command given")
    with contextlib.suppress(FileNotFoundError):
        options.progress.unlink()
    with NotedSignals() as signals:
        process = subprocess.Popen(command)
        passed_on = 0

        def running() -> bool:
            nonlocal passed_on
            for number in signals.came[passed_on:]:
                passed_on += 1
                process.send_signal(number)
            return process.poll() is None

        follow(options.progress, running)
    status = process.wait()
    return status if status >= 0 else 128 - status
