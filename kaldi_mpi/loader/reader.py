"""Minibatches, read ahead of the computation by threads of the C library."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader.chunks import ChunkShape
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error
from kaldi_mpi.loader.plan import (
    DEFAULT_MEMORY,
    ENDLESS,
    ChunkPlan,
    Cut,
    Position,
    Size,
    Source,
    check_range,
    shapes_of,
    sizes_of,
)
from kaldi_mpi.log import logger

# How long one wait in C lasts before Python may look at its signals (Ctrl-C), in milliseconds.
_POLL_MS = 200


class Buffer(NamedTuple):
    """Memory for one minibatch: C-contiguous, writeable arrays, at least as large as the largest minibatch.

    Attributes:
        feats: float32, B * rows * feat_dim elements.
        labels: int64, B * width * num_targets elements.
        weights: float32, as many as labels; None where all weights are 1.
        ivectors: float32, B * ivector_dim elements; None where there are none.
    """

    feats: NDArray[np.float32]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    ivectors: NDArray[np.float32] | None = None


Array = TypeVar("Array")
Other = TypeVar("Other")
Allocate = Callable[[int, type[np.generic]], NDArray[Any]]


def new_buffers(
    source: Source, chunking: Cut, minibatch: Size, depth: int, allocate: Allocate = np.empty
) -> list[Buffer]:
    """Buffers for a reader of `source`.

    Args:
        source, chunking, minibatch: as for the reader.
        depth: how many.
        allocate: makes an array of (size, dtype); by default ordinary memory.
    """
    sizes = _largest(source, chunking, minibatch)

    def one(size: int | None, dtype: type[np.generic]) -> Any:
        return None if size is None else allocate(size, dtype)

    dtypes: list[type[np.generic]] = [np.float32, np.int64, np.float32, np.float32]
    return [Buffer(*(one(size, dtype) for size, dtype in zip(sizes, dtypes, strict=True))) for _ in range(depth)]


def _largest(source: Source, chunking: Cut, minibatch: Size) -> tuple[int, int, int | None, int | None]:
    """Elements that a buffer's arrays need; None: there is no such array."""
    shapes = shapes_of(source, chunking)
    pairs = list(zip(sizes_of(shapes, minibatch), shapes, strict=True))
    feats = max(chunks * shape.rows for chunks, shape in pairs) * source.feat_dim
    labels = max(chunks * shape.width for chunks, shape in pairs) * source.num_targets
    ivectors = max(chunks for chunks, _ in pairs) * source.ivector_dim
    return feats, labels, labels if source.has_weights else None, ivectors or None


@dataclass(frozen=True)
class Minibatch(Generic[Array]):
    """What one rank gets at one step.

    A reader's has NumPy arrays, which are valid until its next ``__next__``; `map` puts those of another library in
    their place.

    Attributes:
        feats: float32 (B, rows, feat_dim); B is smaller in an epoch's last steps, maybe 0.
        labels: int64 (B, W), or (B, W, K) where frames have up to K > 1 labels; -1 where there is no label: no
            frame, or a frame that belongs to another chunk.
        frames: labelled frames here.
        global_frames: labelled frames of this step over all ranks.
        weight: the sum of the weights of all labels here; `frames` where all are 1.
        epoch: from 0.
        step: global step, counted from where the reader's plan starts.
        shape: of the chunks.
        weights: float32 of the labels' shape; None: all are 1.
        ivectors: float32 (B, ivector_dim), or None.
    """

    feats: Array
    labels: Array
    frames: int
    global_frames: int
    weight: float
    epoch: int
    step: int
    shape: ChunkShape
    weights: Array | None = None
    ivectors: Array | None = None

    @property
    def first(self) -> int:
        """The time of a chunk's first row, when its first label has time 0."""
        return self.shape.label_delay - self.shape.left

    def map(self, convert: Callable[[str, Array], Other]) -> Minibatch[Other]:
        """The same minibatch with other arrays: `convert` makes each of its name and the array there is."""
        return Minibatch(
            feats=convert("feats", self.feats),
            labels=convert("labels", self.labels),
            frames=self.frames,
            global_frames=self.global_frames,
            weight=self.weight,
            epoch=self.epoch,
            step=self.step,
            shape=self.shape,
            weights=None if self.weights is None else convert("weights", self.weights),
            ivectors=None if self.ivectors is None else convert("ivectors", self.ivectors),
        )


NumpyMinibatch = Minibatch[NDArray[Any]]


