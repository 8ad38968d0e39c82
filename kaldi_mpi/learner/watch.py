"""Run a command that trains somewhere else, and show its progress meanwhile.

``kaldi-mpi progress exp/lstm/progress.json -- COMMAND...`` runs COMMAND, draws a bar (or plain
lines off a terminal) from what the training writes to the file, and ends with COMMAND's exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kaldi_mpi.learner.progress import follow
from kaldi_mpi.options import Parser


def main(arguments: Sequence[str]) -> int:
    """``kaldi-mpi progress``; returns the exit status of the command that was run."""
    parser = Parser(prog="kaldi-mpi progress", description=__doc__)
    parser.add_argument("progress", type=Path, help="the training's progress.json; an old one is removed first")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command given")
    with contextlib.suppress(FileNotFoundError):
        options.progress.unlink()
    process = subprocess.Popen(command)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        follow(options.progress, lambda: process.poll() is None)
    except KeyboardInterrupt:
        process.terminate()
    finally:
        signal.signal(signal.SIGTERM, previous)
    status = process.wait()
    return status if status >= 0 else 128 - status
