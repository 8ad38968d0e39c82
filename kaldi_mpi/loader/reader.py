"""Minibatches, read ahead of the computation by threads of the C library."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader.minibatch import (
    Buffer,
    ChainSupervision,
    Minibatch,
    NumpyMinibatch,
    flat,
    largest,
    lend,
    new_buffers,
    supervision_of,
    view,
)
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
)
from kaldi_mpi.log import logger

# How long one wait in C lasts before Python may look at its signals (Ctrl-C), in milliseconds.
_POLL_MS = 200


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
        needed = largest(source, chunking, minibatch)
        if buffers is None:
            buffers = new_buffers(source, chunking, minibatch, depth)
        self._buffers = [flat(buffer, needed) for buffer in buffers]
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
        views = {name: getattr(source, f"c_{name}", None) for name in ("corpus", "examples", "chain")}
        for name, c_view in views.items():
            setattr(config, name, ffi.NULL if c_view is None else c_view)
        (lent,) = (c_view for c_view in views.values() if c_view is not None)
        config.single_frames = views["examples"] is not None and self._is_cut
        units = config.units
        units.num_units = source.num_units
        units.files = lent.files
        units.file_of = borrow(source.file_of, "int32_t", np.int32)
        units.begin = borrow(source.begin, "int64_t", np.int64)
        units.end = borrow(source.end, "int64_t", np.int64)
        config.dim, config.ivector_dim, config.targets = source.feat_dim, source.ivector_dim, source.num_targets
        c_shapes = ffi.new("km_shape[]", [shape.fields() for shape in shapes])
        config.num_shapes, config.shapes = len(shapes), c_shapes
        return lent, c_shapes

    def _lend_buffers(self, config: Any) -> object:
        lent = [lend(buffer) for buffer in self._buffers]
        c_buffers = ffi.new("km_buffer[]", [one[0] for one in lent])
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
        buffer, chunks, frames = self._buffers[got.buffer], int(got.num_chunks), int(got.frames)
        shape, source = self.plan.shape_of(got.shape, got.epoch), self._source
        epoch, step, global_frames = int(got.epoch) // self.plan.passes, int(got.step), int(got.global_frames)
        feats = view(buffer.feats, (chunks, shape.rows, source.feat_dim))
        ivectors = None if buffer.ivectors is None else view(buffer.ivectors, (chunks, source.ivector_dim))
        supervision = self._supervision(buffer, shape.width)
        if supervision is not None:
            weight, none = supervision.weight * frames, view(buffer.labels, (chunks, 0))
            return Minibatch(
                feats, none, frames, global_frames, weight, epoch, step, shape, None, ivectors, supervision
            )
        labels_of = (shape.width,) if source.num_targets == 1 else (shape.width, source.num_targets)
        labels = view(buffer.labels, (chunks, *labels_of))
        weights = None if buffer.weights is None else view(buffer.weights, (chunks, *labels_of))
        weight = float(frames if weights is None else weights.sum(dtype=np.float64, where=labels >= 0))
        return Minibatch(feats, labels, frames, global_frames, weight, epoch, step, shape, weights, ivectors)

    def _supervision(self, buffer: Buffer, frames: int) -> ChainSupervision[NDArray[Any]] | None:
        """Of the minibatch that was delivered; None: it has labels."""
        if buffer.first_state is None:
            return None
        got: Any = self._minibatch
        source: Any = self._source  # of chain examples
        return supervision_of(
            buffer, got.graphs, weight=float(got.weight), frames=frames, num_pdfs=source.num_pdfs,
            end2end=source.end2end,
        )  # fmt: skip

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
