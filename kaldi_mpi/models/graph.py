"""The graph of a network's nodes: checks, recurrent layers, and which frames of a node are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models.components import ComponentModule
from kaldi_mpi.models.config import ComponentNode, Config, DimRangeNode, InputNode, Node, OutputNode, Place
from kaldi_mpi.models.descriptor import Descriptor, DescriptorError
from kaldi_mpi.models.times import Axis, Mask, Times, defined, demand, moduli, reach

# nnet3's name of the input that holds one vector a chunk, at time 0, instead of one a frame.
IVECTOR = "ivector"

# A node, or nodes that depend on each other.
Unit = Node | frozenset[str]


class Graph:
    """Checked nodes in an order in which they can be computed.

    Args:
        config: nodes.
        components: by name.

    Attributes:
        nodes: by name.
        units: nodes, and sets of nodes that depend on each other (recurrent layers), inputs first.

    Raises:
        ConfigError: nodes or components that are missing, dimensions that do not fit, a descriptor of a kind that is
            not supported; names the file and the node; all complaints at once, a line each.
    """

    def __init__(self, config: Config, components: Mapping[str, ComponentModule]) -> None:
        self.source, self.components, self._places = config.source, components, config.places
        self.nodes: dict[str, Node] = {}
        self._complaints: list[str] = []
        for node in config.nodes:
            if node.name in self.nodes:
                raise self.error(node.name, "is defined twice")
            self.nodes[node.name] = node
        self._dims: dict[str, int] = {}
        self._check()
        if self._complaints:
            raise ConfigError("\n".join(self._complaints))
        edges = {name: self.inputs_of(node) for name, node in self.nodes.items()}
        self.units: list[Unit] = [
            self.nodes[names[0]] if len(names) == 1 and names[0] not in edges[names[0]] else frozenset(names)
            for names in strongly_connected(edges)
        ]
        # How far beyond what is asked for, and given, frames can matter.
        self._reach = sum(self._reach_of(node) for node in self.nodes.values()) + 1
        self.modulus = self._modulus()

    def error(self, node: str, cause: str) -> ConfigError:
        return self._places.get(node, Place(self.source)).error(cause, f"node {node}")

    def _complain(self, node: str, cause: str) -> None:
        self._complaints.append(str(self.error(node, cause)))

    def inputs_of(self, node: Node) -> list[str]:
        """Names of the nodes that it takes; a component without an input names any node, also itself, as its input."""
        module = self.module_of(node)
        if isinstance(node, InputNode) or (module is not None and module.takes_nothing):
            return []
        if isinstance(node, DimRangeNode):
            return [node.input_node]
        return list(node.input.names())

    def dim(self, name: str) -> int:
        """Columns of a node."""
        return self._dims[name]

    def module_of(self, node: Node) -> ComponentModule | None:
        return self.components.get(node.component) if isinstance(node, ComponentNode) else None

    def descriptor_of(self, node: Node) -> Descriptor | None:
        """What a node takes; None for an input."""
        if isinstance(node, InputNode):
            return None
        return Descriptor("", (node.input_node,)) if isinstance(node, DimRangeNode) else node.input

    # Checks

    def _check(self) -> None:
        for node in self.nodes.values():
            if isinstance(node, ComponentNode):
                if node.component not in self.components:
                    self._complain(node.name, f"there is no component {node.component}")
                else:
                    self._dims[node.name] = self.components[node.component].output_dim
            elif isinstance(node, InputNode | DimRangeNode):
                self._dims[node.name] = node.dim
        for node in self.nodes.values():
            missing = [name for name in self.inputs_of(node) if name not in self.nodes]
            for name in missing:
                self._complain(node.name, f"its input {name} does not exist")
            for name in self.inputs_of(node):
                if isinstance(self.nodes.get(name), OutputNode):
                    self._complain(node.name, f"its input {name} is an output node")
                    missing.append(name)
            if missing or any(name not in self._dims for name in self.inputs_of(node)):
                continue
            if isinstance(node, DimRangeNode):
                self._check_columns(node)
            elif isinstance(node, ComponentNode | OutputNode):
                self._check_descriptor(node)

    def _check_columns(self, node: DimRangeNode) -> None:
        whole = self._dims[node.input_node]
        if node.offset < 0 or node.offset + node.dim > whole:
            self._complain(node.name, f"columns {node.offset} to {node.offset + node.dim} of a node of {whole}")

    def _check_descriptor(self, node: ComponentNode | OutputNode) -> None:
        for part in _walk(node.input):
            if part.op == "ReplaceIndex" and str(part.arguments[1]) != "t":
                self._complain(node.name, f"{part}: only the t index can be replaced")
            if part.op == "Round" and part.integer(1) < 1:
                self._complain(node.name, f"{part}: the modulus must be above 0")
            if part.op == "Offset" and len(part.arguments) > 2 and part.integer(2):
                self._complain(node.name, "Offset of the x index is not supported")
        try:
            dim = node.input.dim(self.dim)
        except DescriptorError as error:
            self._complain(node.name, str(error))
            return
        if isinstance(node, OutputNode):
            self._dims[node.name] = dim
        elif node.component in self.components:
            wanted = self.components[node.component].input_dim
            if dim != wanted and not self.components[node.component].takes_nothing:
                self._complain(node.name, f"input of dimension {dim} for a component of {wanted}")

    def resolve(self, name: str) -> tuple[str, int, int]:
        """(node, offset, dim) of a name, through dim-range nodes."""
        node, offset, dim = self.nodes[name], 0, self.dim(name)
        while isinstance(node, DimRangeNode):
            offset += node.offset
            node = self.nodes[node.input_node]
        return node.name, offset, dim

    # Frames

    def _reach_of(self, node: Node) -> int:
        descriptor = self.descriptor_of(node)
        own = 0 if descriptor is None else reach(descriptor)
        module = self.module_of(node)
        if module is not None and not module.row_wise:
            required, optional = module.input_times(0)
            own += max((abs(t) for t in (*required, *optional)), default=0) + module.modulus
        return own

    def _modulus(self) -> int:
        found = 1
        for node in self.nodes.values():
            descriptor, module = self.descriptor_of(node), self.module_of(node)
            for modulus in moduli(descriptor) if descriptor is not None else ():
                found = math.lcm(found, modulus)
            found = math.lcm(found, module.modulus if module is not None else 1)
        return found

    def axis(self, first: int, last: int) -> Axis:
        """An axis for a request that is given, or asks for, the times first .. last."""
        return Axis(min(first, 0) - self._reach, max(last, 0) + self._reach)

    def computable(self, axis: Axis, given: Mapping[str, Mask]) -> dict[str, Mask]:
        """Frames that each node can have when the inputs have the frames `given` by name."""
        found: dict[str, Mask] = {}
        for unit in self.units:
            if isinstance(unit, InputNode):
                found[unit.name] = given.get(unit.name, axis.empty())
            elif not isinstance(unit, frozenset):
                found[unit.name] = self._able(unit, axis, found)
            else:
                # What a recurrence needs of itself stands in IfDefined: it is computable where the rest is.
                found.update({name: axis.full() for name in unit})
                changed = True
                while changed:
                    changed = False
                    for name in sorted(unit):
                        mask = self._able(self.nodes[name], axis, found)
                        changed = changed or not np.array_equal(mask, found[name])
                        found[name] = mask
        return found

    def _able(self, node: Node, axis: Axis, found: Mapping[str, Mask]) -> Mask:
        descriptor, module = self.descriptor_of(node), self.module_of(node)
        assert descriptor is not None
        if module is not None and module.takes_nothing:
            return axis.full()
        have = defined(descriptor, axis, axis.times, found)
        if module is None or module.row_wise:
            return have
        able = axis.empty()
        for times, required, optional in _input_times(module, axis.times):
            # A component that can do without each of its inputs cannot do without all of them.
            there = [axis.look(have, column) for column in (required if required else optional)]
            able[times - axis.first] = np.all(there, axis=0) if required else np.any(there, axis=0)
        return able

    def needed(self, axis: Axis, wanted: Mapping[str, Mask], computable: Mapping[str, Mask]) -> dict[str, Mask]:
        """Frames of each node that the frames `wanted` of some depend on; other nodes are left out."""
        found = {name: mask.copy() for name, mask in wanted.items()}
        for unit in reversed(self.units):
            if not isinstance(unit, frozenset):
                if unit.name in found:
                    module = self.module_of(unit)
                    if module is not None and module.fills_gaps:
                        found[unit.name] |= _between(axis, found[unit.name]) & computable[unit.name]
                    self._demand(unit, axis, computable, found)
                continue
            before = None
            while before is None or any(not np.array_equal(found[n], before[n]) for n in found if n in unit):
                before = {name: found[name].copy() if name in found else axis.empty() for name in unit}
                for name in unit:
                    if name in found:
                        self._demand(self.nodes[name], axis, computable, found)
        return found

    def _demand(self, node: Node, axis: Axis, computable: Mapping[str, Mask], found: dict[str, Mask]) -> None:
        descriptor, module = self.descriptor_of(node), self.module_of(node)
        if descriptor is None or (module is not None and module.takes_nothing):
            return
        times = axis.of(found[node.name])
        demand(descriptor, axis, self.component_inputs(node, axis, times, computable), computable, found)

    def component_inputs(self, node: Node, axis: Axis, times: Times, computable: Mapping[str, Mask]) -> Times:
        """The times at which a node's descriptor is taken, for its output at `times`."""
        module = self.module_of(node)
        if module is None or module.row_wise:
            return times
        descriptor = self.descriptor_of(node)
        assert descriptor is not None
        have = defined(descriptor, axis, axis.times, computable)
        taken = axis.empty()
        for _, required, optional in _input_times(module, times):
            for column in required:
                axis.put(taken, column)
            for column in optional:
                axis.put(taken, column[axis.look(have, column)])
        return axis.of(taken)

    def contexts(self, outputs: Sequence[str] = ("output",)) -> tuple[int, int]:
        """Frames that the outputs need to their left and right, as nnet3-info prints them.

        Raises:
            ConfigError: an output can never be computed.
        """
        window = 2 * self._reach + 2 * self.modulus + 100
        left = right = 0
        for shift in range(self.modulus):
            # The chunk begins at any time that the modulus tells apart.
            axis = self.axis(shift, shift + window)
            frames = axis.mask(range(shift, shift + window))
            given = {node.name: frames for node in self.nodes.values() if isinstance(node, InputNode)}
            given[IVECTOR] = axis.mask([0])
            able = self.computable(axis, given)
            for output in outputs:
                times = axis.of(able[output])
                # With an i-vector taken as a row a frame, nothing but time 0 can be had.
                if not len(times) or (IVECTOR in self.nodes and times.tolist() == [0]):
                    cause = f"cannot be computed from {window} frames of input"
                    if IVECTOR in self.nodes:
                        cause += f" ({IVECTOR} has time 0 alone: take it by ReplaceIndex({IVECTOR}, t, 0))"
                    raise self.error(output, cause)
                left = max(left, int(times[0]) - shift)
                right = max(right, shift + window - 1 - int(times[-1]))
        return max(0, left), max(0, right)


