"""The numerator of chain training: which strings of pdfs an utterance or a chunk of it may have.

From a phone lattice or an alignment comes an FST of the utterance's output frames, in which each phone may lie a
little earlier or later than it was aligned (Povey et al. 2016, section 2.5). Chunks are cut out of it, and multiplied
with normalization.fst, so that numerator paths are paths of the denominator, too (supervision_chunks.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.chain.acceptor import EPSILON, Acceptor, connect, push, remove_epsilons
from kaldi_mpi.chain.context_graph import expand_phones
from kaldi_mpi.chain.phone_hmm import PhoneHmms
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.fst import Fst, build_fst
from kaldi_mpi.formats.lattice import CompactLattice
from kaldi_mpi.formats.supervision import Supervision


@dataclass(frozen=True)
class SupervisionOptions:
    """How far a phone may move, and what is kept of its lattice's costs.

    Attributes:
        left_tolerance, right_tolerance: input frames that a phone may begin earlier, end later.
        frame_subsampling_factor: input frames an output frame.
        lm_scale: of the lattice's graph costs.
        weight: of the supervision.

    Raises:
        ConfigError: values that Kaldi refuses, too: tolerances so small that a phone of one input frame could be
            between two output frames, or a scale below 0 or not below 1.
    """

    left_tolerance: int = 5
    right_tolerance: int = 5
    frame_subsampling_factor: int = 3
    lm_scale: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        left, right, factor = self.left_tolerance, self.right_tolerance, self.frame_subsampling_factor
        if min(left, right) < 0 or factor < 1 or left + right + 1 < factor:
            raise ConfigError(
                f"--left-tolerance={left} and --right-tolerance={right} must be at least 0, "
                f"--frame-subsampling-factor={factor} at least 1 and at most one more than their sum"
            )
        if not 0.0 <= self.lm_scale < 1.0:
            raise ConfigError(f"--lm-scale={self.lm_scale} must be at least 0 and below 1")


@dataclass(frozen=True, eq=False)
class PhoneLattice:
    """The phones that an utterance may have, and when.

    Attributes:
        phones: acceptor without epsilons, costs are the lattice's graph costs.
        intervals: (A, 3) int64: phone, begin and end in input frames, of each arc with a phone.
        num_frames: input frames of the utterance.
    """

    phones: Fst
    intervals: NDArray[np.int64]
    num_frames: int


def phones_of_lattice(lattice: CompactLattice, *, file: str | None = None, key: str | None = None) -> PhoneLattice:
    """The phones of a lattice whose arcs are phones (lattice-align-phones --replace-output-symbols=true).

    Raises:
        DataError: it is empty, its paths have different lengths, or it has frames without a phone or the reverse.
    """

    def error(cause: str) -> DataError:
        return DataError(cause, file=file, key=key)

    if lattice.start < 0:
        raise error("the lattice is empty")
    final = lattice.nexts == lattice.num_states
    if ((lattice.labels == 0) & (lattice.frames > 0)).any() or ((lattice.labels > 0) & (lattice.frames == 0)).any():
        raise error("the lattice has frames without a phone, or a phone without frames: it is not aligned by phones")
    leaving: list[list[tuple[int, int, int]]] = [[] for _ in range(lattice.num_states + 1)]
    rows = zip(
        lattice.sources.tolist(), lattice.nexts.tolist(), lattice.labels.tolist(), lattice.frames.tolist(), strict=True
    )
    for source, to, phone, frames in rows:
        leaving[source].append((to, phone, frames))
    times, order, intervals = {lattice.start: 0}, [lattice.start], set()
    for state in order:
        for to, phone, frames in leaving[state]:
            time = times[state] + frames
            if to not in times:
                times[to] = time
                order.append(to)
            elif times[to] != time:
                raise error("the lattice's paths have different lengths")
            if phone:
                intervals.add((phone, times[state], time))
    if lattice.num_states not in times:
        raise error("the lattice has no path to an end")
    columns = (lattice.sources, lattice.labels, lattice.labels, lattice.graph, lattice.nexts)
    arcs = list(zip(*(column[~final].tolist() for column in columns), strict=True))
    finals = dict(zip(lattice.sources[final].tolist(), lattice.graph[final].tolist(), strict=True))
    phones = remove_epsilons(Acceptor.from_fst(build_fst(lattice.start, lattice.num_states, arcs, finals))).to_fst()
    return PhoneLattice(phones, np.array(sorted(intervals), np.int64).reshape(-1, 3), times[lattice.num_states])


def phones_of_alignment(
    segments: Sequence[tuple[int, int]], *, file: str | None = None, key: str | None = None
) -> PhoneLattice:
    """The same from the (phone, input frames) pairs of an alignment (ali-to-phones --write-lengths=true).

    Raises:
        DataError: there are none, or a phone or a duration below 1.
    """
    if not segments or min(min(segment) for segment in segments) < 1:
        raise DataError("phones and durations must be 1 or more, and there must be some", file=file, key=key)
    phones, durations = np.array(segments, np.int64).T
    ends = np.cumsum(durations)
    arcs = [(number, phone, phone, 0.0, number + 1) for number, phone in enumerate(phones.tolist())]
    return PhoneLattice(
        build_fst(0, len(arcs) + 1, arcs, {len(arcs): 0.0}),
        np.stack([phones, ends - durations, ends], axis=1),
        int(ends[-1]),
    )


def make_supervision(
    lattice: PhoneLattice,
    hmms: PhoneHmms,
    options: SupervisionOptions,
    *,
    transition_ids: bool = False,
    file: str | None = None,
    key: str | None = None,
) -> Supervision | None:
    """The FST of an utterance, as Kaldi's chain-get-supervision makes it.

    Args:
        transition_ids: labels are transition-ids, which unconstrained examples are made from, not pdf-ids + 1.
        file, key: for messages.

    Returns:
        None if no path is left: the utterance has more phones than output frames. Otherwise one FST without
        epsilons that need not be deterministic; each state has one time, and states are in the order of time.

    Raises:
        DataError: a phone that tree or transition model does not know.
    """
    factor = options.frame_subsampling_factor
    frames = -(-lattice.num_frames // factor)
    allowed: list[set[int]] = [set() for _ in range(frames)]
    for phone, begin, end in lattice.intervals.tolist():
        first = -(-max(0, begin - options.left_tolerance) // factor)
        last = -(-min(lattice.num_frames, end + options.right_tolerance) // factor)
        for frame in range(first, last):
            allowed[frame].add(phone)
    scaled = Acceptor.from_fst(lattice.phones)
    scaled = Acceptor(
        [[(label, cost * options.lm_scale, to) for label, cost, to in arcs] for arcs in scaled.arcs],
        [math.inf if cost == math.inf else cost * options.lm_scale for cost in scaled.finals],
    )
    # The cheapest path costs nothing: only what an alternative costs more than another is said, where they part.
    phones = push(scaled, remove_total=True).to_fst()
    try:
        graph = expand_phones(phones, hmms, transition_costs=False, transition_ids=transition_ids, file=file)
    except DataError as error:
        raise DataError(error.cause, file=error.file, key=key) from error
    fst = _unrolled(graph, allowed)
    if not fst.num_states:
        return None
    label_dim = hmms.num_transition_ids if transition_ids else hmms.num_pdfs
    return Supervision(options.weight, 1, frames, label_dim, False, (fst.to_fst(),))


def _unrolled(graph: Fst, allowed: list[set[int]]) -> Acceptor:
    """The paths of a graph of frames (labels, phones) with an allowed phone at each frame."""
    arcs: list[list[tuple[int, int, float, int]]] = [[] for _ in range(graph.num_states)]
    columns = (graph.sources(), graph.ilabels, graph.olabels, graph.costs, graph.nexts)
    for source, *arc in zip(*(column.tolist() for column in columns), strict=True):
        arcs[source].append((arc[0], arc[1], arc[2], arc[3]))
    finals = graph.finals.tolist()
    result = Acceptor()
    if not arcs:
        return result
    number_of: dict[tuple[int, int], int] = {}
    left: list[tuple[int, int]] = []

    def number(time: int, state: int) -> int:
        found = number_of.setdefault((time, state), len(left))
        if found == len(left):
            left.append((time, state))
            result.add_state(finals[state] if time == len(allowed) else math.inf)
        return found

    number(0, graph.start)
    for current, (time, state) in enumerate(left):
        for label, phone, cost, to in arcs[state]:
            if label == EPSILON:
                result.arcs[current].append((label, cost, number(time, to)))
            elif time < len(allowed) and phone in allowed[time]:
                result.arcs[current].append((label, cost, number(time + 1, to)))
    # Epsilons stand before the first frame only, where they do not mix states of different times.
    return remove_epsilons(result) if (graph.ilabels == EPSILON).any() else connect(result)
