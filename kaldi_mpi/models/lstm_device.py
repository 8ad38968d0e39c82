"""By what the LSTM's loops over time run on a device: Triton's kernels and CUDA graphs, where they prove themselves.

Neither is trusted: what a GPU, its driver and a version of Triton make of them is seen on a small layer, before the
training's first minibatch; where that fails or differs, PyTorch's operations do it, and the log says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kaldi_mpi.log import logger
from kaldi_mpi.models.cuda_graphs import CudaRecorder, Graphs
from kaldi_mpi.models.lstm_steps import Layout

Layer: TypeAlias = Callable[[torch.device], list[Tensor]]  # output and gradients of a small layer


@dataclass(frozen=True)
class Means:
    """By what a loop over time is carried out on a device.

    Attributes:
        kernels: lstm_kernels.py; None: PyTorch's operations.
        graphs: recordings; None: each launch is the host's.
    """

    kernels: ModuleType | None = None
    graphs: Graphs | None = None

    def run(self, steps: Callable[..., Any], layout: Layout, *tensors: Tensor | None) -> Any:
        """What `steps`, a loop of lstm_steps.py, returns."""
        if self.graphs is None:
            return steps(layout, self.kernels, *tensors)
        function = functools.partial(steps, layout, self.kernels)
        return self.graphs((steps, layout, self.kernels), function, *tensors)


_MEANS: dict[torch.device, Means] = {}
_TRIALS = 4  # of graphs: a run, a recording, and two replays more


def means_for(device: torch.device, layer: Layer) -> Means:
    """On a GPU kernels and graphs, where they give what PyTorch gives, which is tried at the first call.

    Args:
        device: of the layer.
        layer: computes a small one on a device, by the means that this function gives while it is tried.
    """
    if device in _MEANS:
        return _MEANS[device]
    if device.type != "cuda":
        return Means()
    _MEANS[device] = Means()
    wanted = layer(device)
    try:
        from kaldi_mpi.models import lstm_kernels
    except ImportError as error:
        logger.warning("LSTM on %s by PyTorch's operations, several times slower: no Triton (%s)", device, error)
    else:
        slower = "by PyTorch's operations, several times slower"
        try_means(device, Means(lstm_kernels), layer, wanted, lstm_kernels.ERRORS, slower)
    graphs = Means(_MEANS[device].kernels, Graphs(CudaRecorder()))
    try_means(device, graphs, layer, wanted, (RuntimeError,), "launch by launch")
    return _MEANS[device]


def try_means(
    device: torch.device,
    means: Means,
    layer: Layer,
    wanted: list[Tensor],
    errors: tuple[type[Exception], ...],
    without: str,
) -> None:
    """Use `means` from now on, if the small layer then gives what is wanted, each time; `without` goes to the log."""
    before, _MEANS[device] = _MEANS[device], means
    try:
        for _ in range(_TRIALS):
            for found, right in zip(layer(device), wanted, strict=True):
                if not torch.allclose(found, right, rtol=1e-4, atol=1e-4):
                    raise RuntimeError(f"results differ by {(found - right).abs().max().item():g}")
    except errors as error:
        _MEANS[device] = before
        cause = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
        what = "CUDA graphs" if means.graphs is not None else "Triton's kernels"
        logger.warning("LSTM on %s %s: %s cannot be used: %s", device, without, what, cause)
