"""The numerators of a minibatch: the log of the sum over the paths of each graph, and posteriors of pdfs at frames.

A path's weight is the exponential of its outputs, which are not limited, less its costs. On a CPU this is
csrc/numerator.c, on a GPU one launch of a Triton kernel where it proves itself, elsewhere, and for numbers that are
not float32, PyTorch's operations (numerator_torch.py); always in float64 and in the log domain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.chain.device import kernels_for
from kaldi_mpi.chain.native import Memory, array, each_range, ffi, lib, numbers
from kaldi_mpi.chain.numerator_torch import ArcTensors, sum_paths
from kaldi_mpi.chain.supervision_graphs import SupervisionGraphs
from kaldi_mpi.errors import DataError


@dataclass(frozen=True, eq=False)
class PreparedNumerator:
    """The graphs of a minibatch, checked, with what is known of them before there are outputs.

    An entry is a pdf at a frame of a sequence that occurs on an arc; E of them.

    Attributes:
        graphs: G of them, N arcs.
        num_pdfs: P, of the outputs.
        times: (S,) int32: frames from the start of a constrained graph to the state; of cyclic ones nothing.
        arc_entries: (N,) int32: the entry of each arc; of a cyclic graph, that at frame 0, less the graph's first.
        first_entry: (G + 1,) int64: entries of a graph are together, in the order of time.
        entries: (E,) int64: (sequence T + frame) P + pdf of each.
    """

    graphs: SupervisionGraphs
    num_pdfs: int
    times: NDArray[np.int32]
    arc_entries: NDArray[np.int32]
    first_entry: NDArray[np.int64]
    entries: NDArray[np.int64]

    @cached_property
    def _structs(self) -> tuple[Any, Any]:
        return _in_c(self.graphs), _about(self.graphs, self.num_pdfs, self.times, self.arc_entries, self.first_entry)

    @cached_property
    def _entries(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def _tensors(self) -> dict[torch.device, ArcTensors]:
        return {}

    def on(self, device: torch.device) -> ArcTensors:
        """The arrays on a device, copied there when first asked for."""
        if device not in self._tensors:
            graphs, first_entry = self.graphs, self.first_entry
            self._tensors[device] = ArcTensors.of(graphs, self.times, self.arc_entries, first_entry, device)
        return self._tensors[device]

    def entries_on(self, device: torch.device) -> Tensor:
        """`entries` on a device, copied there when first asked for."""
        if device not in self._entries:
            self._entries[device] = torch.from_numpy(self.entries).to(device, non_blocking=True)
        return self._entries[device]

    def sums(self, outputs: Tensor, posteriors: bool = True) -> tuple[Tensor, Tensor | None]:
        """The log-sums over the paths of each graph, (G,) float64, and posteriors of all entries, (E,).

        Where no path is left: -inf, and 0. Where an output is NaN, so is what it is on.

        Args:
            outputs: (B, T, P).
            posteriors: whether they are wanted; they have the outputs' dtype.

        Raises:
            ValueError: the shape is not that of the supervision.
        """
        shape = self.graphs.num_sequences, self.graphs.frames, self.num_pdfs
        if tuple(outputs.shape) != shape:
            raise ValueError(f"outputs of shape {tuple(outputs.shape)} for a supervision of {shape}")
        device = outputs.device
        scores = outputs.detach().reshape(-1)[self.entries_on(device)]
        if scores.dtype == torch.float32 and device.type == "cpu":
            return self._c(scores, posteriors)
        if scores.dtype == torch.float32 and (kernels := kernels_for(device, KERNELS, trial)) is not None:
            return kernels.sum_paths(self.on(device), scores, posteriors)
        return sum_paths(self.on(device), scores, posteriors)

    def _c(self, scores: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        graphs, numerator = self._structs
        log_probs = torch.empty(self.graphs.num_graphs, dtype=torch.float64)
        posteriors = torch.empty_like(scores) if wanted else None
        doubles = lib.km_numerator_doubles(graphs, numerator)

        def work(begin: int, end: int) -> None:
            memory = _MEMORY.take(doubles)
            lib.km_numerator_sums(
                graphs, numerator, numbers(scores), begin, end, numbers(log_probs), numbers(posteriors), array(memory)
            )
            _MEMORY.give_back(memory)

        each_range(self.graphs.num_graphs, work)
        return log_probs, posteriors


_MEMORY = Memory(np.float64)
KERNELS = "numerator_kernels"


def trial(device: torch.device, kernels: ModuleType | None) -> list[Tensor]:
    """Log-sums and posteriors of small graphs of both kinds, by the kernels or without."""
    ends = np.array([np.inf, np.inf, np.inf, 0.5, np.inf, np.inf, 0.0], dtype=np.float32)
    found: list[Tensor] = []
    for cyclic in (False, True):
        graphs = SupervisionGraphs(
            1.0, 2, 3, cyclic, np.array([0, 4, 7], dtype=np.int32), np.array([0, 1, 2], dtype=np.int32),
            np.array([0, 3, 4, 6, 6, 7, 9, 9]), ends, np.array([0, 1, 1, 2, 0, 0, 2, 1, 0], dtype=np.int32),
            np.linspace(0.1, 1.0, 9, dtype=np.float32), np.array([1, 1, 2, 3, 3, 3, 5, 6, 6], dtype=np.int32),
        )  # fmt: skip
        arcs = prepare_numerator(graphs, 3).on(device)
        scores = torch.linspace(-2.0, 2.0, arcs.num_entries, device=device)
        sums, posteriors = (sum_paths if kernels is None else kernels.sum_paths)(arcs, scores, True)
        assert posteriors is not None
        found += [sums, posteriors]
    return found


def prepare_numerator(graphs: SupervisionGraphs, num_pdfs: int) -> PreparedNumerator:
    """Check a minibatch's graphs and number their entries; all of the work is C, without the interpreter's lock.

    Raises:
        DataError: the supervision is of a tree with another number of pdfs; a pdf is not of it; an arc leads nowhere;
            of a constrained graph, a state has no time or two, or a path does not end with the last frame. Names the
            sequence.
    """
    if graphs.num_pdfs != num_pdfs:
        raise DataError(
            f"examples of a tree with {graphs.num_pdfs} pdfs, for a network with {num_pdfs} outputs: another tree"
        )
    times = np.empty(len(graphs.finals), dtype=np.int32)
    arc_entries = np.empty(len(graphs.pdfs), dtype=np.int32)
    first_entry = np.empty(graphs.num_graphs + 1, dtype=np.int64)
    last = np.empty(num_pdfs, dtype=np.int64)
    in_c, error = _in_c(graphs), ffi.new("km_error *")
    about = _about(graphs, num_pdfs, times, arc_entries, first_entry)
    if lib.km_numerator_prepare(in_c, about, array(last), error) != lib.KM_OK:
        cause = ffi.string(error.cause).decode("utf-8", "replace")
        raise DataError(cause, key=f"sequence {graphs.first_sequence[error.utterance]} of the minibatch")
    entries = np.empty(int(first_entry[-1]), dtype=np.int64)
    lib.km_numerator_entries(in_c, about, array(entries))
    return PreparedNumerator(graphs, num_pdfs, times, arc_entries, first_entry, entries)


def _in_c(graphs: SupervisionGraphs) -> Any:
    return ffi.new(
        "km_graphs *",
        {
            "num_fsts": graphs.num_graphs,
            "num_states": len(graphs.finals),
            "num_sequences": graphs.num_sequences,
            "num_arcs": len(graphs.pdfs),
            "first_state": array(graphs.first_state),
            "first_sequence": array(graphs.first_sequence),
            "first_arc": array(graphs.first_arc),
            "finals": array(graphs.finals),
            "pdfs": array(graphs.pdfs),
            "costs": array(graphs.costs),
            "nexts": array(graphs.nexts),
        },
    )


def _about(
    graphs: SupervisionGraphs,
    num_pdfs: int,
    times: NDArray[np.int32],
    arc_entries: NDArray[np.int32],
    first_entry: NDArray[np.int64],
) -> Any:
    return ffi.new(
        "km_numerator *",
        {
            "frames": graphs.frames,
            "num_pdfs": num_pdfs,
            "cyclic": graphs.cyclic,
            "times": array(times),
            "arc_entries": array(arc_entries),
            "first_entry": array(first_entry),
        },
    )
