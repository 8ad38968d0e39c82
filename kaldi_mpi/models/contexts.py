"""How much context a network needs, from its nodes alone, as ranges of frames.

A range of frames is a pair (first, last), both included; FOREVER stands for no limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from kaldi_mpi.models.config import DimRangeNode, InputNode, Node
from kaldi_mpi.models.descriptor import Descriptor
from kaldi_mpi.models.graph import IVECTOR

Range = tuple[int, int]
FOREVER = 1 << 40
EVERYWHERE: Range = (-FOREVER, FOREVER)


def intersection(a: Range, b: Range) -> Range:
    """Frames in both."""
    return max(a[0], b[0]), min(a[1], b[1])


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
