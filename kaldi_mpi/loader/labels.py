"""Labels of many utterances in memory: two bytes a frame, where the pdf-ids allow it."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
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


class Labels(Collection[str]):
    """The labels of utterances, added one by one; afterwards any number of corpora may use them without a copy.

    As a collection it has the utterances' keys, in the order in which they came. Make one with `Labels.read`.
    """

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._num_frames = array("i")
        self._first_frame, self._first_pair = array("q"), array("q")
        self._frames = self._pairs = 0  # in all
        # The four below grow in place: nothing is in memory twice, and what is not written to is not taken up.
        self._ids, self._is_wide = bytearray(), False  # uint16, or int32 if wide
        self._ends: bytearray | None = None  # int32 a frame, pairs of its utterance up to its end; None: no posteriors
        self._weights: bytearray | None = None  # float32 a pair; None: all are 1
        self._most = self._least = 1  # pairs of a frame

    @classmethod
    def read(cls, pairs: Iterable[tuple[str, FrameLabels]], wanted: Collection[str] | None = None) -> Labels:
        """Take the labels of utterances, of which only one at a time need be in memory as they come.

        Args:
            pairs: key and labels, as for `Corpus.open`.
            wanted: keep only these utterances.

        Raises:
            DataError: values that cannot be labels, posteriors among labels, or an utterance that comes twice; names
                the utterance.
        """
        labels = cls()
        for key, values in pairs:
            if wanted is None or key in wanted:
                labels.add(key, values)
        return labels

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def add(self, key: str, labels: FrameLabels, *, frames: int | None = None, file: str | None = None) -> None:
        """Copy the labels of an utterance.

        Args:
            key: the utterance.
            labels: its labels.
            frames: how many it must have: those of its features.
            file: that of the features, for messages.

        Raises:
            DataError: another number of frames, values that cannot be labels, or an utterance that is there already.
        """
        if key in self._index:
            raise DataError("labels of this utterance come twice", key=key)
        if isinstance(labels, Posterior):
            if len(self._index) and self._ends is None:
                raise DataError("posteriors, and other utterances have one label a frame", key=key)
            got = self._add_pairs(labels, frames, file=file, key=key)
        else:
            if self._ends is not None:
                raise DataError("one label a frame, and other utterances have posteriors", key=key)
            got = self._add_single(np.asarray(labels), frames, file=file, key=key)
        self._index[key] = len(self._index)
        self._num_frames.append(got)
        self._first_frame.append(self._frames)
        self._frames += got

    def _add_single(self, ids: NDArray[Any], frames: int | None, *, file: str | None, key: str) -> int:
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"labels are {ids.dtype} {ids.shape}, not a vector of integers", key=key)
        _check_frames("alignment", len(ids), frames, file=file, key=key)
        self._add_ids(ids, _check_ids(ids, key))
        return len(ids)

    def _add_pairs(self, pairs: Posterior, frames: int | None, *, file: str | None, key: str) -> int:
        offsets, ids = np.asarray(pairs.row_offsets), np.asarray(pairs.ids)
        weights = np.asarray(pairs.weights, dtype=np.float32)
        _check_frames("posterior", len(offsets) - 1, frames, file=file, key=key)
        counts = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(ids) or counts.min(initial=0) < 0 or weights.shape != ids.shape:
            raise DataError("the posterior's arrays do not fit each other", key=key)
        if len(ids) > _LARGEST:
            raise DataError(f"{len(ids)} pairs are too many for one utterance", key=key)
        highest = _check_ids(ids, key)
        if not np.isfinite(weights).all():
            raise DataError("a weight is not a finite number", key=key)
        self._add_ids(ids, highest)
        # Most posteriors are all ones: these are told apart, and take no memory.
        if self._weights is None and not (weights == 1.0).all():
            self._weights = bytearray(np.ones(self._pairs, dtype=np.float32).data)
        if self._weights is not None:
            self._weights += weights.tobytes()
        if self._ends is None:
            self._ends = bytearray()
        self._ends += offsets[1:].astype(np.int32).tobytes()
        self._first_pair.append(self._pairs)
        self._pairs += len(ids)
        if len(counts):
            self._most, self._least = max(self._most, int(counts.max())), min(self._least, int(counts.min()))
        return len(counts)

    def _add_ids(self, ids: NDArray[Any], highest: int) -> None:
        if highest > _LARGEST_NARROW and not self._is_wide:
            wide = np.frombuffer(self._ids, np.uint16).astype(np.int32)
            self._ids, self._is_wide = bytearray(wide.data), True
        self._ids += ids.astype(np.int32 if self._is_wide else np.uint16).tobytes()

    def check_frames(self, key: str, frames: int, *, file: str) -> None:
        """Check the number of labelled frames of an utterance against that of its features; `file` is theirs.

        Raises:
            DataError: it is another one.
        """
        what = "alignment" if self._ends is None else "posterior"
        _check_frames(what, self._num_frames[self._index[key]], frames, file=file, key=key)

    def of(self, keys: Sequence[str]) -> CorpusLabels:
        """The labels of these utterances, at least one, in this order. Nothing can be added from then on."""
        at = np.array([self._index[key] for key in keys], dtype=np.intp)
        num_frames, first = np.frombuffer(self._num_frames, np.int32)[at], np.frombuffer(self._first_frame, np.int64)
        ids: NDArray[Any] = np.frombuffer(self._ids, np.int32 if self._is_wide else np.uint16)
        if self._ends is None:
            return CorpusLabels(num_frames, first[at], ids)
        first_pair = np.frombuffer(self._first_pair, np.int64)[at]
        weights = None if self._weights is None else np.frombuffer(self._weights, np.float32)
        if self._most == 1 and self._least == 1 and weights is None:
            # One label a frame after all: then its index is the frame's.
            return CorpusLabels(num_frames, first_pair, ids)
        ends = np.frombuffer(self._ends, np.int32)
        return CorpusLabels(num_frames, first[at], ids, self._most, first_pair, ends, weights)


@dataclass(frozen=True, eq=False)
class CorpusLabels:
    """The labels of a corpus' utterances, which are given by their index there; the flat arrays are those of `Labels`.

    Attributes:
        num_frames: (utterances,) int32.
        frames: (utterances,) int64, the index of each one's first frame in `ids`, or in `ends` where there are some.
        ids: uint16 or int32.
        num_targets: most labels of a frame, at least 1.
        pairs: (utterances,) int64, the index of each one's first pair in `ids` and `weights`; None: one label a frame.
        ends: per frame, pairs of its utterance up to its end; None: one label a frame.
        weights: of each pair, float32; None: all are 1.
    """

    num_frames: NDArray[np.int32]
    frames: NDArray[np.int64]
    ids: NDArray[Any]
    num_targets: int = 1
    pairs: NDArray[np.int64] | None = None
    ends: NDArray[np.int32] | None = None
    weights: NDArray[np.float32] | None = None

    def lend(self) -> tuple[dict[str, Any], list[Any]]:
        """The fields of the C library's ``km_labels``, and what must be kept for as long as they are used."""
        wide = self.ids.dtype == np.int32
        fields = {
            "targets": self.num_targets,
            "frames": borrow(self.frames, "int64_t", np.int64),
            "entries": ffi.NULL if self.pairs is None else borrow(self.pairs, "int64_t", np.int64),
            "ends": ffi.NULL if self.ends is None else borrow(self.ends, "int32_t", np.int32),
            "narrow": ffi.NULL if wide else borrow(self.ids, "uint16_t", np.uint16),
            "wide": borrow(self.ids, "int32_t", np.int32) if wide else ffi.NULL,
            "weights": ffi.NULL if self.weights is None else borrow(self.weights, "float", np.float32),
        }
        return fields, list(fields.values())

    def labels_of(self, i: int) -> NDArray[np.int32]:
        """The labels of utterance `i`: (frames,); or (frames, num_targets) with -1 where there is none."""
        return self._rows(i, self.ids, np.int32(-1))

    def weights_of(self, i: int) -> NDArray[np.float32] | None:
        """The weights of these labels, 0 where there is no label; None if all are 1."""
        return None if self.weights is None else self._rows(i, self.weights, np.float32(0.0))

    def _rows(self, i: int, values: NDArray[Any], empty: Any) -> NDArray[Any]:
        begin, frames = int(self.frames[i]), int(self.num_frames[i])
        if self.pairs is None or self.ends is None:
            return np.asarray(values[begin : begin + frames].astype(empty.dtype))
        ends = self.ends[begin : begin + frames]
        starts = np.concatenate([np.zeros(1, dtype=np.int32), ends[:-1]])
        at = starts[:, None] + np.arange(self.num_targets)
        present = at < ends[:, None]
        rows = np.full(at.shape, empty)
        rows[present] = values[int(self.pairs[i]) + at[present]]
        return rows[:, 0] if self.num_targets == 1 else rows


def _check_frames(what: str, got: int, wanted: int | None, *, file: str | None, key: str) -> None:
    if wanted is not None and got != wanted:
        raise DataError(f"the {what} has {got} frames and the features have {wanted}", file=file, key=key)


def _check_ids(ids: NDArray[Any], key: str) -> int:
    """The highest of them; 0 if there is none."""
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < 0 or high > _LARGEST:
        raise DataError(f"label {low if low < 0 else high} is not a pdf-id", key=key)
    return high
