"""Minibatches: what one has in it, and the memory in which a reader keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.loader.chunks import ChunkShape
from kaldi_mpi.loader.native import borrow, ffi
from kaldi_mpi.loader.plan import Cut, Size, Source, shapes_of, sizes_of


class Buffer(NamedTuple):
    """Memory for one minibatch: C-contiguous, writeable arrays, at least as large as the largest minibatch.

    Attributes:
        feats: float32, B * rows * feat_dim elements.
        labels: int64, B * width * num_targets elements.
        weights: float32, as many as labels (of chain examples B * width); None where all weights are 1.
        ivectors: float32, B * ivector_dim elements; None where there are none.
        first_state, first_sequence, first_arc, finals, times, pdfs, costs, nexts: of chain examples, what a
            `ChainSupervision` has; None for others.
    """

    feats: NDArray[np.float32]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    ivectors: NDArray[np.float32] | None = None
    first_state: NDArray[np.int32] | None = None
    first_sequence: NDArray[np.int32] | None = None
    first_arc: NDArray[np.int64] | None = None
    finals: NDArray[np.float32] | None = None
    times: NDArray[np.int32] | None = None
    pdfs: NDArray[np.int32] | None = None
    costs: NDArray[np.float32] | None = None
    nexts: NDArray[np.int32] | None = None


# The type of each array in NumPy and in C.
_TYPES: dict[str, tuple[type[np.generic], str]] = {
    "feats": (np.float32, "float"),
    "labels": (np.int64, "int64_t"),
    "weights": (np.float32, "float"),
    "ivectors": (np.float32, "float"),
    "first_state": (np.int32, "int32_t"),
    "first_sequence": (np.int32, "int32_t"),
    "first_arc": (np.int64, "int64_t"),
    "finals": (np.float32, "float"),
    "times": (np.int32, "int32_t"),
    "pdfs": (np.int32, "int32_t"),
    "costs": (np.float32, "float"),
    "nexts": (np.int32, "int32_t"),
}

# Elements that each array of a buffer needs; what is not named is not there.
Sizes = dict[str, int]

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
    sizes = largest(source, chunking, minibatch)
    return [new_buffer(sizes, allocate) for _ in range(depth)]


def new_buffer(sizes: Sizes, allocate: Allocate = np.empty) -> Buffer:
    """A buffer of arrays of these sizes."""
    return Buffer(**{name: allocate(size, _TYPES[name][0]) for name, size in sizes.items()})


def largest(source: Source, chunking: Cut, minibatch: Size) -> Sizes:
    """Elements that a buffer's arrays need for the largest minibatch that can occur."""
    shapes = shapes_of(source, chunking)
    units = sizes_of(shapes, minibatch)
    pairs = [(count * shape.sequences, shape) for count, shape in zip(units, shapes, strict=True)]
    frames = max(chunks * shape.width for chunks, shape in pairs)
    sizes = {
        "feats": max(chunks * shape.rows for chunks, shape in pairs) * source.feat_dim,
        "labels": frames * source.num_targets,
    }
    if source.has_weights:
        sizes["weights"] = frames * max(1, source.num_targets)
    if source.ivector_dim:
        sizes["ivectors"] = max(chunks for chunks, _ in pairs) * source.ivector_dim
    graphs = getattr(source, "largest_graphs", None)
    return sizes if graphs is None else {**sizes, **graphs(units)}


def flat(buffer: Buffer, needed: Sizes) -> Buffer:
    """The buffer's arrays as vectors of their first elements, so many as are needed.

    Raises:
        ConfigError: one is not there, too small or of another type.
    """
    vectors: dict[str, NDArray[Any]] = {}
    for name, size in needed.items():
        array, dtype = getattr(buffer, name), _TYPES[name][0]
        if array is None:
            raise ConfigError(f"a minibatch buffer has no {name}, and the data have")
        if array.dtype != dtype or array.size < size or not (array.flags.c_contiguous and array.flags.writeable):
            raise ConfigError(
                f"a minibatch buffer's {name} are {array.dtype} with {array.size} elements, and must be a writeable, "
                f"contiguous {np.dtype(dtype)} array with at least {size}"
            )
        vectors[name] = array.reshape(-1)[:size]
    return Buffer(**vectors)


def lend(buffer: Buffer) -> Any:
    """The buffer as a ``km_buffer``, which keeps the arrays alive only as long as they are kept elsewhere."""
    pointers = {
        name: borrow(array, _TYPES[name][1], _TYPES[name][0])
        for name, array in buffer._asdict().items()
        if array is not None
    }
    lent = ffi.new("km_buffer *")
    for name, pointer in pointers.items():
        setattr(lent if name in ("feats", "labels", "weights", "ivectors") else lent.graphs, name, pointer)
    return lent