@dataclass(frozen=True)
class Counters:
    """What a reader has done so far.

    Attributes:
        consumer_waited: seconds that ``__next__`` waited for data, or for a request.
        readers_waited: seconds that the threads waited for a free buffer, or for a request, summed over them.
        disk_waited: seconds that the threads waited for data to be read ahead, summed over them.
        bytes_read: bytes read from archives.
        frames: labelled frames delivered.
        memory: bytes in use: data read ahead, its order, and the buffers.
        bad: utterances or examples that could not be read and were left out.
        seconds: since the reader was made.
    """

    consumer_waited: float
    readers_waited: float
    disk_waited: float
    bytes_read: int
    frames: int
    memory: int
    bad: int
    seconds: float

    @property
    def frames_per_second(self) -> float:
        """Labelled frames delivered in a second, since the reader was made."""
        return self.frames / max(self.seconds, 1e-9)


class MinibatchReader(Iterator[NumpyMinibatch]):
    """Iterates over one rank's minibatches; close it, or use it as a context manager.

    The order is that of `ChunkPlan`: epoch e visits all chunks in an order drawn by (seed, e), the same on all ranks,
    and each rank takes its part of each global step; every labelled frame is seen once an epoch. The order does
    not depend on `threads` or `depth`, and the chunks of a step do not depend on how ranks and chunks share the
    product of `size` and `minibatch`.

    A reader made with `on_request` reads the steps that `request` names, in the order of the requests; what a
    step holds is the same as above. Requests may come from any thread, of steps in any order and epochs in
    any mixture, up to `depth` at a time; `__next__` waits for them, and `finish` says that there are no more.

    Args:
        source: what to read, a `Corpus` or `Examples`.
        chunking: how utterances are cut: chunks of one shape, or of several; None for whole examples, and a
            `ChunkShape` of width 1 for their labelled frames, one by one.
        minibatch: chunks that one rank takes at a step: a number, or a rule for each size of chunks.
        seed: of the order, 0 .. 2**64-1.
        rank: this rank.
        size: number of ranks.
        threads: threads that decode; one more reads ahead.
        depth: buffers in the queue, when `buffers` is not given; depth - 1 minibatches are read ahead.
        shuffle: False leaves the chunks in the order of the source, in every epoch.
        first_step: global step to start with.
        num_epochs: stop when so many epochs have gone since the very first; None: never.
        on_request: read what `request` names; `first_step` and `num_epochs` stay at their defaults.
        buffers: the queue's memory (see `new_buffers`).
        memory: bytes of the source that are in memory at a time; half of it is what chunks are shuffled in.
        start: position to go on from, also of another `size`; see `ChunkPlan`.
        plan: of the same source and arguments, where there is one already. Several readers may share it.
        skip_bad: how many utterances or examples may turn out to be unreadable. They are delivered with features 0
            and without labels, and logged; `global_frames` still counts their frames.
        bytes_per_second: read from disk no faster than that; for tests and measurements.

    Raises:
        ConfigError: an argument out of its range, or a `plan` that is of another source or other arguments.
        DataError: memory or threads cannot be had.

    Attributes:
        plan: which chunks make up each step.
        steps_per_epoch: the same on every rank.
    """

    def __init__(
        self,
        source: Source,
        chunking: Cut,
        minibatch: Size,
        *,
        seed: int,
        rank: int = 0,
        size: int = 1,
        threads: int = 1,
        depth: int = 4,
        shuffle: bool = True,
        first_step: int = 0,
        num_epochs: int | None = None,
        on_request: bool = False,
        buffers: Sequence[Buffer] | None = None,
        memory: int = DEFAULT_MEMORY,
        start: Position | None = None,
        plan: ChunkPlan | None = None,
        skip_bad: int = 0,
        bytes_per_second: int = 0,
    ) -> None:
        if plan is None:
            plan = ChunkPlan(
                source, chunking, minibatch, size=size, seed=seed, shuffle=shuffle, memory=memory, start=start
            )
        elif not plan.is_of(
            source, chunking, minibatch, size=size, seed=seed, shuffle=shuffle, memory=memory, start=start
        ):
            raise ConfigError("the plan is of another source, or was made with other arguments than the reader's")
        self.plan, self.steps_per_epoch = plan, plan.steps_per_epoch
        check_range("rank", rank, 0, size)
        check_range("number of reader threads", threads, 1, 1024)
        check_range("depth of the reader's queue", depth, 1, 2**16)
        check_range("first step", first_step, 0, ENDLESS)
        check_range("number of epochs", num_epochs or 0, 0, 2**31)
        check_range("number of bad utterances to skip", skip_bad, 0, 2**24)
        check_range("bytes per second", bytes_per_second, 0, 2**62)
        if on_request and (first_step or num_epochs is not None):
            raise ConfigError("a reader on request has neither a first step nor a number of epochs")
        self._source, self._is_cut = source, chunking is not None
        needed = _largest(source, chunking, minibatch)
        if buffers is None:
            buffers = new_buffers(source, chunking, minibatch, depth)
        self._buffers = [_flat(buffer, needed) for buffer in buffers]
        check_range("number of buffers", len(self._buffers), 1, 2**16)
        self._memory = sum(array.nbytes for buffer in self._buffers for array in buffer if array is not None)
        self._made = time.monotonic()

        config = ffi.new("km_queue_config *")
        lent = [self._lend_source(config), self._lend_buffers(config)]
        config.plan = self.plan.c_plan
        config.rank, config.threads = rank, threads
        config.first_step = lib.KM_ON_REQUEST if on_request else first_step
        config.end_step = ENDLESS if num_epochs is None else self.plan.end_of_epochs(num_epochs)
        config.bytes_per_second, config.skip_bad = bytes_per_second, skip_bad
        error = new_error()
        self._queue = lib.km_queue_new(config, error)
        if self._queue == ffi.NULL:
            raise_data_error(error)
        self._minibatch = ffi.new("km_minibatch *")
        self._final_counters: Counters | None = None
        self._num_bad = 0  # of those, how many have been logged
        self._on_request = on_request
        self._next_lock = threading.Lock()  # held by __next__, also while it waits
        self._lock = threading.Lock()  # held by calls that do not wait
        # The threads write into the buffers and read the source until they are joined: the finalizer keeps
        # both, and the plan, alive until then, in whatever order this object's parts are collected.
        keep = (source, self.plan, self._buffers, lent)
        self._stop = weakref.finalize(self, _stop, self._queue, (self._next_lock, self._lock), os.getpid(), keep)

    def _lend_source(self, config: Any) -> object:
        """Write the source into the configuration; what is returned must live as long as the queue."""
        source, shapes = self._source, self.plan.shapes
        corpus = getattr(source, "c_corpus", None)
        examples = getattr(source, "c_examples", None)
        config.corpus = corpus if corpus is not None else ffi.NULL
        config.examples = examples if examples is not None else ffi.NULL
        config.single_frames = examples is not None and self._is_cut
        units = config.units
        units.num_units = source.num_units
        units.files = corpus.files if corpus is not None else examples.files  # type: ignore[union-attr]
        units.file_of = borrow(source.file_of, "int32_t", np.int32)
        units.begin = borrow(source.begin, "int64_t", np.int64)
        units.end = borrow(source.end, "int64_t", np.int64)
        config.dim, config.ivector_dim, config.targets = source.feat_dim, source.ivector_dim, source.num_targets
        c_shapes = ffi.new("km_shape[]", [(s.width, s.left, s.right, s.label_delay) for s in shapes])
        config.num_shapes, config.shapes = len(shapes), c_shapes
        return corpus, examples, c_shapes

    def _lend_buffers(self, config: Any) -> object:
        def pointer(array: NDArray[Any] | None, ctype: str, dtype: type[np.generic]) -> Any:
            return ffi.NULL if array is None else borrow(array, ctype, dtype)

        lent = [
            (
                pointer(buffer.feats, "float", np.float32),
                pointer(buffer.labels, "int64_t", np.int64),
                pointer(buffer.weights, "float", np.float32),
                pointer(buffer.ivectors, "float", np.float32),
            )
            for buffer in self._buffers
        ]
        c_buffers = ffi.new("km_buffer[]", lent)
        config.depth, config.buffers = len(lent), c_buffers
        return lent, c_buffers

    def request(self, step: int) -> None:
        """Have `__next__` deliver a global step, after those requested before; waits for nothing.

        Raises:
            ConfigError: the step is negative.
            ValueError: `depth` steps are requested and not yet delivered; after `finish`; the reader is not
                on request, or closed.
        """
        check_range("step", step, 0, ENDLESS)
        with self._open_on_request() as queue:
            result = lib.km_queue_request(queue, step)
        if result == lib.KM_FULL:
            raise ValueError(f"all {len(self._buffers)} buffers of the minibatch reader wait to be delivered")
        if result == lib.KM_END:
            raise ValueError("the minibatch reader was told that there are no more requests")

    def finish(self) -> None:
        """Say that there will be no more requests: the iteration ends after those made. Again does no harm.

        Raises:
            ValueError: the reader is not on request, or closed.
        """
        with self._open_on_request() as queue:
            lib.km_queue_finish(queue)

    @contextlib.contextmanager
    def _open_on_request(self) -> Iterator[Any]:
        """Keep the queue from being freed."""
        if not self._on_request:
            raise ValueError("the minibatch reader does not read on request")
        with self._lock:
            if not self._stop.alive:
                raise ValueError("the minibatch reader is closed")
            yield self._queue

    def __iter__(self) -> MinibatchReader:
        return self

    def __next__(self) -> NumpyMinibatch:
        """The next minibatch; the arrays of the one before become invalid.

        Raises:
            StopIteration: after the last epoch, or the last request and `finish`.
            DataError: the data of this minibatch cannot be read; names archive, key and byte offset. Every
                later call raises it again.
            ValueError: the reader is closed.
        """
        error = new_error()
        while True:
            with self._next_lock:
                if not self._stop.alive:
                    raise ValueError("the minibatch reader is closed")
                result = lib.km_queue_next(self._queue, _POLL_MS, self._minibatch, error)
            self._log_bad()
            if result == lib.KM_READY:
                return self._delivered()
            if result == lib.KM_END:
                raise StopIteration
            if result != lib.KM_NOT_YET:
                if error.utterance < 0:
                    raise_data_error(error)
                file, key = self._source.location_of(error.utterance)
                raise_data_error(error, file=file, key=key)

    def _log_bad(self) -> None:
        """Warn of the units that were left out since the last call."""
        error = new_error()
        while self._stop.alive and lib.km_queue_bad(self._queue, self._num_bad, error) == lib.KM_OK:
            self._num_bad += 1
            file, key = self._source.location_of(error.utterance)
            try:
                raise_data_error(error, file=file, key=key)
            except DataError as cause:
                logger.warning("left out: %s", cause)

    def _delivered(self) -> NumpyMinibatch:
        got: Any = self._minibatch
        buffer, chunks = self._buffers[got.buffer], int(got.num_chunks)
        shape, source = self.plan.shapes[got.shape], self._source
        targets = (source.num_targets,) if source.num_targets > 1 else ()
        by_label = (chunks, shape.width, *targets)
        labels = _view(buffer.labels, by_label)
        weights = None if buffer.weights is None else _view(buffer.weights, by_label)
        return Minibatch(
            feats=_view(buffer.feats, (chunks, shape.rows, source.feat_dim)),
            labels=labels,
            frames=int(got.frames),
            global_frames=int(got.global_frames),
            weight=float(got.frames if weights is None else weights.sum(dtype=np.float64, where=labels >= 0)),
            epoch=int(got.epoch),
            step=int(got.step),
            shape=shape,
            weights=weights,
            ivectors=None if buffer.ivectors is None else _view(buffer.ivectors, (chunks, source.ivector_dim)),
        )

    def counters(self) -> Counters:
        """What the reader has done since it was made; after `close`, until it was closed."""
        with self._lock:
            if self._final_counters is not None:
                return self._final_counters
            return self._read_counters()

    def _read_counters(self) -> Counters:
        counters = ffi.new("km_counters *")
        lib.km_queue_counters(self._queue, counters)
        return Counters(
            counters.consumer_waited,
            counters.readers_waited,
            counters.disk_waited,
            int(counters.bytes_read),
            int(counters.frames),
            int(counters.memory) + self._memory,
            int(counters.bad),
            time.monotonic() - self._made,
        )

    def close(self) -> None:
        """Stop the threads and wait for them; more than once does no harm."""
        with self._lock:
            if self._final_counters is None:
                self._final_counters = self._read_counters()
        self._stop()

    def __enter__(self) -> MinibatchReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _stop(queue: Any, locks: tuple[threading.Lock, threading.Lock], pid: int, lent: object) -> None:
    """Join the threads and free the queue once nobody uses it; `lent` is what the threads use."""
    if os.getpid() != pid:
        return  # a forked child has the memory but not the threads: there is nobody to join
    lib.km_queue_stop(queue)  # so that a __next__ that waits lets go
    with locks[0], locks[1]:
        lib.km_queue_free(queue)


def _flat(buffer: Buffer, needed: tuple[int, int, int | None, int | None]) -> Buffer:
    """The buffer's arrays as vectors of their first elements, so many as are needed."""
    dtypes = (np.float32, np.int64, np.float32, np.float32)
    flat: list[Any] = []
    for name, array, size, dtype in zip(Buffer._fields, Buffer(*buffer), needed, dtypes, strict=True):
        if size is None or array is None:
            if size is not None:
                raise ConfigError(f"a minibatch buffer has no {name}, and the data have")
            flat.append(None)
            continue
        if array.dtype != dtype or array.size < size or not (array.flags.c_contiguous and array.flags.writeable):
            raise ConfigError(
                f"a minibatch buffer's {name} are {array.dtype} with {array.size} elements, and must be a writeable, "
                f"contiguous {np.dtype(dtype)} array with at least {size}"
            )
        flat.append(array.reshape(-1)[:size])
    return Buffer(*flat)


def _view(flat: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    count = 1
    for length in shape:
        count *= length
    return flat[:count].reshape(shape)
