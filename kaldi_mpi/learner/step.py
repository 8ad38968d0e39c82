"""One learner's part in a step: the gradient of its minibatch, and the optimiser's change of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.learner.batches import Batch
from kaldi_mpi.learner.dropout_schedule import DropoutSchedule
from kaldi_mpi.learner.faults import Injector
from kaldi_mpi.learner.images import ImageAugmentation
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.objective import DerivativeTimes, FrameObjective, Objective
from kaldi_mpi.learner.schedule import ExponentialRate, SuperLearner
from kaldi_mpi.learner.shrinking import Shrinking
from kaldi_mpi.learner.state import TrainingState
from kaldi_mpi.log import logger
from kaldi_mpi.transport.beat import Beat


class LearnerStep:
    """Computes gradients and applies them; `averaging.SteppingLearner` for synchronous strategies.

    Args:
        state: model, flat buffers, optimiser.
        rate: the learning rate.
        num_learners: N.
        derivatives: of chunks.
        log: is told each minibatch's objective.
        injector: disturbances on purpose.
        l2_factor: of all l2-regularize, beside 1 / N (nnet3-train's --l2-regularize-factor).
        backstitch_scale, backstitch_interval: every so many minibatches, first go back by `backstitch_scale` times the
            step, then forward by 1 plus that from there (Wang et al., "Backstitch", Interspeech 2017); 0: never.
        dropout: of components, by how much of the data is done.
        shrinking: of parameters, as iterations begin.
        images: what happens to inputs that are images; None: nothing.
        beat: is told of each minibatch; None: nobody is.
        objective: what the network is trained for; None: its labels.
    """

    def __init__(
        self,
        state: TrainingState,
        rate: ExponentialRate,
        num_learners: int,
        derivatives: DerivativeTimes,
        log: TrainingLog,
        injector: Injector,
        l2_factor: float = 1.0,
        backstitch_scale: float = 0.0,
        backstitch_interval: int = 1,
        dropout: DropoutSchedule | None = None,
        shrinking: Shrinking | None = None,
        images: ImageAugmentation | None = None,
        beat: Beat | None = None,
        objective: Objective | None = None,
    ) -> None:
        self._objective: Objective = FrameObjective() if objective is None else objective
        self.state, self.rate, self._log = state, rate, log
        self._num_learners, self._derivatives, self._injector = num_learners, derivatives, injector
        self._l2_factor = l2_factor
        self._backstitch_scale, self._backstitch_interval = backstitch_scale, backstitch_interval
        self._dropout = DropoutSchedule() if dropout is None else dropout
        self._shrinking = Shrinking() if shrinking is None else shrinking
        self._images = images
        self._beat = Beat() if beat is None else beat
        self._scale = 1.0  # of the parameters, before the next minibatch
        self._minibatches = 0
        # The parameters before the minibatch, where they have moved before its gradient was taken; and whether they
        # have by backstitch's first step.
        self._moved_from: torch.Tensor | None = None
        self._stepped_back = False
        self._begun_at, self._effective = 0, rate.initial  # the iteration's first frame, and its rate
        self._rate_factor = 1.0
        self._super_learner: SuperLearner | None = None
        self._batch: Batch | None = None
        self._global_chunks = 0

    def begin_phase(self, rate_factor: float, super_learner: SuperLearner | None) -> None:
        """From now on steps are those of a phase: its strategy's factor of the rate, and this rank's super-learner."""
        self._rate_factor, self._super_learner = rate_factor, super_learner

    def saturation(self) -> float:
        """Of the model's sigmoids and tanhs, where parameters may be shrunk by it; else 0."""
        return self.state.model.saturation() if self._shrinking.acts else 0.0

    def begin_iteration(self, number: int, frames: int, saturation: float | None = None) -> None:
        """Set the learning rate; shrink the parameters, with the next minibatch, if it is time; and forget statistics.

        These then are of one iteration, as in Kaldi, whose jobs begin with none.

        Args:
            number: of the iteration, from 0.
            frames: trained on so far, over all learners.
            saturation: None: that of this learner's model.
        """
        model = self.state.model
        self._begun_at, self._effective = frames, self.rate.effective(frames)
        if self.rate.by_iteration:
            self._effective = self.rate.of_iteration(number, frames)
            self._log.learning_rate = self._effective
        if self._shrinking.acts:
            if not number:
                saturation = 0.0  # nothing is known of the model yet
            elif saturation is None:
                saturation = self.saturation()
            rate = self._effective * self._num_learners
            self._scale = self._shrinking.scale(rate, number == 0, saturation)
            if self._scale != 1.0:
                logger.info("iteration %d: shrink: %.5f (saturation %.3f)", number, self._scale, saturation)
        for module in model.by_name.values():
            module.zero_statistics()

    def state_dict(self) -> dict[str, Any]:
        """What belongs to the iteration, for a checkpoint in the middle of it."""
        return {
            "begun_at": self._begun_at, "effective": self._effective, "scale": self._scale,
            "minibatches": self._minibatches,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begun_at, self._effective, self._scale = state["begun_at"], state["effective"], state["scale"]
        self._minibatches = state["minibatches"]
        if self.rate.by_iteration:
            self._log.learning_rate = self._effective

    def _shrink(self) -> None:
        """All parameters times the scale, but not batch-norm's moments, which are of activations."""
        for c in self.state.flat.components:
            self.state.flat.values[c.where] *= self._scale
        self._scale = 1.0

    def compute_gradients(self, batch: Batch, statistics: bool = True, logged: bool = True) -> None:
        """Fill the flat gradients: of the loss summed over the minibatch's frames (zero if it has none).

        Components with natural gradient precondition theirs. Batch-norm's statistics move if `statistics`.
        """
        flat = self.state.flat
        flat.gradients.zero_()
        if batch.frames:
            model, feats = self.state.model, batch.feats
            if self._images is not None:
                feats = self._images(feats, model.mode.chance)
            terms = self._objective.train(model, feats, batch, self._derivatives)
            if logged:
                self._log.add_objective(terms, batch.frames)
            for c in flat.components:
                if c.module is not None:
                    c.module.finish_gradient()
        if statistics:
            flat.take_statistics()

    def compute(self, batch: Batch, frames: int | None = None) -> None:
        """`compute_gradients` with the disturbances around it, and the sum over a super-learner after it.

        Args:
            frames: trained on so far, over all learners; None: as the state has it.
        """
        self._minibatches += 1
        self._beat.moved(f"computing minibatch {self._minibatches}")
        self._injector.begin()
        self._moved_from, self._stepped_back = None, False
        if self._scale != 1.0:
            # Asynchronous: the published model moves by it as by the gradient, see `change`.
            self._moved_from = self.state.flat.values.clone()
            self._shrink()
        frames = self.state.frames if frames is None else frames
        reached = self._begun_at if self.rate.by_iteration else frames
        self._dropout.apply(self.state.model, reached / self.rate.total_frames)
        if self._backstitch_scale and self._minibatches % self._backstitch_interval == 0 and batch.frames:
            self._step_back(batch, frames)
        self.compute_gradients(batch, logged=not self._stepped_back)
        self._injector.end()
        if self._super_learner is not None:
            self._super_learner.mean_(self.state.flat.gradients)
        self._beat.at(f"what comes after minibatch {self._minibatches}")

    def _step_back(self, batch: Batch, frames: int) -> None:
        """Backstitch's first step: against the gradient, with preconditioners that are not updated, and without l2."""
        state, chance = self.state, self.state.model.mode.chance
        if self._moved_from is None:
            self._moved_from = state.flat.values.clone()
        self._stepped_back = True
        draws = chance.state_dict()
        for module in state.model.by_name.values():
            module.freeze_natural_gradient(True)
        self.compute_gradients(batch, statistics=False)
        state.optimiser.step(self._rate(frames), 0.0, scale=-self._backstitch_scale)
        for module in state.model.by_name.values():
            module.freeze_natural_gradient(False)
        chance.load_state_dict(draws)  # the second pass has the same dropout masks

    def _rate(self, frames: int) -> float:
        effective = self._effective if self.rate.by_iteration else self.rate.effective(frames)
        return effective * self._num_learners * self._rate_factor

    def _optimise(
        self, frames: int, chunks: float, change: torch.Tensor | None = None, base: torch.Tensor | None = None
    ) -> None:
        scale = 1.0 + self._backstitch_scale if self._stepped_back else 1.0
        # The whole of l2 belongs to the second of backstitch's steps, whose scale it must not get.
        l2_chunks = chunks * self._l2_factor / (self._num_learners * scale)
        optimiser = self.state.optimiser
        optimiser.step(self._rate(frames), l2_chunks, change, base, scale=scale, constrain=not self._stepped_back)

    def change(self, frames: int, chunks: float, into: torch.Tensor) -> None:
        """Put the optimiser's change into `into`, (P,) float32; the parameters stay.

        Args:
            frames: trained on so far, over all learners: they decide the rate.
            chunks: of this learner's minibatch.
        """
        self._optimise(frames, chunks, into)
        if self._moved_from is not None:
            into += self.state.flat.values - self._moved_from

    # As a `SteppingLearner`.

    def begin(self, batch: Batch, global_chunks: int) -> None:
        """The next step's minibatch, and how many chunks the step has over all learners."""
        self._batch, self._global_chunks = batch, global_chunks
        if self._scale != 1.0:
            self._shrink()  # before the strategy looks at the parameters

    def read_parameters(self, look: Callable[[NDArray[np.float32]], None]) -> None:
        self.state.flat.read(self.state.flat.values, look)

    def mix_gradients(self, rule: Callable[[NDArray[np.float32]], None]) -> None:
        self.state.flat.mix(self.state.flat.gradients, rule)

    def mix_parameters(self, rule: Callable[[NDArray[np.float32]], bool]) -> bool:
        return self.state.flat.mix(self.state.flat.values, rule)

    def update(self, base: NDArray[np.float32] | None, together: bool) -> None:
        """See `SteppingLearner.update`; the learners of a super-learner always move together."""
        state, batch = self.state, self._batch
        assert batch is not None, "begin() has not been called"
        moved = None if base is None else state.flat.on_device(base)
        together = together or self._super_learner is not None
        if batch.frames or together:
            chunks = self._global_chunks if together else len(batch.labels)
            self._optimise(state.frames, chunks, base=moved)
        elif moved is not None:
            state.flat.values.copy_(moved)

    def forget_momentum(self) -> None:
        self.state.optimiser.forget()