def view(vector: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The first elements of a vector in another shape."""
    count = 1
    for length in shape:
        count *= length
    return vector[:count].reshape(shape)


@dataclass(frozen=True)
class ChainSupervision(Generic[Array]):
    """What the numerator of LF-MMI needs of a minibatch of chain examples: F FSTs over the tropical semiring, with S
    states and N arcs in all, one FST after the other.

    Each FST is of one sequence; of a merged example it is of all its sequences, one after the other. It has
    frames_per_sequence arcs a sequence from its start, which is its first state, to a final state; constrained ones
    have their states in order of time, those of end-to-end examples may have cycles.

    Attributes:
        weight: of each sequence (``<Weight>``).
        frames_per_sequence: output frames, T.
        num_pdfs: columns of the output (``<LabelDim>``).
        end2end: whether the FSTs may have cycles, and are not tied to frames.
        first_state: int32 (F + 1), of each FST; and S.
        first_sequence: int32 (F + 1), of each FST: the first sequence that it is of; and B.
        first_arc: int64 (S + 1): the arcs of state s are first_arc[s] .. first_arc[s + 1] - 1.
        finals: float32 (S), costs; inf where a state is not final.
        times: int32 (S), arcs from the start of its FST to each state; None for end-to-end examples.
        pdfs: int32 (N), labels less 1.
        costs: float32 (N).
        nexts: int32 (N), states numbered over all FSTs.
        deriv_weights: float32 (B, T); None where all are 1.
    """

    weight: float
    frames_per_sequence: int
    num_pdfs: int
    end2end: bool
    first_state: Array
    first_sequence: Array
    first_arc: Array
    finals: Array
    pdfs: Array
    costs: Array
    nexts: Array
    times: Array | None = None
    deriv_weights: Array | None = None

    def map(self, convert: Callable[[str, Array], Other]) -> ChainSupervision[Other]:
        """The same with other arrays: `convert` makes each of its name and the array there is."""
        return ChainSupervision(
            weight=self.weight,
            frames_per_sequence=self.frames_per_sequence,
            num_pdfs=self.num_pdfs,
            end2end=self.end2end,
            first_state=convert("first_state", self.first_state),
            first_sequence=convert("first_sequence", self.first_sequence),
            first_arc=convert("first_arc", self.first_arc),
            finals=convert("finals", self.finals),
            pdfs=convert("pdfs", self.pdfs),
            costs=convert("costs", self.costs),
            nexts=convert("nexts", self.nexts),
            times=None if self.times is None else convert("times", self.times),
            deriv_weights=None if self.deriv_weights is None else convert("deriv_weights", self.deriv_weights),
        )


def graph_sizes(fsts: int, states: int, arcs: int, *, end2end: bool) -> Sizes:
    """Elements of the arrays of a `ChainSupervision`, but for the derivative weights."""
    of_fsts = {"first_state": fsts + 1, "first_sequence": fsts + 1}
    of_states = {"first_arc": states + 1, "finals": states, **({} if end2end else {"times": states})}
    return {**of_fsts, **of_states, "pdfs": arcs, "costs": arcs, "nexts": arcs}


def supervision_of(
    buffer: Buffer, graphs: Any, *, weight: float, frames: int, num_pdfs: int, end2end: bool
) -> ChainSupervision[NDArray[Any]]:
    """Views of what a buffer has of supervision.

    Args:
        graphs: ``km_graphs``, which says how much there is.
        weight, frames, num_pdfs, end2end: see `ChainSupervision`.
    """
    counts = graph_sizes(graphs.num_fsts, graphs.num_states, graphs.num_arcs, end2end=end2end)
    arrays = {name: getattr(buffer, name)[:count] for name, count in counts.items()}
    if buffer.weights is not None:
        arrays["deriv_weights"] = view(buffer.weights, (graphs.num_sequences, frames))
    return ChainSupervision(weight, frames, num_pdfs, end2end, **arrays)


@dataclass(frozen=True)
class Minibatch(Generic[Array]):
    """What one rank gets at one step.

    A reader's has NumPy arrays, which are valid until its next ``__next__``; `map` puts those of another library in
    their place.

    Attributes:
        feats: float32 (B, rows, feat_dim); B is smaller in an epoch's last steps, maybe 0.
        labels: int64 (B, W), or (B, W, K) where frames have up to K > 1 labels; -1 where there is no label: no
            frame, or a frame that belongs to another chunk. Of chain examples (B, 0).
        frames: labelled frames here; of chain examples, output frames.
        global_frames: labelled frames of this step over all ranks.
        weight: the sum of the weights of all labels here; `frames` where all are 1. Of chain examples, the weight of
            the supervision times `frames`.
        epoch: from 0.
        step: global step, counted from where the reader's plan starts.
        shape: of the chunks.
        weights: float32 of the labels' shape; None: all are 1.
        ivectors: float32 (B, ivector_dim), or None.
        supervision: of chain examples, in place of labels.
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
    supervision: ChainSupervision[Array] | None = None

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
            supervision=None if self.supervision is None else self.supervision.map(convert),
        )


NumpyMinibatch = Minibatch[NDArray[Any]]
