"""Targets of a raw network, by a table of their own (steps/nnet3/get_egs_targets.sh) in place of alignments."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

import kaldi_native_io
import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.scp import read_table
from kaldi_mpi.loader.alignments import INT_VECTORS
from kaldi_mpi.loader.entries import read_entries
from kaldi_mpi.loader.labels import FrameLabels
from kaldi_mpi.loader.posteriors import Posterior


class Targets:
    """The targets of utterances, of which one is in memory at a time.

    Args:
        scp: table of matrices (frames, num_outputs), or of int32 vectors: one output's number a frame.
        dense: which of the two.
        num_outputs: of the network.
    """

    def __init__(self, scp: str | os.PathLike[str], dense: bool, num_outputs: int) -> None:
        self._scp, self._dense, self._num_outputs = os.fspath(scp), dense, num_outputs

    def pairs(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, FrameLabels]]:
        """Key and targets of one utterance after the other; of `wanted` ones, where these are given.

        Raises:
            DataError: the table or an archive cannot be read, or targets do not fit the network's output; names file
                and key.
        """
        if not self._dense:
            for key, labels in read_entries(f"scp:{self._scp}", INT_VECTORS, wanted):
                if labels is not None:
                    yield key, self._labels(key, labels)
            return
        for key, location in read_table(self._scp).items():
            if wanted is None or key in wanted:
                yield key, self._posterior(key, location)

    def _labels(self, key: str, labels: NDArray[np.int32]) -> NDArray[np.int32]:
        wrong = np.flatnonzero((labels < 0) | (labels >= self._num_outputs))
        if wrong.size:
            raise DataError(
                f"target {labels[wrong[0]]} at frame {wrong[0]}, and the network's outputs are 0 to "
                f"{self._num_outputs - 1}",
                file=self._scp, key=key,
            )  # fmt: skip
        return labels

    def _posterior(self, key: str, location: str) -> Posterior:
        try:
            matrix = np.asarray(kaldi_native_io.FloatMatrix.read(location).numpy())
        except RuntimeError as error:
            cause = f"the matrix at {location} cannot be read: {str(error).strip().splitlines()[-1]}"
            raise DataError(cause, file=self._scp, key=key) from error
        if matrix.shape[1] != self._num_outputs:
            raise DataError(
                f"targets of {matrix.shape[1]} columns, and the network has {self._num_outputs} outputs "
                "(--use-dense-targets=false means vectors of outputs' numbers)",
                file=self._scp, key=key,
            )  # fmt: skip
        there = matrix != 0.0
        there[:, 0] |= ~there.any(axis=1)  # a frame whose targets are all 0 has a target all the same
        counts = there.sum(axis=1)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return Posterior(offsets, np.nonzero(there)[1].astype(np.int32), matrix[there].astype(np.float32))
