"""Passes over data that do not train: validation, diagnostics, priors, LDA statistics.

Each learner takes its share of the chunks, and the sums are added over learners in rank order, so that the
figures do not depend on timing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.loader import ChunkShape, Corpus, Minibatch, MinibatchReader
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.models.lda import LdaStats
from kaldi_mpi.transport.world import World

# LDA statistics are taken of features rounded to this. Their squares and sums are then exact in float64 (up to
# values of 256 and 2**25 frames), so that the transform has the same bits for any number of learners; without
# it, directions in which classes do not differ, and which rounding alone decides, would come out at random.
_LDA_QUANTUM = 2.0**-6


@dataclasses.dataclass(frozen=True)
class Score:
    """What Kaldi's ``nnet3-compute-prob`` reports of one set.

    Attributes:
        log_likelihood: mean log-probability of the right pdf-id per frame, natural logarithm.
        accuracy: share of frames whose most probable pdf-id is the right one.
        frames: how many.
    """

    log_likelihood: float
    accuracy: float
    frames: int

    def lines(self) -> list[str]:
        """The two lines of ``nnet3-compute-prob``, which Kaldi's scripts parse."""
        return [
            f"Overall log-likelihood for 'output' is {self.log_likelihood:.6g} per frame, over {self.frames} frames.",
            f"Overall accuracy for 'output' is {self.accuracy:.6g} per frame, over {self.frames} frames.",
        ]


@dataclasses.dataclass(frozen=True)
class Pass:
    """How a pass cuts its data: the chunks of the training, this learner's share of them, and its device."""

    shape: ChunkShape
    chunks_per_minibatch: int
    world: World
    device: torch.device

    def minibatches(
        self, corpus: Corpus, seed: int | None = None, max_chunks: int | None = None
    ) -> Iterator[Minibatch]:
        """This learner's minibatches of one epoch, but for those without frames.

        They come in the corpus's order, or shuffled by `seed`; after `max_chunks` chunks, over all learners and
        rounded up to whole steps, there are no more.
        """
        per_step = self.chunks_per_minibatch * self.world.size
        with MinibatchReader(
            corpus,
            self.shape,
            self.chunks_per_minibatch,
            seed=seed or 0,
            rank=self.world.rank,
            size=self.world.size,
            shuffle=seed is not None,
            num_epochs=1,
        ) as reader:
            for minibatch in reader:
                if max_chunks is not None and minibatch.step * per_step >= max_chunks:
                    break
                if minibatch.frames:
                    yield minibatch

    def features(self, minibatch: Minibatch) -> torch.Tensor:
        """The minibatch's features on the device, (B, T, D)."""
        return torch.from_numpy(minibatch.feats).to(self.device)

    def first(self) -> int:
        """The time index of a chunk's first row, when its first label has time 0."""
        return self.shape.label_delay - self.shape.left


@contextlib.contextmanager
def with_parameters(model: AcousticModel, flat: FlatParameters, values: NDArray[np.float32]) -> Iterator[None]:
    """Put `values` into the model for a block that only evaluates, then the learner's own parameters back."""
    own = flat.to_numpy()
    flat.load(values)
    model.eval()
    try:
        yield
    finally:
        flat.load(own)
        model.train()


@torch.no_grad()
def compute_prob(model: AcousticModel, corpus: Corpus, how: Pass) -> Score:
    """Log-probability and accuracy of `model` on all of `corpus`, each learner taking its share.

    Every rank gets the same score. Chunks are cut as in training.
    """
    sums = np.zeros(3)
    for minibatch in how.minibatches(corpus):
        output = model(how.features(minibatch), how.first(), how.shape.width)
        labels = torch.from_numpy(minibatch.labels).to(how.device)
        labelled = labels >= 0
        right = output[labelled].gather(1, labels[labelled][:, None])
        sums[0] += right.double().sum().item()
        sums[1] += (output.argmax(dim=2)[labelled] == labels[labelled]).sum().item()
        sums[2] += minibatch.frames
    objective, correct, frames = how.world.sum_float64(sums).tolist()
    return Score(objective / max(frames, 1), correct / max(frames, 1), int(frames))


@torch.no_grad()
def mean_posterior(model: AcousticModel, corpus: Corpus, how: Pass, max_chunks: int, seed: int) -> NDArray[np.float64]:
    """The mean of the model's posteriors over about `max_chunks` random chunks: the priors of final.mdl.

    As Kaldi's ``compute_average_posterior`` and ``nnet3-am-adjust-priors``: (K,) float64, summing to 1.
    """
    total = np.zeros(model.output_dim)
    for minibatch in how.minibatches(corpus, seed, max_chunks):
        output = model(how.features(minibatch), how.first(), how.shape.width)
        labelled = torch.from_numpy(minibatch.labels).to(how.device) >= 0
        total += output[labelled].double().exp().sum(dim=0).cpu().numpy()
    total = how.world.sum_float64(total)
    # A posterior that underflows everywhere would make a prior of zero and its log infinite.
    total = np.maximum(total / total.sum(), 1e-20)
    return np.asarray(total / total.sum(), np.float64)


@torch.no_grad()
def lda_statistics(
    model: AcousticModel, component: str, corpus: Corpus, how: Pass, max_chunks: int, seed: int
) -> LdaStats:
    """LDA statistics of what `component` receives, over about `max_chunks` random chunks and all learners.

    Args:
        model: built with any transform for `component`; only the layers below it are used.
        component: name of the fixed-affine component.
    """
    stats: LdaStats | None = None
    for minibatch in how.minibatches(corpus, seed, max_chunks):
        spliced = model.node_input(component, how.features(minibatch), how.first(), how.shape.width)
        stats = stats or LdaStats(spliced.shape[2], model.output_dim)
        labels = torch.from_numpy(minibatch.labels)
        labelled = labels >= 0
        rounded = np.rint(spliced.cpu()[labelled].numpy().astype(np.float64) / _LDA_QUANTUM) * _LDA_QUANTUM
        stats.accumulate(rounded, labels[labelled].numpy())
    assert stats is not None  # there are no more learners than utterances, so each has chunks in the first step
    for array in stats.arrays():
        array[...] = how.world.sum_float64(array)
    return stats


def spread_of(own: NDArray[np.float32], mean: NDArray[np.float32], world: World) -> float:
    """(1/N) sum_i |x_i - mean|^2, on every rank."""
    if world.size == 1:
        return 0.0
    difference = own.astype(np.float64) - mean
    return float(world.sum_float64(np.array([difference @ difference]))[0]) / world.size
