"""What a learner shows of its life while it runs, and what it writes down when the launcher sees a hang.

One small file a rank (``beat.RANK``, in the directory of the status files), rewritten about once a second by a thread
of its own: a process that is stopped, or whose threads all hang in the kernel, says nothing new in it; one that waits
for another goes on beating, but does not move. The launcher reads these (`kaldi_mpi.hangs`). It answers by the file
``hang``; each learner then writes its stacks into ``DIR/log/hang.RANK``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from kaldi_mpi.files import atomic_write
from kaldi_mpi.log import logger
from kaldi_mpi.transport.status import STATUS_DIR_ENV

BEAT_SECONDS = 1.0
WAITING = "waiting"  # what `doing` begins with where a learner waits for others

_WEIGHT = 0.1  # of the newest step in the usual one
_RECORD_BYTES = 6144  # always as long: a shorter record would leave the end of a longer one. A path has up to 4096
_DOING_CHARACTERS = 200
_TRIES = 3  # to read a record that is being written
_HANG = "hang"


@dataclasses.dataclass(frozen=True)
class Record:
    """What ``beat.RANK`` says.

    Attributes:
        rank, pid, host: of the learner.
        beats: goes up with each writing.
        moves: goes up with each minibatch.
        usual: seconds between two minibatches, an exponential mean; 0: not known yet.
        doing: what it is at, in words; begins with `WAITING` where it waits for others.
        watched: whether it trains, so that a minibatch is due after about `usual`.
        log: ``DIR/log``; "": there is none.
    """

    rank: int
    pid: int
    host: str
    beats: int
    moves: int
    usual: float
    doing: str
    watched: bool
    log: str


class Beat:
    """One learner's record and the thread that writes it, as long as the block runs.

    Args:
        rank: in the whole run.
        folder: of status files; None: nobody looks, and there are neither file nor thread.
        log: ``DIR/log``; None: stacks are written nowhere.
        describe: what the learner's thread waits for, as "waiting for ..."; "": for nothing.
        last_exchanges: lines for ``hang.RANK``. Both are asked on the beat's thread.
        clock: in seconds.
    """

    def __init__(
        self,
        rank: int = 0,
        folder: Path | None = None,
        log: Path | None = None,
        describe: Callable[[], str] = lambda: "",
        last_exchanges: Callable[[], list[str]] = lambda: [],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank, self._folder, self._clock = rank, folder, clock
        self._describe, self._last_exchanges = describe, last_exchanges
        self._beats, self._moves, self._usual = 0, 0, 0.0
        self._doing, self._watched = "starting", False
        self._log = "" if log is None else str(log.absolute())
        self._last = 0.0  # when the last minibatch began
        self._seen = 0  # the last hang that it has written down
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    @classmethod
    def of_environment(
        cls,
        rank: int,
        log: Path,
        describe: Callable[[], str] = lambda: "",
        last_exchanges: Callable[[], list[str]] = lambda: [],
    ) -> Beat:
        """Where the launcher looks for it; without a launcher nobody does."""
        folder = os.environ.get(STATUS_DIR_ENV)
        return cls(rank, Path(folder) if folder else None, log, describe, last_exchanges)

    def __enter__(self) -> Beat:
        if self._folder is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._folder is not None:
            self._thread.join()
            _path(self._folder, self._rank).unlink(
                missing_ok=True
            )  # else its silence would be that of a frozen process

    # For the learner's thread.

    def moved(self, doing: str) -> None:
        """A minibatch begins; to be called once for each. From then on the next is due, and this learner watched."""
        now = self._clock()
        if self._watched:
            took = now - self._last
            self._usual = self._usual + _WEIGHT * (took - self._usual) if self._usual else took
        self._moves, self._doing, self._watched, self._last = self._moves + 1, doing, True, now

    def end_watch(self, doing: str) -> None:
        """What comes now, until the next minibatch begins, takes as long as it takes."""
        self._moves, self._doing, self._watched = self._moves + 1, doing, False

    def at(self, doing: str) -> None:
        """What it does now, between two minibatches."""
        self._doing = doing

    def goes_on(self) -> None:
        """This process gets on with something else than minibatches of the training; from any thread."""
        self._moves += 1

    # On the beat's thread.

    def _run(self) -> None:
        last = self._clock()
        while True:
            try:
                self._write()
                self._look(self._clock() - last)
            except FileNotFoundError:  # the launcher has removed the directory: the run is over
                return
            except Exception as error:  # noqa: BLE001 - a training goes on without it
                logger.debug("beat: %s", error)
            last = self._clock()
            if self._over.wait(BEAT_SECONDS):
                return

    def record(self) -> Record:
        """As it is now."""
        doing = self._describe() or self._doing
        return Record(
            self._rank, os.getpid(), os.uname().nodename, self._beats, self._moves, round(self._usual, 4),
            doing[:_DOING_CHARACTERS], self._watched, self._log,
        )  # fmt: skip

    def _write(self) -> None:
        assert self._folder is not None
        self._beats += 1
        said = json.dumps(dataclasses.asdict(self.record()), ensure_ascii=False).encode()
        # NFS shows what was written to others when the file is closed, and in place there is no new name to look up.
        descriptor = os.open(_path(self._folder, self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, said.ljust(_RECORD_BYTES), 0)
        finally:
            os.close(descriptor)

    def _look(self, gap: float) -> None:
        """Write down where all threads are, if the launcher has seen a new hang."""
        assert self._folder is not None
        number, line = read_hang(self._folder)
        if number <= self._seen:
            return
        self._seen = number
        if self._log:
            with open_hang_log(Path(self._log), self._rank, line) as stream:
                if gap > 3 * BEAT_SECONDS:
                    stream.write(f"written late: this process has done nothing for {gap:.0f} s\n")
                self._write_stacks(stream)

    def _write_stacks(self, stream: IO[str]) -> None:
        said = self.record()
        stream.write(f"learner rank {said.rank} on host {said.host}, process {said.pid}: {said.doing}\n\n")
        stream.writelines(f"thread 0x{t.ident or 0:016x}: {t.name}\n" for t in threading.enumerate())
        stream.write("\n")
        stream.flush()
        faulthandler.dump_traceback(stream, all_threads=True)
        if lines := self._last_exchanges():
            stream.write("\nthe last exchanges:\n")
            stream.writelines(f"{line}\n" for line in lines)


@contextlib.contextmanager
def open_hang_log(log: Path, rank: int, line: str) -> Iterator[IO[str]]:
    """``DIR/log/hang.RANK``, open behind what it has already, with a head; `line`: what the launcher says of it."""
    log.mkdir(parents=True, exist_ok=True)
    with open(log / f"hang.{rank}", "a", encoding="utf-8", errors="replace") as stream:
        stream.write(f"{'=' * 80}\n{time.strftime('%F %T')} {line}\n")
        yield stream


def _path(folder: Path, rank: int) -> Path:
    return folder / f"beat.{rank}"


def read_beats(folder: Path) -> dict[int, Record]:
    """The records of all ranks that have one; without those that could only be read half written."""
    found = {}
    for path in folder.glob("beat.*"):
        for _ in range(_TRIES):
            with contextlib.suppress(OSError, ValueError, TypeError):
                record = Record(**json.loads(path.read_text(encoding="utf-8")))
                found[record.rank] = record
                break
    return found


def put_hang(folder: Path, number: int, line: str) -> None:
    """Tell all learners of hang `number`, from 1; 0: there is none, as at the start.

    It is there from the start, since a host may believe for half a minute that there is no file which it has not found.
    """
    with atomic_write(folder / _HANG, "w", sync=False) as stream:
        json.dump([number, line], stream)


def read_hang(folder: Path) -> tuple[int, str]:
    """The last hang's number and line."""
    try:
        number, line = json.loads((folder / _HANG).read_text(encoding="utf-8"))
        return int(number), str(line)
    except (OSError, ValueError):
        return 0, ""
