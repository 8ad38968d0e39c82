"""How much to train, and in which phases: positions in the data as steps and as tickets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from kaldi_mpi.averaging import Strategy
from kaldi_mpi.transport.world import World


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to train, in global steps (one minibatch a learner) that are the same on every rank.

    Attributes:
        num_steps: of the whole training.
        steps_per_epoch: the last of which may be smaller.
        steps_per_iteration: between two validations.
        num_epochs: what `num_steps` amount to.
        checkpoint_interval: validations between two checkpoints in synchronous phases; 0 for none.
        checkpoint_interval_asynchronous: the same where a checkpoint makes learners wait for each other.
        min_deriv_time, max_deriv_time_relative: times, relative to a chunk's first and last label, outside which
            there are no derivatives (Kaldi's ``--optimization.min-deriv-time`` and ``max-deriv-time-relative``).
    """

    num_steps: int
    steps_per_epoch: int
    steps_per_iteration: int
    num_epochs: float
    checkpoint_interval: int = 1
    checkpoint_interval_asynchronous: int = 5
    min_deriv_time: int | None = None
    max_deriv_time_relative: int | None = None

    def iteration(self, step: int) -> int:
        """The iteration that ends with `step` steps done."""
        return -(-step // self.steps_per_iteration)

    def ends_iteration(self, step: int) -> bool:
        """Whether a validation is due when `step` steps are done."""
        return step % self.steps_per_iteration == 0 or step == self.num_steps

    def max_deriv_time(self, width: int) -> int | None:
        """The last time with derivatives in a chunk of `width` labelled frames."""
        return None if self.max_deriv_time_relative is None else width - 1 + self.max_deriv_time_relative

    def saves(self, step: int, asynchronous: bool) -> bool:
        """Whether a checkpoint is due with that validation."""
        interval = self.checkpoint_interval_asynchronous if asynchronous else self.checkpoint_interval
        return bool(interval) and self.iteration(step) % interval == 0 and step < self.num_steps


@dataclasses.dataclass
class Phase:
    """A stretch of the training under one strategy: the global steps `first_step` .. `end_step` - 1.

    Attributes:
        peers: the world that an asynchronous strategy talks in: all learners, or the leaders of super-learners,
            and a dedicated server, if there is one, as the last rank. None: all learners.
        group: the learners of this learner's super-learner; None: it is alone.
        sum_in_group: sums a (P,) tensor over `group` in place.
        dedicated_server: whether `peers` has a rank that only keeps the centre.
    """

    strategy: Strategy
    first_step: int
    end_step: int
    peers: World | None = None
    group: World | None = None
    sum_in_group: Callable[[torch.Tensor], None] | None = None
    dedicated_server: bool = False


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
