"""Progress, log lines and files that appear whole."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.learner.logs import IterationLogs
from kaldi_mpi.learner.progress import Progress, Snapshot, follow
from kaldi_mpi.log import KaldiFormatter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def train(progress: Progress, clock: Clock, seconds: int) -> None:
    """Three million frames at ten thousand a second, told once a second."""
    for second in range(1, seconds + 1):
        clock.now += 1.0
        progress.update(10_000 * second, 3_000_000, 4, lambda: -1.25, -1.5, 0.00123, last=second == 300)


def test_a_bar_on_a_terminal() -> None:
    clock, stream = Clock(), Terminal()
    train(Progress(None, terminal=True, stream=stream, clock=clock), clock, 300)
    drawings = stream.getvalue().split("\r\x1b[K")[1:]
    assert len(drawings) == 300 and stream.getvalue().endswith("\n") and stream.getvalue().count("\n") == 1
    assert drawings[149] == (
        "[############............]  50%  epoch 2.00/4  1.5M/3M frames  10k frames/s  "
        "log-prob -1.2500  valid -1.5000  lr 0.00123  left 2:30"
    )
    assert "100%" in drawings[-1] and "left 0:00" in drawings[-1]


def test_plain_lines_elsewhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("kaldi_mpi")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        clock, stream = Clock(), io.StringIO()
        train(Progress(tmp_path / "progress.json", terminal=False, stream=stream, clock=clock), clock, 300)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert stream.getvalue() == "" and len(lines) == 20  # one each 15 seconds
    assert lines[0].startswith("epoch 0.20/4  150k/3M frames  10k frames/s  log-prob -1.2500  valid -1.5000  lr")


@pytest.mark.parametrize("terminal", [True, False])
def test_those_who_watch_see_what_the_file_says(tmp_path: Path, terminal: bool) -> None:
    path = tmp_path / "progress.json"
    clock = Clock()
    writer = Progress(path, terminal=False, stream=io.StringIO(), clock=clock)
    stream = Terminal() if terminal else io.StringIO()
    steps = iter(range(4))

    def running() -> bool:
        step = next(steps)
        if step == 1:  # before that the file does not exist, and nobody minds
            train(writer, clock, 15)
        return step < 3

    follow(path, running, stream, sleep=lambda _: None, clock=clock)
    text = stream.getvalue()
    assert text.count("150k/3M frames") == 1
    assert ("[#" in text) == terminal and ("\x1b" in text) == terminal


def test_watching_a_command(tmp_path: Path) -> None:
    """The exit status is the command's, and so is its output; an old progress file is not shown."""
    path = tmp_path / "progress.json"
    path.write_text("of an older run")
    result = subprocess.run(
        [sys.executable, "-m", "kaldi_mpi", "progress", str(path), "--", "sh", "-c", "echo said; exit 7"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (7, "said\n", "")


def test_time_left_is_unknown_without_speed() -> None:
    assert Snapshot(0, 10, 1, 0.0, 0.0, -1.0, None, 0.1).words().endswith("left ?")
    assert Snapshot(1, 36001, 1, 0.0, 10.0, -1.0, None, 0.1).words().endswith("left 1:00:00")


def test_log_lines_are_kaldis() -> None:
    record = logging.LogRecord("kaldi_mpi", logging.INFO, "/a/b/loop.py", 7, "x is %d", (3,), None, "run")
    line = KaldiFormatter("kaldi-mpi-train", 2).format(record)
    assert re.fullmatch(r"LOG \(kaldi-mpi-train/2\[[0-9.]+\]:run\(\):loop\.py:7\) x is 3", line)
    record.levelno = logging.ERROR
    assert KaldiFormatter("p").format(record).startswith("ERROR (p[")


def test_iteration_logs_have_the_lines_that_scripts_parse(tmp_path: Path) -> None:
    """The patterns are those of steps/libs/nnet3/report/log_parse.py and steps/libs/nnet3/train/common.py."""
    IterationLogs(tmp_path).train(3, 1, {"output": (-250.0, 200.0, 0.0)})
    text = (tmp_path / "train.3.2.log").read_text()
    found = re.search(
        r"Overall average objective function for 'output' is ([0-9.\-+e]+) over ([0-9.\-+e]+) frames", text
    )
    assert found is not None and found.groups() == ("-1.25", "200")
    assert re.search(r"log-prob-per-frame=\s*-1\.25", text)
    IterationLogs(tmp_path).train(3, 1, {"output": (-25.0, 200.0, -5.0), "output-xent": (-250.0, 200.0, 0.0)})
    text = (tmp_path / "train.3.2.log").read_text()
    # As nnet3-chain-train prints an objective with l2, and the other output's.
    assert "Overall average objective function for 'output' is -0.125 + -0.025 = -0.15 over 200 frames." in text
    assert "Overall average objective function for 'output-xent' is -1.25 over 200 frames." in text


def test_atomic_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path, "w") as stream:
        stream.write("first")
    with pytest.raises(RuntimeError, match="on the way"), atomic_write(path, "w") as stream:
        stream.write("second")
        raise RuntimeError("on the way")
    with pytest.raises(DataError, match=r"file: cannot write: No space left on device"), atomic_write(path) as stream:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file"]
    with (
        pytest.raises(DataError, match="nowhere/file: cannot write: No such file"),
        atomic_write(tmp_path / "nowhere" / "file"),
    ):
        pass