def _between(axis: Axis, mask: Mask) -> Mask:
    """All times from the first of `mask` to its last, at the largest step that meets each of it."""
    times = axis.of(mask)
    if len(times) < 3:
        return mask
    return axis.mask(range(int(times[0]), int(times[-1]) + 1, int(np.gcd.reduce(np.diff(times)))))


def _input_times(module: ComponentModule, times: Times) -> Iterator[tuple[Times, list[Times], list[Times]]]:
    """Times, and for each required and each optional input of them its times; a part for each phase of the modulus."""
    for phase in range(module.modulus):
        mine = times[np.mod(times, module.modulus) == phase]
        if len(mine):
            required, optional = module.input_times(phase)
            yield mine, [mine + (t - phase) for t in required], [mine + (t - phase) for t in optional]


def _walk(descriptor: Descriptor) -> Iterator[Descriptor]:
    yield descriptor
    for part in descriptor.children:
        yield from _walk(part)


def strongly_connected(edges: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """Strongly connected components, inputs first (Tarjan's algorithm, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    for root in edges:
        if root in index:
            continue
        work = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            name, rest = work[-1]
            for other in rest:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(edges[other])))
                    break
                if other in on_stack:
                    low[name] = min(low[name], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == index[name]:
                    found: list[str] = []
                    while not found or found[-1] != name:
                        found.append(stack.pop())
                        on_stack.discard(found[-1])
                    yield found[::-1]
