"""What a request makes a network compute: the rows of every node and where each input row is found.

A computation (nnet3's name for it too) depends on shapes alone: which input frames there are, which outputs are wanted,
where derivatives end. So it is made once for each shape of minibatch; running it takes no decisions and looks at no
value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kaldi_mpi.models.components import BackpropTruncation, Call
from kaldi_mpi.models.config import ComponentNode, DimRangeNode, InputNode, Node, OutputNode
from kaldi_mpi.models.descriptor import Descriptor
from kaldi_mpi.models.graph import IVECTOR, Graph
from kaldi_mpi.models.lstm_backward import LstmSettings
from kaldi_mpi.models.lstm_group import LstmGroup, recognise
from kaldi_mpi.models.rows import MISSING, Gather
from kaldi_mpi.models.times import MOVES, Axis, Mask, Times, defined, moved, offsets_of


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Columns [begin, end) of some rows of a node."""

    node: str
    begin: int
    end: int
    rows: Gather
    times: tuple[int, ...]  # of the rows, for those who keep rows by time; None's place is taken by `there`
    there: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Expression:
    """A descriptor over the rows of one step: `op` is Append, Sum, Scale, Const or Switch."""

    op: str
    parts: tuple[Leaf | Expression, ...]
    scale: float = 1.0
    columns: int = 0
    count: int = 0
    order: Gather | None = None  # of Switch: where each of the parts' rows belongs


Source = Leaf | Expression


@dataclasses.dataclass(frozen=True)
class Step:
    """One node's (or recurrent layer's) rows."""

    node: ComponentNode | DimRangeNode | OutputNode
    source: Source | None
    call: Call


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """Nodes that depend on each other: steps block by block of times."""

    members: tuple[str, ...]
    blocks: tuple[tuple[Step, ...], ...]


@dataclasses.dataclass(frozen=True)
class FusedLstm:
    """An LSTM layer computed as one operation; `stride` frames lie between its rows."""

    group: LstmGroup
    settings: LstmSettings
    source: Source
    mask: Source | None
    times: tuple[int, ...]
    stride: int
    window: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Computation:
    """The steps of a request, in order.

    Attributes:
        times: of each node that is computed, or given.
    """

    steps: tuple[Step | Recurrence | FusedLstm, ...]
    times: Mapping[str, tuple[int, ...]]


