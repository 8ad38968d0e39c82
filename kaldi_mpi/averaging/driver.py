"""How strategies are driven: one synchronous step; and a rank's part in an asynchronous strategy.

Whoever trains comes here: the learner, a dedicated server, the simulation, tests and benchmarks. The two orders of
calls below are therefore written down once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from kaldi_mpi.averaging.journal import Journal, JournalEvent
from kaldi_mpi.averaging.published import Flat, PublishedModel
from kaldi_mpi.averaging.strategy import Asynchronous, Hook, Synchronous
from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.world import Messages


class SteppingLearner(Protocol):
    """What a synchronous step asks of a learner, whose vectors may live in a device's memory."""

    def read_parameters(self, look: Callable[[Flat], None]) -> None:
        """Show the parameters, (P,) float32, to `look`, which may go on reading them until `update` is called."""

    def mix_gradients(self, rule: Callable[[Flat], None]) -> None:
        """Let `rule` change the gradients, (P,) float32, in place."""

    def mix_parameters(self, rule: Callable[[Flat], bool]) -> bool:
        """Let `rule` change the parameters, (P,) float32, in place; returns what it returns."""

    def update(self, base: Flat | None, together: bool) -> None:
        """Add the optimiser's change to `base`, (P,) float32, and make the sum the parameters.

        Args:
            base: None: the parameters themselves.
            together: all learners move by the same gradient, also one that had no frames; otherwise such a learner
                takes `base` as it is.
        """

    def forget_momentum(self) -> None:
        """Drop the optimiser's momentum."""


def synchronous_step(
    strategy: Synchronous,
    learner: SteppingLearner,
    compute_gradients: Callable[[], None],
    frames: int,
    global_frames: int,
) -> bool:
    """One step of all learners, each of which calls this with its own minibatch.

    Returns whether all have met in it: mixed gradients or parameters, or is this learner alone.

    Args:
        strategy: their rule.
        learner: this rank's model and optimiser.
        compute_gradients: fills the learner's gradients.
        frames: labelled frames of this learner's minibatch.
        global_frames: labelled frames of all minibatches of the step.
    """
    hooks = strategy.hooks
    if Hook.START_STEP in hooks:
        learner.read_parameters(strategy.start_step)
    compute_gradients()
    if Hook.COMBINE_GRADIENTS in hooks and strategy.world.size > 1:
        learner.mix_gradients(strategy.combine_gradients)
    base = strategy.base() if Hook.BASE in hooks else None
    learner.update(base, strategy.moves_together)
    due = Hook.MIX_PARAMETERS in hooks and strategy.count_step(frames, global_frames)
    if due and learner.mix_parameters(strategy.mix_parameters):
        learner.forget_momentum()
    return due or Hook.COMBINE_GRADIENTS in hooks or strategy.world.size == 1


def _in_main_memory(buffer: Any, rule: Callable[[Flat], None]) -> None:
    rule(np.asarray(buffer))


class Participant:
    """One rank's part in an asynchronous strategy: its published model, and what it does with the others.

        connect   publish publish ...   leave settle   [rejoin publish ...   leave settle]   disconnect

    `publish` is made of `filter_change`, `publish_piece` for each piece, `announce` and `wait_unblocked`; the
    simulation, in which each of them is an event of its own, calls them one by one.

    Attributes:
        strategy, model, journal: as given.
        step: the number of the next step of this rank's learner, from 0.

    Args:
        strategy: the rule.
        model: this rank's published model.
        messages: between the ranks that take part.
        journal: of this rank; None: nothing is taken down.
        mix: how to let a rule change a vector in place, wherever it lives; by default it is in main memory.
    """

    def __init__(
        self,
        strategy: Asynchronous,
        model: PublishedModel,
        messages: Messages,
        journal: Journal | None = None,
        mix: Callable[[Any, Callable[[Flat], None]], None] = _in_main_memory,
    ) -> None:
        self.strategy, self.model = strategy, model
        self.journal = Journal(wanted=False) if journal is None else journal
        self.step = 0
        self._messages, self._mix = messages, mix

    def connect(self) -> None:
        """Listen to the others."""
        self.strategy.connect(self.model, functools.partial(self._messages.send, Channel.STRATEGY), self.journal)
        self._messages.on_message(Channel.STRATEGY, self.strategy.receive, self.model.allocate)

    def disconnect(self) -> None:
        """Listen no more; nothing may be under way."""
        self._messages.on_message(Channel.STRATEGY, None)

    def publish(self, change: Any, copy: Any, frames: int) -> None:
        """The learner's step: x <- x + change, copy <- x, piece by piece; then exchanges may begin.

        Args:
            change: (P,) float32, of the optimiser; a strategy with a momentum of its own changes it.
            copy: (P,) float32, the parameters with which the learner computes its next gradient.
            frames: labelled frames of the step's minibatch.
        """
        self.filter_change(change)
        for piece in range(self.model.num_pieces):
            self.publish_piece(piece, change, copy)
        self.announce(frames)
        self.wait_unblocked()

    def filter_change(self, change: Any) -> None:
        """Let the strategy change the learner's step before it is published."""
        if Hook.FILTER_CHANGE in self.strategy.hooks:
            self._mix(change, self.strategy.filter_change)

    def publish_piece(self, piece: int, change: Any, copy: Any) -> None:
        """`publish` for one piece, which is locked meanwhile."""
        model = self.model
        with model.lock(piece):
            model.push_pull(piece, change, copy)
            self.journal.record(JournalEvent.STEP, piece, self.step, own_steps=model.steps[piece])

    def announce(self, frames: int) -> None:
        """Tell the communication thread that all pieces of a step are published."""
        self.step += 1
        self._messages.post(functools.partial(self.strategy.step_taken, frames))

    def wait_unblocked(self) -> None:
        """Return when the strategy lets the learner take its next step."""
        if Hook.BLOCKED in self.strategy.hooks:
            self._messages.wait(lambda: not self.strategy.blocked())

    def leave(self) -> None:
        """The learner takes no more steps for now; others are still answered."""
        self._messages.post(self.strategy.leave)

    def settle(self) -> None:
        """Return when all exchanges that this rank started have ended."""
        self._messages.wait(self.strategy.quiet)

    def rejoin(self) -> None:
        """The learner goes on after `leave`."""
        self._messages.post(self.strategy.rejoin)
