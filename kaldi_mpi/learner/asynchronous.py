"""A phase in which no learner waits for another: tickets for data, a published model, exchanges behind its back.

    the learner's thread                               the communication thread
    ---------------------------------------------      ----------------------------------------------
    takes a ticket, the loader has its minibatch        hands out and receives tickets
    computes the gradient on its own copy w
    x <- x + change, w <- x   (piece by piece)          mixes x with other learners, whenever they ask

Learners meet at the phase's end, and where they are asked to stop: those that get no more tickets start no more
exchanges but go on answering, until all have come so far. Validations in between fetch all published models, and
checkpoints have each learner save its state at its next step; neither stops anybody. Who is silent for too long is lost
(`members`) and nobody waits for it.

With super-learners (``--super-learner-size k``), k learners take the parts of one ticket and sum their gradients;
the first of them, the leader, has the published model and talks to the other leaders.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kaldi_mpi.averaging import Asynchronous, Participant, Settings, Strategy
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published_device import make_published
from kaldi_mpi.learner.batches import Batch
from kaldi_mpi.learner.checkpoint import Checkpoints
from kaldi_mpi.learner.coordinator import Coordinator
from kaldi_mpi.learner.dataset import Dataset
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.members import LeftBehindError, Members, StepClock
from kaldi_mpi.learner.schedule import Phase, Plan, TicketMap
from kaldi_mpi.learner.server import command_server
from kaldi_mpi.learner.snapshots import Snapshots
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.learner.stopping import Stopping
from kaldi_mpi.learner.tickets import IN_HAND, TicketClient
from kaldi_mpi.learner.validate import IterationEnd, Validation, spread_of
from kaldi_mpi.transport.gpu import takes_device_pointers
from kaldi_mpi.transport.world import Messages, World

# What a learner's checkpoint has, given the step, the frames up to it, and what has a state that other threads change:
# parameters (None: the learner's own) and strategy.
Parts = Callable[[int, int, torch.Tensor | None, dict[Strategy, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Order:
    """What a super-learner's leader has its learners do.

    Attributes:
        now, ahead: this ticket and, if it is known already, the next; None: there is none.
        iteration: that begins with it; None: none does.
        saturation: of the leader's model, by which all decide whether it is shrunk then.
        save: the step as which they save their state first; None: they do not.
        reload: whether the leader has got another model.
        ends: whether there are no more tickets.
        over: why all end here, without the others; "": they do not.
    """

    now: int | None = None
    ahead: int | None = None
    iteration: int | None = None
    saturation: float = 0.0
    save: int | None = None
    reload: bool = False
    ends: bool = False
    over: str = ""


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What an asynchronous phase has around it.

    Attributes:
        everyone: all ranks of the run.
        world: the learners.
        dataset: what they train on.
        plan: of the training.
        log: of the training.
        validation: what rank 0 runs in the background.
        settings: how parameters travel.
        stopping: whether the run is asked to stop.
        checkpoints: where states are saved.
        parts: of a checkpoint.
        tickets: what is left of those before the first, in a checkpoint that is gone on from; None: nothing is.
        lost_after: see `Members`.
        journal_dir: where exchanges are journaled; None: nowhere.
        spare: told whether the others go on should this process die.
    """

    everyone: World
    world: World
    dataset: Dataset
    plan: Plan
    log: TrainingLog
    validation: Validation
    settings: Settings
    stopping: Stopping
    checkpoints: Checkpoints
    parts: Parts
    tickets: dict[str, Any] | None
    lost_after: float
    journal_dir: Path | None
    spare: Callable[[bool], None] = lambda _: None