class Compiler:
    """Makes the computations of one network."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.groups: dict[frozenset[str], LstmGroup | None] = {
            unit: recognise(graph, unit) for unit in graph.units if isinstance(unit, frozenset)
        }

    def compile(
        self,
        wanted: Mapping[str, Sequence[int]],
        given: tuple[int, int],
        deriv: tuple[int | None, int | None] = (None, None),
        only_input: str | None = None,
    ) -> Computation:
        """The computation of frames `wanted` of some nodes.

        Args:
            given: first and last time of the input of frames; an i-vector has time 0.
            deriv: first and last time with derivatives; None: no limit.
            only_input: the last node, of which only the input is made (its step has no component).

        Raises:
            ValueError: the input's frames do not reach as far as what is wanted needs.
        """
        graph = self.graph
        times = [t for frames in wanted.values() for t in frames]
        axis = graph.axis(min([given[0], *times]), max([given[1], *times]))
        frames = axis.mask(range(given[0], given[1] + 1))
        inputs = {node.name: frames for node in graph.nodes.values() if isinstance(node, InputNode)}
        inputs[IVECTOR] = axis.mask([0])
        able = graph.computable(axis, inputs)
        for name, asked in wanted.items():
            if not able[name][np.array(asked, np.int64) - axis.first].all():
                have = axis.of(able[name])
                span = f"frames {have[0]} to {have[-1]}" if len(have) else "no frame"
                raise ValueError(
                    f"input frames {given[0]} to {given[1]} allow {span} of {name}; "
                    f"{min(asked)} to {max(asked)} are asked for"
                )
        needed = graph.needed(axis, {name: axis.mask(asked) for name, asked in wanted.items()}, able)
        return _Maker(self, axis, able, needed, deriv, given).compile(only_input)


class _Maker:
    def __init__(
        self,
        compiler: Compiler,
        axis: Axis,
        able: Mapping[str, Mask],
        needed: Mapping[str, Mask],
        deriv: tuple[int | None, int | None],
        given: tuple[int, int],
    ) -> None:
        self.compiler, self.graph, self.axis, self.able, self.deriv = compiler, compiler.graph, axis, able, deriv
        self.times: dict[str, Times] = {name: axis.of(mask) for name, mask in needed.items()}
        for node in self.graph.nodes.values():
            if isinstance(node, InputNode) and node.name in self.times:
                # The input comes whole, whatever of it is needed.
                every = np.array([0]) if node.name == IVECTOR else np.arange(given[0], given[1] + 1)
                self.times[node.name] = every

    def compile(self, only_input: str | None) -> Computation:
        steps: list[Step | Recurrence | FusedLstm] = []
        for unit in self.graph.units:
            if isinstance(unit, frozenset):
                if any(name in self.times for name in unit):
                    steps.append(self.recurrence(unit))
            elif unit.name in self.times and not isinstance(unit, InputNode):
                bare = unit.name == only_input
                steps.append(self.step(unit, self.times[unit.name], bare))
        return Computation(tuple(steps), {name: tuple(times.tolist()) for name, times in self.times.items()})

    def window(self, times: Times) -> tuple[int, int]:
        """Rows [begin, end) of those at `times` that get derivatives."""
        low, high = self.deriv
        begin = 0 if low is None else int(np.searchsorted(times, low))
        end = len(times) if high is None else int(np.searchsorted(times, high, side="right"))
        return begin, max(begin, end)

    def step(self, node: Node, times: Times, bare: bool = False) -> Step:
        assert isinstance(node, ComponentNode | DimRangeNode | OutputNode)
        module = self.graph.module_of(node)
        descriptor = self.graph.descriptor_of(node)
        assert descriptor is not None
        inside = times if bare else self.graph.component_inputs(node, self.axis, times, self.able)
        nothing = module is not None and module.takes_nothing and not bare
        source = None if nothing else self.source(descriptor, inside)
        return Step(node, source, Call(tuple(inside.tolist()), tuple(times.tolist()), self.window(times)))

    # Descriptors

    def source(self, descriptor: Descriptor, at: Times, there: Mask | None = None) -> Source:
        """A descriptor at the times `at`; where `there` is False its rows are zeros."""
        op, parts = descriptor.op, descriptor.children
        there = np.ones(len(at), np.bool_) if there is None else there
        if not op:
            return self.leaf(descriptor.name, at, there)
        if op in MOVES:
            return self.source(parts[0], moved(descriptor, at), there)
        if op == "IfDefined":
            return self.source(parts[0], at, there & defined(parts[0], self.axis, at, self.able))
        if op == "Const":
            value = float(str(descriptor.arguments[0]))
            return Expression("Const", (), scale=value, columns=descriptor.integer(1), count=len(at))
        if op == "Scale":
            return Expression("Scale", (self.source(parts[0], at, there),), scale=float(str(descriptor.arguments[0])))
        if op in ("Failover", "Switch"):
            if op == "Failover":
                first = defined(parts[0], self.axis, at, self.able)
                turns = [np.flatnonzero(first), np.flatnonzero(~first)]
            else:
                turns = [np.flatnonzero(np.mod(at, len(parts)) == number) for number in range(len(parts))]
            sources, order = [], []
            for part, rows in zip(parts, turns, strict=True):
                if len(rows):
                    sources.append(self.source(part, at[rows], there[rows]))
                    order.append(rows)
            if len(sources) == 1:
                return sources[0]
            # Rows are put together part after part; this is where each belongs.
            back = np.argsort(np.concatenate(order), kind="stable")
            return Expression("Switch", tuple(sources), order=Gather(back))
        return Expression(op, tuple(self.source(part, at, there) for part in parts))

    def leaf(self, name: str, at: Times, there: Mask) -> Leaf:
        base, offset, dim = self.graph.resolve(name)
        have = self.times.get(base)
        if have is None:  # only zeros are taken of it
            have = np.zeros(0, np.int64)
        found = np.searchsorted(have, at)
        found = np.where(there, found, MISSING)
        return Leaf(base, offset, offset + dim, Gather(found), tuple(at.tolist()), tuple(there.tolist()))

    # Recurrences

    def recurrence(self, unit: frozenset[str]) -> Recurrence | FusedLstm:
        group = self.compiler.groups[unit]
        if group is not None:
            fused = self.fused(group)
            if fused is not None:
                return fused
        members = [name for name in unit if name in self.times]
        delays = {offset for a in members for b in members for offset in self.offsets(a, b) if offset}
        if not delays or (min(delays) < 0 < max(delays)):
            raise self.graph.error(min(unit), f"a recurrence with offsets {sorted(delays)} is not supported")
        order = self.order(members)
        size = min(abs(delay) for delay in delays)
        every = sorted({t for name in members for t in self.times[name].tolist()}, reverse=max(delays) > 0)
        blocks: list[list[int]] = []
        for t in every:
            if blocks and abs(t - blocks[-1][0]) < size:
                blocks[-1].append(t)
            else:
                blocks.append([t])
        made = []
        for block in blocks:
            steps = []
            for name in order:
                times = np.array(sorted(set(block) & set(self.times[name].tolist())), np.int64)
                if len(times):
                    steps.append(self.step(self.graph.nodes[name], times))
            made.append(tuple(steps))
        return Recurrence(tuple(members), tuple(made))

    def offsets(self, taker: str, giver: str) -> list[int]:
        descriptor = self.graph.descriptor_of(self.graph.nodes[taker])
        return [] if descriptor is None else list(offsets_of(descriptor, giver))

    def order(self, members: Sequence[str]) -> list[str]:
        """Members after those that they take at their own time."""
        rest, order = sorted(members), []
        while rest:
            ready = [a for a in rest if not any(0 in self.offsets(a, b) for b in rest)]
            if not ready:
                raise self.graph.error(rest[0], f"nodes that need each other at the same frame: {', '.join(rest)}")
            order += ready
            rest = [name for name in rest if name not in ready]
        return order

    def fused(self, group: LstmGroup) -> FusedLstm | None:
        """The layer as one operation, where its rows are equally spaced and the delay is a multiple of that."""
        spans = [self.times[name] for name in group.members if name in self.times]
        times = np.unique(np.concatenate(spans))
        steps = set(np.diff(times).tolist())
        stride = steps.pop() if len(steps) == 1 else 1
        if steps or abs(group.delay) % stride:
            return None
        self.times[group.value] = times
        mask = None if group.mask is None else self.source(group.mask, times)
        truncation = self.graph.components[group.truncation]
        assert isinstance(truncation, BackpropTruncation)
        settings = LstmSettings(
            delay=group.delay,
            scale=truncation.scale,
            clipping_threshold=truncation.clipping_threshold,
            zeroing_threshold=truncation.zeroing_threshold,
            zeroing_interval=truncation.zeroing_interval,
            recurrence_interval=truncation.recurrence_interval,
        )
        source = self.source(group.inputs, times)
        return FusedLstm(group, settings, source, mask, tuple(times.tolist()), stride, self.window(times))
