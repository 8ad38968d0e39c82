"""The published model where the learner's device is: in main memory, or on a GPU.

On a GPU, x stays in device memory, so that the learner's step (x <- x + change, w <- x) costs two passes of
device memory and nothing crosses the bus. Snapshots and differences of the pieces that travel go through
page-locked memory on a stream of their own, beside the learner's kernels, or stay on the device where MPI takes its
addresses. Events order the two streams piece
by piece: neither sees a piece half-changed by the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.averaging.published import Flat, HostPublishedModel, PiecewiseModel, PublishedModel
from kaldi_mpi.transport.number_formats import Wire
from kaldi_mpi.transport.world import Allocate

_TORCH_WIRE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DevicePublishedModel(PiecewiseModel):
    """A `PublishedModel` in a device's memory; also works for CPU tensors, without streams.

    Args:
        values: (P,) float32 on the device, the model at the start; copied.
        piece_size: parameters of a piece.
        wire: ``float32``, ``float16`` or ``bfloat16``.
        direct: snapshots stay on the device, and MPI is given their addresses.
    """

    def __init__(self, values: torch.Tensor, piece_size: int, wire: str, direct: bool = False) -> None:
        super().__init__(values.numel(), piece_size, wire)
        self._x = values.detach().clone()
        self._direct = direct
        self.allocate: Allocate | None = self._on_device if direct else None
        self._wire_type = _TORCH_WIRE[wire]
        self._cuda = values.device.type == "cuda"
        self._stream = torch.cuda.Stream(values.device) if self._cuda else None
        # The last use of each piece, on either stream: whoever comes next waits for it on the device.
        self._used: list[torch.cuda.Event | None] = [None] * self.num_pieces

    def snapshot(self, piece: int) -> Wire:
        """See `PublishedModel.snapshot`; returns when the copy is complete, page-locked or on the device."""
        with self._ordered(piece, self._stream):
            narrow = self._x[self.where[piece]].to(self._wire_type, copy=True)
            if self._direct:
                if self._stream is not None:
                    self._stream.synchronize()
                return cast(Wire, narrow)
            host = torch.empty(narrow.shape, dtype=self._wire_type, pin_memory=self._cuda)
            host.copy_(narrow, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return _as_wire(host)

    def read(self, piece: int) -> Flat:
        with self._ordered(piece, self._stream):
            return np.asarray(self._x[self.where[piece]].to("cpu", copy=True).numpy())

    def mix(self, piece: int, mine: Wire, theirs: Wire, weight: float) -> None:
        """See `PublishedModel.mix`; the difference is taken on the device, in float32, as elsewhere."""
        with self._ordered(piece, self._stream):
            difference = self._to_device(theirs) - self._to_device(mine)
            difference *= float(np.float32(weight))
            self._x[self.where[piece]] += difference
        if self._stream is not None:
            self._stream.synchronize()  # `mine` and `theirs` may be given back now

    def push_pull(self, piece: int, change: torch.Tensor, copy: torch.Tensor) -> None:
        """See `PublishedModel.push_pull`; on the learner's stream, which is not waited for."""
        where = self.where[piece]
        with self._ordered(piece, None):
            self._x[where] += change[where]
            copy[where] = self._x[where]
        self.steps[piece] += 1

    def received(self, payload: Any) -> Wire:
        """See `PublishedModel.received`; a message that came before `allocate` was known is in main memory."""
        if isinstance(payload, np.ndarray):
            return payload.view(self.wire)
        return cast(Wire, payload.view(self._wire_type))

    def _on_device(self, size: int) -> torch.Tensor:
        """Memory for the `size` bytes of a message."""
        return torch.empty(size, dtype=torch.uint8, device=self._x.device)

    def to_numpy(self) -> Flat:
        out = np.empty(self._x.numel(), np.float32)
        for piece, where in enumerate(self.where):
            with self.lock(piece):
                out[where] = self.read(piece)
        return out

    def write(self, piece: int, values: Flat) -> None:
        with self._ordered(piece, None):
            self._x[self.where[piece]] = torch.from_numpy(values).to(self._x.device)

    def load(self, values: Flat) -> None:
        for piece, where in enumerate(self.where):
            with self.lock(piece):
                self.write(piece, values[where])

    def _to_device(self, wire: Wire | torch.Tensor) -> torch.Tensor:
        if isinstance(wire, torch.Tensor):
            return wire.to(torch.float32)
        host = torch.from_numpy(np.ascontiguousarray(wire).view(np.int16 if wire.dtype == np.uint16 else wire.dtype))
        if wire.dtype == np.uint16:
            host = host.view(torch.bfloat16)
        return host.to(self._x.device, non_blocking=True).to(torch.float32)

    @contextlib.contextmanager
    def _ordered(self, piece: int, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Work on a piece on `stream` (None: the caller's current one), after whatever used it last."""
        if not self._cuda:
            yield
            return
        stream = stream or torch.cuda.current_stream(self._x.device)
        with torch.cuda.stream(stream):
            last = self._used[piece]
            if last is not None:
                stream.wait_event(last)
            yield
            event = torch.cuda.Event()
            event.record(stream)
            self._used[piece] = event


def _as_wire(host: torch.Tensor) -> NDArray[Any]:
    if host.dtype == torch.bfloat16:
        return np.asarray(host.view(torch.int16).numpy().view(np.uint16))
    return np.asarray(host.numpy())


def make_published(values: torch.Tensor, piece_size: int, wire: str, direct: bool = False) -> PublishedModel:
    """The published model for a learner whose parameters are `values`, (P,) float32 on its device.

    Args:
        piece_size, wire, direct: see `DevicePublishedModel`.
    """
    if values.device.type == "cuda":
        return DevicePublishedModel(values, piece_size, wire, direct)
    return HostPublishedModel(values.numpy(), piece_size, wire)
