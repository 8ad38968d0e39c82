"""The learning rate over a training, in Kaldi's terms."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ExponentialRate:
    """The effective learning rate falls exponentially with the frames processed.

    lr(n) = initial * (final / initial) ** (n / total): Kaldi's ``get_learning_rate`` in
    ``steps/libs/nnet3/train/common.py``, with frames where Kaldi counts archives. Each of N learners applies
    the actual rate N * lr(n); the averaged model then moves at lr(n).

    Args:
        initial: effective learning rate before the first frame.
        final: after the last.
        total_frames: labelled frames of the whole training, over all learners and epochs.
    """

    initial: float
    final: float
    total_frames: int

    def effective(self, frames: int) -> float:
        """The effective learning rate after `frames` frames over all learners."""
        done = min(1.0, frames / self.total_frames)
        return self.initial * math.exp(done * math.log(self.final / self.initial))

    def actual(self, frames: int, num_learners: int) -> float:
        """What each of `num_learners` learners applies at that point."""
        return num_learners * self.effective(frames)
