"""The denominator of a minibatch: the log-probability of all that the graph allows, and each pdf's occupation.

On a CPU it is csrc/denominator.c, on a GPU Triton's kernels where they prove themselves (device.py), and
elsewhere, and for numbers that are not float32, PyTorch's operations (denominator_torch.py, which has the formulas).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaldi_mpi.chain.denominator_graph import DenominatorGraph, denominator_graph
from kaldi_mpi.chain.denominator_torch import DenominatorSums, GraphTensors, forward_backward, graph_tensors
from kaldi_mpi.chain.device import kernels_for
from kaldi_mpi.chain.native import Memory, array, each_range, ffi, lib, numbers
from kaldi_mpi.formats.fst import Fst

KERNELS = "denominator_kernels"


class Denominator:
    """The graph with what is kept between minibatches.

    Args:
        graph: the denominator graph.
        leaky: the coefficient of the leaky HMM.

    Raises:
        ValueError: the coefficient is not between 0 and 1.
    """

    def __init__(self, graph: DenominatorGraph, leaky: float) -> None:
        if not 0.0 < leaky < 1.0:
            raise ValueError(f"leaky-hmm-coefficient {leaky:g} is not between 0 and 1")
        self.graph, self.leaky = graph, leaky
        self._memory = Memory(np.float32)
        self._tensors: dict[tuple[torch.device, torch.dtype], GraphTensors] = {}
        self._arranged: dict[torch.device, Any] = {}
        self._in_c = ffi.new(
            "km_denominator_graph *",
            {
                "num_states": graph.num_states,
                "num_pdfs": graph.num_pdfs,
                "num_groups": graph.num_groups,
                "initial": array(graph.initial),
                "first_group": array(graph.first_group),
                "group_pdfs": array(graph.group_pdfs),
                "first_in": array(graph.first_in),
                "sources": array(graph.sources),
                "in_probs": array(graph.in_probs),
                "first_out": array(graph.first_out),
                "out_groups": array(graph.out_groups),
                "out_probs": array(graph.out_probs),
            },
        )

    def __call__(
        self, outputs: Tensor, derivative: Tensor | None = None, scale: float = 1.0, checked: int = 1
    ) -> DenominatorSums:
        """Log-probabilities of sequences; occupations times `scale` are written to `derivative`.

        Args:
            outputs: (B, T, P), the network's, of any size; P is the graph's num_pdfs, T at least 1.
            derivative: the same shape, dtype and device, contiguous; or None: only log-probabilities are wanted.
            checked: for how many of the first frames the sums are taken that should be 1.

        Raises:
            ValueError: the shapes do not fit.
        """
        shape = tuple(outputs.shape)
        if len(shape) != 3 or shape[2] != self.graph.num_pdfs or shape[1] < 1:
            raise ValueError(f"outputs of shape {shape} for a denominator graph of {self.graph.num_pdfs} pdfs")
        if derivative is not None and (tuple(derivative.shape) != shape or not derivative.is_contiguous()):
            raise ValueError(f"derivative of shape {tuple(derivative.shape)} for outputs of shape {shape}")
        outputs, checked = outputs.detach(), min(checked, shape[1])
        if outputs.dtype == torch.float32 and outputs.device.type == "cpu":
            return self._c(outputs.contiguous(), derivative, scale, checked)
        if outputs.dtype == torch.float32 and (kernels := kernels_for(outputs.device, KERNELS, trial)) is not None:
            key = outputs.device
            if key not in self._arranged:
                self._arranged[key] = kernels.arrange(self.graph, key)
            return kernels.forward_backward(
                self._arranged[key], outputs.contiguous(), self.leaky, derivative, scale, checked
            )
        return forward_backward(self._on(outputs), outputs, self.leaky, derivative, scale, checked)

    def _on(self, outputs: Tensor) -> GraphTensors:
        key = outputs.device, outputs.dtype
        if key not in self._tensors:
            self._tensors[key] = graph_tensors(self.graph, *key)
        return self._tensors[key]

    def _c(self, outputs: Tensor, derivative: Tensor | None, scale: float, checked: int) -> DenominatorSums:
        sequences, frames, pdfs = outputs.shape
        log_probs = torch.empty(sequences, dtype=torch.float64)
        sums = torch.empty(2, checked, sequences, dtype=torch.float64)
        of_outputs = ffi.new("km_outputs *", (numbers(outputs), frames * pdfs, pdfs, sequences, frames))
        found = ffi.new(
            "km_denominator_sums *",
            (numbers(log_probs), numbers(derivative), scale, checked, numbers(sums[0]), numbers(sums[1])),
        )
        lanes = lib.KM_LANES
        floats = lib.km_denominator_floats(self._in_c, frames)

        def work(begin: int, end: int) -> None:
            memory = self._memory.take(floats)
            last = min(end * lanes, sequences)
            lib.km_denominator(self._in_c, of_outputs, self.leaky, begin * lanes, last, found, array(memory))
            self._memory.give_back(memory)

        each_range(-(-sequences // lanes), work)
        if derivative is None:
            return DenominatorSums(log_probs)
        return DenominatorSums(log_probs, sums[0], sums[1])


def trial(device: torch.device, kernels: ModuleType | None) -> list[Tensor]:
    """Log-probabilities, occupations and sums of a small graph, whose degrees differ, by the kernels or without."""
    generator = np.random.default_rng(5)
    states, pdfs = 40, 12
    degrees = np.minimum(generator.geometric(0.2, states), states)
    degrees[0] = states
    nexts = [np.sort(generator.permutation(states)[:degree]) for degree in degrees]
    arcs = int(degrees.sum())
    labels = generator.integers(1, pdfs + 1, arcs).astype(np.int32)
    graph = denominator_graph(
        Fst(
            0, np.zeros(states, np.float32), np.cumsum([0, *degrees]), labels, labels,
            generator.uniform(1.0, 5.0, arcs).astype(np.float32), np.concatenate(nexts).astype(np.int32),
        ),
        pdfs,
    )  # fmt: skip
    outputs = torch.from_numpy(generator.normal(0.0, 3.0, (3, 7, pdfs)).astype(np.float32)).to(device)
    derivative = torch.empty_like(outputs)
    if kernels is None:
        on_device = graph_tensors(graph, device, outputs.dtype)
        sums = forward_backward(on_device, outputs, 0.1, derivative, 1.0, 7)
    else:
        sums = kernels.forward_backward(kernels.arrange(graph, device), outputs, 0.1, derivative, 1.0, 7)
    assert sums.state_sums is not None and sums.pdf_sums is not None
    return [sums.log_probs, derivative, sums.state_sums, sums.pdf_sums]
