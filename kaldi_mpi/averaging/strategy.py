"""What every strategy is: a rule that mixes the models (or the gradients) of N learners.

All of them fit one equation. With X = [x_1 .. x_N] the learners' models, one column each,

    X <- X W + D                                                                                    (X)

W is a doubly stochastic mixing matrix (each rule names its own), D holds each learner's own step, and what
is mixed may be some steps old. Block momentum and elastic averaging put a filter behind the mean.

Two families differ in who waits for whom:

*Synchronous* strategies (`Strategy`) are called by the learner's thread, at the same steps on all ranks:

    start_step -> forward, backward -> combine_gradients -> base -> optimiser -> note,
    and if due mix_parameters;   finish once at the end

*Asynchronous* strategies (`kaldi_mpi.averaging.exchange.Exchanging`) mix a published model, of which the
learner takes a copy for each step and to which it adds its change; they are driven by events, on a
communication thread, and never wait.

A strategy sees flat buffers, never a model, and talks through a `Collective`, never through MPI, so that
the same code runs over real ranks, over threads in a test, in a simulation, and alone.

The learning rate that a learner applies is Kaldi's actual one, N times the effective one: the average of
N models that each moved with N times the rate moves as one model with the rate does (Kaldi's
``train_rnn.py``; Povey, Zhang and Khudanpur, arXiv 1410.7455).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.transport.world import Collective

Flat = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Step:
    """One minibatch over all learners, as its strategy sees it."""

    index: int  # from 0, over the whole training
    frames: int  # labelled frames in this learner's minibatch (0 where the last step had none left for it)
    global_frames: int  # labelled frames of this step over all learners


class Strategy:
    """A synchronous rule of averaging. Subclasses override what they need; the base leaves learners alone."""

    name: ClassVar[str]
    # Whether all learners take each step with one gradient, also those that had no frames of their own in it.
    moves_together: ClassVar[bool] = False
    # Whether it is one of the asynchronous family, `exchange.Exchanging`.
    asynchronous: ClassVar[bool] = False

    def __init__(self, world: Collective) -> None:
        self.world = world
        self.num_averages = 0
        self.bytes_sent = 0

    @property
    def rate_factor(self) -> float:
        """By what the learner's actual learning rate (N times the effective one) is to be multiplied."""
        return 1.0

    def begin(self, parameters: Flat) -> None:
        """Called once before the first step with the model that all learners start from; not when going on."""

    def start_step(self, parameters: Flat, step: Step) -> None:
        """Called before the gradient is computed; may start communication of `parameters`.

        They are lent to the strategy, and stay as they are, until `base` is called.
        """

    def combine_gradients(self, gradients: Flat, step: Step) -> None:
        """Mix the learners' gradients in place, before the optimiser uses them.

        Args:
            gradients: (P,) float32, summed over the frames of this learner's minibatch.
            step: the step that they belong to.
        """

    def base(self, step: Step) -> Flat | None:
        """Called when the gradient is there: the vector to which the optimiser's change is to be added.

        (P,) float32, the caller's own; None: the parameters themselves. What is returned takes their place in
        the very pass that adds the change, so that a mean that is there already costs the learner no time.
        """
        return None

    def note(self, step: Step) -> bool:
        """Take note of a step that the optimiser has taken; returns whether to mix parameters now."""
        return False

    def mix_parameters(self, parameters: Flat) -> bool:
        """Mix the learners' parameters, (P,) float32, in place; called when `note` says so.

        Returns whether the optimiser is to forget its momentum.
        """
        return False

    def finish(self, parameters: Flat) -> None:
        """Make the models of all learners equal in place, after the last step."""

    def mean_model(self, parameters: Flat) -> Flat:
        """The mean of all learners' models as a new (P,) float32 array; the models themselves stay."""
        mean = parameters.copy()
        if self.world.size > 1:
            self.world.sum_(mean)
            mean /= np.float32(self.world.size)
        return mean

    def state_dict(self) -> dict[str, Any]:
        """All that the strategy must remember to go on as if it had never stopped."""
        return {"num_averages": self.num_averages, "bytes_sent": self.bytes_sent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.num_averages = state["num_averages"]
        self.bytes_sent = state["bytes_sent"]

    def _count(self, buffer: Flat, wire: str = "float32") -> None:
        """Keep account of one averaging: a sum by pieces sends each rank's buffer out and, in float32, back once."""
        self.num_averages += 1
        each = buffer.itemsize + (buffer.itemsize if wire == "float32" else 2)
        self.bytes_sent += each * buffer.size * (self.world.size - 1) // self.world.size
