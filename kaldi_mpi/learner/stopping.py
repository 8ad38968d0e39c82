"""A run that is asked to stop: all learners agree on the step between two others at which they do.

Asked are they by the launcher (SIGTERM or SIGUSR1 before a preemption, Ctrl-C, the death of what started the run), or
by a signal to a learner. They write a checkpoint there, from which the same command goes on; under a synchronous
strategy what it ends with has the very bytes of a training left in peace.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kaldi_mpi.processes import NotedSignals
from kaldi_mpi.transport.status import STATUS_DIR_ENV, ask_to_stop, asked_to_stop
from kaldi_mpi.transport.world import World

_LOOK_SECONDS = 0.2


class Stopping:
    """One learner's view of it.

    Attributes:
        why: what all learners have agreed to stop for; "": they have not.
        saves: whether they have agreed to write a checkpoint at this step and go on.
        left: on rank 0, called on its communication thread: the tickets that learners in their own time have not done
            before they stopped; None: such a step has none.

    Args:
        world: the learners.
        signals: that came to this process; None: it notes none.
        clock: in seconds.
        save_seconds: between two checkpoints; None: time asks for none.
    """

    def __init__(
        self,
        world: World,
        signals: NotedSignals | None = None,
        clock: Callable[[], float] = time.monotonic,
        save_seconds: float | None = None,
    ) -> None:
        self._world, self._signals, self._clock = world, signals, clock
        self._save_seconds, self._saved_at = save_seconds, clock()
        self.why, self.saves = "", False
        self.left: Callable[[], dict[str, Any]] | None = None
        self._asked, self._next_look = "", 0.0
        self._skip = 0  # steps at which all learners have met that do not ask
        self._skipped, self._last = 0, clock()

    def look(self) -> str:
        """Why this learner knows that the run is to stop; "": it knows of nothing."""
        now = self._clock()
        if not self._asked and now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            if self._signals is not None and self._signals.came:
                self._asked = f"signal {self._signals.name} to learner rank {self._world.rank}"
                if folder := os.environ.get(STATUS_DIR_ENV):
                    ask_to_stop(Path(folder), self._asked)
            else:
                self._asked = asked_to_stop()
        return self._asked

    def time_to_save(self) -> bool:
        """On rank 0: whether it is time for a checkpoint; says so once."""
        if self._save_seconds is None or self._clock() - self._saved_at < self._save_seconds:
            return False
        self._saved_at = self._clock()
        return True

    def agree(self) -> bool:
        """Called by all learners after the same steps, those at which they have met: whether they stop or save here.

        Now and then one of these calls is a message from the first learner to all, which also says how many will not
        be: about as many as there are in a fifth of a second.
        """
        self.look()
        self.saves = False
        if self._skipped < self._skip:
            self._skipped += 1
            return False
        told = None
        if self._world.rank == 0:
            now = self._clock()
            a_step = (now - self._last) / (self._skip + 1)
            self._last = now
            skip = int(min(_LOOK_SECONDS / max(a_step, 1e-6), 2 * self._skip + 10))
            told = (self._asked, skip, self.time_to_save())
        self.why, self._skip, self.saves = self._world.broadcast(told)
        self._skipped = 0
        return bool(self.why) or self.saves
