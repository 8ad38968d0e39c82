"""Learners that stand still: who waits for whom, and which of them is the root; as the launcher sees it.

A learner *stands* when it has not moved for a multiple of its usual step. Where strategies meet, one that stands makes
all stand: that is a hang. Where they do not, the others go on, and there is only a line. A learner whose process is
stopped, or hangs in the kernel, is *frozen*: nothing comes from it any more, while one that waits goes on beating.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kaldi_mpi.log import logger
from kaldi_mpi.processes import state_of
from kaldi_mpi.transport.beat import WAITING, Record, open_hang_log, put_hang, read_beats

ON_HANG = ("wait", "end")  # what --on-hang may be; the first is the default

# A step that is twenty times the usual one is no chance; but steps of milliseconds wait now and then for a disk, or
# for a busy core, and ten seconds of that are no hang either.
FLOOR_SECONDS = 10.0
USUAL_STEPS = 20
# While nobody knows how long a step takes (the first one compiles kernels), and between phases of a training.
_UNKNOWN_SECONDS = 60.0
# Without a beat, which comes each second where a process has the least time for it.
_SILENT_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_DUMP_SECONDS = 3.0  # for learners to write their stacks before the run is ended
_MOST_NAMED = 3

_STATES = {
    "T": "is stopped",
    "t": "is held by a debugger",
    "D": "is in an uninterruptible wait, for a disk perhaps",
}


def process_state(record: Record) -> str:
    """See `processes.state_of`."""
    return state_of(record.pid, record.host)


@dataclasses.dataclass
class _Rank:
    """What is known of a learner.

    Attributes:
        record: its last.
        moved_at, beaten_at: when there was last something new in it.
        named: whether a line has said that it stands while the others go on.
    """

    record: Record
    moved_at: float
    beaten_at: float
    named: bool = False

    @property
    def waits(self) -> bool:
        return self.record.doing.startswith(WAITING)


@dataclasses.dataclass(frozen=True)
class Hang:
    """All learners stand.

    Attributes:
        number: from 1, a new one each time it is told.
        line: for the log.
        frozen: ranks that will not write their stacks themselves.
    """

    number: int
    line: str
    frozen: frozenset[int]


class HangWatch:
    """Decides from the learners' records, by its own clock: those of hosts may differ.

    Attributes:
        hang: that there is now, as it was last told; None: there is none.

    Args:
        size: how many learners there are; those whose process is found dead no longer count.
        clock: in seconds.
        floor: a learner does not stand before so many seconds.
        state_of: see `process_state`.
    """

    def __init__(
        self,
        size: int,
        clock: Callable[[], float] = time.monotonic,
        floor: float = FLOOR_SECONDS,
        state_of: Callable[[Record], str] = process_state,
    ) -> None:
        self._size, self._clock, self._floor, self._state_of = size, clock, floor, state_of
        self._ranks: dict[int, _Rank] = {}
        self._looked_at = clock()
        self._number, self._told_at = 0, 0.0  # of the hang: when it was last told, in seconds of its age
        self.hang: Hang | None = None

    def look(self, records: Mapping[int, Record]) -> list[str]:
        """To be called about each second; returns lines for the log."""
        now = self._clock()
        self._take(records, now)
        ranks = [self._ranks[rank] for rank in sorted(records)]
        dead = [one for one in ranks if self._is_frozen(one, now) and self._state_of(one.record) in ("Z", "X")]
        ranks = [one for one in ranks if one not in dead]  # the others may do without them
        # A process that is stopped does nothing that might take long.
        stopped = any(self._is_frozen(one, now) and self._state_of(one.record) in ("T", "t") for one in ranks)
        unknown = self._floor if stopped else _UNKNOWN_SECONDS
        standing = [one for one in ranks if self._stands(one, now, unknown)]
        lines = []
        for one in ranks:
            if one.named and one.moved_at == now:
                one.named = False
                lines.append(f"{_name(one)} moves again")
        if standing and len(standing) == self._size - len(dead):
            return lines + self._tell_hang(standing, now)
        if self.hang is not None:
            self.hang, self._told_at = None, 0.0
            lines.append("learners go on again")
        for one in standing:
            idle = now - one.moved_at
            # Where all meet, the others stop a moment after it does.
            others_go_on = any(now - other.moved_at < idle / 2 for other in ranks if other is not one)
            if not one.named and not one.waits and others_go_on:
                one.named = True
                lines.append(f"{self._describe(one, now)}; the others go on")
        return lines

    def _take(self, records: Mapping[int, Record], now: float) -> None:
        gap, self._looked_at = now - self._looked_at, now
        if gap > _SILENT_SECONDS:  # it is this process, or the whole machine, that has stood still
            for known in self._ranks.values():
                known.moved_at, known.beaten_at = known.moved_at + gap, known.beaten_at + gap
        for rank, record in records.items():
            one = self._ranks.setdefault(rank, _Rank(record, now, now))
            moved = (record.moves, record.doing) != (one.record.moves, one.record.doing)
            if record.beats != one.record.beats:
                one.beaten_at = now
                # Of what is no training, a beat is all that is seen.
                moved |= not (record.watched or record.doing.startswith(WAITING))
            one.record = record
            if moved:
                one.moved_at = now

    def _is_frozen(self, one: _Rank, now: float) -> bool:
        return now - one.beaten_at > _SILENT_SECONDS

    def _stands(self, one: _Rank, now: float, unknown: float) -> bool:
        """`unknown`: seconds after which one does whose usual step says nothing."""
        record = one.record
        if not (record.watched or one.waits or self._is_frozen(one, now)):
            return False
        known = record.watched and record.usual
        return now - one.moved_at > (max(self._floor, USUAL_STEPS * record.usual) if known else unknown)

    def _tell_hang(self, ranks: Sequence[_Rank], now: float) -> list[str]:
        """Its line, when it is new, and again each time that it has become twice as old."""
        frozen = [one for one in ranks if self._is_frozen(one, now)]
        roots = frozen or [one for one in ranks if not one.waits] or list(ranks)
        age = max(now - one.moved_at for one in roots)
        if self.hang is not None and age < 2 * self._told_at:
            return []
        self._number, self._told_at = self._number + 1, age
        line = self._line(roots, [one for one in ranks if one not in roots], now)
        self.hang = Hang(self._number, line, frozenset(one.record.rank for one in frozen))
        return [line]

    def _line(self, roots: Sequence[_Rank], others: Sequence[_Rank], now: float) -> str:
        if not others and len(roots) > 1 and all(one.waits for one in roots):
            seconds = min(now - one.moved_at for one in roots)
            return "; ".join([f"no learner has moved for {seconds:.0f} s, all wait", *_grouped(roots)])
        said = [self._describe(one, now) for one in roots[:_MOST_NAMED]]
        if len(roots) > _MOST_NAMED:
            said.append(f"nor have {len(roots) - _MOST_NAMED} more")
        return "; ".join([*said, *_grouped(others)])

    def _describe(self, one: _Rank, now: float) -> str:
        state = self._state_of(one.record)
        words = _STATES.get(state, "")
        if not words and self._is_frozen(one, now):
            words = f"gives no sign of life (state {state})" if state else "gives no sign of life"
        process = f" (process {one.record.pid} {words})" if words else f" (process {one.record.pid})"
        return f"{_name(one)}{process} has not moved for {now - one.moved_at:.0f} s, last in {one.record.doing}"


def _name(one: _Rank) -> str:
    return f"learner rank {one.record.rank} on host {one.record.host}"


def _grouped(ranks: Sequence[_Rank]) -> list[str]:
    """What each of them does, those that do the same together: of a hundred, most do."""
    by_doing: dict[str, list[int]] = {}
    for one in ranks:
        by_doing.setdefault(one.record.doing, []).append(one.record.rank)
    said = [f"rank {', '.join(map(str, same))}: {doing}" for doing, same in by_doing.items()]
    more = [f"and {len(said) - _MOST_NAMED} others"] if len(said) > _MOST_NAMED else []
    return said[:_MOST_NAMED] + more


class Hangs:
    """Looks for hangs, tells of them, and has learners write down where they are.

    Attributes:
        why: the run is to end, since there is a hang; "": it is not.

    Args:
        status_dir: of the learners.
        num_learners: N.
        ends: whether a hang ends the run.
    """

    def __init__(self, status_dir: Path, num_learners: int, ends: bool) -> None:
        self._folder, self._ends = status_dir, ends
        self._watch = HangWatch(num_learners)
        self._next, self._number, self._end_at = 0.0, 0, 0.0
        self.why = ""
        put_hang(status_dir, 0, "")

    def look(self, now: float) -> None:
        """To be called often, with `time.monotonic()`."""
        if now < self._next or self.why:
            return
        self._next = now + _LOOK_SECONDS
        records = read_beats(self._folder)
        lines = self._watch.look(records)
        hang = self._watch.hang
        if hang is not None and hang.number != self._number:
            logs = {record.log for record in records.values()} - {""}
            lines[-1] += f"; stacks: {min(logs)}/hang.*" if logs else ""
            self._end_at = self._end_at or now + _DUMP_SECONDS
            put_hang(self._folder, hang.number, hang.line)
            for rank in sorted(hang.frozen):
                _write_for(records[rank], hang.line)
            self._number = hang.number
        for line in lines:
            logger.warning("%s", line)
        if hang is None:
            self._end_at = 0.0
        elif self._ends and now >= self._end_at:
            self.why = hang.line


def _write_for(record: Record, line: str) -> None:
    """``hang.RANK`` of a learner that cannot: what the kernel says of its threads, if they are on this host."""
    if not record.log or record.host != os.uname().nodename:
        return
    with contextlib.suppress(OSError), open_hang_log(Path(record.log), record.rank, line) as stream:
        stream.write(f"written by the launcher: this learner gives no sign of life\n{record}\n\n")
        for task in sorted(Path(f"/proc/{record.pid}/task").iterdir()):
            name, state, where = (_of_kernel(task / what) for what in ("comm", "stat", "wchan"))
            state = state.rpartition(")")[2].split()[0] if state else "?"
            stream.write(f"thread {task.name} ({name}): state {state}, in the kernel at {where or '?'}\n")


def _of_kernel(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
