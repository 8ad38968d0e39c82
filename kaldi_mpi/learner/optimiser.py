"""Kaldi's SGD: momentum with its scaling, and limits on the change of each component and of the whole.

What ``nnet3-train`` does with one minibatch (``NnetTrainer::TrainInternal``, ``UpdateNnetWithMaxChange``). With g the
gradient of the objective, summed over the minibatch's frames and preconditioned where a component has natural
gradient, a the actual learning rate, m the momentum and D the running delta (0 at the start):

    D   <- D + a f_c g - 2 a f_c l2 n w    per component c: f_c its learning-rate factor, l2 its           (1)
                                           l2-regularize, n the number of chunks
    s_c  = min(1, max-change_c / ((1-m) |D_c|))                                                           (2)
    s    = min(1, max-param-change / |(1-m) s_c D_c|_all)                                                 (3)
    w_c <- w_c + s s_c (1-m) D_c                                                                          (4)
    w_c <- constrained(w_c)                of components under the orthonormal constraint, at times       (5)
    D   <- m D                                                                                            (6)

The factor (1-m) in (4) makes the effective learning rate independent of m. A change that is not finite is
not applied, and D is set to 0. Batch-norm's statistics, which lie among the parameters, just move by what stands in
the place of their gradient. On a GPU all of this is decided there: the host waits for nothing.
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
    """Equations (1) to (6) on the flat parameters of one learner.

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
        device = flat.values.device
        limits = [c.max_change if c.max_change > 0 else math.inf for c in flat.components]
        self._limits = torch.tensor(limits, dtype=torch.float32, device=device)
        # Minibatches that (2) struck, for each component; that (3) struck, that were skipped, and those in a row.
        self._struck = torch.zeros(len(limits), dtype=torch.int64, device=device)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    @property
    def limited(self) -> dict[str, int]:
        """Minibatches that (2) struck, by component."""
        return dict(zip((c.name for c in self._flat.components), self._struck.tolist(), strict=True))

    @property
    def limited_globally(self) -> int:
        """Minibatches that (3) struck."""
        return int(self._counts[0].item())

    @property
    def skipped(self) -> int:
        """Minibatches whose change was not finite."""
        return int(self._counts[1].item())

    @torch.no_grad()
    def step(
        self,
        learning_rate: float,
        num_chunks: float,
        change: torch.Tensor | None = None,
        base: torch.Tensor | None = None,
        scale: float = 1.0,
        constrain: bool = True,
    ) -> None:
        """Move the parameters along the gradients that lie in the flat buffer.

        Args:
            learning_rate: the actual learning rate, a.
            num_chunks: chunks in the minibatch, n (for l2 alone), with Kaldi's factor 1/N.
            change: (P,) float32; if given, the change of (4) and (5) is written there and the parameters stay.
            base: (P,) float32; if given, the parameters become this plus the change.
            scale: of the change and, by its magnitude, of all limits: backstitch's two steps have -alpha and 1 + alpha.
            constrain: whether (5) may act.

        Raises:
            KaldiMpiError: 50 minibatches in a row gave no finite change: the training has diverged.
        """
        self.num_steps += 1
        kept = 1.0 - self._momentum
        flat = self._flat
        norms: list[torch.Tensor] = []
        for c in flat.components:
            rate = learning_rate * c.learning_rate_factor
            delta = self.delta[c.where]
            delta.add_(flat.gradients[c.where], alpha=-rate)
            if c.l2_regularize:
                delta.add_(flat.values[c.where], alpha=-2.0 * rate * c.l2_regularize * num_chunks)
            norms.append(torch.linalg.vector_norm(delta))
        factors, finite = self._factors(torch.stack(norms) * (kept * abs(scale)), abs(scale))
        if flat.values.device.type == "cpu":
            self.check()
            if not finite:
                logger.warning("infinite parameter change at step %d, not applied", self.num_steps - 1)
                self.delta.zero_()
                if change is not None:
                    change.zero_()
                if base is not None:
                    flat.values.copy_(base)
                return
        else:
            self.delta.copy_(torch.where(finite, self.delta, torch.zeros_like(self.delta)))
        for index, c in enumerate(flat.components):
            factor = factors[index] * (kept * scale)
            if change is None:
                values = flat.values[c.where]
                from_ = values if base is None else base[c.where]
                torch.addcmul(from_, self.delta[c.where], factor, out=values)
            else:
                torch.mul(self.delta[c.where], factor, out=change[c.where])
            if c.module is not None:
                c.module.update_statistics(factor, self._momentum)
        for s in flat.statistics:
            if change is None:
                from_ = flat.values[s.where] if base is None else base[s.where]
                torch.sub(from_, flat.gradients[s.where], out=flat.values[s.where])
            else:
                torch.neg(flat.gradients[s.where], out=change[s.where])
        if constrain:
            self._constrain(change)
        if self._momentum:
            self.delta.mul_(self._momentum)
        else:
            self.delta.zero_()

    def _constrain(self, change: torch.Tensor | None) -> None:
        """(5), on the parameters or on what they become by `change`."""
        for c in self._flat.components:
            if c.module is None or not c.module.constrained:
                continue
            if change is None:
                c.module.constrain()
                continue
            values = self._flat.values[c.where]
            before = values.clone()
            values.add_(change[c.where])
            if c.module.constrain():
                torch.sub(values, before, out=change[c.where])
            values.copy_(before)

    def _factors(self, norms: torch.Tensor, limit_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors s * s_c of (2) and (3) for changes of these norms, (C,); and whether all is finite, 0-dim.

        They are all 0 where it is not.
        """
        finite = torch.isfinite(norms).all()
        limits = self._limits * limit_scale
        factors = torch.where(norms > limits, limits / norms, torch.ones_like(norms))
        self._struck += (finite & (norms > limits)).to(torch.int64)
        whole = torch.linalg.vector_norm(factors * norms)
        if self._max_param_change > 0:
            most = self._max_param_change * limit_scale
            over = whole > most
            factors = torch.where(over, factors * (most / whole), factors)
            self._counts[0] += (finite & over).to(torch.int64)
        skipped = (~finite).to(torch.int64)
        self._counts[1] += skipped
        self._counts[2] = (self._counts[2] + 1) * skipped
        return torch.where(finite, factors, torch.zeros_like(factors)), finite

    def check(self) -> None:
        """Raises KaldiMpiError if the training has diverged; a GPU is waited for."""
        if int(self._counts[2].item()) >= _MAX_SKIPPED:
            raise KaldiMpiError(
                f"training has diverged: no finite gradient in {_MAX_SKIPPED} minibatches; lower the learning rate"
            )

    def forget(self) -> None:
        """Drop the momentum: the running delta starts from 0."""
        self.delta.zero_()

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
            "struck": self._struck.cpu().clone(),
            "counts": self._counts.cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delta.copy_(state["delta"])
        self.num_steps = state["num_steps"]
        self._struck.copy_(state["struck"])
        self._counts.copy_(state["counts"])
