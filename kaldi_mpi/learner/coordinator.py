"""What rank 0 does for all learners of an asynchronous phase: iterations, validations and checkpoints between tickets.

Nobody stops for any of it. As the learners come to a ticket at which an iteration ends, all are told to begin the next
at their next step, the mean of their models is fetched and validated on a thread of its own, and where a checkpoint is
due each saves its own state. Where the run is asked to stop, no more tickets are handed out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.learner.checkpoint import Checkpoints
from kaldi_mpi.learner.schedule import Plan, TicketMap
from kaldi_mpi.learner.snapshots import Snapshots
from kaldi_mpi.learner.stopping import Stopping
from kaldi_mpi.learner.tickets import TicketServer
from kaldi_mpi.learner.validate import BackgroundValidation, Validation
from kaldi_mpi.log import logger
from kaldi_mpi.transport.world import Messages


class Coordinator:
    """Rank 0's; what has no other remark runs on its communication thread.

    Attributes:
        tickets: what hands them out.

    Args:
        messages: of the learners (super-learners).
        snapshots: what fetches their models.
        plan, where: of the training, in steps and in tickets.
        group_size: learners of a super-learner.
        validation, stopping, checkpoints: of the training.
        command_save: has a dedicated server save its state as that of a step.
    """

    def __init__(
        self,
        messages: Messages,
        snapshots: Snapshots,
        plan: Plan,
        where: TicketMap,
        group_size: int,
        validation: Validation,
        stopping: Stopping,
        checkpoints: Checkpoints,
        command_save: Callable[[int], None],
    ) -> None:
        self.tickets = TicketServer(messages, where.units, self._come_to)
        self._messages, self._snapshots, self._plan, self._map = messages, snapshots, plan, where
        self._group_size, self._stopping, self._checkpoints = group_size, stopping, checkpoints
        self._command_save = command_save
        self._background = BackgroundValidation(validation)
        self._marks: deque[tuple[int, int]] = deque()  # ticket and step at which an iteration ends
        self._span = 0, 0
        self._silent: list[int] = []  # whom the last model validated was without
        self._saving: int | None = None  # the step of a checkpoint that was asked for and is not there yet

    # On the learner's thread.

    def open(self, first: int, end: int, left: dict[str, Any] | None) -> None:
        """Hand out the tickets of the steps `first` .. `end` - 1, or what a checkpoint says is `left` of them."""
        marks = [(self._map.ticket(step), step) for step in range(first + 1, end) if self._plan.ends_iteration(step)]
        begin: dict[str, Any] = {"again": (), "next": self._map.ticket(first)} if left is None else left

        def open_segment() -> None:
            self._span, self._marks = (first, end), deque(marks)
            self.tickets.open(begin["next"], self._map.ticket(end), begin["again"])

        self._messages.post(open_segment)

    def close(self) -> int:
        """When all have come to the segment's end: the step that it is; an earlier one where they are asked to stop."""
        self._stopping.left = self.tickets.not_done if self.tickets.stopped else None
        return self._span[1]

    def finish_validations(self) -> None:
        """Return when all that have begun are done."""
        self._messages.wait(self._snapshots.quiet)
        self._background.drain()

    def end(self) -> None:
        """End the thread that validates."""
        self._background.close()

    def tickets_left(self) -> dict[str, Any]:
        """What a checkpoint says besides, all of whose parts are written."""
        self._saving = None
        return self.tickets.left()

    # Members.

    def lost(self, rank: int) -> None:
        """See `members.Concerned`: a checkpoint under way does not wait for a super-learner that is gone."""
        self.tickets.lost(rank)
        for number in range(self._group_size):
            self._checkpoints.lost(rank * self._group_size + number)

    def back(self, rank: int) -> None:
        """See `members.Concerned`."""
        self.tickets.back(rank)
        for number in range(self._group_size):
            self._checkpoints.back(rank * self._group_size + number)

    # Between tickets.

    def _come_to(self, ticket: int) -> None:
        while self._marks and self._marks[0][0] <= ticket:
            step = self._marks.popleft()[1]
            self.tickets.begin_iteration(self._plan.iteration(step))
            self._snapshots.take(self._plan.iteration(step), self._validate)
            if self._plan.saves(step):
                self._begin_checkpoint(step)
        first, end = self._span
        if self._stopping.time_to_save():
            before = [step for step in range(first, end) if self._map.ticket(step) <= ticket]
            self._begin_checkpoint(max(before, default=first))
        if not self._stopping.why and (why := self._stopping.look()):
            self._stopping.why = why
            # The step that the learners come to next; those before it have begun, and what is not done of them, or is
            # done of others, stands in the checkpoint. Near the end there is little left, and all of it is done.
            step = next(step for step in range(first + 1, end + 1) if self._map.ticket(step) > ticket)
            if step < end:
                self._span = first, step
                self.tickets.stop()

    def _begin_checkpoint(self, step: int) -> None:
        """Have all learners save, each in its own time."""
        if self._saving is not None:
            logger.info("no checkpoint of step %d: that of step %d is not written yet", step, self._saving)
            return
        self._saving = step
        self._checkpoints.announce(step)
        self.tickets.save(step)
        self._command_save(step)

    def _validate(self, iteration: int, mean: NDArray[np.float32], spread: float | None, silent: list[int]) -> None:
        if silent != self._silent:  # else it has been said
            self._silent = silent
            named = f"; rank {', '.join(map(str, silent))} did not answer" if silent else " again"
            number = self._map.units
            logger.warning(
                "iteration %d: the model validated is the mean of %d of %d learners%s",
                iteration, number - len(silent), number, named,
            )  # fmt: skip
        self._background.start(iteration, mean, spread)
