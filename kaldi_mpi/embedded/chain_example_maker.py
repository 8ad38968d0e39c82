"""Chain examples of an utterance: its phones become supervision, chunks are cut out of that and of the features."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.chain.phone_hmm import PhoneHmms
from kaldi_mpi.chain.supervision import (
    PhoneLattice,
    SupervisionOptions,
    make_supervision,
    phones_of_alignment,
    phones_of_lattice,
)
from kaldi_mpi.chain.supervision_chunks import ChunkCutter, Normaliser
from kaldi_mpi.embedded.chain_chunks import Chunk, ChunkWidths
from kaldi_mpi.embedded.cmvn import speaker_cmvn
from kaldi_mpi.embedded.datadir import DataDir, read_table
from kaldi_mpi.embedded.features import read_matrix
from kaldi_mpi.embedded.phone_times import PhoneTimes
from kaldi_mpi.errors import DataError
from kaldi_mpi.files import read_number
from kaldi_mpi.formats.chain_example import ChainExample, chain_example_bytes
from kaldi_mpi.formats.cmvn_options import CmvnOptions
from kaldi_mpi.formats.compressed_matrix import CompressedMatrix
from kaldi_mpi.formats.fst import Fst, read_fst
from kaldi_mpi.formats.lattice import parse_compact_lattice
from kaldi_mpi.formats.scp import Location, parse_location
from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.formats.tree import read_tree
from kaldi_mpi.loader import read_alignments
from kaldi_mpi.log import logger

_LENGTH_TOLERANCE = 1  # output frames; nnet3-chain-get-egs' default


@dataclass(frozen=True)
class ExampleOptions:
    """How examples are made.

    Attributes:
        widths: of chunks, and the frame subsampling factor.
        left, right: input frames before and after a chunk.
        left_initial, right_final: the same before an utterance's first and after its last chunk; -1: no others.
        supervision: tolerances; its factor is that of the alignments.
        constrained: whether phones keep their times within a chunk.
        compress: whether inputs are compressed.
        seed: of what is drawn: covers, gaps, frames of i-vectors.
    """

    widths: ChunkWidths
    left: int = 4
    right: int = 4
    left_initial: int = -1
    right_final: int = -1
    supervision: SupervisionOptions = field(default_factory=SupervisionOptions)
    constrained: bool = True
    compress: bool = True
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Ivectors:
    """Those of an utterance: (n, I) float32, one for every `period` frames."""

    rows: NDArray[np.float32]
    period: int


class ExampleMaker:
    """Makes the examples of one utterance after the other.

    Args:
        hmms: of the chain tree.
        normalization_fst: read from normalization.fst; its costs are scaled by 1 - the lattices' scale.
        options: what to make.

    Attributes:
        dropped: reasons, and how many utterances or chunks gave no example for it.
    """

    def __init__(self, hmms: PhoneHmms, normalization_fst: Fst, options: ExampleOptions) -> None:
        self._hmms, self._options = hmms, options
        self._normaliser = Normaliser(normalization_fst, 1.0 - options.supervision.lm_scale)
        self.dropped: Counter[str] = Counter()

    def make(
        self,
        key: str,
        feats: NDArray[np.float32] | CompressedMatrix,
        phones: PhoneLattice,
        ivectors: Ivectors | None = None,
        chunks: Sequence[Chunk] | None = None,
    ) -> list[tuple[str, bytes]]:
        """The examples of an utterance.

        Args:
            key: the utterance.
            feats: (frames, D) float32, normalised; or as they lie in a file, where they are compressed.
            phones: what it may have.
            ivectors: one of a labelled frame of a chunk, drawn, goes with it.
            chunks: which ones; by default those that `ChunkWidths` draws.

        Returns:
            Key (``UTT-FIRSTFRAME``) and entry of each; where something is missing, `dropped` says why.

        Raises:
            DataError: features that are not finite, or a phone that the tree does not know.
        """
        options, factor = self._options, self._options.widths.factor
        if not isinstance(feats, CompressedMatrix) and not np.isfinite(feats).all():
            raise DataError("its features are not all finite", key=key)
        supervision = make_supervision(
            phones, self._hmms, options.supervision, transition_ids=not options.constrained, key=key
        )
        if supervision is None:
            self.dropped["utterances with more phones than output frames"] += 1
            return []
        labelled = supervision.frames_per_sequence
        if abs(labelled + len(feats) // -factor) > _LENGTH_TOLERANCE:
            logger.warning("%s: %d frames, and labels of %d output frames", key, len(feats), labelled)
            self.dropped["utterances whose labels and features differ in length"] += 1
            return []
        rng = np.random.default_rng([options.seed, zlib.crc32(key.encode())])
        if chunks is None:
            chunks = options.widths.chunks(min(len(feats), labelled * factor), rng)
            if not chunks:
                self.dropped["utterances shorter than all widths"] += 1
        cutter, found = ChunkCutter(supervision, key=key), []
        for chunk in chunks:
            part = cutter.cut(chunk.first // factor, chunk.frames // factor)
            if options.constrained:
                normalised = self._normaliser.constrained(part)
            else:
                normalised = self._normaliser.unconstrained(part, self._hmms, rng)
            ivector = None if ivectors is None else _ivector_within(ivectors, chunk, rng)
            if normalised is None:
                self.dropped["chunks that normalization.fst does not know"] += 1
                continue
            left, rows = self._rows(feats, chunk)
            example = ChainExample(rows, left, normalised, chunk.weights, factor, ivector)
            name = f"{key}-{chunk.first}"
            found.append((name, chain_example_bytes(name, example, compress=options.compress)))
        return found

    def _rows(
        self, feats: NDArray[np.float32] | CompressedMatrix, chunk: Chunk
    ) -> tuple[int, NDArray[np.float32] | CompressedMatrix]:
        """The left context, and the input rows; beyond the utterance's ends they repeat its first and last frame."""
        options = self._options
        left = options.left_initial if chunk.is_first and options.left_initial >= 0 else options.left
        right = options.right_final if chunk.is_last and options.right_final >= 0 else options.right
        times = np.arange(chunk.first - left, chunk.first + chunk.frames + right)
        return left, feats[np.clip(times, 0, len(feats) - 1)]