class AsynchronousPhase:
    """One learner's part in the phase.

    Args:
        phase: under an asynchronous strategy.
        learner: its state stands at the phase's first step, or at one from which it goes on.
        around: see there.
    """

    def __init__(self, phase: Phase, learner: LearnerStep, around: Surroundings) -> None:
        assert isinstance(phase.strategy, Asynchronous)
        self._phase, self._learner, self._around = phase, learner, around
        self._world, self._dataset, self._plan, self._log = around.world, around.dataset, around.plan, around.log
        self._stopping = around.stopping
        self._strategy, self._peers, self._group = phase.strategy, phase.peers, phase.super_learner
        self._group_size = self._group.world.size if self._group is not None else 1
        self._leads = self._group is None or self._group.world.rank == 0
        self._state = learner.state
        self._change = torch.zeros_like(self._state.flat.values)
        self._clock = StepClock()

    def run(self) -> Generator[IterationEnd | None]:
        """Train to the phase's end, after which all models are equal.

        Yields where all learners have met at an iteration's end, and None where they stop in the middle of one.

        Raises:
            LeftBehindError: the others have ended it without this learner.
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
            folder = self._around.journal_dir if self._leads else None
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
        flat, strategy, settings = self._state.flat, self._strategy, self._around.settings
        strategy.forget_exchanges()  # of a checkpoint
        if self._phase.dedicated_server:
            self._command_server("start", self._phase.number, flat.to_numpy())
        on_gpu = flat.values.device.type == "cuda"
        self._published = make_published(
            flat.values,
            settings.piece_size,
            settings.transfer_dtype,
            direct=on_gpu and strategy.on_device and takes_device_pointers(),
        )
        names = self._peers.gather(f"learner rank {self._world.rank} on {os.uname().nodename}")
        self._members = Members(
            self._peers.messages, strategy.num_learners, strategy, self._published, names, self._around.lost_after,
            forget=lambda: self._client.forget(),
            is_stuck=lambda: self._group is not None and self._clock.is_stuck(),
        )  # fmt: skip
        messages = self._members.messages
        self._participant = Participant(strategy, self._published, messages, self._journal, flat.mix)
        self._client = TicketClient(messages, self._reader.request, strategy.rest)
        self._snapshots = Snapshots(messages, strategy, self._published)
        self._coordinator = self._coordinate(messages) if self._peers.rank == 0 else None
        self._participant.connect()
        self._snapshots.attach()
        if self._coordinator is not None:
            self._client.attach(self._coordinator.tickets)
            self._members.attach(self._coordinator, self._snapshots)
        else:
            self._client.attach(None)
            self._members.attach()
        if self._phase.dedicated_server:
            self._peers.barrier()  # the server listens

    def _coordinate(self, messages: Messages) -> Coordinator:
        around, everyone = self._around, self._around.everyone

        def command_save(step: int) -> None:  # also a server that has no part in the phase
            command_server(everyone, everyone is not self._world, "save", step)

        return Coordinator(
            messages, self._snapshots, self._plan, self._map, self._group_size,
            around.validation, self._stopping, around.checkpoints, command_save,
        )  # fmt: skip

    def _disconnect(self) -> None:
        if self._coordinator is not None:
            self._coordinator.end()
        self._command_server("stop")
        self._client.detach()
        self._snapshots.detach()
        self._participant.disconnect()
        self._members.detach()

    def _segments(self) -> Iterator[tuple[int, int]]:
        """Steps (first, end) of the stretches between two points where all learners meet."""
        first = self._state.step
        ends = {self._phase.end_step}
        if self._plan.exit_step is not None and first < self._plan.exit_step < self._phase.end_step:
            ends.add(self._plan.exit_step)
        for end in sorted(ends):
            yield first, end
            first = end

    def _segment(self, first: int, end: int) -> int:
        """Take tickets until there are no more of this segment, then wait until all exchanges are over.

        Returns the step that all have come to: `end`, or an earlier one where they are asked to stop.
        """
        self._requested: set[int] = set()  # tickets that the loader was asked for, in a learner that does not lead
        if self._leads:
            if self._coordinator is not None:
                left = self._around.tickets if first == self._state.step else None
                self._coordinator.open(first, end, left)
            self._participant.rejoin()
            self._client.start()
        ranks = None
        self._around.spare(self._world.rank >= self._group_size and self._around.lost_after > 0)
        while ranks is None:  # None: lost after its last step
            self._work()
            if self._leads:
                self._participant.leave()
                self._participant.settle()
                ranks = self._members.meet()
            if self._group is not None:
                ranks = self._group.world.broadcast(ranks)
        self._around.spare(False)
        self._leave_out_others(ranks)
        if self._leads:
            self._command_server("meet")
            self._peers.barrier()
        closed = None
        if self._leads and self._coordinator is not None:
            closed = self._coordinator.close(), self._stopping.why
        step, self._stopping.why = self._world.broadcast(closed)
        if self._stopping.why:
            self._begin_missed_iterations(step)
        return int(step)

    def _work(self) -> None:
        """Do what comes, ticket by ticket, until there are no more."""
        while not (order := self._next_order()).ends:
            if order.over:
                raise LeftBehindError(order.over)
            if order.reload and self._group is not None:
                self._share_values()
            if order.save is not None:
                self._save(order.save)
            if order.now is None:
                continue
            if not self._leads:
                for number in (order.now, order.ahead):
                    if number is not None and number not in self._requested:
                        self._requested.add(number)
                        self._reader.request(number)
            self._train_on(self._minibatch(order.now), order.now, order)

    def _minibatch(self, ticket: int) -> Batch:
        """That of a ticket, which the loader has been asked for; those before it have gone to other learners."""
        while (batch := next(self._batches)).step != ticket:
            self._requested.discard(batch.step)
        self._requested.discard(ticket)
        return batch

    def _leave_out_others(self, ranks: list[int]) -> None:
        """From here on there are only those who meet."""
        if len(ranks) == self._peers.size:
            return
        size, everyone = self._group_size, self._around.everyone
        learners = [rank * size + k for rank in ranks if rank < self._map.units for k in range(size)]
        if everyone is not self._world:  # there is a server
            command_server(everyone, True, "shrink", [*learners, everyone.size - 1])
            everyone.shrink([*learners, everyone.size - 1])
        self._world.shrink(learners)
        if self._peers is not self._world and self._peers is not everyone and self._leads:  # last: not on all ranks
            self._peers.shrink(ranks)

    def _begin_missed_iterations(self, step: int) -> None:
        """Those that began with a ticket of another learner while this one had none left."""
        missed = list(iter(self._client.begun, None)) if self._leads else []
        if self._group is not None:
            missed = self._group.world.broadcast(missed)
        for number in missed:
            self._log.end_iteration(number - 1)
            frames = round(self._dataset.train.total_frames * self._map.epochs(self._map.ticket(step)))
            self._learner.begin_iteration(number, frames, self._learner.saturation())

    def _next_order(self) -> _Order:
        """What this learner, or its super-learner, does next."""
        order = self._lead() if self._leads else None
        if self._group is not None:
            order = self._group.world.broadcast(order)
        assert order is not None
        return order

    def _lead(self) -> _Order:
        reload = False
        if self._members.is_lost:
            try:
                self._members.come_back()
            except LeftBehindError as error:
                return _Order(over=str(error))
            self._state.flat.load(self._published.to_numpy())
            self._client.start_again()
            reload = True
        ticket = self._client.next()
        save = self._client.to_save()
        if ticket is None:
            return _Order(save=save, reload=reload, ends=save is None and self._client.ended)
        iteration = self._client.begun()
        saturation = 0.0 if iteration is None else self._learner.saturation()
        return _Order(ticket, self._client.peek(), iteration, saturation, save, reload)

    def _share_values(self) -> None:
        """The leader's model, to all of its super-learner."""
        assert self._group is not None
        values = self._state.flat.values
        if not self._leads:
            values.zero_()
        self._group.sum_(values)

    def _train_on(self, batch: Batch, ticket: int, order: _Order) -> None:
        """One step of this learner, or of its super-learner."""
        self._clock.begin()
        frames = round(self._dataset.train.total_frames * self._map.epochs(ticket))
        if order.iteration is not None:
            self._log.end_iteration(order.iteration - 1)
            self._learner.begin_iteration(order.iteration, frames, order.saturation)
        self._learner.compute(batch, frames)
        self._learner.change(frames, self._reader.plan.chunks_of_step(ticket), self._change)
        # The ticket of a learner that is lost has gone to another.
        if self._leads and not self._members.is_lost:
            self._participant.publish(self._change, self._state.flat.values, batch.global_frames)
        if self._group is not None:
            self._share_values()
        self._log.show_progress(frames)
        took = self._clock.end()
        if self._leads:
            self._client.done(took)

    def _save(self, step: int) -> None:
        """Hand over this learner's state as that of `step`, which others come to earlier or later.

        Exchanges that are under way are of no more use to whoever goes on from there.
        """
        values: torch.Tensor | None = None
        changed: dict[Strategy, Any] = {}
        if self._leads:

            def take() -> None:
                nonlocal values
                values = torch.from_numpy(self._published.to_numpy())
                changed[self._strategy] = self._strategy.state_dict()
                self._client.say_saved()

            messages = self._peers.messages
            messages.post(take)
            messages.wait(lambda: bool(changed))
        frames = round(self._dataset.train.total_frames * self._map.epochs(self._map.ticket(step)))
        parts = self._around.parts(step, frames, values, changed)
        coordinator = self._coordinator if self._leads else None
        self._around.checkpoints.save(step, parts, None if coordinator is None else coordinator.tickets_left)

    def _meet(self, step: int) -> Iterator[IterationEnd | None]:
        """All learners have come to `step` and nothing is under way: the mean of all models, and where they go on."""
        state, ends = self._state, step == self._phase.end_step
        if self._leads:
            if self._coordinator is not None:
                self._coordinator.finish_validations()
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
        spread = spread_of(own, mean, self._world) * self._world.size / len(self._strategy.present)
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

    def _command_server(self, *command: Any) -> None:
        command_server(self._around.everyone, self._phase.dedicated_server, *command)
