"""Minibatches on the learner's device, copied there ahead of the step that needs them.

On a CPU a batch's tensors are the reader's own buffers. For a GPU the reader fills page-locked buffers, and a thread
of its own copies them on a side stream into one of two sets of buffers on the device while the learner computes on the
other:

    reader's threads  ->  page-locked buffer  --side stream-->  buffers on the device  ->  the learner's step
                          given back when its                   written again when the step
                          copy has finished                     that used it has finished

Both conditions are events: the thread waits for the copy's on the host, the side stream for the step's, and the
computing stream for the copy's. The learner itself never waits for a copy.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.loader import Counters, Minibatch, MinibatchReader, NumpyMinibatch

# A minibatch on the learner's device; valid until the next ``__next__``.
Batch: TypeAlias = Minibatch[Tensor]

_COPIES = 2


class StreamEvent(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Have the host wait until the stream has come there."""


class Streams(Protocol):
    """What copying needs of a device; the tests put a recorder in its buffers."""

    def pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        """A (size,) tensor in page-locked memory."""

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """A (size,) tensor on the device."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Queue a copy to the device on the side stream."""

    def copied(self) -> StreamEvent:
        """The point after all copies queued so far."""

    def computed(self) -> StreamEvent:
        """The point after all that the calling thread has queued to compute."""

    def compute_after(self, event: StreamEvent) -> None:
        """What the calling thread queues from now on begins after `event`."""

    def copy_after(self, event: StreamEvent) -> None:
        """Copies queued from now on begin after `event`."""


class CudaStreams:
    """CUDA's streams; `device` computes on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: Any = torch.cuda.Stream(device)

    def pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        # Memory of the side stream: nothing that the computing stream has still to do can be in it.
        with torch.cuda.stream(self._side):
            return torch.empty(size, dtype=dtype, device=self._device)

    def copy(self, to: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._side):
            to.copy_(source, non_blocking=True)

    def copied(self) -> StreamEvent:
        return self._recorded(self._side)

    def computed(self) -> StreamEvent:
        return self._recorded(torch.cuda.current_stream(self._device))

    def compute_after(self, event: StreamEvent) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)  # type: ignore[arg-type]

    def copy_after(self, event: StreamEvent) -> None:
        self._side.wait_event(event)

    @staticmethod
    def _recorded(stream: Any) -> StreamEvent:
        # blocking: a thread that waits for it leaves its core to others.
        event: Any = torch.cuda.Event(blocking=True)
        event.record(stream)
        done: StreamEvent = event
        return done


def streams_of(device: torch.device) -> Streams | None:
    """How to copy to a device; None where nothing need be copied."""
    return CudaStreams(device) if device.type == "cuda" else None


def page_locked(streams: Streams) -> Callable[[int, type[np.generic]], NDArray[Any]]:
    """Makes the arrays of a reader's buffers, for `new_buffers`."""
    return lambda size, dtype: streams.pinned(size, torch.from_numpy(np.empty(0, dtype)).dtype).numpy()


# The graphs of a `ChainSupervision`: the numerator is prepared on the CPU.
SUPERVISION_GRAPHS = frozenset(
    ("first_state", "first_sequence", "first_arc", "finals", "times", "pdfs", "costs", "nexts")
)


class _DeviceBuffers:
    """Room on the device for one minibatch."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.used: StreamEvent | None = None  # the point after the step that computed on it last

    def copy_in(self, streams: Streams, name: str, source: Tensor) -> Tensor:
        """Queue the copy of `source` to here; what the CPU will look at is copied there, at once."""
        if name in SUPERVISION_GRAPHS:
            return source.clone()
        if name not in self.tensors or self.tensors[name].numel() < source.numel():
            self.tensors[name] = streams.empty(source.numel(), source.dtype)
        here = self.tensors[name][: source.numel()].view(source.shape)
        streams.copy(here, source)
        return here


class DeviceBatches(Iterator[Batch]):
    """A reader's minibatches on a device; close it, or use it as a context manager.

    Args:
        reader: whose buffers are page-locked, if `streams` are given; closed with this.
        streams: how to copy; None: the tensors are the reader's buffers.

    Attributes:
        reader: the reader; `request` is for those on request.
        waited: seconds that ``__next__`` waited.
    """

    def __init__(self, reader: MinibatchReader, streams: Streams | None = None) -> None:
        self.reader, self._streams, self.waited = reader, streams, 0.0
        self._held: _DeviceBuffers | None = None
        if streams is None:
            return
        self._ready: queue.Queue[tuple[_DeviceBuffers, StreamEvent, Batch] | BaseException | None] = queue.Queue()
        self._free: queue.Queue[_DeviceBuffers | None] = queue.Queue()
        for _ in range(_COPIES):
            self._free.put(_DeviceBuffers())
        self._thread = threading.Thread(target=self._copy_all, args=(streams,), name="copy-to-device", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        began = time.monotonic()
        try:
            if self._streams is None:
                return _as_tensors(next(self.reader))
            return self._next_copied(self._streams)
        finally:
            self.waited += time.monotonic() - began

    def _next_copied(self, streams: Streams) -> Batch:
        if self._held is not None:
            self._held.used = streams.computed()
            self._free.put(self._held)
            self._held = None
        got = self._ready.get()
        if got is None:
            self._ready.put(None)  # for those who ask again
            raise StopIteration
        if isinstance(got, BaseException):
            self._ready.put(got)
            raise got
        self._held, copied, batch = got
        streams.compute_after(copied)
        return batch

    def _copy_all(self, streams: Streams) -> None:
        """The thread's work."""
        try:
            while (buffers := self._free.get()) is not None:
                minibatch = next(self.reader, None)
                if minibatch is None:
                    break
                if buffers.used is not None:
                    streams.copy_after(buffers.used)
                host = _as_tensors(minibatch)
                there = host.map(functools.partial(buffers.copy_in, streams))
                copied = streams.copied()
                self._ready.put((buffers, copied, there))
                copied.synchronize()  # the reader takes its buffer back at the next call
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again by __next__, in the learner's thread
            self._ready.put(error)

    def close(self) -> None:
        """Stop reading and copying; more than once does no harm."""
        if self._streams is None:
            self.reader.close()
            return
        self._free.put(None)
        self.reader.close()
        self._thread.join()
        if self._held is not None:  # the step that uses it may still be computing
            self._streams.computed().synchronize()
            self._held = None

    def counters(self) -> Counters:
        """The reader's."""
        return self.reader.counters()

    def __enter__(self) -> DeviceBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _as_tensors(minibatch: NumpyMinibatch) -> Batch:
    """The minibatch as tensors in the reader's memory."""
    return minibatch.map(lambda _, array: torch.from_numpy(array))
