"""Which chunks there are, and which of them make up each step: known without reading any data."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.loader.chunks import Chunking, ChunkShape, MinibatchRule
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error

ENDLESS = 2**62  # steps
DEFAULT_MEMORY = 128 * 2**20

# Examples are small, and have been shuffled on disk: to read each from another place would be slow for no gain.
_RUN_BYTES, _RUNS_IN_A_POOL = 2**20, 16

Cut = ChunkShape | Chunking | None
Size = int | MinibatchRule


class Source(Protocol):
    """Utterances of a corpus (`Corpus`) or examples of a directory (`Examples`, `ChainExamples`).

    A unit is one run of bytes of one archive. The arrays have one element a unit, and are read-only. A source may have
    an attribute `passes`: so many times an epoch goes through it (`ChainExamples`); without it, once.

    Attributes:
        num_units: how many there are, at least 1.
        feat_dim: columns of the features.
        ivector_dim: elements of the i-vector of each chunk; 0 where there is none.
        num_targets: most labels of a frame; 0: there is supervision in their place.
        has_weights: whether labels have weights other than 1.
        num_frames: labelled frames of each unit, at least 1.
        total_frames: those of an epoch: their sum, times `passes`.
        paths: the archives.
        file_of: the archive of each unit, an index into `paths`.
        begin: byte offset of each unit in its archive.
        end: byte offset behind each unit.
        unit_bytes: their difference; 0 for a unit whose bytes are those of the unit before (of a merged example).
        num_without_labels: units that were left out because they have no labels.
    """

    @property
    def num_units(self) -> int: ...
    @property
    def feat_dim(self) -> int: ...
    @property
    def ivector_dim(self) -> int: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def has_weights(self) -> bool: ...
    @property
    def num_frames(self) -> NDArray[np.int32]: ...
    @property
    def total_frames(self) -> int: ...
    @property
    def paths(self) -> Sequence[str]: ...
    @property
    def file_of(self) -> NDArray[np.int32]: ...
    @property
    def begin(self) -> NDArray[np.int64]: ...
    @property
    def end(self) -> NDArray[np.int64]: ...
    @property
    def unit_bytes(self) -> NDArray[np.int64]: ...
    @property
    def num_without_labels(self) -> int: ...

    def location_of(self, unit: int) -> tuple[str, str]:
        """The archive and the key of a unit; for messages."""
        ...


def check_range(what: str, value: int, least: int, limit: int) -> None:
    """Raise ConfigError unless `value` is at least `least` and below `limit`."""
    if not least <= value < limit:
        raise ConfigError(f"{what} is {value}, and must be at least {least} and below {limit}")


@dataclasses.dataclass(frozen=True)
class Position:
    """A position in the data, to be saved: what an epoch has delivered up to it.

    Attributes:
        epoch: from 0.
        taken: of each shape of chunks, how many of the epoch have been delivered, over all ranks (of all its passes
            together).
        order: a digest of what decides the epoch's order: data, chunking, seed and memory. A position has a meaning
            in this order only.
    """

    epoch: int
    taken: tuple[int, ...]
    order: str


def shapes_of(source: Source, chunking: Cut) -> list[ChunkShape]:
    """All shapes that chunks of a source may have.

    Raises:
        ConfigError: for examples, which are cut already, a chunking that is not of single frames, or one of more
            context than they have; none for features.
    """
    own: list[ChunkShape] | None = getattr(source, "shapes", None)
    if own is not None:
        if chunking is None:
            return own
        if source.num_targets == 0:
            raise ConfigError("chain examples are cut already: they have their own shapes, and take no chunking")
        if not isinstance(chunking, ChunkShape) or chunking.width != 1 or chunking.label_delay:
            raise ConfigError(
                "examples are cut already: they have their own shapes, and take no chunking but one of single frames"
            )
        for name in ("left", "right"):
            least = min(getattr(shape, name) for shape in own)
            if least < getattr(chunking, name):
                raise ConfigError(
                    f"there are examples with {least} context rows on the {name}, and {getattr(chunking, name)} are "
                    "needed around each frame"
                )
        return [chunking]
    if chunking is None:
        raise ConfigError("features need a chunking: the width of chunks and their context")
    return _chunking(chunking).shapes()


def sizes_of(shapes: list[ChunkShape], minibatch: Size) -> list[int]:
    """Chunks of a minibatch of each shape; of merged chain examples, which are minibatches already, one."""
    rule = MinibatchRule.of(minibatch) if isinstance(minibatch, int) else minibatch
    return [rule.largest(shape.rows) if shape.sequences == 1 else 1 for shape in shapes]


def _chunking(chunking: ChunkShape | Chunking) -> Chunking:
    return Chunking.of(chunking) if isinstance(chunking, ChunkShape) else chunking


class ChunkPlan:
    """The chunks of a source in the order of each epoch, shared out in global steps; the same on all ranks.

    The order of epoch e is drawn by (seed, e). Units (utterances, or runs of examples of up to 1 MiB) are permuted and
    taken in pools, of as many as have `memory` / 2 bytes on disk; the chunks of a pool are permuted. Walking through
    them, `size` times the minibatch of chunks of one shape make a global step, and what is left at the end makes
    smaller ones. A source that fits into one pool is so permuted as a whole. Where an epoch has several passes, each
    is in an order of its own.

    Args:
        source: a `Corpus` or `Examples`.
        chunking: how utterances are cut; None for whole examples. A `ChunkShape` of width 1 cuts either into single
            frames: of examples into their labelled ones.
        minibatch: chunks that one rank takes at a step: a number, or a rule for each size of chunks.
        size: number of ranks.
        seed: of the order, 0 .. 2**64-1.
        shuffle: False leaves units and chunks in the order of the source, in every epoch.
        memory: bytes of the source that may be in memory at a time.
        start: where to go on; None: at the beginning. Steps are numbered from there. It may come from a plan of another
            `size` or `minibatch`: the rest of its epoch is shared out anew.

    Raises:
        ConfigError: an argument out of its range, or a `start` in another order.
        DataError: memory cannot be had, or examples of different weight would come into one minibatch.

    Attributes:
        shapes: of the chunks, without the frame shifts that `shape_of` adds.
        passes: how many times an epoch goes through the source.
        steps_per_epoch: global steps of a whole epoch.
        steps_of_first_epoch: of the one in which the plan starts.
        num_chunks: chunks of an epoch.
        first_epoch: in which the plan starts.
        order: the digest of the order, see `Position`.
        c_plan: the C library's km_plan.
    """

    def __init__(
        self,
        source: Source,
        chunking: Cut,
        minibatch: Size,
        *,
        size: int,
        seed: int,
        shuffle: bool = True,
        memory: int = DEFAULT_MEMORY,
        start: Position | None = None,
    ) -> None:
        self._made_of = (chunking, minibatch, size, seed, shuffle, memory, start)
        self._source = source  # whose arrays the plan uses for as long as it lives
        self.shapes = shapes_of(source, chunking)
        chunks = np.array(sizes_of(self.shapes, minibatch), dtype=np.int32)
        check_range("seed", seed, 0, 2**64)
        check_range("number of ranks", size, 1, 2**24)
        check_range("memory for data, in bytes,", memory, 1, 2**62)
        self.order = _digest(source, self.shapes, seed, shuffle, memory)
        self.passes = int(getattr(source, "passes", 1))
        check_minibatches = getattr(source, "check_minibatches", None)
        if check_minibatches is not None:
            check_minibatches(chunks)
        config = ffi.new("km_plan_config *")
        config.num_units = source.num_units
        config.num_frames = borrow(source.num_frames, "int32_t", np.int32)
        config.unit_bytes = borrow(source.unit_bytes, "int64_t", np.int64)
        config.pool_bytes = memory // 2
        config.num_shapes = len(self.shapes)
        config.chunks_per_minibatch = borrow(chunks, "int32_t", np.int32)
        config.num_ranks, config.shuffle, config.seed = size, shuffle, seed
        if hasattr(source, "shape_of"):
            config.run_bytes = min(_RUN_BYTES, memory // 2 // _RUNS_IN_A_POOL)
        if chunking is None:
            config.shape_of = borrow(source.shape_of, "int32_t", np.int32)  # type: ignore[attr-defined]
        else:
            _chunking(chunking).fill(config)
        self.first_epoch, done = self._start_at(config, start)
        error = new_error()
        plan = lib.km_plan_new(config, error)
        if plan == ffi.NULL:
            raise_data_error(error)
        self.c_plan = ffi.gc(plan, lib.km_plan_free)
        steps = int(lib.km_plan_steps_per_epoch(plan))
        self.steps_per_epoch = self.passes * steps
        self.steps_of_first_epoch = int(lib.km_plan_steps_of_first_epoch(plan)) + (self.passes - 1 - done) * steps
        self.num_chunks = self.passes * int(lib.km_plan_num_chunks(plan))

    def _start_at(self, config: Any, start: Position | None) -> tuple[int, int]:
        """The epoch to start in, and how many passes of it are over."""
        if start is None:
            return 0, 0
        if start.order != self.order or len(start.taken) != len(self.shapes):
            raise ConfigError(
                "the position to go on from is in another order of the data: data, chunk widths and contexts, seed and "
                "the loader's memory must be those that it was saved with"
            )
        check_range("epoch", start.epoch, 0, 2**31)
        self._taken = np.array(start.taken, dtype=np.int64)
        done = 0
        if self.passes > 1:
            # A pass is over when all of its shapes are: the slowest one says how many are.
            a_pass = self._chunks_of_pass()
            done = min(int((self._taken // a_pass).min()), self.passes - 1)
            self._taken -= done * a_pass
        config.epoch = start.epoch * self.passes + done
        config.taken = borrow(self._taken, "int64_t", np.int64)
        return start.epoch, done

    def _chunks_of_pass(self) -> NDArray[np.int64]:
        """Of each shape, where units are whole examples."""
        shape_of: NDArray[np.int32] = self._source.shape_of  # type: ignore[attr-defined]
        return np.bincount(shape_of, minlength=len(self.shapes))

    def shape_of(self, shape: int, number: int) -> ChunkShape:
        """The shape of chunks as they are delivered.

        Args:
            shape: an index into `shapes`.
            number: of the pass, counted from the very first.
        """
        of_pass = getattr(self._source, "shape_of_pass", None)
        found: ChunkShape = self.shapes[shape] if of_pass is None else of_pass(shape, number)
        return found

    def is_of(
        self,
        source: Source,
        chunking: Cut,
        minibatch: Size,
        *,
        size: int,
        seed: int,
        shuffle: bool,
        memory: int,
        start: Position | None,
    ) -> bool:
        """Whether the plan was made of just these."""
        return self._source is source and self._made_of == (chunking, minibatch, size, seed, shuffle, memory, start)

    def end_of_epochs(self, num_epochs: int) -> int:
        """How many steps there are until so many epochs have gone since the very first, this plan's start included."""
        left = num_epochs - self.first_epoch
        return self.steps_of_first_epoch + (left - 1) * self.steps_per_epoch if left > 0 else 0

    def _summary(self, step: int) -> Any:
        check_range("step", step, 0, ENDLESS)
        summary, error = ffi.new("km_step_summary *"), new_error()
        if lib.km_plan_summary(self.c_plan, step, summary, error) != lib.KM_OK:
            raise_data_error(error)
        return summary

    def frames_of_step(self, step: int) -> int:
        """Labelled frames of a global step over all ranks.

        Steps of the same pool are cheap one after the other; another pool's order is drawn first.
        """
        return int(self._summary(step).frames)

    def chunks_of_step(self, step: int) -> int:
        """Chunks of a global step over all ranks: those of a whole step, or what an epoch has left."""
        return int(self._summary(step).chunks)

    def position(self, step: int) -> Position:
        """The position before a global step: `start` for a plan that goes on from there."""
        check_range("step", step, 0, ENDLESS)
        epoch, taken, error = ffi.new("int64_t *"), ffi.new("int64_t[]", len(self.shapes)), new_error()
        if lib.km_plan_position(self.c_plan, step, epoch, taken, error) != lib.KM_OK:
            raise_data_error(error)
        whole, done = divmod(int(epoch[0]), self.passes)
        counts = [int(count) for count in taken]
        if done:
            counts = [count + done * int(a_pass) for count, a_pass in zip(counts, self._chunks_of_pass(), strict=True)]
        return Position(whole, tuple(counts), self.order)


def _digest(source: Source, shapes: list[ChunkShape], seed: int, shuffle: bool, memory: int) -> str:
    is_one_pool = int(source.unit_bytes.sum(dtype=np.int64)) <= memory // 2
    passes = getattr(source, "passes", 1)
    order = (shapes, seed, shuffle, None if is_one_pool else memory // 2, *((passes,) if passes > 1 else ()))
    digest = hashlib.sha256(repr(order).encode())
    digest.update(np.ascontiguousarray(source.num_frames).data)
    shape_of = getattr(source, "shape_of", None)
    if shape_of is not None:
        digest.update(np.ascontiguousarray(shape_of).data)
    if not is_one_pool:
        digest.update(np.ascontiguousarray(source.unit_bytes).data)
    return digest.hexdigest()[:32]
