"""Which recurrences of a network are LSTM layers that `lstm.lstm` computes as one operation."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from kaldi_mpi.models.components import (
    Affine,
    BackpropTruncation,
    ComponentModule,
    Linear,
    LstmNonlinearity,
)
from kaldi_mpi.models.config import ComponentNode, DimRangeNode
from kaldi_mpi.models.descriptor import Descriptor
from kaldi_mpi.models.graph import Graph


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
        mask: the three columns of a dropout mask, or None.
    """

    members: frozenset[str]
    value: str
    inputs: Descriptor
    delay: int
    w_all: str
    nonlinearity: str
    truncation: str
    projection: str | None
    mask: Descriptor | None = None


class _Other(Exception):
    """The recurrence is of another kind."""


def recognise(graph: Graph, names: Set[str]) -> LstmGroup | None:
    """The LSTM layer that nodes which depend on each other are; None: they are something else."""
    try:
        found = _Recogniser(graph, names).group()
    except _Other:
        return None
    for node in graph.nodes.values():
        for name in graph.inputs_of(node):
            if name not in found.members or node.name in found.members:
                continue
            # The fused layer gives its output alone, not the cell.
            base, offset, _ = graph.resolve(name)
            offset += node.offset if isinstance(node, DimRangeNode) else 0
            cell = graph.dim(found.value) // 2
            if base != found.value or (found.projection is None and offset < cell):
                return None
    return found


class _Recogniser:
    """Finds the parts of an LSTM in a set of nodes that depend on each other."""

    def __init__(self, graph: Graph, names: Set[str]) -> None:
        self.graph, self.names = graph, names

    def one(self, cls: type[ComponentModule]) -> ComponentNode:
        nodes = self.component_nodes(cls)
        if len(nodes) != 1:
            raise _Other
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
        if len(terms) == 3 and not terms[2].op and terms[2].name not in self.names:
            terms.pop()  # a dropout mask
        last = terms.pop() if terms else node.input
        inner = last.children[0] if last.op == "IfDefined" else last
        if last.op != "IfDefined" or inner.op != "Offset" or inner.children[0].op:
            raise _Other
        if self.graph.resolve(inner.children[0].name) != wanted:
            raise _Other
        return terms, inner.integer(1)

    def sources(self, node: ComponentNode) -> list[tuple[str, int, int]]:
        """What a node's input is made of, neighbouring columns of the same node joined."""
        terms = node.input.children if node.input.op == "Append" else (node.input,)
        if any(term.op for term in terms):
            raise _Other
        parts: list[tuple[str, int, int]] = []
        for name, offset, dim in (self.graph.resolve(term.name) for term in terms):
            if parts and parts[-1][0] == name and parts[-1][1] + parts[-1][2] == offset:
                offset, dim = parts[-1][1], parts[-1][2] + dim
                parts.pop()
            parts.append((name, offset, dim))
        return parts

    def group(self) -> LstmGroup:
        truncation = self.one(BackpropTruncation)
        nonlinearity = self.one(LstmNonlinearity)
        cell = self.graph.dim(nonlinearity.name) // 2
        affines = self.component_nodes((Affine, Linear))
        w_all = [node for node in affines if node.input.op == "Append"]
        if len(w_all) != 1:
            raise _Other
        others = [node for node in affines if node is not w_all[0]]
        projection = others[0] if others else None
        known = {truncation.name, nonlinearity.name, w_all[0].name, *(node.name for node in others)}
        extra = [
            name
            for name in self.names - known
            if not isinstance(self.graph.nodes[name], DimRangeNode) or self.graph.resolve(name)[0] not in known
        ]
        if extra or len(others) > 1:
            raise _Other
        rec = self.graph.dim(truncation.name) - cell
        if projection is None:
            wanted = [(nonlinearity.name, 0, 2 * cell)]
        else:
            wanted = [(nonlinearity.name, 0, cell), (projection.name, 0, rec)]
            if self.sources(projection) != [(nonlinearity.name, cell, cell)]:
                raise _Other
        if self.sources(truncation) != wanted:
            raise _Other
        inputs, delay = self.recurrence(w_all[0], (truncation.name, cell, rec))
        gates, delay_of_cell = self.recurrence(nonlinearity, (truncation.name, 0, cell))
        if [str(term) for term in gates] != [w_all[0].name] or delay != delay_of_cell or delay == 0:
            raise _Other
        if not inputs or any(name in self.names for term in inputs for name in term.names()):
            raise _Other
        value = projection or nonlinearity
        masks = nonlinearity.input.children[2:]
        return LstmGroup(
            members=frozenset(self.names | {value.name, nonlinearity.name}),
            value=value.name,
            inputs=inputs[0] if len(inputs) == 1 else Descriptor("Append", tuple(inputs)),
            delay=delay,
            w_all=w_all[0].component,
            nonlinearity=nonlinearity.component,
            truncation=truncation.component,
            projection=projection.component if projection else None,
            mask=masks[0] if masks else None,
        )
