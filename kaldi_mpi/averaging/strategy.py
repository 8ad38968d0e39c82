"""What every strategy is: a rule that mixes the models (or the gradients) of N learners.

All of them fit one equation. With X = [x_1 .. x_N] the learners' models, one column each,

    X <- X W + D                                                                                    (X)

W is a doubly stochastic mixing matrix (each rule names its own), D holds each learner's own step, and what
is mixed may be some steps old. Block momentum and elastic averaging put a filter behind the mean.

Two families differ in who waits for whom:

*Synchronous* strategies act in the learner's thread, at the same steps on all ranks: `driver.synchronous_step`.

*Asynchronous* strategies mix a published model, of which the learner takes a copy for each step and to which it
adds its change; they are driven by events, on a communication thread, and never wait: `driver.Participant`.

A strategy declares the hooks at which it acts (`hooks`); the drivers call no others, so that a GPU's parameters are
copied only for a strategy that looks at them.

A strategy sees flat buffers, never a model, and talks through the protocols of `kaldi_mpi.transport.world`, never
through MPI, so that the same code runs over real ranks, over threads in a test, in a simulation, and alone.

The learning rate that a learner applies is Kaldi's actual one, N times the effective one: the average of
N models that each moved with N times the rate moves as one model with the rate does (Kaldi's
``train_rnn.py``; Povey, Zhang and Khudanpur, arXiv 1410.7455).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published import Flat, PublishedModel
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.transport.world import Collective

Payload = NDArray[np.uint8]


class Hook(enum.Flag):
    """Where a strategy may act: the methods of these names. The drivers call none that it does not declare."""

    NONE = 0
    # Of synchronous strategies.
    START_STEP = enum.auto()
    COMBINE_GRADIENTS = enum.auto()
    BASE = enum.auto()
    MIX_PARAMETERS = enum.auto()  # and `count_step`, which says when
    # Of asynchronous ones.
    FILTER_CHANGE = enum.auto()
    BLOCKED = enum.auto()  # a learner may have to wait before its next step
    SHARE = enum.auto()  # the model is something else than the mean of the published ones


class Strategy:
    """What both families have.

    Attributes:
        name: for ``--strategy``.
        hooks: at which it acts.
        asynchronous: of which family it is.
        num_averages: averagings, or exchanges started here, so far.
        bytes_sent: by this rank, for averaging.

    Args:
        world: the learners (and a dedicated server, if there is one, as the last).
    """

    name: ClassVar[str]
    hooks: Hook = Hook.NONE
    asynchronous: ClassVar[bool]

    def __init__(self, world: Collective) -> None:
        self.world = world
        self.num_averages = 0
        self.bytes_sent = 0

    @classmethod
    def from_settings(cls, world: Collective, settings: Settings) -> Strategy:
        """The strategy as the settings ask for it."""
        return cls(world)

    @property
    def rate_factor(self) -> float:
        """By what the learner's actual learning rate (N times the effective one) is to be multiplied."""
        return 1.0

    def mean_model(self, parameters: Flat) -> Flat:
        """The model of all learners as a new (P,) float32 array; a collective. The learners' own models stay."""
        raise NotImplementedError

    def finish(self, parameters: Flat) -> None:
        """Make the models of all learners equal in place, after the last step; a collective."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that the strategy must remember to go on as if it had never stopped."""
        return {"num_averages": self.num_averages, "bytes_sent": self.bytes_sent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_averages = state["num_averages"]
        self.bytes_sent = state["bytes_sent"]


class Synchronous(Strategy):
    """A rule that all learners follow at the same steps. The base leaves them alone.

    Attributes:
        moves_together: whether all learners take each step with one gradient, also those that had no frames of
            their own in it.
    """

    asynchronous: ClassVar[bool] = False
    moves_together: ClassVar[bool] = False

    def begin(self, parameters: Flat) -> None:
        """Called once before the first step with the model that all learners start from; not when going on."""

    def start_step(self, parameters: Flat) -> None:
        """Called before the gradient is computed; may start communication of `parameters`, (P,) float32.

        They are lent to the strategy, and stay as they are, until `base` is called.
        """

    def combine_gradients(self, gradients: Flat) -> None:
        """Mix the learners' gradients in place, before the optimiser uses them.

        Args:
            gradients: (P,) float32, summed over the frames of this learner's minibatch.
        """

    def base(self) -> Flat | None:
        """Called when the gradient is there: the vector to which the optimiser's change is to be added.

        (P,) float32, the caller's own; None: the parameters themselves. What is returned takes their place in
        the very pass that adds the change, so that a mean that is there already costs the learner no time.
        """
        return None

    def count_step(self, frames: int, global_frames: int) -> bool:
        """Count a step that the optimiser has taken; returns whether to mix parameters now.

        Args:
            frames: labelled frames in this learner's minibatch (0 where the last step had none left for it).
            global_frames: labelled frames of this step over all learners.
        """
        return False

    def mix_parameters(self, parameters: Flat) -> bool:
        """Mix the learners' parameters, (P,) float32, in place; called when `count_step` says so.

        Returns whether the optimiser is to forget its momentum.
        """
        return False

    def mean_model(self, parameters: Flat) -> Flat:
        mean = parameters.copy()
        if self.world.size > 1:
            self.world.sum_(mean)
            mean /= np.float32(self.world.size)
        return mean

    def finish(self, parameters: Flat) -> None:
        """Nothing, for those whose models are equal after each step."""

    def _count_average(self, buffer: Flat, wire: str = "float32") -> None:
        """Keep account of one averaging: a sum by pieces sends each rank's buffer out and, in float32, back once."""
        self.num_averages += 1
        each = buffer.itemsize + (buffer.itemsize if wire == "float32" else 2)
        self.bytes_sent += each * buffer.size * (self.world.size - 1) // self.world.size


class Send(Protocol):
    """Sends a message without waiting; messages of one sender to one receiver arrive in order."""

    def __call__(self, to: int, numbers: Sequence[int], payload: NDArray[Any] | None) -> None:
        """Send a few whole numbers and an array, which must not change until it has arrived."""


class Asynchronous(Strategy):
    """A rule that is driven by events, called one at a time on the communication thread (or by a simulation).

    Attributes:
        rank, size: of this rank, and of all that were there at the start.
        gone: ranks that are lost: they do not answer, and nobody asks them.
        on_device: whether what travels may stay in a device's memory.
    """

    asynchronous: ClassVar[bool] = True
    on_device: ClassVar[bool] = True

    def __init__(self, world: Collective) -> None:
        super().__init__(world)
        # Not the world's, which may have fewer ranks at the end.
        self.rank, self.size = world.rank, world.size
        self.gone: set[int] = set()

    def connect(self, model: PublishedModel, send: Send, journal: Journal) -> None:
        """Give the strategy the model that it mixes, its way to the others, and its journal."""
        self.model, self.send, self.journal = model, send, journal

    def filter_change(self, change: Flat) -> None:
        """Change a learner's own step, (P,), in place before it is published (momentum of its own); on its thread."""

    def step_taken(self, frames: int) -> None:
        """The learner has published a step, of a minibatch of so many labelled frames."""

    def receive(self, source: int, numbers: Sequence[int], payload: Payload) -> None:
        """A message of this strategy has come from `source`."""

    def leave(self) -> None:
        """The learner takes no more steps for now: start nothing new, go on answering."""

    def rejoin(self) -> None:
        """The learner goes on after `leave`."""

    def quiet(self) -> bool:
        """Whether nothing that this rank started is under way."""
        return True

    def drop(self, rank: int) -> None:
        """`rank` is lost: what is under way with it is over, and nothing more is begun."""
        self.gone.add(rank)

    def admit(self, rank: int) -> None:
        """`rank` is back, with another learner's model."""
        self.gone.discard(rank)

    def forget_exchanges(self) -> None:
        """What was under way when the state was saved never ends."""

    def abandon(self) -> None:
        """The others have given this rank up: what it had under way is void, and until `rejoin` it begins nothing."""

    def adopt(self) -> None:
        """After `abandon`: this rank's published model has become another learner's, and it goes on from there."""

    def rest(self, resting: bool) -> None:
        """The learner has nothing to do for now, or has again; in the middle of the others' work, unlike `rejoin`."""
        if resting:
            self.leave()

    def blocked(self) -> bool:
        """Whether the learner must wait before its next step; never, but for bounded staleness."""
        return False

    @property
    def num_learners(self) -> int:
        """Ranks that learn, which come first; any others only answer."""
        return self.size

    @property
    def present(self) -> list[int]:
        """The learners that are not lost."""
        return [rank for rank in range(self.num_learners) if rank not in self.gone]

    def share(self, parameters: Flat) -> Flat:
        """This rank's share, (P,) float32, new: their sum over the ranks by `num_shares` is the final model."""
        return parameters.copy() if self.rank < self.num_learners else np.zeros_like(parameters)

    @property
    def num_shares(self) -> int:
        return len(self.present)

    def sources(self, piece: int) -> list[int]:
        """The ranks that have a share of a piece of the final model."""
        return self.present

    def piece_of_share(self, piece: int) -> Flat:
        """This rank's share of a piece, float32, new, as it is now; on the communication thread."""
        with self.model.lock(piece):
            return self.model.read(piece)

    def mean_model(self, parameters: Flat) -> Flat:
        """See `Strategy.mean_model`; for when no learner is at work."""
        model = self.share(parameters)
        if self.world.size > 1:
            self.world.sum_(model)
            model /= np.float32(self.num_shares)
        return model

    def finish(self, parameters: Flat) -> None:
        """See `Strategy.finish`; after `leave`, `quiet` and a barrier of all."""
        parameters[:] = self.mean_model(parameters)