def _ivector_within(ivectors: Ivectors, chunk: Chunk, rng: np.random.Generator) -> NDArray[np.float32]:
    # Of a labelled frame, as the loader draws it: nnet3-chain-get-egs' own often lies far behind the chunk.
    frame = int(rng.integers(chunk.first, chunk.first + chunk.frames))
    row: NDArray[np.float32] = ivectors.rows[min(frame // ivectors.period, len(ivectors.rows) - 1)]
    return row


@dataclass(frozen=True)
class MakerTask:
    """What a process needs to start.

    Attributes:
        data_dir: features, CMVN statistics and speakers.
        chain_dir: tree, 0.trans_mdl and normalization.fst.
        source_dir: where the final.mdl of the alignments is.
        sources: this process's files of alignments (``ali.1.gz``) or phone lattices (``lat.1.gz``).
        ivector_dir: None: without i-vectors.
        cmvn: how features are normalised.
        options: what to make.
        path: where the examples go.
    """

    data_dir: str
    chain_dir: str
    source_dir: str
    sources: Sequence[str]
    ivector_dir: str | None
    cmvn: CmvnOptions
    options: ExampleOptions
    path: str


class Entry(NamedTuple):
    """An example in a file of a process: utterance, number of the chunk, offset and bytes of the entry."""

    utterance: str
    number: int
    offset: int
    size: int


@dataclass
class Made:
    """What became of some utterances.

    Attributes:
        entries: the examples.
        utterances: those in the alignments or lattices.
        frames: input frames of those that have features.
        feat_dim, ivector_dim: columns; 0: there was nothing to see it from.
        dropped: as in `ExampleMaker`.
    """

    entries: list[Entry]
    utterances: list[str]
    frames: int
    feat_dim: int
    ivector_dim: int
    dropped: Counter[str]


class JobMaker:
    """Makes the examples of whole files of alignments or lattices: one process's part of the work.

    Raises:
        DataError: a file is missing or malformed.
    """

    def __init__(self, task: MakerTask) -> None:
        self._task = task
        chain, data = Path(task.chain_dir), DataDir(task.data_dir)
        hmms = PhoneHmms(read_tree(chain / "tree"), read_transition_model(chain / "0.trans_mdl"))
        self._maker = ExampleMaker(hmms, read_fst(chain / "normalization.fst"), task.options)
        self._scp, self._feats = data.file("feats.scp"), data.feats_scp
        self._normalise = speaker_cmvn(data, task.cmvn)
        self._as_they_are = task.options.compress and not (task.cmvn.norm_means or task.cmvn.norm_vars)
        self._ivectors: dict[str, str] | None = None
        if task.ivector_dir is not None:
            self._ivector_scp = str(Path(task.ivector_dir, "ivector_online.scp"))
            self._ivectors = read_table(self._ivector_scp)
            self._period = read_number(Path(task.ivector_dir, "ivector_period"), what="a number of frames", low=1)

    def make(self) -> Made:
        """Write the examples of all utterances.

        Raises:
            DataError: something in the data is wrong, or the file cannot be written.
        """
        made, at = Made([], [], 0, 0, 0, self._maker.dropped), 0
        try:
            with open(self._task.path, "wb") as stream:
                for source in self._task.sources:
                    for key, phones in self._phones(source):
                        made.utterances.append(key)
                        for number, entry in enumerate(self._examples(key, phones, made)):
                            stream.write(entry)
                            made.entries.append(Entry(key, number, at, len(entry)))
                            at += len(entry)
        except OSError as error:
            raise DataError(f"cannot write: {error.strerror or error}", file=self._task.path) from error
        return made

    def _examples(self, key: str, phones: PhoneLattice, made: Made) -> list[bytes]:
        if key not in self._feats:
            made.dropped["utterances without features"] += 1
            return []
        feats = self._features(key)
        if feats.shape[1] != (made.feat_dim or feats.shape[1]):
            raise DataError(
                f"features of dimension {feats.shape[1]} after others of {made.feat_dim}", file=self._scp, key=key
            )
        made.feat_dim = feats.shape[1]
        made.frames += len(feats)
        ivectors = self._ivectors_of(key)
        if ivectors is not None:
            made.ivector_dim = ivectors.rows.shape[1]
        return [entry for _, entry in self._maker.make(key, feats, phones, ivectors)]

    def _features(self, key: str) -> NDArray[np.float32] | CompressedMatrix:
        """Normalised. Where that changes nothing, compressed ones stay what they are, as in Kaldi."""
        place = parse_location(self._feats[key], file=self._scp, key=key)
        whole = place == Location(place.path, place.offset)
        if self._as_they_are and whole and not place.is_command:
            found = CompressedMatrix.read(place.path, place.offset, key=key)
            if found is not None:
                return found
        return self._normalise(key, read_matrix(self._feats[key], file=self._scp, key=key))

    def _ivectors_of(self, key: str) -> Ivectors | None:
        if self._ivectors is None:
            return None
        if key not in self._ivectors:
            raise DataError("the utterance has no i-vectors", file=self._ivector_scp, key=key)
        return Ivectors(read_matrix(self._ivectors[key], file=self._ivector_scp, key=key), self._period)

    def _phones(self, source: str) -> Iterator[tuple[str, PhoneLattice]]:
        """Each utterance's phones."""
        if Path(source).name.startswith("lat."):
            yield from phone_lattices(source)
            return
        times = PhoneTimes(read_transition_model(Path(self._task.source_dir, "final.mdl")), source)
        for key, tids in read_alignments(source).items():
            yield key, phones_of_alignment(times.of(key, tids), file=source, key=key)


def phone_lattices(path: str) -> Iterator[tuple[str, PhoneLattice]]:
    """The lattices of an archive whose arcs are phones, gzipped or not.

    Raises:
        DataError: it cannot be read, or its lattices are ordinary ones, with words.
    """
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read: {error}", file=path) from error
    at = 0
    while at < len(data):
        space = data.find(b" ", at)
        key = data[at : max(space, at)].decode("utf-8", "replace")
        if not key:
            raise DataError("a key and a lattice are expected", file=path, offset=at)
        lattice, at = parse_compact_lattice(data, space + 1, file=path, key=key)
        try:
            phones = phones_of_lattice(lattice, file=path, key=key)
        except DataError as error:
            cause = (
                f"{error.cause} (Kaldi's lattice-align-phones --replace-output-symbols=true makes lattices of phones)"
            )
            raise DataError(cause, file=path, key=key) from error
        yield key, phones
