"""Kaldi's SGD: momentum with its scaling, and limits on the change of each component and of the whole.

What ``nnet3-train`` does with one minibatch (``NnetTrainer::TrainInternal``, ``UpdateNnetWithMaxChange``),
here without natural gradient. With g the gradient of the objective, summed over the minibatch's frames,
a the actual learning rate, m the momentum and D the running delta (0 at the start):

    D   <- D + a f_c g - 2 a f_c l2 n w    per component c: f_c its learning-rate factor, l2 its           (1)
                                           l2-regularize, n the number of chunks
    s_c  = min(1, max-change_c / ((1-m) |D_c|))                                                           (2)
    s    = min(1, max-param-change / |(1-m) s_c D_c|_all)                                                 (3)
    w_c <- w_c + s s_c (1-m) D_c                                                                          (4)
    D   <- m D                                                                                            (5)

The factor (1-m) in (4) makes the effective learning rate independent of m. A change that is not finite is
not applied, and D is set to 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kaldi_mpi.errors import KaldiMpiError
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.log import logger

# This many minibatches in a row without a finite gradient mean that the training has diverged.
_MAX_SKIPPED = 50


class KaldiSgd:
    """Equations (1) to (5) on the flat parameters of one learner.

    Args:
        flat: parameters and gradients; gradients are those of the loss (the negated objective).
        momentum: m, in [0, 1).
        max_param_change: the limit in (3), 0 for none.
    """

    def __init__(self, flat: FlatParameters, momentum: float, max_param_change: float) -> None:
        self._flat = flat
        self._momentum = momentum
        self._max_param_change = max_param_change
        self.delta = torch.zeros_like(flat.values)
        self.num_steps = 0
        self.limited = {component.name: 0 for component in flat.components}  # minibatches that (2) struck
        self.limited_globally = 0
        self.skipped = 0
        self._skipped_in_a_row = 0

    @torch.no_grad()
    def step(
        self,
        learning_rate: float,
        num_chunks: float,
        change: torch.Tensor | None = None,
        base: torch.Tensor | None = None,
    ) -> None:
        """Move the parameters along the gradients that lie in the flat buffer.

        Args:
            learning_rate: the actual learning rate, a.
            num_chunks: chunks in the minibatch, n (for l2 alone), with Kaldi's factor 1/N.
            change: (P,) float32; if given, the change of (4) is written there and the parameters stay.
            base: (P,) float32; if given, the parameters become this plus the change.

        Raises:
            KaldiMpiError: 50 minibatches in a row gave no finite change: the training has diverged.
        """
        self.num_steps += 1
        scale = 1.0 - self._momentum
        norms: list[torch.Tensor] = []
        for c in self._flat.components:
            rate = learning_rate * c.learning_rate_factor
            delta = self.delta[c.where]
            delta.add_(self._flat.gradients[c.where], alpha=-rate)
            if c.l2_regularize:
                delta.add_(self._flat.values[c.where], alpha=-2.0 * rate * c.l2_regularize * num_chunks)
            norms.append(torch.linalg.vector_norm(delta))
        # One transfer for all norms: a GPU waits once a step, not once a component.
        factors = self._limits([norm * scale for norm in torch.stack(norms).tolist()])
        if factors is None:
            self.delta.zero_()
            if change is not None:
                change.zero_()
            if base is not None:
                self._flat.values.copy_(base)
            return
        for c, factor in zip(self._flat.components, factors, strict=True):
            if change is None:
                values = self._flat.values[c.where]
                from_ = values if base is None else base[c.where]
                torch.add(from_, self.delta[c.where], alpha=scale * factor, out=values)
            else:
                torch.mul(self.delta[c.where], scale * factor, out=change[c.where])
        if self._momentum:
            self.delta.mul_(self._momentum)
        else:
            self.delta.zero_()

    def forget(self) -> None:
        """Drop the momentum: the running delta starts from 0."""
        self.delta.zero_()

    def _limits(self, norms: list[float]) -> list[float] | None:
        """The factors s * s_c of (2) and (3) for changes of these norms, or None to skip the minibatch."""
        if not all(math.isfinite(norm) for norm in norms):
            self.skipped += 1
            self._skipped_in_a_row += 1
            logger.warning("infinite parameter change at step %d, not applied", self.num_steps - 1)
            if self._skipped_in_a_row >= _MAX_SKIPPED:
                raise KaldiMpiError(
                    f"training has diverged: no finite gradient in {_MAX_SKIPPED} minibatches; lower the learning rate"
                )
            return None
        self._skipped_in_a_row = 0
        factors = []
        for c, norm in zip(self._flat.components, norms, strict=True):
            struck = c.max_change > 0 and norm > c.max_change
            self.limited[c.name] += struck
            factors.append(c.max_change / norm if struck else 1.0)
        whole = math.hypot(*(f * n for f, n in zip(factors, norms, strict=True)))
        if self._max_param_change > 0 and whole > self._max_param_change:
            self.limited_globally += 1
            factors = [f * (self._max_param_change / whole) for f in factors]
        return factors

    def report(self) -> list[str]:
        """What Kaldi prints at the end of a training job: how often each limit struck."""
        steps = max(1, self.num_steps)
        lines = [
            f"For {name}, per-component max-change was enforced {100.0 * count / steps:.4g} % of the time."
            for name, count in self.limited.items()
            if count
        ]
        if self.limited_globally:
            lines.append(
                f"The global max-change was enforced {100.0 * self.limited_globally / steps:.4g} % of the time."
            )
        return lines

    def state_dict(self) -> dict[str, Any]:
        """The running delta and the counters."""
        return {
            "delta": self.delta.cpu().clone(),
            "num_steps": self.num_steps,
            "limited": dict(self.limited),
            "limited_globally": self.limited_globally,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delta.copy_(state["delta"])
        self.num_steps = state["num_steps"]
        self.limited = dict(state["limited"])
        self.limited_globally = state["limited_globally"]
        self.skipped = state["skipped"]
