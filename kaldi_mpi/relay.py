"""What mpiexec prints, on its way to the terminal: its banners at each bad end are kept back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

# What mpiexec, or the library of the rank that ends a run, says whenever a run ends badly. Where a learner has said
# why, this only hides the reason.
_RULES = (
    (b"-", rb"MPI_ABORT was invoked|Primary job |(?:prterun|mpirun|mpiexec|orterun) "),  # Open MPI
    (b"=", rb"=   BAD TERMINATION"),  # MPICH and its relatives
)
_BANNER = re.compile(
    b"|".join(rb"%b{60,}\n(?:%b).*?\n%b{60,}\n\0*" % (rule, first, rule) for rule, first in _RULES)
    + rb"|YOUR APPLICATION TERMINATED WITH [^\n]*\nThis typically [^\n]*\nPlease see [^\n]*\n"
    + rb"|Abort\(\d+\) on node [^\n]* application called MPI_Abort[^\n]*\n",
    re.DOTALL,
)
_BANNER_BEGUN = re.compile(
    b"|".join(rb"%b+(?:\n(?:[^\n]*|(?:%b).*))?\Z" % (rule, first) for rule, first in _RULES)
    + rb"|YOUR APPLICATION TERMINATED WITH .*\Z|Abort\([^\n]*\Z",
    re.DOTALL,
)
_LONGEST_BANNER = 4096


class Stream:
    """One of mpiexec's output streams on its way to ours; its banners are held back."""

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        self._source, self._sink = source, sink
        self.tail = b""  # the last that came, banners included
        self.banners = b""
        self._unsure = b""  # what may be the beginning of a banner

    def run(self) -> None:
        while piece := os.read(self._source.fileno(), 65536):
            self.tail = (self.tail + piece)[-16384:]
            self._write(self._without_banners(piece))
        self._write(self._unsure)

    def release(self) -> None:
        """Pass on the banners too."""
        self._write(self.banners)
        self.banners = b""

    def _without_banners(self, piece: bytes) -> bytes:
        text = self._unsure + piece
        if self.banners and not self._unsure:
            text = text.lstrip(b"\0")  # prterun ends its last banner with one, at times after a while
        found = _BANNER.findall(text)
        if found:
            self.banners += b"".join(found)
            text = _BANNER.sub(b"", text)
        begun = _BANNER_BEGUN.search(text)
        end = begun.start() if begun and len(text) - begun.start() <= _LONGEST_BANNER else len(text)
        self._unsure = text[end:]
        return text[:end]

    def _write(self, text: bytes) -> None:
        if text:
            self._sink.write(text)
            self._sink.flush()


class Relay:
    """Passes on what mpiexec prints, as it comes, and remembers its last words.

    Open MPI tells of a dead process on standard error, MPICH on standard output.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._streams = [Stream(process.stdout, sys.stdout.buffer), Stream(process.stderr, sys.stderr.buffer)]
        self._threads = [
            threading.Thread(target=stream.run, name=f"mpiexec-{number}", daemon=True)
            for number, stream in enumerate(self._streams)
        ]

    def __enter__(self) -> Relay:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Wait for the streams' end."""
        for thread in self._threads:
            thread.join(timeout=2.0)

    def release_banners(self) -> None:
        """Pass on what mpiexec itself said of the run's end; after `finish`."""
        for stream in self._streams:
            stream.release()

    def ranks_named(self, statuses: Sequence[Mapping[str, Any]]) -> set[int]:
        """The ranks whose process mpiexec's last words name (Open MPI and MPICH both say ``PID n``)."""
        said = {int(number) for stream in self._streams for number in re.findall(rb"\bPID (\d+)", stream.tail)}
        return {int(s["rank"]) for s in statuses if s["pid"] in said}
