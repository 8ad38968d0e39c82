"""Functions of tensors whose launches are recorded once for each set of shapes, and replayed as one CUDA graph.

A loop over time is hundreds of small launches, which the host cannot give as fast as a GPU works them off; a graph is
one. It reads and writes the same memory at each replay: inputs are copied there, and what comes out is copied away, so
that a caller may keep it for as long as it likes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor | None]
Function: TypeAlias = Callable[..., Tensors]

_MOST = 32  # recordings that are kept: each holds the memory that its function takes
_WARM_UPS = 2  # runs before a recording, in which libraries make what they need and Triton compiles


class Recorder(Protocol):
    """What records; tests put in one that needs no GPU."""

    def record(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """Run a function, keeping what it launches: what launches that again, and the tensors that it writes then."""


class CudaRecorder:
    """Records into a CUDA graph of the current device."""

    def record(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        # thread_local: the thread that copies minibatches, and that of MPI, go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run()
        return graph.replay, outputs


@dataclass
class _Recording:
    inputs: Tensors
    replay: Callable[[], None]
    outputs: Tensors


class Graphs:
    """The recordings of one device.

    Args:
        recorder: makes them.
        most: that are kept; where more are wanted, the one that has not been used for longest goes.

    A function is run as it is when a key and set of shapes come for the first time, for it may be the last one too, and
    is recorded at the second.
    """

    def __init__(self, recorder: Recorder, most: int = _MOST) -> None:
        self._recorder, self._most = recorder, most
        self._known: OrderedDict[Hashable, _Recording | None] = OrderedDict()

    def __call__(self, key: Hashable, function: Function, *inputs: Tensor | None) -> Tensors:
        """What `function` gives for `inputs`, of which it may only read, and write, the memory.

        Args:
            key: tells apart functions, and what else they depend on; shapes need not be in it.
        """
        # A recording's memory is one thread's: validation runs beside training.
        of_inputs = tuple(None if t is None else (tuple(t.shape), t.dtype) for t in inputs)
        whole = (key, threading.get_ident(), of_inputs)
        if whole not in self._known:
            self._remember(whole, None)
            return function(*inputs)
        recording = self._known[whole]
        if recording is None:
            recording = self._record(function, inputs)
            self._remember(whole, recording)
        self._known.move_to_end(whole)
        for static, given in zip(recording.inputs, inputs, strict=True):
            if static is not None and given is not None:
                static.copy_(given)
        recording.replay()
        return tuple(None if output is None else output.clone() for output in recording.outputs)

    def _record(self, function: Function, inputs: Tensors) -> _Recording:
        static = tuple(None if t is None else t.clone(memory_format=torch.contiguous_format) for t in inputs)
        replay, outputs = self._recorder.record(lambda: function(*static))
        return _Recording(static, replay, outputs)

    def _remember(self, whole: Hashable, recording: _Recording | None) -> None:
        self._known[whole] = recording
        while len(self._known) > self._most:
            self._known.popitem(last=False)
