"""A phase in which no learner waits for another: tickets for data, a published model, exchanges behind its back.

    the learner's thread                               the communication thread
    ---------------------------------------------      ----------------------------------------------
    takes a ticket, the loader has its minibatch        hands out and receives tickets
    computes the gradient on its own copy w
    x <- x + change, w <- x   (piece by piece)          mixes x with other learners, whenever they ask

A segment ends where a checkpoint is due, and at the phase's end: learners that get no more tickets start no
more exchanges but go on answering, until all have come so far. Validations in between take snapshots of all
published models and stop nobody.

With super-learners (``--super-learner-size k``), k learners take the parts of one ticket and sum their gradients;
the first of them, the leader, has the published model and talks to the other leaders.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.journal import Event, Journal
from kaldi_mpi.averaging.published_device import make_published
from kaldi_mpi.learner.evaluate import spread_of
from kaldi_mpi.learner.evaluator import Evaluator
from kaldi_mpi.learner.plan import Phase, TicketMap
from kaldi_mpi.learner.server import STRATEGY_CHANNEL, tell
from kaldi_mpi.learner.snapshots import Snapshots
from kaldi_mpi.learner.tickets import IN_HAND, TicketClient, TicketServer
from kaldi_mpi.loader import Minibatch

if TYPE_CHECKING:
    from kaldi_mpi.learner.loop import Learner


class AsynchronousPhase:
    """One learner's part in the phase.

    Args:
        learner: at the phase's first step, or at one from which it goes on.
        phase: under an asynchronous strategy.
    """

    def __init__(self, learner: Learner, phase: Phase) -> None:
        assert isinstance(phase.strategy, Exchanging)
        self._learner, self._phase = learner, phase
        self._strategy = phase.strategy
        self._peers = phase.peers or learner.world
        self._group = phase.group
        self._sum_in_group = phase.sum_in_group
        self._group_size = self._group.size if self._group is not None else 1
        self._leads = self._group is None or self._group.rank == 0
        self._change = torch.zeros_like(learner.flat.values)
        self._own_steps = 0
        self._iterations_begun: list[int] = []  # whose beginning has not been noticed in the learner's thread

    def run(self) -> None:
        """Train to the phase's end, after which all models are equal."""
        learner, around = self._learner, self._learner.around
        with learner.loader.watch(
            learner.reading.feed(
                learner.data.train,
                learner.flat.values.device,
                rank=self._group.rank if self._group is not None else 0,
                size=self._group_size,
                depth=IN_HAND + 2,
                on_request=True,
            )
        ) as self._feed:
            self._reader = self._feed.reader
            chunks = self._reader.plan
            self._map = TicketMap(
                learner.world.size // self._group_size, learner.plan.steps_per_epoch, chunks.steps_per_epoch
            )
            path = around.journal_dir / f"learner.{learner.world.rank}" if around.journal_dir and self._leads else None
            self._journal = Journal(path, wanted=path is not None)
            try:
                if self._leads:
                    self._connect()
                for first, end in self._segments():
                    self._segment(first, end)
                    self._meet(end)
                if self._leads:
                    self._disconnect()
            finally:
                self._journal.close()

    def _connect(self) -> None:
        """Publish the model and listen to the others; the leader alone."""
        learner, strategy, messages = self._learner, self._strategy, self._peers.messages
        number, is_new = learner.phases.index(self._phase), learner.step == self._phase.first_step
        if self._phase.dedicated_server:
            tell(self._peers, True, "start", number, is_new, learner.flat.to_numpy())
        if is_new:
            strategy.begin(learner.flat.to_numpy())
        around = learner.around
        self._shared = make_published(learner.flat.values, around.piece_size, around.wire, strategy.on_device)
        strategy.connect(
            self._shared,
            lambda to, numbers, payload: messages.send(STRATEGY_CHANNEL, to, numbers, payload),
            self._journal,
        )
        first = self._peers.rank == 0
        self._client = TicketClient(messages, self._reader.request)
        self._server = TicketServer(messages, self._map.units, self._on_ticket) if first else None
        self._evaluator = Evaluator(learner) if first else None
        self._snapshots = Snapshots(messages, strategy, self._shared, self._begin_iteration, self._evaluate)
        self._marks: dict[int, int] = {}
        messages.on_message(STRATEGY_CHANNEL, strategy.receive, self._shared.allocate)
        self._client.attach(self._server)
        self._snapshots.attach()
        if self._phase.dedicated_server:
            self._peers.barrier()  # the server listens

    def _disconnect(self) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
        self._tell("stop")
        self._client.detach()
        self._snapshots.detach()
        self._peers.messages.on_message(STRATEGY_CHANNEL, None)

    def _segments(self) -> Iterator[tuple[int, int]]:
        """Steps (first, end) of the stretches between two points where all learners meet."""
        first = self._learner.step
        for step in range(first + 1, self._phase.end_step + 1):
            saves = self._learner.plan.ends_iteration(step) and self._learner.plan.saves(step, True)
            if saves or step == self._phase.end_step:
                yield first, step
                first = step

    def _segment(self, first: int, end: int) -> None:
        """Take tickets until there are no more of this segment, then wait until all exchanges are over."""
        learner, messages = self._learner, self._peers.messages
        if self._leads:
            if self._server is not None:
                server, tickets = self._server, (self._map.ticket(first), self._map.ticket(end))
                marks = {
                    self._map.ticket(step): learner.plan.iteration(step)
                    for step in range(first + 1, end)
                    if learner.plan.ends_iteration(step)
                }

                def open_segment() -> None:
                    self._marks = marks
                    server.open(*tickets)

                messages.post(open_segment)
            messages.post(self._strategy.stay)
            self._client.start()
        requested = -1
        while (ticket := self._next_ticket()) is not None:
            now, ahead = ticket
            if not self._leads:
                for number in (now, ahead):
                    if number is not None and number > requested:
                        requested = number
                        self._reader.request(number)
            self._take(next(self._feed), now)
        if self._leads:
            messages.post(self._strategy.leave)
            messages.wait(self._strategy.quiet)
            self._tell("meet")
            self._peers.barrier()

    def _next_ticket(self) -> tuple[int, int | None] | None:
        """This ticket and, if it is known already, the next; None at the segment's end."""
        got: tuple[int, int | None] | None = None
        if self._leads:
            ticket = self._client.next()
            got = None if ticket is None else (ticket, self._client.peek())
        return got if self._group is None else self._group.broadcast(got)

    def _take(self, minibatch: Minibatch[torch.Tensor], ticket: int) -> None:
        """One step of this learner, or of its super-learner."""
        learner, flat = self._learner, self._learner.flat
        began = time.monotonic()
        if self._iterations_begun:
            learner.log_training(self._iterations_begun.pop(0) - 1)
        learner.around.injector.begin()
        learner.compute_gradients(minibatch)
        learner.around.injector.end()
        if self._sum_in_group is not None:
            self._sum_in_group(flat.gradients)
            flat.gradients /= self._group_size
        frames = round(learner.data.train.total_frames * self._map.epochs(ticket))
        rate = learner.rate.actual(frames, learner.world.size) * self._strategy.rate_factor
        chunks = self._reader.plan.chunks_of_step(ticket) / learner.world.size
        learner.optimiser.step(rate, chunks, self._change)
        if self._leads:
            self._publish(minibatch.global_frames)
        if self._sum_in_group is not None:
            if not self._leads:
                flat.values.zero_()
            self._sum_in_group(flat.values)  # the leader's model, to all
        learner.show_progress(frames)
        if self._leads:
            self._client.done(time.monotonic() - began)

    def _publish(self, frames: int) -> None:
        """x <- x + change, w <- x; then tell the communication thread."""
        learner, strategy, shared = self._learner, self._strategy, self._shared
        if strategy.filters_change:
            learner.flat.mix(self._change, strategy.filter_change)
        for piece in range(shared.num_pieces):
            with shared.lock(piece):
                shared.push_pull(piece, self._change, learner.flat.values)
                self._journal.record(Event.STEP, piece, self._own_steps, own_steps=shared.steps[piece])
        self._own_steps += 1
        messages = self._peers.messages
        messages.post(lambda: strategy.step_taken(frames))
        if strategy.may_block:
            messages.wait(lambda: not strategy.blocked())

    def _meet(self, step: int) -> None:
        """All learners have come to `step` and nothing is under way: mean, validation, checkpoint."""
        learner, ends = self._learner, step == self._phase.end_step
        if self._leads:
            if self._evaluator is not None:
                self._peers.messages.wait(self._snapshots.quiet)
                self._evaluator.drain()
            own = self._shared.to_numpy()
            self._tell("mean")
            mean = self._strategy.mean_model(own)
            model = own
            if ends:
                self._tell("finish")
                model = own.copy()
                self._strategy.finish(model)
        else:
            own = mean = model = np.zeros(learner.flat.values.numel(), np.float32)
        if self._group is not None:
            mean, model = self._group.broadcast((mean, model))
            own = own if self._leads else mean
        spread = spread_of(own, mean, learner.world) * learner.world.size / self._map.units
        if self._leads:
            self._shared.load(model)
        learner.flat.load(model)
        learner.step = step
        learner.frames = round(learner.data.train.total_frames * self._map.epochs(self._map.ticket(step)))
        learner.show_progress(learner.frames, last=step == learner.plan.num_steps)
        if learner.plan.ends_iteration(step):
            learner.end_iteration(mean, spread, True)

    def _tell(self, command: str) -> None:
        tell(self._peers, self._phase.dedicated_server, command)

    # On the communication thread.

    def _on_ticket(self, ticket: int) -> None:
        if ticket in self._marks:
            self._snapshots.take(self._marks[ticket])

    def _begin_iteration(self, iteration: int) -> None:
        self._iterations_begun.append(iteration)

    def _evaluate(self, iteration: int, mean: NDArray[np.float32], spread: float | None) -> None:
        assert self._evaluator is not None
        self._evaluator.start(iteration, mean, spread)
