"""Examples of chain (LF-MMI) training on disk as a source of minibatches: an egs directory and its frame shifts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader.chunks import ChunkShape
from kaldi_mpi.loader.egs_index import key_before
from kaldi_mpi.loader.examples import THREADS, EgsInfo, OpenedEgs, Paths
from kaldi_mpi.loader.minibatch import ChainSupervision, Sizes, graph_sizes, lend, new_buffer, supervision_of, view
from kaldi_mpi.loader.native import Archives, borrow, ffi, lib, new_error, raise_data_error

_MOST_STATES = 2**31 - 1


def frame_shift(archive: int, number: int, factor: int) -> int:
    """The ``--frame-shift`` with which Kaldi's chain training reads an archive, from 0 to `factor` - 1.

    In as many passes as the factor each archive comes once with each shift (steps/nnet3/chain/train.py).

    Args:
        archive: its number, from 1.
        number: of the pass over all archives, from 0.
        factor: the frame subsampling factor.
    """
    return (archive + number) % factor


def shifted(shape: ChunkShape, shift: int) -> ChunkShape:
    """The shape of chunks after a frame shift, as nnet3-chain-copy-egs makes it: the times of the input get later by
    the shift, and those of the output by the nearest multiple of the subsampling factor.

    Raises:
        ConfigError: the chunks have too few rows before or after the labels.
    """
    factor = shape.subsampling
    later = (2 * shift + factor) // (2 * factor) * factor - shift  # output against input
    return dataclasses.replace(shape, left=shape.left + later, right=shape.right - later)


@dataclass
class ChainUnit:
    """One unit, decoded.

    Attributes:
        feats: float32 (sequences, rows, feat_dim).
        ivectors: float32 (sequences, ivector_dim), or None.
        supervision: of these sequences.
    """

    feats: NDArray[np.float32]
    ivectors: NDArray[np.float32] | None
    supervision: ChainSupervision[NDArray[Any]]


class ChainExamples:
    """The chunks of an egs directory of chain training, which stay on disk. Make one with `ChainExamples.open`.

    A unit is an example; where Kaldi has merged it already, a minibatch as it stands.

    With frame shifts an epoch has as many passes over all units as the frame subsampling factor, and in each of them
    the chunks of an archive are shifted by another number of frames, in Kaldi's order. Chunks that are shifted
    differently never share a minibatch: they are groups of their own.

    Attributes:
        num_units: how many there are.
        passes: how many of them make an epoch.
        frame_subsampling_factor: input frames for each output frame.
        shapes: of each group of chunks: their shape, without a shift. Chunks of a group share minibatches.
        shape_of: int32 array, the group of each unit: an index into `shapes`.
        num_frames: int32 array, output frames of each unit, of all its sequences together.
        total_frames: those of an epoch: their sum, times `passes`.
        file_of: int32 array, the archive of each unit: an index into `paths`.
        paths: the archives.
        begin: int64 array, byte offset of each unit in its archive (of its ``\\0B``).
        end: int64 array, byte offset behind it.
        unit_bytes: int64 array, their difference.
        weight: float32 array, of the supervision of each unit.
        states, arcs: int32 arrays, of the FSTs of each unit.
        feat_dim: columns of ``input``.
        ivector_dim: columns of ``ivector``; 0: there is none.
        num_pdfs: labels of the supervision.
        end2end: whether each sequence has an FST of its own, maybe with cycles.
        num_targets: 0, because there are no labels.
        has_weights: whether a derivative weight other than 1 occurs.
        num_without_labels: 0.
        num_bad: examples that were left out because they are malformed.
        c_chain: the C library's km_chain_examples.
    """

    num_targets = 0
    num_without_labels = 0
    passes: int
    frame_subsampling_factor: int
    _archives: Archives

    @classmethod
    def open(
        cls,
        source: Paths,
        *,
        frame_subsampling_factor: int = 3,
        shifts: bool = True,
        output: str = "output",
        index_cache: str | os.PathLike[str] | None = None,
        threads: int = THREADS,
        skip_bad: int = 0,
    ) -> ChainExamples:
        """Open archives of chain examples, and find all chunks by one pass over them, or from a file with the index.

        Args:
            source: a directory as ``steps/nnet3/chain/get_egs.sh`` leaves it (``cegs.1.ark``, ...), of which
                ``info`` is checked as well; one archive (``combine.cegs``); or a list of them, which are numbered in
                this order.
            frame_subsampling_factor: that of the examples.
            shifts: False: an epoch is one pass, without frame shifts.
            output: name of the output whose supervision counts; other outputs are passed over.
            index_cache, threads, skip_bad: as for `Examples.open`.

        Raises:
            DataError: an archive is missing or malformed, or does not fit the others, ``info`` or the subsampling
                factor; or chunks have too few rows for frame shifts. Names archive, key and byte offset.
            ConfigError: an argument that is not possible.
        """
        if not 1 <= frame_subsampling_factor < 2**16:
            raise ConfigError(f"frame subsampling factor is {frame_subsampling_factor}, and must be at least 1")
        opened = OpenedEgs.open(source, output, index_cache, threads, skip_bad, chain=True)
        examples = cls()
        examples._archives = opened.archives
        examples.frame_subsampling_factor = frame_subsampling_factor
        examples.passes = frame_subsampling_factor if shifts else 1
        examples._use(opened, output)
        if opened.info is not None:
            examples._check_info(opened.info)
        return examples

    def _use(self, opened: OpenedEgs, output: str) -> None:
        """Keep the index, and build the C view of it."""
        index = opened.index
        assert index.states is not None and index.arcs is not None and index.weight is not None
        self.paths = opened.paths
        self.num_units = len(index.begin)
        self.file_of, self.begin, self.end = index.file_of, index.begin, index.end
        self.unit_bytes = self.end - self.begin
        self.num_frames = index.frames
        self.total_frames = self.passes * int(self.num_frames.sum(dtype=np.int64))
        self.states, self.arcs, self.weight = index.states, index.arcs, index.weight
        self.feat_dim, self.ivector_dim, self.num_pdfs = index.feat_dim, index.ivector_dim, index.num_pdfs
        self.has_weights, self.end2end, self.num_bad = index.has_weights, index.end2end, index.num_bad
        structures = [self._structure(i, index.shapes[i], index.shape_of) for i in range(len(index.shapes))]
        # Archives that are shifted alike in every pass.
        kind_of = (self.file_of + 1) % self.passes
        groups, self.shape_of = np.unique(index.shape_of * self.passes + kind_of, return_inverse=True)
        self.shape_of = self.shape_of.astype(np.int32)
        self.shapes = [structures[int(group) // self.passes] for group in groups]
        self._kinds = [int(group) % self.passes for group in groups]
        self._order = np.argsort(self.shape_of, kind="stable")
        self._first = np.searchsorted(self.shape_of[self._order], np.arange(len(groups) + 1))
        # Lent to C for as long as this object lives.
        self._lent = {
            "output": ffi.new("char[]", output.encode()),
            "files": opened.files,
            "file_of": borrow(self.file_of, "int32_t", np.int32),
            "begin": borrow(self.begin, "int64_t", np.int64),
            "end": borrow(self.end, "int64_t", np.int64),
            "states": borrow(self.states, "int32_t", np.int32),
            "arcs": borrow(self.arcs, "int32_t", np.int32),
            "weights": borrow(self.weight, "float", np.float32),
        }
        sizes = {name: getattr(self, name) for name in ("num_units", "feat_dim", "ivector_dim", "num_pdfs", "end2end")}
        self.c_chain = ffi.new("km_chain_examples *", {**self._lent, **sizes})
        for array in (self.file_of, self.begin, self.end, self.num_frames, self.shape_of, self.unit_bytes, self.states,
                      self.arcs, self.weight):  # fmt: skip
            array.flags.writeable = False

    def _structure(self, number: int, shape: NDArray[np.int32], shape_of: NDArray[np.int32]) -> ChunkShape:
        """The shape of some chunks, of which all that is asked of them is checked."""
        width, left, right, subsampling, sequences = map(int, shape)
        unit = int(np.flatnonzero(shape_of == number)[0])
        wanted = self.frame_subsampling_factor
        if width > 1 and subsampling != wanted:
            file, key = self.location_of(unit)
            cause = f"output frames are {subsampling} input frames apart, and the frame subsampling factor is {wanted}"
            raise DataError(cause, file=file, key=key, offset=int(self.begin[unit]))
        found = ChunkShape(width, left, right, subsampling=wanted, sequences=sequences)
        for shift in range(self.passes):
            try:
                shifted(found, shift)
            except ConfigError as error:
                file, key = self.location_of(unit)
                cause = f"{left} rows before the first output frame and {right} after the last: too few for a shift of"
                offset = int(self.begin[unit])
                raise DataError(f"{cause} {shift} frames", file=file, key=key, offset=offset) from error
        return found

    def _check_info(self, info: EgsInfo) -> None:
        info.check("feat_dim", self.feat_dim)
        info.check("ivector_dim", self.ivector_dim)
        info.check("num_pdfs", self.num_pdfs)
        for shape in self.shapes:
            info.check_context(shape)

    def location_of(self, unit: int) -> tuple[str, str]:
        """The archive and the key of a unit; for messages (the key is read from the archive)."""
        path = self.paths[int(self.file_of[unit])]
        return path, key_before(path, int(self.begin[unit]))

    def shape_of_pass(self, group: int, number: int) -> ChunkShape:
        """The shape of a group's chunks, one by one, in a pass: shifted.

        Args:
            group: an index into `shapes`.
            number: of the pass, counted from the training's first.
        """
        one = dataclasses.replace(self.shapes[group], sequences=1)
        return shifted(one, frame_shift(self._kinds[group], number, self.passes))

    def _units_of(self, group: int) -> NDArray[np.int64]:
        return self._order[self._first[group] : self._first[group + 1]]

    def check_minibatches(self, sizes: Sequence[int] | NDArray[np.int32]) -> None:
        """Check that all chunks of a minibatch have the same weight, as Kaldi does.

        Args:
            sizes: of each group, how many of its units make a minibatch.

        Raises:
            DataError: they need not have; names one unit, and another one in the cause.
        """
        for group, size in enumerate(sizes):
            units = self._units_of(group)
            weights = self.weight[units]
            others = np.flatnonzero(weights != weights[0])
            if size > 1 and others.size:
                file, key = self.location_of(int(units[others[0]]))
                other_file, other_key = self.location_of(int(units[0]))
                where = "" if other_file == file else f" of {other_file}"
                raise DataError(
                    f"the weight of its supervision is {weights[others[0]]:g}, and {weights[0]:g} that of "
                    f"{other_key}{where}: within a minibatch all must be equal (a minibatch of 1 takes each alone)",
                    file=file, key=key, offset=int(self.begin[units[others[0]]]),
                )  # fmt: skip

    def largest_graphs(self, sizes: Sequence[int]) -> Sizes:
        """Elements of the arrays of a `ChainSupervision` that has the largest FSTs which can come together.

        Args:
            sizes: of each group, how many of its units make a minibatch.

        Raises:
            ConfigError: more than can be counted.
        """
        fsts = states = arcs = 1
        for group, size in enumerate(sizes):
            units = self._units_of(group)
            size = min(size, len(units))
            each = self.shapes[group].sequences if self.end2end else 1
            fsts, states = max(fsts, size * each), max(states, _largest_sum(self.states[units], size))
            arcs = max(arcs, _largest_sum(self.arcs[units], size))
        if states > _MOST_STATES:
            raise ConfigError(f"a minibatch may have FSTs of {states} states: smaller ones are needed")
        return graph_sizes(fsts, states, arcs, end2end=self.end2end)

    def unit(self, number: int) -> ChainUnit:
        """Decode one unit, 0 <= number < num_units.

        Raises:
            DataError: the archive cannot be read, or has changed since the index was made.
            IndexError: no such unit.
        """
        if not 0 <= number < self.num_units:
            raise IndexError(f"unit {number} of {self.num_units}")
        shape = self.shapes[int(self.shape_of[number])]
        sizes = {"feats": shape.sequences * shape.rows * self.feat_dim, "labels": 0}
        if self.ivector_dim:
            sizes["ivectors"] = shape.sequences * self.ivector_dim
        if self.has_weights:
            sizes["weights"] = shape.sequences * shape.width
        fsts = shape.sequences if self.end2end else 1
        states, arcs = int(self.states[number]), int(self.arcs[number])
        buffer = new_buffer({**sizes, **graph_sizes(fsts, states, arcs, end2end=self.end2end)})
        lent = lend(buffer)
        out = ffi.new("km_chain_out *", (lent.feats, lent.ivectors, lent.weights))
        graph, error = ffi.addressof(lent, "graphs"), new_error()
        c_shape = ffi.new("km_shape *", shape.fields())
        if lib.km_chain_examples_read(self.c_chain, c_shape, number, out, graph, error) != lib.KM_OK:
            file, key = self.location_of(number)
            raise_data_error(error, file=file, key=key)
        return ChainUnit(
            view(buffer.feats, (shape.sequences, shape.rows, self.feat_dim)),
            None if buffer.ivectors is None else view(buffer.ivectors, (shape.sequences, self.ivector_dim)),
            supervision_of(buffer, graph, weight=float(self.weight[number]), frames=shape.width,
                           num_pdfs=self.num_pdfs, end2end=self.end2end),
        )  # fmt: skip


def _largest_sum(values: NDArray[np.int32], count: int) -> int:
    """The sum of the `count` largest, 1 <= count <= len(values)."""
    return int(np.partition(values, len(values) - count)[len(values) - count :].sum(dtype=np.int64))
