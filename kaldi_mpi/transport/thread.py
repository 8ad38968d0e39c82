"""The communication thread of one rank: it carries everything that ranks say to each other.

Libraries of MPI make hardly any progress while the program computes, so each rank has a thread that starts
transfers without blocking and tests them, sleeping in between. It runs three kinds of work:

* *tasks*, generators that yield lists of transfers and go on when all of a list are done. Collectives are
  written so; those of one *lane* run one after the other, different lanes side by side;
* *listeners*, which are polled for messages (`kaldi_mpi.transport.messages`);
* *actions*, posted by any thread, run in the order posted; and those that run again after so many seconds.

So a message is answered while a sum is under way and while the learner computes. Nothing here blocks on
one transfer, hence ranks cannot wait for each other in a circle by the order in which transfers complete.

The thread does not know MPI: whoever starts a transfer gives it a handle, and the world a way to test handles.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol

from kaldi_mpi.log import logger
from kaldi_mpi.transport.status import STATUS_DIR_ENV

SPIN_SECONDS = 100e-6  # after something happened, look again at once for so long
SHORTEST_SLEEP = 50e-6
LONGEST_SLEEP_MOVING = 0.25e-3  # with transfers under way: libraries move large ones on when they are tested
LONGEST_SLEEP_LISTENING = 1.5e-3
LONG_WAIT = 60.0  # seconds after which the log tells of a wait; doubled each time
_REMEMBERED = 40  # transfers and tasks done, for the log of a hang
_FOR_EVER = 1e6  # seconds; threading's locks take no infinity
_LAST_CHANCE = 1.0  # seconds that `stop` leaves to transfers under way


# Sleeping for no time takes 50 us and more, yielding one.
_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


class BrokenWorldError(RuntimeError):
    """The ranks can talk no more: one of them has failed, or the world was closed."""


class PeersDiedError(Exception):
    """Some transfers have ended because processes at their other ends have died, which the MPI library survives.

    Attributes:
        done: which of the handles have ended, well or not.
        peers: the dead, by their ranks in the whole run.
    """

    def __init__(self, done: Sequence[int], peers: set[int]) -> None:
        super().__init__(f"rank {', '.join(map(str, sorted(peers)))} has died")
        self.done, self.peers = done, peers


class Transfer(NamedTuple):
    """One array on its way."""

    handle: Any  # what the world's `completed` understands
    way: str  # "to" or "from"
    peer: int  # its rank in the whole run


Task = Generator[Sequence[Transfer], None, Any]


class Listener(Protocol):
    """Something that looks for messages."""

    def poll(self) -> bool:
        """Look once; returns whether something happened."""


class Completion:
    """What a waiting thread holds: set when a task is done or a condition true."""

    __slots__ = ("_lock", "done", "failure", "is_set", "result", "what")

    def __init__(self, what: str, done: Callable[[], None] | None = None) -> None:
        self.what = what
        self.done = done  # called on the communication thread
        self.is_set = False
        self.result: Any = None
        self.failure: BaseException | None = None
        self._lock = threading.Lock()  # held until it is set: wakes ten times faster than threading.Event
        self._lock.acquire()

    def set(self, result: Any = None) -> None:
        self.result = result
        self.release()
        if self.done is not None:
            self.done()

    def release(self) -> None:
        """Let those who wait go on; safe to call again."""
        self.is_set = True
        with contextlib.suppress(RuntimeError):
            self._lock.release()

    def wait(self, seconds: float) -> bool:
        """Wait up to so long; returns whether it is set."""
        if not self.is_set and self._lock.acquire(timeout=seconds):
            self.release()
        return self.is_set


class _Timer:
    """An action that runs again and again."""

    __slots__ = ("action", "due", "seconds")

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self.seconds, self.action = seconds, action
        self.due = time.monotonic() + seconds


class Lane:
    """Tasks of one world that run one after the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.finished = 0
        self.tasks: deque[tuple[Task, Completion]] = deque()
        self.open = 0  # transfers that the first task waits for

    def describe(self) -> str:
        """Where it stands, for the log."""
        return f"{self.name} {self.finished} ({self.tasks[0][1].what})" if self.tasks else f"no {self.name}"


