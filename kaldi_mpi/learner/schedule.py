"""How much to train, at which rate, and in which phases: positions in the data as steps and as tickets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from kaldi_mpi.averaging import Settings, Strategy, Synchronous, make_strategy
from kaldi_mpi.averaging.allreduce import SuperLearnerAllreduce
from kaldi_mpi.averaging.sequence import PhaseSpec
from kaldi_mpi.averaging.settings import CENTRES, HIERARCHICAL
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.world import World


@dataclasses.dataclass(frozen=True)
class ExponentialRate:
    """The effective learning rate falls exponentially with the frames processed.

    lr(n) = initial * (final / initial) ** (n / total): Kaldi's ``get_learning_rate`` in
    ``steps/libs/nnet3/train/common.py``, with frames where Kaldi counts archives. Each of N learners applies
    the actual rate N * lr(n); the averaged model then moves at lr(n).

    As there, n is where an iteration began, and the last one has the final rate. With few iterations, and so with many
    learners, that moves a model further than a rate that falls within iterations would: by a tenth with ten of them.

    Attributes:
        initial: effective learning rate of the first iteration.
        final: of the last.
        total_frames: labelled frames of the whole training, over all learners and epochs.
        num_iterations: of the whole training; 1: the rate falls with each minibatch, from `initial` to `final`.
    """

    initial: float
    final: float
    total_frames: int
    num_iterations: int = 1

    @property
    def by_iteration(self) -> bool:
        """Whether it stays the same within an iteration."""
        return self.num_iterations > 1

    def of_iteration(self, number: int, frames: int) -> float:
        """The effective learning rate of an iteration, from 0, that begins after `frames` frames."""
        return self.final if number + 1 >= self.num_iterations else self.effective(frames)

    def effective(self, frames: int) -> float:
        """The effective learning rate after `frames` frames over all learners."""
        done = min(1.0, frames / self.total_frames)
        return self.initial * math.exp(done * math.log(self.final / self.initial))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to train, in global steps (one minibatch a learner) that are the same on every rank.

    Attributes:
        num_steps: of the whole training.
        steps_per_epoch: the last of which may be smaller.
        steps_per_iteration: between two validations.
        num_epochs: what `num_steps` amount to.
        checkpoint_interval: validations between two checkpoints; 0 for none.
        exit_step: where the training ends early (``--exit-stage``), with a checkpoint; None: it does not.
    """

    num_steps: int
    steps_per_epoch: int
    steps_per_iteration: int
    num_epochs: float
    checkpoint_interval: int = 1
    exit_step: int | None = None

    @property
    def num_iterations(self) -> int:
        """Of the whole training."""
        return self.iteration(self.num_steps)

    @property
    def iterations_per_epoch(self) -> float:
        """How many an epoch has, with fractions."""
        return self.steps_per_epoch / self.steps_per_iteration

    def first_step(self, iteration: int) -> int:
        """The step that an iteration begins with."""
        return min(self.num_steps, iteration * self.steps_per_iteration)

    def iteration(self, step: int) -> int:
        """The iteration that ends with `step` steps done."""
        return -(-step // self.steps_per_iteration)

    def ends_iteration(self, step: int) -> bool:
        """Whether a validation is due when `step` steps are done."""
        return step % self.steps_per_iteration == 0 or step == self.num_steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due with that validation."""
        if step == self.exit_step:
            return True
        interval = self.checkpoint_interval
        return bool(interval) and self.iteration(step) % interval == 0 and step < self.num_steps


@dataclasses.dataclass(frozen=True)
class TicketMap:
    """Steps as tickets: a global step is about one ticket for each of the learners (super-learners) that take them.

    The minibatches of N learners and of one are cut from the same order of chunks. With chunks of one shape the
    tickets of a step have just the step's chunks. With several, whole minibatches of each shape are collected first, so
    that steps and tickets do not come in the same order; steps are then spread evenly over the epoch's tickets. In
    both cases each step of an epoch begins at another ticket, and step and ticket end the epoch together.

    Attributes:
        units: N, or N / k with super-learners of k.
        steps_per_epoch: as in `Plan`.
        tickets_per_epoch: minibatches of one unit; at least steps_per_epoch, at most `units` times as many.
    """

    units: int
    steps_per_epoch: int
    tickets_per_epoch: int

    def ticket(self, step: int) -> int:
        """The first ticket of a global step."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        if (self.steps_per_epoch - 1) * self.units < self.tickets_per_epoch:
            within = rest * self.units
        else:
            within = rest * self.tickets_per_epoch // self.steps_per_epoch
        return epoch * self.tickets_per_epoch + within

    def epochs(self, ticket: int) -> float:
        """How many epochs have gone when `ticket` is the next."""
        return ticket / self.tickets_per_epoch


@dataclasses.dataclass(frozen=True)
class SuperLearner:
    """Learners that act as one: they take the parts of one minibatch and sum their gradients.

    Attributes:
        world: its learners; the first of them, the leader, talks to the other leaders.
        leaders: of all super-learners (in the leaders; in others, the ranks of the same number).
        sum_: sums a (P,) tensor over them in place.
    """

    world: World
    leaders: World
    sum_: Callable[[torch.Tensor], None]

    def mean_(self, tensor: torch.Tensor) -> None:
        """Replace a (P,) tensor by its mean over the learners."""
        self.sum_(tensor)
        tensor /= self.world.size


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the training under one strategy: the global steps `first_step` .. `end_step` - 1.

    Attributes:
        number: from 0.
        name: as ``--strategy`` has it.
        strategy: that of this learner.
        peers: the world that an asynchronous strategy talks in: all learners, or the leaders of super-learners,
            and a dedicated server, if there is one, as the last rank.
        super_learner: that of this learner; None: it is alone.
        dedicated_server: whether `peers` has a rank that only keeps the centre.
    """

    number: int
    name: str
    strategy: Strategy
    first_step: int
    end_step: int
    peers: World
    super_learner: SuperLearner | None = None
    dedicated_server: bool = False


def make_phases(
    specs: Sequence[PhaseSpec],
    settings: Settings,
    plan: Plan,
    world: World,
    everyone: World,
    super_learner: SuperLearner | None,
) -> list[Phase]:
    """The phases of the training, with their strategies.

    Args:
        specs: what was asked for.
        settings: of all strategies.
        plan: of the training.
        world: the learners.
        everyone: the learners and a dedicated server, if there is one.
        super_learner: that of this learner, where there are any.
    """
    phases: list[Phase] = []
    first, epochs = 0, 0.0
    for number, spec in enumerate(specs):
        epochs += spec.epochs
        last = number == len(specs) - 1
        end = plan.num_steps if last else min(plan.num_steps, round(epochs * plan.steps_per_epoch))
        group = super_learner if spec.name in HIERARCHICAL else None
        peers = everyone if spec.name in CENTRES else world
        strategy = make_strategy(spec.name, peers, settings)
        if group is not None:
            if group.world.size == world.size:
                strategy = SuperLearnerAllreduce(world)
            elif strategy.asynchronous:
                strategy = make_strategy(spec.name, group.leaders, settings)
            peers = group.leaders
        if strategy.asynchronous and peers.size == 1:
            strategy = Synchronous(world)  # a learner alone has nobody to exchange with
        server = settings.dedicated_server and spec.name in CENTRES
        phases.append(Phase(number, spec.name, strategy, first, end, peers, group, server))
        first = end
    return phases


def check_super_learners(size: int, num_learners: int) -> None:
    """Raises ConfigError where learners cannot be put into super-learners of `size`."""
    if num_learners % size:
        raise ConfigError(f"--super-learner-size {size}: {num_learners} learners cannot be put into groups of {size}")
