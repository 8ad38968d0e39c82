"""Labels of a whole corpus in memory: two bytes a frame, where the pdf-ids allow it."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.native import borrow, ffi
from kaldi_mpi.loader.posteriors import Posterior

# What the labels of one utterance are: a vector of pdf-ids, or posteriors.
FrameLabels: TypeAlias = NDArray[Any] | Posterior

_LARGEST_NARROW = 2**16 - 1  # id in two bytes
_LARGEST = 2**31 - 1


class LabelStore:
    """The labels of all utterances, put in one by one in any order.

    Args:
        num_frames: (utterances,) frames of each.

    Attributes:
        num_targets: most labels of a frame, at least 1; known after `finish`, as is has_weights.
        has_weights: whether any weight differs from 1.
    """

    def __init__(self, num_frames: NDArray[np.int32]) -> None:
        self._num_frames = num_frames
        self._frames = np.zeros(len(num_frames), dtype=np.int64)  # index of each utterance's first frame
        np.cumsum(num_frames[:-1], dtype=np.int64, out=self._frames[1:])
        self._total = int(num_frames.sum(dtype=np.int64))
        # Of labels of which there is one a frame. Memory that nothing is written to is not taken up: it does
        # not matter that utterances which are left out have room here.
        self._values: NDArray[np.uint16] | NDArray[np.int32] | None = None
        # Of posteriors.
        self._entries: NDArray[np.int64] | None = None  # index of each utterance's first pair
        self._ends: NDArray[np.int32] | None = None  # per frame, pairs of its utterance up to its end
        self._ids: list[NDArray[Any]] = []
        self._weights: list[NDArray[np.float32]] = []
        self._num_pairs = 0
        self._all_weights: NDArray[np.float32] | None = None
        self._most = self._least = 1  # pairs of a frame
        self.num_targets, self.has_weights = 1, False

    def put(self, i: int, labels: FrameLabels, *, file: str, key: str) -> None:
        """Copy the labels of utterance `i`; `file` is that of the features, for messages.

        Raises:
            DataError: another number of frames than the features have, or values that cannot be labels.
        """
        if isinstance(labels, Posterior):
            if self._values is not None:
                raise DataError("posteriors, and other utterances have one label a frame", key=key)
            self._put_pairs(i, labels, file=file, key=key)
        else:
            if self._entries is not None:
                raise DataError("one label a frame, and other utterances have posteriors", key=key)
            self._put_single(i, np.asarray(labels), file=file, key=key)

    def _check_frames(self, what: str, got: int, i: int, *, file: str, key: str) -> None:
        frames = int(self._num_frames[i])
        if got != frames:
            raise DataError(f"the {what} has {got} frames and the features have {frames}", file=file, key=key)

    def _put_single(self, i: int, values: NDArray[Any], *, file: str, key: str) -> None:
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise DataError(f"labels are {values.dtype} {values.shape}, not a vector of integers", key=key)
        self._check_frames("alignment", len(values), i, file=file, key=key)
        _check_ids(values, key)
        if self._values is None:
            self._values = np.empty(self._total, dtype=np.uint16)
        if self._values.dtype == np.uint16 and values.max() > _LARGEST_NARROW:
            self._values = self._values.astype(np.int32)
        self._values[self._frames[i] : self._frames[i] + len(values)] = values

    def _put_pairs(self, i: int, pairs: Posterior, *, file: str, key: str) -> None:
        offsets, ids = np.asarray(pairs.row_offsets), np.asarray(pairs.ids)
        weights = np.asarray(pairs.weights, dtype=np.float32)
        self._check_frames("posterior", len(offsets) - 1, i, file=file, key=key)
        counts = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(ids) or counts.min() < 0 or weights.shape != ids.shape:
            raise DataError("the posterior's arrays do not fit each other", key=key)
        if len(ids) > _LARGEST:
            raise DataError(f"{len(ids)} pairs are too many for one utterance", key=key)
        if len(ids):
            _check_ids(ids, key)
        if not np.isfinite(weights).all():
            raise DataError("a weight is not a finite number", key=key)
        if self._entries is None or self._ends is None:
            self._entries = np.zeros(len(self._num_frames), dtype=np.int64)
            self._ends = np.empty(self._total, dtype=np.int32)
        self._entries[i] = self._num_pairs
        self._ends[self._frames[i] : self._frames[i] + len(counts)] = offsets[1:]
        self._ids.append(ids.astype(np.uint16 if len(ids) == 0 or ids.max() <= _LARGEST_NARROW else np.int32))
        self._num_pairs += len(ids)
        self._most, self._least = max(self._most, int(counts.max())), min(self._least, int(counts.min()))
        # Most posteriors are all ones: these are told apart, and take no memory.
        all_ones = bool((weights == 1.0).all())
        self.has_weights |= not all_ones
        self._weights.append(np.broadcast_to(np.float32(1.0), weights.shape) if all_ones else weights.copy())

    def finish(self, kept: NDArray[np.intp]) -> None:
        """Bring the labels into their final form; of all utterances only those at the indices `kept` remain."""
        self._num_frames, frames = self._num_frames[kept], self._frames[kept]
        if self._entries is not None:
            entries = self._entries[kept]
            wide = any(ids.dtype == np.int32 for ids in self._ids)
            values = np.concatenate(self._ids, dtype=np.int32 if wide else np.uint16)
            if self.has_weights:
                self._all_weights = np.concatenate(self._weights)
            self._ids, self._weights = [], []
            self.num_targets = self._most
            if self._most == 1 and self._least == 1 and not self.has_weights:
                # One label a frame after all: then its index is the frame's.
                self._entries, self._ends, frames = None, None, entries
            else:
                self._entries = entries
            self._values = values
        self._frames = frames

    def lend(self) -> tuple[dict[str, Any], list[Any]]:
        """The fields of the C library's ``km_labels``, and what must be kept for as long as they are used."""
        assert self._values is not None  # an utterance has been put in, and all are finished
        wide = self._values.dtype == np.int32
        fields = {
            "targets": self.num_targets,
            "frames": borrow(self._frames, "int64_t", np.int64),
            "entries": ffi.NULL if self._entries is None else borrow(self._entries, "int64_t", np.int64),
            "ends": ffi.NULL if self._ends is None else borrow(self._ends, "int32_t", np.int32),
            "narrow": ffi.NULL if wide else borrow(self._values, "uint16_t", np.uint16),
            "wide": borrow(self._values, "int32_t", np.int32) if wide else ffi.NULL,
            "weights": ffi.NULL if self._all_weights is None else borrow(self._all_weights, "float", np.float32),
        }
        return fields, list(fields.values())

    def labels(self, i: int) -> NDArray[np.int32]:
        """The labels of utterance `i`: (frames,); or (frames, num_targets) with -1 where there is none."""
        return self._rows(i, self._values, np.int32(-1))

    def weights(self, i: int) -> NDArray[np.float32] | None:
        """The weights of these labels, 0 where there is no label; None if all are 1."""
        if self._all_weights is None:
            return None
        return self._rows(i, self._all_weights, np.float32(0.0))

    def _rows(self, i: int, values: Any, empty: Any) -> NDArray[Any]:
        begin, frames = int(self._frames[i]), int(self._num_frames[i])
        if self._entries is None or self._ends is None:
            return np.asarray(values[begin : begin + frames].astype(empty.dtype))
        ends = self._ends[begin : begin + frames]
        starts = np.concatenate([np.zeros(1, dtype=np.int32), ends[:-1]])
        at = starts[:, None] + np.arange(self.num_targets)
        present = at < ends[:, None]
        rows = np.full(at.shape, empty)
        rows[present] = values[int(self._entries[i]) + at[present]]
        return rows[:, 0] if self.num_targets == 1 else rows


def _check_ids(values: NDArray[Any], key: str) -> None:
    low, high = values.min(), values.max()
    if low < 0 or high > _LARGEST:
        raise DataError(f"label {low if low < 0 else high} is not a pdf-id", key=key)
