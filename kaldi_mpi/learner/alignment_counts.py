"""What Kaldi's scripts take from counting alignments: transition probabilities, first priors, a scale of outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.tokens import FloatArray, Writer
from kaldi_mpi.formats.transition import TransitionModel
from kaldi_mpi.loader import PdfAlignments
from kaldi_mpi.transport.world import World

PRIOR_SCALE_FILE = "presoftmax_prior_scale.vec"
_FLOOR, _LEAST_COUNT = 0.01, 5.0  # of MleTransitionUpdateConfig
_PRIOR_FLOOR = 5.0e-06  # nnet3-am-train-transitions --prior-floor
_SMOOTHING = 0.01  # of counts, in units of their mean (smooth_presoftmax_prior_scale_vector)


class AlignmentCounts:
    """How often each transition-id occurs in the alignments.

    Attributes:
        transitions: the alignments' model.
        counts: (transition-ids + 1,) float64; element 0 is 0.
    """

    def __init__(self, transitions: TransitionModel, counts: NDArray[np.float64]) -> None:
        self.transitions, self.counts = transitions, counts

    @classmethod
    def of_directory(cls, ali_dir: str, transitions: TransitionModel) -> AlignmentCounts:
        """Those of ``ali.*.gz``.

        Raises:
            DataError: an archive is malformed or of another model, or there are no frames; names file and key.
        """
        alignments = PdfAlignments(ali_dir, transitions.tid_to_pdf)
        for _ in alignments.pairs():  # counts them
            pass
        if not alignments.counts.any():
            raise DataError("the alignments have no frames", file=ali_dir)
        return cls(transitions, alignments.counts)

    @classmethod
    def of_all_learners(
        cls, ali_dir: str, transitions: TransitionModel, counts: NDArray[np.float64] | None, world: World
    ) -> AlignmentCounts:
        """From `counts`, if all learners have read the alignments; otherwise rank 0 reads them for all."""
        if counts is None:
            counts = cls.of_directory(ali_dir, transitions).counts if world.rank == 0 else None
            counts = world.broadcast(counts)
        assert counts is not None
        return cls(transitions, counts)

    def trained_transitions(self) -> TransitionModel:
        """The model with the most likely transition probabilities, as nnet3-am-train-transitions makes it.

        A state that occurs less than five times keeps its own; none falls much below 0.01.
        """
        log_probs = np.array(self.transitions.log_probs, np.float32)
        first = 1
        for phone, number, _, _ in self.transitions.tuples:
            topology = self.transitions.entries[self.transitions.phone_to_entry[phone]]
            own = slice(first, first + len(topology[number].transitions))
            first, counts = own.stop, self.counts[own]
            if len(counts) < 2 or counts.sum() < _LEAST_COUNT:
                continue
            probabilities = (counts / counts.sum()).astype(np.float32)
            for _ in range(3):
                probabilities *= np.float32(1.0 / probabilities.sum(dtype=np.float32))
                probabilities = np.maximum(probabilities, np.float32(_FLOOR))
            log_probs[own] = np.log(probabilities)
        return dataclasses.replace(self.transitions, log_probs=log_probs)

    def pdf_counts(self) -> NDArray[np.float64]:
        """(K,): how often each pdf-id occurs."""
        model = self.transitions
        counts = np.bincount(model.tid_to_pdf[1:], weights=self.counts[1:], minlength=model.num_pdfs)
        return counts.astype(np.float64)

    def priors(self) -> FloatArray:
        """(K,) float32: the share of each pdf-id, at least 5e-6: a model's priors until its own are estimated."""
        counts = self.pdf_counts()
        floored = np.maximum(counts / counts.sum(), _PRIOR_FLOOR)
        return np.asarray(floored / floored.sum(), np.float32)

    def prior_scale(self, power: float) -> NDArray[np.float64]:
        """(K,), of mean 1: (count + 0.01 of the mean count) ^ power (smooth_presoftmax_prior_scale_vector)."""
        counts = self.pdf_counts()
        scales = (counts + _SMOOTHING * counts.mean()) ** power
        return scales / scales.mean()

    def write_prior_scale(self, folder: Path, power: float) -> None:
        """Write `prior_scale` to ``presoftmax_prior_scale.vec`` in `folder`, and link it into its configs.

        Raises:
            DataError: it cannot be written.
        """
        with atomic_write(folder / PRIOR_SCALE_FILE) as stream:
            Writer(stream, binary=False).vector(self.prior_scale(power).astype(np.float32))
        link = folder / "configs" / PRIOR_SCALE_FILE
        if link.parent.is_dir():
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..") / PRIOR_SCALE_FILE)
