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

import dataclasses
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.averaging import Asynchronous, Participant, Settings
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published_device import make_published
from kaldi_mpi.learner.batches import Batch
from kaldi_mpi.learner.dataset import Dataset
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.schedule import Phase, Plan, TicketMap
from kaldi_mpi.learner.server import command_server
from kaldi_mpi.learner.snapshots import Snapshots
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.learner.stopping import Stopping
from kaldi_mpi.learner.tickets import IN_HAND, TicketClient, TicketServer
from kaldi_mpi.learner.validate import BackgroundValidation, IterationEnd, Validation, spread_of
from kaldi_mpi.transport.gpu import takes_device_pointers
from kaldi_mpi.transport.world import World


@dataclasses.dataclass(frozen=True)
class _Ticket:
    """What a super-learner's leader has its learners do.

    Attributes:
        now, ahead: this ticket and, if it is known already, the next.
        iteration: that begins with it; None: none does.
        saturation: of the leader's model, by which all decide whether it is shrunk then.
    """

    now: int
    ahead: int | None
    iteration: int | None
    saturation: float


class AsynchronousPhase:
    """One learner's part in the phase.

    Args:
        phase: under an asynchronous strategy.
        world: the learners.
        dataset: what they train on.
        plan: of the training.
        learner: its state stands at the phase's first step, or at one from which it goes on.
        log: of the training.
        validation: what rank 0 runs in the background.
        settings: how parameters travel.
        stopping: whether the run is asked to.
        journal_dir: where exchanges are journaled; None: nowhere.
    """

    def __init__(
        self,
        phase: Phase,
        world: World,
        dataset: Dataset,
        plan: Plan,
        learner: LearnerStep,
        log: TrainingLog,
        validation: Validation,
        settings: Settings,
        stopping: Stopping,
        journal_dir: Path | None,
    ) -> None:
        assert isinstance(phase.strategy, Asynchronous)
        self._phase, self._world, self._dataset, self._plan = phase, world, dataset, plan
        self._learner, self._log, self._validation, self._settings = learner, log, validation, settings
        self._strategy, self._peers, self._group = phase.strategy, phase.peers, phase.super_learner
        self._stopping = stopping
        self._group_size = self._group.world.size if self._group is not None else 1
        self._leads = self._group is None or self._group.world.rank == 0
        self._journal_dir = journal_dir if self._leads else None
        self._state = learner.state
        self._change = torch.zeros_like(self._state.flat.values)
        self._iterations_begun: list[int] = []  # whose beginning has not been noticed in the learner's thread

    def run(self) -> Generator[IterationEnd | None]:
        """Train to the phase's end, after which all models are equal.

        Yields where all learners have met at an iteration's end, and None where they stop in the middle of one.
        """
        self._learner.begin_phase(self._strategy.rate_factor, self._group)
        batches = self._dataset.batches(
            self._dataset.train,
            self._state.flat.values.device,
            rank=self._group.world.rank if self._group is not None else 0,
            size=self._group_size,
            depth=IN_HAND + 2,
            on_request=True,
        )
        with self._log.loader.watch(batches) as self._batches:
            self._reader = batches.reader
            chunks = self._reader.plan
            self._map = TicketMap(
                self._world.size // self._group_size, self._plan.steps_per_epoch, chunks.steps_per_epoch
            )
            folder = self._journal_dir
            path = None if folder is None else folder / f"learner.{self._world.rank}"
            self._journal = Journal(path, wanted=path is not None)
            try:
                if self._leads:
                    self._connect()
                for first, end in self._segments():
                    step = self._segment(first, end)
                    try:
                        yield from self._meet(step)
                    except GeneratorExit:  # all learners have met, and leave here
                        if self._leads:
                            self._disconnect()
                        raise
                if self._leads:
                    self._disconnect()
            finally:
                self._journal.close()

    def _connect(self) -> None:
        """Publish the model and listen to the others; the leader alone."""
        flat, strategy, messages = self._state.flat, self._strategy, self._peers.messages
        is_new = self._state.step in (self._phase.first_step, self._state.begun_at)
        if self._phase.dedicated_server:
            command_server(self._peers, True, "start", self._phase.number, is_new, flat.to_numpy())
        on_gpu = flat.values.device.type == "cuda"
        self._published = make_published(
            flat.values,
            self._settings.piece_size,
            self._settings.transfer_dtype,
            direct=on_gpu and strategy.on_device and takes_device_pointers(),
        )
        self._participant = Participant(strategy, self._published, messages, self._journal, flat.mix)
        first = self._peers.rank == 0
        self._client = TicketClient(messages, self._reader.request)
        self._server = TicketServer(messages, self._map.units, self._on_ticket) if first else None
        self._background = BackgroundValidation(self._validation) if first else None
        self._snapshots = Snapshots(messages, strategy, self._published, self._begin_iteration, self._validate)
        self._marks: dict[int, int] = {}
        self._participant.connect()
        self._client.attach(self._server)
        self._snapshots.attach()
        if self._phase.dedicated_server:
            self._peers.barrier()  # the server listens

    def _disconnect(self) -> None:
        if self._background is not None:
            self._background.close()
        self._command_server("stop")
        self._client.detach()
        self._snapshots.detach()
        self._participant.disconnect()

    def _segments(self) -> Iterator[tuple[int, int]]:
        """Steps (first, end) of the stretches between two points where all learners meet."""
        first = self._state.step
        for step in range(first + 1, self._phase.end_step + 1):
            saves = self._plan.ends_iteration(step) and self._plan.saves(step, True)
            if saves or step == self._phase.end_step:
                yield first, step
                first = step

    def _segment(self, first: int, end: int) -> int:
        """Take tickets until there are no more of this segment, then wait until all exchanges are over.

        Returns the step that all have come to: `end`, or an earlier one where they are asked to stop.
        """
        self._span = first, end
        if self._leads:
            if self._server is not None:
                self._open_segment(self._server, first, end)
            self._participant.rejoin()
            self._client.start()
        requested = -1
        while (ticket := self._next_ticket()) is not None:
            if not self._leads:
                for number in (ticket.now, ticket.ahead):
                    if number is not None and number > requested:
                        requested = number
                        self._reader.request(number)
            self._train_on(next(self._batches), ticket)
        if self._leads:
            self._participant.leave()
            self._participant.settle()
            self._command_server("meet")
            self._peers.barrier()
        step, self._stopping.why = self._world.broadcast((self._span[1], self._stopping.why))
        if self._stopping.why:
            self._begin_missed_iterations(step)
        return int(step)

    def _begin_missed_iterations(self, step: int) -> None:
        """Those that began with a ticket of another learner while this one had none left."""
        missed = self._iterations_begun
        if self._group is not None:
            missed = self._group.world.broadcast(missed)
        for number in missed:
            self._log.end_iteration(number - 1)
            frames = round(self._dataset.train.total_frames * self._map.epochs(self._map.ticket(step)))
            self._learner.begin_iteration(number, frames, self._learner.saturation())
        self._iterations_begun = []

    def _open_segment(self, server: TicketServer, first: int, end: int) -> None:
        """Have rank 0's communication thread hand out the segment's tickets, and begin iterations between them."""
        marks = {
            self._map.ticket(step): self._plan.iteration(step)
            for step in range(first + 1, end)
            if self._plan.ends_iteration(step)
        }

        def open_segment() -> None:
            self._marks = marks
            server.open(self._map.ticket(first), self._map.ticket(end))

        self._peers.messages.post(open_segment)

    def _next_ticket(self) -> _Ticket | None:
        """What this learner, or its super-learner, does next; None at the segment's end."""
        got = None
        if self._leads:
            ticket = self._client.next()
            if ticket is not None:
                iteration = self._iterations_begun.pop(0) if self._iterations_begun else None
                saturation = 0.0 if iteration is None else self._learner.saturation()
                got = _Ticket(ticket, self._client.peek(), iteration, saturation)
        return got if self._group is None else self._group.world.broadcast(got)

    def _train_on(self, batch: Batch, ticket: _Ticket) -> None:
        """One step of this learner, or of its super-learner."""
        began = time.monotonic()
        frames = round(self._dataset.train.total_frames * self._map.epochs(ticket.now))
        if ticket.iteration is not None:
            self._log.end_iteration(ticket.iteration - 1)
            self._learner.begin_iteration(ticket.iteration, frames, ticket.saturation)
        self._learner.compute(batch, frames)
        self._learner.change(frames, self._reader.plan.chunks_of_step(ticket.now), self._change)
        values = self._state.flat.values
        if self._leads:
            self._participant.publish(self._change, values, batch.global_frames)
        if self._group is not None:
            if not self._leads:
                values.zero_()
            self._group.sum_(values)  # the leader's model, to all
        self._log.show_progress(frames)
        if self._leads:
            self._client.done(time.monotonic() - began)

    def _meet(self, step: int) -> Iterator[IterationEnd | None]:
        """All learners have come to `step` and nothing is under way: the mean of all models, and where they go on."""
        state, ends = self._state, step == self._phase.end_step
        if self._leads:
            if self._background is not None:
                self._peers.messages.wait(self._snapshots.quiet)
                self._background.drain()
            own = self._published.to_numpy()
            self._command_server("mean")
            mean = self._strategy.mean_model(own)
            model = own
            if ends:
                self._command_server("finish")
                model = own.copy()
                self._strategy.finish(model)
        else:
            own = mean = model = np.zeros(state.flat.values.numel(), np.float32)
        if self._group is not None:
            mean, model = self._group.world.broadcast((mean, model))
            own = own if self._leads else mean
        spread = spread_of(own, mean, self._world) * self._world.size / self._map.units
        if self._leads:
            self._published.load(model)
        state.flat.load(model)
        state.step = step
        state.frames = round(self._dataset.train.total_frames * self._map.epochs(self._map.ticket(step)))
        self._log.show_progress(state.frames, last=step == self._plan.num_steps)
        if self._plan.ends_iteration(step):
            yield IterationEnd(mean, spread)
        elif self._stopping.why:
            yield None

    def _command_server(self, command: str) -> None:
        command_server(self._peers, self._phase.dedicated_server, command)

    # On the communication thread.

    def _on_ticket(self, ticket: int) -> None:
        if ticket in self._marks:
            self._snapshots.take(self._marks[ticket])
        first, end = self._span
        if not self._stopping.why and (why := self._stopping.look()):
            # The first step after this ticket: those before it have all been handed out.
            self._span = first, next(step for step in range(first + 1, end + 1) if self._map.ticket(step) > ticket)
            self._stopping.why = why
            assert self._server is not None
            self._server.end_at(self._map.ticket(self._span[1]))

    def _begin_iteration(self, iteration: int) -> None:
        self._iterations_begun.append(iteration)

    def _validate(self, iteration: int, mean: NDArray[np.float32], spread: float | None) -> None:
        assert self._background is not None
        self._background.start(iteration, mean, spread)
