"""A corpus: features on disk, labels in memory; normalisation, transforms and i-vectors as asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.scp import Location, rows_in_range
from kaldi_mpi.loader.ivectors import Ivectors
from kaldi_mpi.loader.labels import CorpusLabels, FrameLabels, Labels
from kaldi_mpi.loader.native import Archives, borrow, byte_ranges, ffi, lib, new_error, raise_data_error, struct_dtype
from kaldi_mpi.loader.tables import TableSource, locate, name_of
from kaldi_mpi.loader.transforms import DeltaOptions, Transform, make_transform, read_norms, speakers_of
from kaldi_mpi.log import logger


class _LeftOut:
    """Utterances that are left out because something is wrong with them: up to `limit`."""

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ConfigError(f"number of bad utterances to skip is {limit}, and must be at least 0")
        self.limit = limit
        self.keys: set[str] = set()

    def add(self, key: str, error: DataError) -> None:
        """Warn, or raise the error if it is one too many."""
        if len(self.keys) < self.limit:
            self.keys.add(key)
            logger.warning("left out: %s", error)
        elif self.limit == 0:
            raise error
        else:
            cause = f"{error.cause} (and {self.limit} bad utterances, which is the limit, have been left out before)"
            raise DataError(cause, file=error.file, key=error.key, offset=error.offset) from error


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
        unit_bytes: int64 array, their difference, and the bytes of the utterance's i-vectors, which are read ahead
            with it.
        feat_dim: columns of the features, as chunks have them.
        ivector_dim: elements of the i-vector of each chunk; 0 where there is none.
        num_targets: most labels of a frame.
        has_weights: whether labels have weights other than 1.
        num_without_labels: utterances that were left out because they have no labels.
        num_bad: utterances that were left out because something is wrong with them.
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
    num_bad: int
    c_corpus: Any
    _scp: str
    _left_out: _LeftOut
    _archives: Archives
    _files: list[str]  # of each utterance, as it is called in messages
    _first_row: NDArray[np.int32]
    _matrices: NDArray[np.void]
    _ivectors: Ivectors | None
    _labels: CorpusLabels
    _input_dim: int

    @classmethod
    def open(
        cls,
        feats_scp: TableSource,
        labels: Labels | Mapping[str, FrameLabels] | Iterable[tuple[str, FrameLabels]],
        *,
        utterances: Sequence[str] | None = None,
        cmvn_scp: TableSource | None = None,
        utt2spk: str | os.PathLike[str] | Mapping[str, str] | None = None,
        norm_means: bool = False,
        norm_vars: bool = False,
        skip_dims: Sequence[int] = (),
        deltas: DeltaOptions | None = None,
        splice: tuple[int, int] | None = None,
        online_ivector_dir: str | os.PathLike[str] | None = None,
        skip_bad: int = 0,
    ) -> Corpus:
        """Open the archives that feats.scp names, and check every header and length; no features are read.

        Features are normalised, and then transformed, as by ``apply-cmvn | add-deltas`` or ``apply-cmvn |
        splice-feats``; chunks are cut from the result.

        Args:
            feats_scp: lines ``key value``, where the value is ``path``, ``path:offset`` or ``command |``, each
                optionally with a range; or an rspecifier, ``scp:...`` or ``ark:...`` (see `tables.locate`). FM,
                DM, CM, CM2 or CM3 matrices, or text. Paths are relative to the working directory, as in Kaldi.
                Of a script file also what `formats.scp.read_table` has read, so that several corpora need not
                read it again; the same holds for `cmvn_scp` and `utt2spk`.
            labels: per utterance one label (pdf-id, >= 0) per frame, or posteriors (`Posterior`); copied, at
                two bytes a frame (four if an id exceeds 65535). A mapping; or pairs of key and labels in any
                order, of which only one at a time need be in memory; or `Labels`, which several corpora share
                without a copy. Utterances without labels are left out and counted: a few fail in GMM alignment.
            utterances: take only these; by default all of feats.scp.
            cmvn_scp: statistics per speaker; needed with norm_means.
            utt2spk: file or mapping; without it cmvn_scp is by utterance.
            norm_means: subtract the speaker's mean.
            norm_vars: scale to unit variance too.
            skip_dims: columns that are not normalised.
            deltas: append derivatives.
            splice: (left, right): put each frame's neighbours beside it.
            online_ivector_dir: directory with ``ivector_online.scp`` and ``ivector_period``; each chunk then
                has an i-vector of one of its frames (see `Ivectors`).
            skip_bad: so many utterances may be left out, with a warning each, because their features or
                i-vectors cannot be opened or their labels do not fit.

        Raises:
            DataError: anything in the files that does not fit; names file, key and byte offset.
            ConfigError: norm_vars without norm_means, norm_means without cmvn_scp, both deltas and splice, or
                options of these out of range.
        """
        if norm_vars and not norm_means:
            raise ConfigError("--norm-vars=true needs --norm-means=true: Kaldi's apply-cmvn refuses it as well")
        if norm_means and cmvn_scp is None:
            raise ConfigError("--norm-means=true needs a cmvn.scp")
        corpus = cls()
        corpus._scp, corpus._left_out = name_of(feats_scp), _LeftOut(skip_bad)
        labelled = labels if isinstance(labels, Labels | Mapping) else None
        locations = corpus._locate(feats_scp, labelled, utterances)
        corpus._open_archives(locations)
        transform = make_transform(deltas, splice, corpus._input_dim)
        corpus._open_ivectors(online_ivector_dir)
        corpus._add_labels(labels)
        norms = norm_of = None
        if norm_means and cmvn_scp is not None:
            speakers = speakers_of(corpus.utterances, utt2spk)
            wanted = sorted(set(speakers))
            norms = read_norms(cmvn_scp, wanted, corpus._input_dim, norm_vars=norm_vars, skip_dims=skip_dims)
            number = {speaker: i for i, speaker in enumerate(wanted)}
            norm_of = np.array([number[speaker] for speaker in speakers], dtype=np.int32)
        corpus._lend(transform, norms, norm_of, norm_vars)
        return corpus

    def _locate(
        self, feats_scp: TableSource, labelled: Collection[str] | None, utterances: Sequence[str] | None
    ) -> list[Location]:
        """Choose the utterances, of those that are `labelled` if that is known, and find their features."""
        self._archives = Archives()
        wanted = None if utterances is None else set(utterances)
        if labelled is not None:
            wanted = set(labelled) if wanted is None else {key for key in wanted if key in labelled}
        on_bad = self._left_out.add if self._left_out.limit else None
        table = locate(feats_scp, self._archives, wanted=wanted, on_bad=on_bad)
        if utterances is not None:
            seen, known = set[str](), set(table.keys)
            for key in utterances:
                if key not in known:
                    raise DataError("the utterance is not in this file", file=self._scp, key=key)
                if key in seen:
                    raise DataError("the utterance is asked for twice", file=self._scp, key=key)
                seen.add(key)
        chosen = table.keys if utterances is None else list(utterances)
        with_labels = chosen if labelled is None else [key for key in chosen if key in labelled]
        self.num_without_labels = len(chosen) - len(with_labels)
        if not with_labels:
            raise DataError(f"none of its {len(chosen)} utterances has labels", file=self._scp)
        self.utterances = [key for key in with_labels if key in table.locations]
        return [table.locations[key] for key in self.utterances]

    def _open_archives(self, locations: list[Location]) -> None:
        """Read the headers of the features."""
        count, header = len(locations), ffi.new("km_matrix *")
        self._files = [sys.intern(location.path) for location in locations]
        self._matrices = np.zeros(count, dtype=struct_dtype("km_matrix"))
        self._first_row = np.array([location.first_row for location in locations], dtype=np.int32)
        self.file_of, self.num_frames = np.zeros(count, dtype=np.int32), np.zeros(count, dtype=np.int32)
        self._input_dim, first = 0, ""
        for i, (key, location) in enumerate(zip(self.utterances, locations, strict=True)):
            try:
                index = self._archives.open(location.path, named_in=self._scp, key=key)
                self._archives.open_matrix(index, location.offset, header, key=key)
                rows = rows_in_range(location, header.rows, file=self._scp, key=key)
                if self._input_dim not in (0, header.cols):
                    cause = f"the features have dimension {header.cols}, and those of {first} have {self._input_dim}"
                    raise DataError(cause, file=location.path, key=key, offset=location.offset)
            except DataError as error:
                self._left_out.add(key, error)
                continue
            if not first:
                first, self._input_dim = key, int(header.cols)
            self._matrices[i : i + 1] = np.frombuffer(ffi.buffer(header), dtype=self._matrices.dtype)
            self.file_of[i], self.num_frames[i] = index, rows

    def _good(self) -> list[tuple[int, str]]:
        """Indices and keys of the utterances that have not been left out so far."""
        return [(i, key) for i, key in enumerate(self.utterances) if key not in self._left_out.keys]

    def _open_ivectors(self, directory: str | os.PathLike[str] | None) -> None:
        """Read the headers of the i-vectors."""
        self._ivectors = None
        if directory is None:
            return
        on_bad = self._left_out.add if self._left_out.limit else None
        good = self._good()
        self._ivectors = Ivectors(directory, len(self.utterances), wanted={key for _, key in good}, on_bad=on_bad)
        for i, key in self._good():
            try:
                self._ivectors.add(i, key, int(self.num_frames[i]))
            except DataError as error:
                self._left_out.add(key, error)

    def _add_labels(self, labels: Labels | Mapping[str, FrameLabels] | Iterable[tuple[str, FrameLabels]]) -> None:
        """Copy the labels, unless they are shared, and forget all utterances that have none or have been left out."""
        frames_of = {key: int(self.num_frames[i]) for i, key in self._good()}
        labelled: set[str] = set()
        if isinstance(labels, Labels):
            own, labelled = labels, set(frames_of)
            for key, frames in frames_of.items():
                try:
                    own.check_frames(key, frames, file=self._scp)
                except DataError as error:
                    self._left_out.add(key, error)
        else:
            own = Labels()
            for key, values in ((key, labels[key]) for key in frames_of) if isinstance(labels, Mapping) else labels:
                if key not in frames_of:
                    continue
                if key in labelled:
                    raise DataError("labels of this utterance come twice", key=key)
                labelled.add(key)
                try:
                    own.add(key, values, frames=frames_of[key], file=self._scp)
                except DataError as error:
                    self._left_out.add(key, error)
        self.num_without_labels += len(frames_of) - len(labelled)
        kept = np.array([i for i, key in self._good() if key in labelled], dtype=np.intp)
        self.num_bad = len(self._left_out.keys)
        if not kept.size:
            raise DataError(
                f"no utterance is left: {self.num_without_labels} have no labels and {self.num_bad} are bad",
                file=self._scp,
            )
        if self.num_without_labels:
            total = self.num_without_labels + self.num_bad + len(kept)
            message = "%d of %d utterances of %s have no labels and are left out"
            logger.warning(message, self.num_without_labels, total, self._scp)
        self._keep(kept)
        self._labels = own.of(self.utterances)
        self.num_targets, self.has_weights = self._labels.num_targets, self._labels.weights is not None

    def _keep(self, kept: NDArray[np.intp]) -> None:
        self.utterances = [self.utterances[i] for i in kept]
        self._files = [self._files[i] for i in kept]
        self._matrices, self._first_row = self._matrices[kept], self._first_row[kept]
        self.file_of, self.num_frames = self.file_of[kept], self.num_frames[kept]
        if self._ivectors is not None:
            self._ivectors.finish(kept)
        self.ivector_dim = 0 if self._ivectors is None else self._ivectors.dim
        self.begin, self.end = byte_ranges(self._matrices, self._first_row, self.num_frames)
        self.unit_bytes = self.end - self.begin
        if self._ivectors is not None:
            self.unit_bytes += self._ivectors.end - self._ivectors.begin
        self.num_units = len(self.utterances)
        self.total_frames = int(self.num_frames.sum(dtype=np.int64))
        self._index = {key: i for i, key in enumerate(self.utterances)}

    def _lend(
        self,
        transform: Transform | None,
        norms: NDArray[np.float32] | None,
        norm_of: NDArray[np.int32] | None,
        norm_vars: bool,
    ) -> None:
        """Build the C view of this corpus; everything that it points to is kept by `_lent`."""
        labels, kept = self._labels.lend()
        ivectors, more = ({"dim": 0}, []) if self._ivectors is None else self._ivectors.lend()
        c_transform, taps = (ffi.NULL, []) if transform is None else transform.lend()
        self.feat_dim = self._input_dim if transform is None else transform.dim
        fields = {
            "files": self._archives.table(),
            "file_of": borrow(self.file_of, "int32_t", np.int32),
            "matrices": ffi.from_buffer("km_matrix[]", self._matrices),
            "first_row": borrow(self._first_row, "int32_t", np.int32),
            "num_frames": borrow(self.num_frames, "int32_t", np.int32),
            "norm_of": ffi.NULL if norm_of is None else borrow(norm_of, "int32_t", np.int32),
            "norms": ffi.NULL if norms is None else borrow(norms, "float", np.float32),
            "transform": c_transform,
        }
        self._lent = [*kept, *more, *taps, *fields.values()]
        sizes = {"num_utterances": self.num_units, "dim": self.feat_dim, "input_dim": self._input_dim}
        parts = {"scales": int(norm_vars), "labels": labels, "ivectors": ivectors}
        self.c_corpus = ffi.new("km_corpus *", {**fields, **sizes, **parts})
        for array in (self.num_frames, self.file_of, self.begin, self.end, self.unit_bytes):
            array.flags.writeable = False

    @property
    def paths(self) -> list[str]:
        return self._archives.paths

    def location_of(self, utterance: int) -> tuple[str, str]:
        """The archive and the key of an utterance, given by its index; for messages.

        From `num_units` on, the indices are of the utterances' i-vectors.
        """
        if utterance >= self.num_units:
            assert self._ivectors is not None  # only its errors have such indices
            i = utterance - self.num_units
            return self._ivectors.path_of(i), self.utterances[i]
        return self._files[utterance], self.utterances[utterance]

    def features(self, key: str) -> NDArray[np.float32]:
        """All features of an utterance: (frames, feat_dim), normalised and transformed as the corpus was opened.

        Raises:
            DataError: the archive cannot be read, or holds what is not a number.
            KeyError: no such utterance.
        """
        i = self._index[key]
        out = np.empty((int(self.num_frames[i]), self.feat_dim), dtype=np.float32)
        error = new_error()
        if lib.km_corpus_features(self.c_corpus, i, borrow(out, "float", np.float32), error) != lib.KM_OK:
            raise_data_error(error, file=self._files[i], key=key)
        return out

    def labels(self, key: str) -> NDArray[np.int32]:
        """The labels of an utterance: (frames,); or (frames, num_targets), with -1 where there is none.

        Raises:
            KeyError: no such utterance.
        """
        return self._labels.labels_of(self._index[key])

    def weights(self, key: str) -> NDArray[np.float32] | None:
        """The weights of these labels, in the same shape, 0 where there is no label; None if all are 1.

        Raises:
            KeyError: no such utterance.
        """
        return self._labels.weights_of(self._index[key])