class CommThread:
    """One rank's communication thread; started by the first piece of work.

    Args:
        rank: in the whole run; for names and the log.
        completed: given the handles of all transfers under way, the indices of those that are done now.
        polls: whether transfers and messages must be looked for; else `nudge` tells that there is something.
        on_failure: called on the thread with what ended it.
        patience: seconds after which a wait raises; None waits for ever.
    """

    def __init__(
        self,
        rank: int,
        completed: Callable[[list[Any]], Sequence[int]],
        *,
        polls: bool,
        on_failure: Callable[[BaseException], None],
        patience: float | None = None,
    ) -> None:
        self.rank = rank
        self._completed, self._polls, self._on_failure = completed, polls, on_failure
        self._patience = patience
        self._bell = threading.Lock()  # free: there is something to do (see Completion for why a bare lock)
        self._bell.acquire()
        self._guard = threading.Lock()  # of what several threads change: starting, waiting, failing
        self._inbox: deque[Callable[[], None]] = deque()
        self._handles: list[Any] = []  # of the transfers under way, and what to do when they are done
        self._transfers: list[tuple[Transfer, Callable[[], None]]] = []
        self._lanes: list[Lane] = []  # those that have tasks
        self._listeners: list[Listener] = []
        self._watched: list[tuple[Callable[[], bool], Completion]] = []
        self._timers: list[_Timer] = []
        self._waiting: set[Completion] = set()
        self._recent: deque[tuple[float, str]] = deque(maxlen=_REMEMBERED)
        self._stop_at: float | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"communication-{rank}", daemon=True)
        self._started = False

    # For any thread.

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the thread, after all that were posted before.

        Raises:
            BrokenWorldError: the thread has ended.
        """
        self._check()
        if not self._started:
            with self._guard:
                if not self._started:
                    self._started = True
                    self._thread.start()
        self._inbox.append(action)
        self.nudge()

    def nudge(self) -> None:
        """There is something to look for."""
        with contextlib.suppress(RuntimeError):  # it has not answered an earlier ring yet
            self._bell.release()

    def submit(self, lane: Lane, task: Task, what: str, done: Callable[[], None] | None = None) -> Completion:
        """Run `task` after the lane's earlier ones; its return value becomes the completion's result."""
        completion = Completion(what, done)
        if self.is_current():
            self._enter(lane, task, completion)
        else:
            self.post(lambda: self._enter(lane, task, completion))
        return completion

    def when(self, ready: Callable[[], bool], what: str) -> Completion:
        """A completion for `ready()`, which is asked on the thread, from now on after everything that happens."""
        completion = Completion(what)
        self.post(lambda: self._watch(ready, completion))
        return completion

    def every(self, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        """Run `action` on the thread again and again, `seconds` apart, until what is returned is called."""
        timer = _Timer(seconds, action)
        self.post(lambda: self._timers.append(timer))
        return lambda: self.post(lambda: self._timers.remove(timer) if timer in self._timers else None)

    def wait(self, completion: Completion) -> Any:
        """Wait in another thread until it is set; tells in the log when that takes long.

        Raises:
            BrokenWorldError: the thread has ended.
            BaseException: what the condition waited for raised.
        """
        if self.is_current():
            raise RuntimeError(f"the communication thread cannot wait for its own work ({completion.what})")
        with self._guard:
            if not completion.is_set:
                self._check()
            self._waiting.add(completion)
        # Where there is a launcher it tells of a wait, and for whom, as soon as it is longer than is usual.
        began, limit = time.monotonic(), _FOR_EVER if os.environ.get(STATUS_DIR_ENV) else LONG_WAIT
        try:
            while not completion.wait(min(limit, self._patience or limit)):
                waited = time.monotonic() - began
                if self._patience is not None and waited >= self._patience:
                    raise BrokenWorldError(self.explain(completion, waited))
                if waited >= limit:
                    logger.warning("%s", self.explain(completion, waited))
                    limit *= 2
        finally:
            with self._guard:
                self._waiting.discard(completion)
        self._check_completion(completion)
        return completion.result

    def is_current(self) -> bool:
        """Whether the caller is this thread."""
        return threading.get_ident() == self._thread.ident

    def alive(self) -> bool:
        """Whether it has neither failed nor been stopped."""
        return self._failure is None and self._stop_at is None

    def stop(self) -> None:
        """End the thread, leaving transfers under way a moment to complete; safe to call again."""
        with self._guard:
            if self._stop_at is None:
                self._stop_at = time.monotonic() + _LAST_CHANCE
            started = self._started
        self.nudge()
        if started and not self.is_current():
            self._thread.join(2 * _LAST_CHANCE)
        self._release_all(BrokenWorldError("the world was closed"))

    def fail(self, error: BaseException) -> None:
        """Break everybody's waits with `error`; from any thread."""
        self._release_all(error)
        self.nudge()

    def explain(self, completion: Completion, seconds: float) -> str:
        """One line for the log: who waits for what, and what is under way."""
        return f"learner rank {self.rank} has waited {seconds:.0f} s for {completion.what}; {self._where()}"

    def waits(self) -> str:
        """What other threads of this rank wait for here, and whom from; "": for nothing. From any thread."""
        with self._guard:
            whats = sorted({completion.what for completion in self._waiting if not completion.is_set})
        return (
            f"waiting for {' and '.join(whats)} ({', '.join(self._under_way()) or 'nothing under way'})"
            if whats
            else ""
        )

    def last_exchanges(self) -> list[str]:
        """What was done last, and what is under way; a line each. From any thread."""
        recent = [f"{time.strftime('%T', time.localtime(at))} {what}" for at, what in list(self._recent)]
        return [*recent, f"now {self._where()}"]

    def _under_way(self) -> list[str]:
        return sorted({f"{transfer.way} rank {transfer.peer}" for transfer, _ in list(self._transfers)})

    def _where(self) -> str:
        lanes = [lane.describe() for lane in list(self._lanes)]
        return (
            f"at {', '.join(lanes) or 'no collective'}; transfers under way: {', '.join(self._under_way()) or 'none'}"
        )

    # On the thread.

    def track(self, transfer: Transfer, then: Callable[[], None]) -> None:
        """Call `then` when the transfer is done."""
        self._handles.append(transfer.handle)
        self._transfers.append((transfer, then))

    def listen(self, listener: Listener, wanted: bool) -> None:
        """Begin or end polling `listener`."""
        if wanted and listener not in self._listeners:
            self._listeners.append(listener)
        elif not wanted and listener in self._listeners:
            self._listeners.remove(listener)

    def _enter(self, lane: Lane, task: Task, completion: Completion) -> None:
        lane.tasks.append((task, completion))
        if len(lane.tasks) == 1:
            self._lanes.append(lane)
            self._advance(lane)

    def _advance(self, lane: Lane) -> None:
        """Let the lane's tasks go on until one waits for transfers."""
        while lane.tasks and not lane.open:
            task, completion = lane.tasks[0]
            try:
                transfers = next(task)
            except StopIteration as end:
                lane.finished += 1
                lane.tasks.popleft()
                self._recent.append((time.time(), f"{lane.name} {lane.finished} done: {completion.what}"))
                if not lane.tasks:
                    self._lanes.remove(lane)
                completion.set(end.value)
                continue
            lane.open = len(transfers)
            for transfer in transfers:
                self.track(transfer, lambda: self._one_done(lane))

    def _one_done(self, lane: Lane) -> None:
        lane.open -= 1
        if not lane.open:
            self._advance(lane)

    def _watch(self, ready: Callable[[], bool], completion: Completion) -> None:
        self._watched.append((ready, completion))

    def _look_at_watched(self) -> None:
        for entry in list(self._watched):
            ready, completion = entry
            try:
                if not ready():
                    continue
            except BaseException as error:  # noqa: BLE001 - belongs to the thread that waits
                completion.failure = error
            self._watched.remove(entry)
            completion.set()

    def _round(self) -> bool:
        """Everything that can be done now; returns whether there was anything."""
        happened = False
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()
            happened = True
        if self._timers:
            happened |= self._run_due(time.monotonic())
        if self._handles:
            dead: set[int] = set()
            try:
                done = self._completed(self._handles)
            except PeersDiedError as error:
                # What a task waits for never comes, and the launcher ends the run; what was a message is forgotten.
                done, dead = error.done, error.peers
            except Exception as error:
                # Either ranks do not make the same calls: one's answer does not fit the other's question. Or a rank
                # has died; then mpiexec ends this one in a moment, and the dead one should be named in its place.
                time.sleep(_LAST_CHANCE)
                raise RuntimeError(f"a transfer failed, {self._where()}: {error}") from error
            if done:
                happened = True
                finished = [
                    then
                    for transfer, then in (self._transfers[index] for index in sorted(done))
                    if transfer.way == "to" or transfer.peer not in dead
                ]
                for index in sorted(done):
                    transfer = self._transfers[index][0]
                    self._recent.append((time.time(), f"{transfer.way} rank {transfer.peer}"))
                gone = set(done)
                self._handles = [handle for index, handle in enumerate(self._handles) if index not in gone]
                self._transfers = [entry for index, entry in enumerate(self._transfers) if index not in gone]
                for then in finished:
                    then()
        for listener in list(self._listeners):
            happened |= listener.poll()
        if happened and self._watched:
            self._look_at_watched()
        return happened

    def _run_due(self, now: float) -> bool:
        due = [timer for timer in self._timers if timer.due <= now]
        for timer in due:
            timer.due = now + timer.seconds  # not before: a thread that was stopped does not catch up
            timer.action()
        return bool(due)

    def _sleep_at_most(self, seconds: float) -> float:
        """Up to the next timer; -1: for ever."""
        if not self._timers:
            return seconds
        rest = max(0.0, min(timer.due for timer in self._timers) - time.monotonic())
        return rest if seconds < 0 else min(seconds, rest)

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # noqa: BLE001 - ends the run
            self._on_failure(error)  # before those who wait wake up: theirs is not the reason to tell
            self._release_all(error)

    def _loop(self) -> None:
        last, delay = time.perf_counter(), SHORTEST_SLEEP
        while self._failure is None:
            if self._round():
                last, delay = time.perf_counter(), SHORTEST_SLEEP
                continue
            if self._stop_at is not None and (not self._handles or time.monotonic() > self._stop_at):
                return
            polling = self._polls and bool(self._handles or self._listeners)
            if polling and time.perf_counter() - last < SPIN_SECONDS:
                _yield()
            elif polling:
                delay = min(1.5 * delay, LONGEST_SLEEP_MOVING if self._handles else LONGEST_SLEEP_LISTENING)
                self._bell.acquire(timeout=self._sleep_at_most(delay))
            elif self._stop_at is None:
                self._bell.acquire(timeout=self._sleep_at_most(-1))
            else:
                self._bell.acquire(timeout=SHORTEST_SLEEP)

    def _check(self) -> None:
        if self._failure is not None:
            raise BrokenWorldError(f"rank {self.rank} can talk no more: {self._failure}") from self._failure
        if self._stop_at is not None:
            raise BrokenWorldError(f"rank {self.rank} can talk no more: the world was closed")

    def _check_completion(self, completion: Completion) -> None:
        if isinstance(completion.failure, BrokenWorldError):
            self._check()
        if completion.failure is not None:
            raise completion.failure

    def _release_all(self, error: BaseException) -> None:
        with self._guard:
            if self._failure is None:
                self._failure = error
            for completion in self._waiting:
                if not completion.is_set:
                    completion.failure = BrokenWorldError(str(error))
                    completion.release()
            self._waiting.clear()
