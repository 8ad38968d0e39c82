"""A corpus: features on disk, labels in memory, normalisation by speaker."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader.archives import Archives
from kaldi_mpi.loader.cmvn import read_norms, speakers_of
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error
from kaldi_mpi.loader.scp import Location, rows_in_range
from kaldi_mpi.loader.tables import locate
from kaldi_mpi.report.log import logger

# A km_matrix of csrc/matrix.h.
_MATRIX = np.dtype(
    [("data", "i8"), ("kind", "i4"), ("rows", "i4"), ("cols", "i4"), ("min", "f4"), ("range", "f4")], align=True
)


class Corpus:
    """Utterances whose features stay on disk and are decoded chunk by chunk. Make one with `Corpus.open`.

    An utterance is a unit of reading: its values lie in one run of bytes of one archive.

    Attributes:
        utterances: the keys, in the order of feats.scp (or as they were asked for).
        num_units: how many there are.
        num_frames: int32 array, frames of each utterance; each has a label.
        total_frames: their sum.
        file_of: int32 array, the archive of each utterance: an index into `paths`.
        paths: the archives.
        begin: int64 array, byte offset of the first value of each utterance in its archive.
        end: int64 array, byte offset behind the last one. Of a row range in a matrix that is stored row by row
            only these rows count; CM is stored column by column, and counts whole.
        unit_bytes: int64 array, their difference.
        feat_dim: columns of the features.
        ivector_dim: elements of the i-vector of each chunk; 0 where there is none.
        num_targets: most labels of a frame.
        has_weights: whether labels have weights other than 1.
        num_without_labels: utterances that were left out because they have no labels.
        c_corpus: the C library's km_corpus.
    """

    utterances: list[str]
    num_units: int
    num_frames: NDArray[np.int32]
    total_frames: int
    file_of: NDArray[np.int32]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    unit_bytes: NDArray[np.int64]
    feat_dim: int
    ivector_dim: int
    num_targets: int
    has_weights: bool
    num_without_labels: int
    c_corpus: Any
    _scp: str
    _norm_of: NDArray[np.int32]  # only with normalisation

    @classmethod
    def open(
        cls,
        feats_scp: str | os.PathLike[str],
        labels: Mapping[str, NDArray[np.int32]],
        *,
        utterances: Sequence[str] | None = None,
        cmvn_scp: str | os.PathLike[str] | None = None,
        utt2spk: str | os.PathLike[str] | Mapping[str, str] | None = None,
        norm_means: bool = False,
        norm_vars: bool = False,
    ) -> Corpus:
        """Open the archives that feats.scp names, and check every header and length; no features are read.

        Args:
            feats_scp: lines ``key value``, where the value is ``path``, ``path:offset`` or ``command |``, each
                optionally with a range; or an rspecifier, ``scp:...`` or ``ark:...`` (see `tables.locate`). FM,
                DM, CM, CM2 or CM3 matrices, or text. Paths are relative to the working directory, as in Kaldi.
            labels: per utterance one label (pdf-id, >= 0) per frame; copied. Utterances without labels are
                left out and counted: a few fail in GMM alignment.
            utterances: take only these; by default all of feats.scp.
            cmvn_scp: statistics per speaker; needed with norm_means.
            utt2spk: file or mapping; without it cmvn_scp is by utterance.
            norm_means: subtract the speaker's mean.
            norm_vars: scale to unit variance too.

        Raises:
            DataError: anything in the files that does not fit; names file, key and byte offset.
            ConfigError: norm_vars without norm_means, or norm_means without cmvn_scp.
        """
        if norm_vars and not norm_means:
            raise ConfigError("--norm-vars=true needs --norm-means=true: Kaldi's apply-cmvn refuses it as well")
        if norm_means and cmvn_scp is None:
            raise ConfigError("--norm-means=true needs a cmvn.scp")
        corpus = cls()
        corpus._scp = os.fspath(feats_scp)
        corpus._locate(labels, utterances)
        corpus._open_archives()
        corpus._take_labels(labels)
        norms = None
        if norm_means and cmvn_scp is not None:
            speakers = speakers_of(corpus.utterances, utt2spk)
            wanted = sorted(set(speakers))
            norms = read_norms(cmvn_scp, wanted, corpus.feat_dim, norm_vars=norm_vars)
            number = {speaker: i for i, speaker in enumerate(wanted)}
            corpus._norm_of = np.array([number[speaker] for speaker in speakers], dtype=np.int32)
        corpus._lend(norms, norm_vars)
        return corpus

    def _locate(self, labels: Mapping[str, NDArray[np.int32]], utterances: Sequence[str] | None) -> None:
        """Choose the utterances and parse where their features are."""
        self._archives = Archives()
        wanted = labels.keys() if utterances is None else labels.keys() & set(utterances)
        table = locate(self._scp, self._archives, wanted=wanted)
        if utterances is not None:
            seen, known = set[str](), set(table.keys)
            for key in utterances:
                if key not in known:
                    raise DataError("the utterance is not in this file", file=self._scp, key=key)
                if key in seen:
                    raise DataError("the utterance is asked for twice", file=self._scp, key=key)
                seen.add(key)
        chosen = table.keys if utterances is None else list(utterances)
        self.utterances = [key for key in chosen if key in labels]
        self.num_without_labels = len(chosen) - len(self.utterances)
        if not self.utterances:
            raise DataError(f"none of its {len(chosen)} utterances has labels", file=self._scp)
        if self.num_without_labels:
            logger.warning(
                "%d of %d utterances of %s have no labels and are left out",
                self.num_without_labels,
                len(chosen),
                self._scp,
            )
        self._locations = [table.locations[key] for key in self.utterances]

    def _open_archives(self) -> None:
        count = len(self.utterances)
        self._matrices = ffi.new("km_matrix[]", count)
        self.file_of = np.empty(count, dtype=np.int32)
        self._first_row = np.array([location.first_row for location in self._locations], dtype=np.int32)
        self.num_frames = np.empty(count, dtype=np.int32)
        for i, (key, location) in enumerate(zip(self.utterances, self._locations, strict=True)):
            index = self._archives.open(location.path, named_in=self._scp, key=key)
            matrix = self._matrices + i
            self._archives.open_matrix(index, location.offset, matrix, key=key)
            self.file_of[i] = index
            self.num_frames[i] = rows_in_range(location, matrix.rows, file=self._scp, key=key)
            self._check_dim(key, location, matrix)
        self.feat_dim = int(self._matrices[0].cols)
        self.total_frames = int(self.num_frames.sum(dtype=np.int64))
        self._index = {key: i for i, key in enumerate(self.utterances)}
        self.num_units = count
        self.ivector_dim, self.num_targets, self.has_weights = 0, 1, False
        self._find_bytes()

    def _find_bytes(self) -> None:
        """Where the values of each utterance lie, headers not counted: these are in memory."""
        matrices = np.frombuffer(ffi.buffer(self._matrices), dtype=_MATRIX)
        value_bytes = np.ones(lib.KM_ROWS8 + 1, dtype=np.int64)
        value_bytes[lib.KM_FLOAT], value_bytes[lib.KM_DOUBLE], value_bytes[lib.KM_ROWS16] = 4, 8, 2
        row_bytes = matrices["cols"] * value_bytes[matrices["kind"]]
        by_column = matrices["kind"] == lib.KM_COLUMNS8
        percentiles = 8 * matrices["cols"].astype(np.int64)
        first = np.where(by_column, 0, self._first_row * row_bytes)
        size = np.where(by_column, percentiles + matrices["rows"] * row_bytes, self.num_frames * row_bytes)
        self.begin = matrices["data"] + first
        self.end = self.begin + size
        self.unit_bytes = size

    @property
    def paths(self) -> list[str]:
        return self._archives.paths

    def _check_dim(self, key: str, location: Location, matrix: Any) -> None:
        dim = self._matrices[0].cols
        if matrix.cols != dim:
            raise DataError(
                f"the features have dimension {matrix.cols}, and those of {self.utterances[0]} have {dim}",
                file=location.path,
                key=key,
                offset=location.offset,
            )

    def _take_labels(self, labels: Mapping[str, NDArray[np.int32]]) -> None:
        self._first_label = np.zeros(len(self.utterances), dtype=np.int64)
        np.cumsum(self.num_frames[:-1], dtype=np.int64, out=self._first_label[1:])
        self._labels = np.empty(self.total_frames, dtype=np.int32)
        for i, key in enumerate(self.utterances):
            values = np.asarray(labels[key])
            frames = int(self.num_frames[i])
            if values.ndim != 1 or values.dtype.kind not in "iu":
                raise DataError(f"labels are {values.dtype} {values.shape}, not a vector of integers", key=key)
            if len(values) != frames:
                raise DataError(
                    f"the alignment has {len(values)} frames and the features have {frames}",
                    file=self._scp,
                    key=key,
                )
            if values.min() < 0 or values.max() > np.iinfo(np.int32).max:
                raise DataError(f"label {values.min() if values.min() < 0 else values.max()} is not a pdf-id", key=key)
            self._labels[self._first_label[i] : self._first_label[i] + frames] = values

    def _lend(self, norms: NDArray[np.float32] | None, norm_vars: bool) -> None:
        """Build the C view of this corpus; everything that it points to is kept by `_lent`."""
        norm_of = self._norm_of if norms is not None else np.zeros(0, dtype=np.int32)
        fields = {
            "files": self._archives.table(),
            "file_of": borrow(self.file_of, "int32_t", np.int32),
            "matrices": self._matrices,
            "first_row": borrow(self._first_row, "int32_t", np.int32),
            "num_frames": borrow(self.num_frames, "int32_t", np.int32),
            "first_label": borrow(self._first_label, "int64_t", np.int64),
            "labels": borrow(self._labels, "int32_t", np.int32),
            "norm_of": borrow(norm_of, "int32_t", np.int32),
            "norms": ffi.NULL if norms is None else borrow(norms, "float", np.float32),
        }
        self._lent = fields
        sizes = {"num_utterances": len(self.utterances), "dim": self.feat_dim, "scales": int(norm_vars)}
        self.c_corpus = ffi.new("km_corpus *", {**fields, **sizes})
        for array in (self.num_frames, self.file_of, self.begin, self.end, self.unit_bytes, self._labels):
            array.flags.writeable = False

    def location_of(self, utterance: int) -> tuple[str, str]:
        """The archive and the key of an utterance, given by its index; for messages."""
        return self._locations[utterance].path, self.utterances[utterance]

    def features(self, key: str) -> NDArray[np.float32]:
        """All features of an utterance: (frames, feat_dim), normalised as the corpus was opened.

        Raises:
            DataError: the archive cannot be read, or holds what is not a number.
            KeyError: no such utterance.
        """
        i = self._index[key]
        out = np.empty((int(self.num_frames[i]), self.feat_dim), dtype=np.float32)
        error = new_error()
        if lib.km_corpus_features(self.c_corpus, i, borrow(out, "float", np.float32), error) != lib.KM_OK:
            raise_data_error(error, file=self._locations[i].path, key=key)
        return out

    def labels(self, key: str) -> NDArray[np.int32]:
        """The labels of an utterance: (frames,), read-only.

        Raises:
            KeyError: no such utterance.
        """
        i = self._index[key]
        first = int(self._first_label[i])
        return self._labels[first : first + int(self.num_frames[i])]
