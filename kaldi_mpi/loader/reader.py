"""Minibatches, read ahead of the computation by threads of the C library."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.loader.corpus import Corpus
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error
from kaldi_mpi.loader.plan import ENDLESS, ChunkPlan, check_range

# How long one wait in C lasts before Python may look at its signals (Ctrl-C), in milliseconds.
_POLL_MS = 200

Buffers = Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]]


@dataclass(frozen=True)
class ChunkShape:
    """The shape of a chunk.

    With labels at t = s .. s+width-1 it has the input rows s-left+label_delay .. s+width-1+right+label_delay;
    rows before the first and after the last frame repeat that frame, as nnet3-get-egs does.

    Attributes:
        width: labelled frames.
        left: context rows before.
        right: context rows after.
        label_delay: frames by which the input runs ahead of the labels.
    """

    width: int
    left: int
    right: int
    label_delay: int = 0

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("left", 0), ("right", 0), ("label_delay", 0)):
            if not least <= getattr(self, name) < 2**24:
                raise ConfigError(f"chunk {name} is {getattr(self, name)}, and must be at least {least}")

    @property
    def rows(self) -> int:
        """Input rows of a chunk."""
        return self.left + self.width + self.right


@dataclass
class Minibatch:
    """What one rank gets at one step. The arrays are valid until the reader's next ``__next__``.

    Attributes:
        feats: float32 (B, left + width + right, feat_dim); B is smaller in an epoch's last step, maybe 0.
        labels: int64 (B, width); -1 where there is no frame, or where the frame belongs to another chunk.
        frames: labelled frames here.
        global_frames: labelled frames of this step over all ranks.
        epoch: from 0.
        step: global step, counted over all epochs.
    """

    feats: NDArray[np.float32]
    labels: NDArray[np.int64]
    frames: int
    global_frames: int
    epoch: int
    step: int


@dataclass(frozen=True)
class Counters:
    """What a reader has done so far.

    Attributes:
        consumer_waited: seconds that ``__next__`` waited for data, or for a request.
        readers_waited: seconds that the threads waited for a free buffer, or for a request, summed over them.
        bytes_read: bytes read from archives.
        frames: labelled frames delivered.
    """

    consumer_waited: float
    readers_waited: float
    bytes_read: int
    frames: int


class MinibatchReader(Iterator[Minibatch]):
    """Iterates over one rank's minibatches; close it, or use it as a context manager.

    Epoch e visits all chunks in an order drawn by (seed, e), the same on all ranks. With `size` ranks of
    `chunks_per_minibatch` chunks each, global step k takes the next size * chunks_per_minibatch chunks of
    the order, and each rank its slice of them; every labelled frame is seen once an epoch. The order does not
    depend on `threads` or `depth`, and the chunks of a step do not depend on how ranks and chunks share the
    product size * chunks_per_minibatch.

    A reader made with `on_request` reads the steps that `request` names, in the order of the requests; what a
    step holds is the same as above. Requests may come from any thread, of steps in any order and epochs in
    any mixture, up to `depth` at a time; `__next__` waits for them, and `finish` says that there are no more.

    Args:
        corpus: what to read.
        shape: of the chunks.
        chunks_per_minibatch: chunks that one rank takes at a step.
        seed: of the order, 0 .. 2**64-1.
        rank: this rank.
        size: number of ranks.
        threads: reader threads.
        depth: buffers in the ring, when `buffers` is not given; depth - 1 minibatches are read ahead.
        shuffle: False leaves the chunks in the order of the corpus, in every epoch.
        first_step: global step to start with.
        num_epochs: stop at the end of this many epochs (counted from step 0); None: never.
        on_request: read what `request` names; `first_step` and `num_epochs` stay at their defaults.
        buffers: the ring's memory, pairs (feats, labels) of writeable, C-contiguous arrays: float32
            (chunks_per_minibatch, rows, feat_dim) and int64 (chunks_per_minibatch, width).

    Raises:
        ConfigError: an argument out of its range.
        DataError: memory or threads cannot be had.

    Attributes:
        plan: which chunks make up each step.
        steps_per_epoch: the same on every rank.
        num_chunks: chunks of an epoch, over all ranks.
    """

    def __init__(
        self,
        corpus: Corpus,
        shape: ChunkShape,
        chunks_per_minibatch: int,
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
        buffers: Buffers | None = None,
    ) -> None:
        self.plan = ChunkPlan(
            corpus.num_frames, shape.width, chunks_per_minibatch, size=size, seed=seed, shuffle=shuffle
        )
        self.steps_per_epoch, self.num_chunks = self.plan.steps_per_epoch, self.plan.num_chunks
        check_range("rank", rank, 0, size)
        check_range("number of reader threads", threads, 1, 1024)
        check_range("depth of the reader's ring", depth, 1, 2**16)
        check_range("first step", first_step, 0, ENDLESS)
        check_range("number of epochs", num_epochs or 0, 0, 2**32)
        if on_request and (first_step or num_epochs is not None):
            raise ConfigError("a reader on request has neither a first step nor a number of epochs")
        self._corpus = corpus
        self._shape = shape
        self._chunks_per_minibatch = chunks_per_minibatch
        if buffers is None:
            buffers = [self._new_buffer() for _ in range(depth)]
        self._buffers = [self._checked_buffer(*pair) for pair in buffers]
        check_range("number of buffers", len(self._buffers), 1, 2**16)

        end = ENDLESS if num_epochs is None else num_epochs * self.steps_per_epoch

        feats = [borrow(pair[0].reshape(-1), "float", np.float32) for pair in self._buffers]
        labels = [borrow(pair[1].reshape(-1), "int64_t", np.int64) for pair in self._buffers]
        error = new_error()
        self._ring = lib.km_ring_new(
            corpus.c_corpus,
            self.plan.c_plan,
            ffi.new("km_shape *", (shape.width, shape.left, shape.right, shape.label_delay)),
            rank,
            threads,
            len(self._buffers),
            ffi.new("float *[]", feats),
            ffi.new("int64_t *[]", labels),
            lib.KM_ON_REQUEST if on_request else first_step,
            end,
            error,
        )
        if self._ring == ffi.NULL:
            raise_data_error(error)
        self._minibatch = ffi.new("km_minibatch *")
        self._final_counters: Counters | None = None
        self._on_request = on_request
        self._next_lock = threading.Lock()  # held by __next__, also while it waits
        self._lock = threading.Lock()  # held by calls that do not wait
        # The threads write into the buffers and read the corpus until they are joined: the finalizer keeps
        # both, and the plan, alive until then, in whatever order this object's parts are collected.
        lent = (corpus, self.plan, feats, labels)
        self._stop = weakref.finalize(self, _stop, self._ring, (self._next_lock, self._lock), os.getpid(), lent)

    def _new_buffer(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        feats = np.empty((self._chunks_per_minibatch, self._shape.rows, self._corpus.feat_dim), np.float32)
        return feats, np.empty((self._chunks_per_minibatch, self._shape.width), np.int64)

    def _checked_buffer(
        self, feats: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        wanted_feats = (self._chunks_per_minibatch, self._shape.rows, self._corpus.feat_dim)
        wanted_labels = (self._chunks_per_minibatch, self._shape.width)
        wanted = ((feats, wanted_feats, np.float32), (labels, wanted_labels, np.int64))
        for array, shape, dtype in wanted:
            flags = array.flags
            if array.shape != shape or array.dtype != dtype or not (flags.c_contiguous and flags.writeable):
                raise ConfigError(
                    f"a minibatch buffer is {array.dtype} {array.shape}, and must be a writeable, "
                    f"contiguous {np.dtype(dtype)} {shape}"
                )
        return feats, labels

    def frames_of_step(self, step: int) -> int:
        """See `ChunkPlan.frames_of_step`."""
        return self.plan.frames_of_step(step)

    def request(self, step: int) -> None:
        """Have `__next__` deliver a global step, after those requested before; waits for nothing.

        Raises:
            ConfigError: the step is negative.
            ValueError: `depth` steps are requested and not yet delivered; after `finish`; the reader is not
                on request, or closed.
        """
        check_range("step", step, 0, ENDLESS)
        with self._open_on_request() as ring:
            result = lib.km_ring_request(ring, step)
        if result == lib.KM_FULL:
            raise ValueError(f"all {len(self._buffers)} buffers of the minibatch reader wait to be delivered")
        if result == lib.KM_END:
            raise ValueError("the minibatch reader was told that there are no more requests")

    def finish(self) -> None:
        """Say that there will be no more requests: the iteration ends after those made. Again does no harm.

        Raises:
            ValueError: the reader is not on request, or closed.
        """
        with self._open_on_request() as ring:
            lib.km_ring_finish(ring)

    @contextlib.contextmanager
    def _open_on_request(self) -> Iterator[Any]:
        """Keep the ring from being freed."""
        if not self._on_request:
            raise ValueError("the minibatch reader does not read on request")
        with self._lock:
            if not self._stop.alive:
                raise ValueError("the minibatch reader is closed")
            yield self._ring

    def __iter__(self) -> MinibatchReader:
        return self

    def __next__(self) -> Minibatch:
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
                result = lib.km_ring_next(self._ring, _POLL_MS, self._minibatch, error)
            if result == lib.KM_READY:
                return self._delivered()
            if result == lib.KM_END:
                raise StopIteration
            if result != lib.KM_NOT_YET:
                if error.utterance < 0:
                    raise_data_error(error)
                file, key = self._corpus.location_of(error.utterance)
                raise_data_error(error, file=file, key=key)

    def _delivered(self) -> Minibatch:
        got: Any = self._minibatch
        feats, labels = self._buffers[got.buffer]
        return Minibatch(
            feats=feats[: got.num_chunks],
            labels=labels[: got.num_chunks],
            frames=int(got.frames),
            global_frames=int(got.global_frames),
            epoch=int(got.step // self.steps_per_epoch),
            step=int(got.step),
        )

    def counters(self) -> Counters:
        """What the reader has done since it was made; after `close`, until it was closed."""
        with self._lock:
            if self._final_counters is not None:
                return self._final_counters
            return self._read_counters()

    def _read_counters(self) -> Counters:
        counters = ffi.new("km_counters *")
        lib.km_ring_counters(self._ring, counters)
        return Counters(
            counters.consumer_waited, counters.readers_waited, int(counters.bytes_read), int(counters.frames)
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


def _stop(ring: Any, locks: tuple[threading.Lock, threading.Lock], pid: int, lent: object) -> None:
    """Join the threads and free the ring once nobody uses it; `lent` is what the threads use."""
    if os.getpid() != pid:
        return  # a forked child has the memory but not the threads: there is nobody to join
    lib.km_ring_stop(ring)  # so that a __next__ that waits lets go
    with locks[0], locks[1]:
        lib.km_ring_free(ring)
