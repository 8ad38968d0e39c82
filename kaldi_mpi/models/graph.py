"""The graph of a network's nodes: checks, recurrent layers, and which frames of a node are needed.

A range of frames is a pair (first, last), both included; FOREVER stands for no limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models.components import (
    Affine,
    BackpropTruncation,
    ComponentModule,
    Linear,
    LstmNonlinearity,
)
from kaldi_mpi.models.config import ComponentNode, Config, DimRangeNode, InputNode, Node, OutputNode
from kaldi_mpi.models.descriptor import Descriptor, DescriptorError

Range = tuple[int, int]
FOREVER = 1 << 40
# nnet3's name of the input that holds one vector a chunk, at time 0, instead of one a frame.
IVECTOR = "ivector"
EVERYWHERE: Range = (-FOREVER, FOREVER)
EMPTY: Range = (FOREVER, -FOREVER)


def intersection(a: Range, b: Range) -> Range:
    """Frames in both."""
    return max(a[0], b[0]), min(a[1], b[1])


def hull(a: Range, b: Range) -> Range:
    """The smallest range that holds both."""
    return min(a[0], b[0]), max(a[1], b[1])


@dataclass(frozen=True)
class LstmGroup:
    """The nodes of one recurrent layer, which are computed together.

    Attributes:
        members: names of all its nodes.
        value: the node whose value the layer gives: the projection, or the nonlinearity (of which only
            the second half, m, can be used).
        inputs: the non-recurrent terms of its input.
        delay: frames to the frame that it recurs to.
        w_all, nonlinearity, truncation, projection: names of components.
    """

    members: frozenset[str]
    value: str
    inputs: Descriptor
    delay: int
    w_all: str
    nonlinearity: str
    truncation: str
    projection: str | None


Unit = Node | LstmGroup


class Graph:
    """Checked nodes in an order in which they can be computed.

    Args:
        config: nodes.
        components: by name.

    Raises:
        ConfigError: a node or component that is missing, dimensions that do not fit, a descriptor or a
            recurrence of a kind that is not supported; names the file and the node.
    """

    def __init__(self, config: Config, components: Mapping[str, ComponentModule]) -> None:
        self.source, self.components = config.source, components
        self.nodes: dict[str, Node] = {}
        for node in config.nodes:
            if node.name in self.nodes:
                raise self.error(node.name, "is defined twice")
            self.nodes[node.name] = node
        self._dims: dict[str, int] = {}
        self._check()
        self.group_of: dict[str, LstmGroup] = {}
        self.units = list(self._units())
        self._check_uses()

    def error(self, node: str, cause: str) -> ConfigError:
        return ConfigError(f"{self.source}: node {node}: {cause}")

    def inputs_of(self, node: Node) -> list[str]:
        if isinstance(node, InputNode):
            return []
        if isinstance(node, DimRangeNode):
            return [node.input_node]
        return list(node.input.names())

    def dim(self, name: str) -> int:
        """Columns of a node."""
        return self._dims[name]

    def _check(self) -> None:
        for node in self.nodes.values():
            if isinstance(node, ComponentNode):
                if node.component not in self.components:
                    raise self.error(node.name, f"there is no component {node.component}")
                self._dims[node.name] = self.components[node.component].output_dim
            elif isinstance(node, InputNode | DimRangeNode):
                self._dims[node.name] = node.dim
        for node in self.nodes.values():
            for name in self.inputs_of(node):
                if name not in self.nodes:
                    raise self.error(node.name, f"its input {name} does not exist")
                if isinstance(self.nodes[name], OutputNode):
                    raise self.error(node.name, f"its input {name} is an output node")
            if isinstance(node, DimRangeNode) and node.input_node == IVECTOR:
                raise self.error(node.name, f"takes {IVECTOR} otherwise than by ReplaceIndex({IVECTOR}, t, 0)")
            if isinstance(node, DimRangeNode):
                whole = self._dims[node.input_node]
                if node.offset < 0 or node.offset + node.dim > whole:
                    raise self.error(
                        node.name, f"columns {node.offset} to {node.offset + node.dim} of a node of {whole}"
                    )
            elif isinstance(node, ComponentNode | OutputNode):
                self._check_descriptor(node)

    def _check_descriptor(self, node: ComponentNode | OutputNode) -> None:
        for part in _walk(node.input):
            if part.op in ("Switch", "Failover", "Round"):
                raise self.error(node.name, f"{part.op} in a descriptor is not supported yet")
            if part.op == "ReplaceIndex" and str(part) != f"ReplaceIndex({IVECTOR}, t, 0)":
                raise self.error(node.name, f"{part}: only ReplaceIndex({IVECTOR}, t, 0) is supported")
            bare = (node.input,) if part is node.input and not part.op else part.children
            if part.op != "ReplaceIndex" and any(not term.op and term.name == IVECTOR for term in bare):
                raise self.error(node.name, f"takes {IVECTOR} otherwise than by ReplaceIndex({IVECTOR}, t, 0)")
            if part.op == "Offset" and len(part.arguments) > 2:
                raise self.error(node.name, "Offset of the x index is not supported")
        try:
            dim = node.input.dim(self.dim)
        except DescriptorError as error:
            raise self.error(node.name, str(error)) from error
        if isinstance(node, ComponentNode):
            wanted = self.components[node.component].input_dim
            if dim != wanted:
                raise self.error(node.name, f"input of dimension {dim} for a component of {wanted}")
        else:
            self._dims[node.name] = dim

    def _units(self) -> Iterator[Unit]:
        for names in _components_of_graph({n: self.inputs_of(node) for n, node in self.nodes.items()}):
            if len(names) == 1 and names[0] not in self.inputs_of(self.nodes[names[0]]):
                yield self.nodes[names[0]]
                continue
            group = _Recogniser(self, set(names)).group()
            self.group_of.update(dict.fromkeys(names, group))
            yield group

    def _check_uses(self) -> None:
        for node in self.nodes.values():
            for name in self.inputs_of(node):
                group = self.group_of.get(name)
                if group is None or node.name in group.members:
                    continue
                base, offset, _ = self.resolve(name)
                if isinstance(node, DimRangeNode):
                    offset += node.offset
                cell = self.dim(group.value) // 2
                if base != group.value or (group.projection is None and offset < cell):
                    raise self.error(node.name, f"takes {name} out of a recurrent layer: not supported yet")

    def resolve(self, name: str) -> tuple[str, int, int]:
        """(node, offset, dim) of a name, through dim-range nodes."""
        node, offset, dim = self.nodes[name], 0, self.dim(name)
        while isinstance(node, DimRangeNode):
            offset += node.offset
            node = self.nodes[node.input_node]
        return node.name, offset, dim

    # Frames

    def unit_inputs(self, unit: Unit) -> Descriptor | None:
        if isinstance(unit, InputNode):
            return None
        if isinstance(unit, LstmGroup):
            return unit.inputs
        return Descriptor("", (unit.input_node,)) if isinstance(unit, DimRangeNode) else unit.input

    def computable(self, given: Range) -> dict[str, Range]:
        """Frames that each node can have when the input of frames has `given` (an i-vector has time 0 alone)."""
        found: dict[str, Range] = {}
        for unit in self.units:
            descriptor = self.unit_inputs(unit)
            if descriptor is not None:
                frames = defined(descriptor, found)
            else:
                frames = (0, 0) if isinstance(unit, InputNode) and unit.name == IVECTOR else given
            for name in unit.members if isinstance(unit, LstmGroup) else (unit.name,):
                found[name] = frames
        return found

    def needed(self, output: str, frames: Range, computable: Mapping[str, Range]) -> dict[str, Range]:
        """Frames of each node that `frames` of node `output` depend on; other nodes are left out."""
        wanted: dict[str, Range] = {output: frames}
        for unit in reversed(self.units):
            if isinstance(unit, LstmGroup):
                demands = [wanted[name] for name in unit.members if name in wanted]
                if not demands:
                    continue
                first, last = demands[0]
                for demand in demands[1:]:
                    first, last = hull((first, last), demand)
                all_ = (-FOREVER, last) if unit.delay < 0 else (first, FOREVER)
                first, last = intersection(all_, computable[unit.value])
                wanted.update(dict.fromkeys(unit.members, (first, last)))
                descriptor: Descriptor | None = unit.inputs
            else:
                if unit.name not in wanted:
                    continue
                (first, last), descriptor = wanted[unit.name], self.unit_inputs(unit)
            if descriptor is not None:
                _demand(descriptor, (first, last), computable, wanted)
        return wanted


def defined(descriptor: Descriptor, nodes: Mapping[str, Range]) -> Range:
    """Frames at which a descriptor has a value."""
    if not descriptor.op:
        return nodes[descriptor.name]
    if descriptor.op in ("IfDefined", "Const", "ReplaceIndex"):  # of an i-vector, which is always given
        return EVERYWHERE
    if descriptor.op == "Offset":
        first, last = defined(descriptor.children[0], nodes)
        return first - descriptor.integer(1), last - descriptor.integer(1)
    frames = EVERYWHERE
    for part in descriptor.children:
        frames = intersection(frames, defined(part, nodes))
    return frames


def contexts(computable: Callable[[Range], Mapping[str, Range]]) -> tuple[int, int]:
    """Frames that the output named ``output`` needs to its left and right, as nnet3-info prints them.

    Args:
        computable: frames that each node can have when the input has a range.

    Raises:
        KeyError: there is no such output.
    """
    # With frames 0 .. FOREVER given, the output begins where the left context has been had, and so on.
    left, right = computable((0, FOREVER))["output"][0], -computable((-FOREVER, 0))["output"][1]
    return max(0, left), max(0, right)


def computable_in_order(nodes: Iterable[Node], given: Range) -> dict[str, Range]:
    """`Graph.computable` of nodes that come after what they depend on, but for what stands in IfDefined.

    Raises:
        KeyError: a node that does not exist, or comes later.
    """
    found: dict[str, Range] = {}
    for node in nodes:
        if isinstance(node, InputNode):
            found[node.name] = (0, 0) if node.name == IVECTOR else given
        elif isinstance(node, DimRangeNode):
            found[node.name] = found[node.input_node]
        else:
            found[node.name] = defined(node.input, found)
    return found


def _demand(descriptor: Descriptor, frames: Range, computable: Mapping[str, Range], wanted: dict[str, Range]) -> None:
    if not descriptor.op:
        wanted[descriptor.name] = hull(wanted.get(descriptor.name, EMPTY), frames)
    elif descriptor.op == "Offset":
        offset = descriptor.integer(1)
        _demand(descriptor.children[0], (frames[0] + offset, frames[1] + offset), computable, wanted)
    elif descriptor.op == "ReplaceIndex":
        time = descriptor.integer(2)
        _demand(descriptor.children[0], (time, time), computable, wanted)
    elif descriptor.op == "IfDefined":
        part = intersection(frames, defined(descriptor.children[0], computable))
        if part[0] <= part[1]:
            _demand(descriptor.children[0], part, computable, wanted)
    else:
        for part_ in descriptor.children:
            _demand(part_, frames, computable, wanted)


def _walk(descriptor: Descriptor) -> Iterator[Descriptor]:
    yield descriptor
    for part in descriptor.children:
        yield from _walk(part)


def _components_of_graph(edges: Mapping[str, list[str]]) -> Iterator[list[str]]:
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


class _Recogniser:
    """Finds the parts of an LSTM in a set of nodes that depend on each other."""

    def __init__(self, graph: Graph, names: set[str]) -> None:
        self.graph, self.names = graph, names
        self.where = min(names)

    def fail(self, cause: str) -> ConfigError:
        listed = ", ".join(sorted(self.names))
        return self.graph.error(self.where, f"this recurrence is not supported: {cause} (nodes: {listed})")

    def one(self, cls: type[ComponentModule] | tuple[type[ComponentModule], ...], what: str) -> ComponentNode:
        nodes = self.component_nodes(cls)
        if len(nodes) != 1:
            raise self.fail(f"{len(nodes)} nodes of type {what} instead of one")
        return nodes[0]

    def component_nodes(self, cls: type[ComponentModule] | tuple[type[ComponentModule], ...]) -> list[ComponentNode]:
        nodes = (self.graph.nodes[name] for name in sorted(self.names))
        return [
            node
            for node in nodes
            if isinstance(node, ComponentNode) and isinstance(self.graph.components[node.component], cls)
        ]

    def recurrence(self, node: ComponentNode, wanted: tuple[str, int, int]) -> tuple[list[Descriptor], int]:
        """The terms of Append(terms..., IfDefined(Offset(wanted, delay))), and the delay."""
        terms = list(node.input.children) if node.input.op == "Append" else []
        last = terms.pop() if terms else node.input
        inner = last.children[0] if last.op == "IfDefined" else last
        if last.op != "IfDefined" or inner.op != "Offset" or inner.children[0].op:
            raise self.fail(f"{node.name} does not end in IfDefined(Offset(node, delay))")
        if self.graph.resolve(inner.children[0].name) != wanted:
            raise self.fail(f"{node.name} does not recur to what is expected")
        return terms, inner.integer(1)

    def sources(self, node: ComponentNode) -> list[tuple[str, int, int]]:
        """What a node's input is made of, neighbouring columns of the same node joined."""
        terms = node.input.children if node.input.op == "Append" else (node.input,)
        if any(term.op for term in terms):
            raise self.fail(f"{node.name} has an input other than nodes")
        parts: list[tuple[str, int, int]] = []
        for name, offset, dim in (self.graph.resolve(term.name) for term in terms):
            if parts and parts[-1][0] == name and parts[-1][1] + parts[-1][2] == offset:
                offset, dim = parts[-1][1], parts[-1][2] + dim
                parts.pop()
            parts.append((name, offset, dim))
        return parts

    def group(self) -> LstmGroup:
        truncation = self.one(BackpropTruncation, BackpropTruncation.kind)
        nonlinearity = self.one(LstmNonlinearity, LstmNonlinearity.kind)
        cell = self.graph.dim(nonlinearity.name) // 2
        affines = self.component_nodes((Affine, Linear))
        w_all = [node for node in affines if node.input.op == "Append"]
        if len(w_all) != 1:
            raise self.fail("not one affine component over input and recurrence")
        others = [node for node in affines if node is not w_all[0]]
        projection = others[0] if others else None
        known = {truncation.name, nonlinearity.name, w_all[0].name, *(node.name for node in others)}
        extra = [
            name
            for name in self.names - known
            if not isinstance(self.graph.nodes[name], DimRangeNode) or self.graph.resolve(name)[0] not in known
        ]
        if extra or len(others) > 1:
            raise self.fail(f"unexpected nodes {sorted(extra) or [node.name for node in others]}")
        rec = self.graph.dim(truncation.name) - cell
        if projection is None:
            wanted = [(nonlinearity.name, 0, 2 * cell)]
        else:
            wanted = [(nonlinearity.name, 0, cell), (projection.name, 0, rec)]
            if self.sources(projection) != [(nonlinearity.name, cell, cell)]:
                raise self.fail(f"{projection.name} does not take the output of {nonlinearity.name}")
        if self.sources(truncation) != wanted:
            raise self.fail(f"{truncation.name} does not take cell and output")
        inputs, delay = self.recurrence(w_all[0], (truncation.name, cell, rec))
        gates, delay_of_cell = self.recurrence(nonlinearity, (truncation.name, 0, cell))
        if [str(term) for term in gates] != [w_all[0].name] or delay != delay_of_cell or delay == 0:
            raise self.fail(f"{nonlinearity.name} does not take {w_all[0].name} and the same recurrence")
        if not inputs or any(name in self.names for term in inputs for name in term.names()):
            raise self.fail(f"{w_all[0].name} has a second recurrence")
        value = projection or nonlinearity
        return LstmGroup(
            members=frozenset(self.names | {value.name, nonlinearity.name}),
            value=value.name,
            inputs=inputs[0] if len(inputs) == 1 else Descriptor("Append", tuple(inputs)),
            delay=delay,
            w_all=w_all[0].component,
            nonlinearity=nonlinearity.component,
            truncation=truncation.component,
            projection=projection.component if projection else None,
        )
