"""How much context a network needs, from its nodes alone: of an xconfig, whose components are not made yet.

Components count as row by row; `Graph.contexts` knows those that look further.
"""

from __future__ import annotations

from collections.abc import Sequence

from kaldi_mpi.models.config import DimRangeNode, InputNode, Node
from kaldi_mpi.models.graph import IVECTOR
from kaldi_mpi.models.times import Axis, Mask, defined, reach


def contexts(nodes: Sequence[Node]) -> tuple[int, int]:
    """Frames that the output named ``output`` needs to its left and right.

    Args:
        nodes: after what they depend on, but for what stands in IfDefined.

    Raises:
        KeyError: there is no such output, or a node that does not exist or comes later.
    """
    furthest = 1 + sum(reach(node.input) for node in nodes if not isinstance(node, InputNode | DimRangeNode))
    given, axis = range(2 * furthest + 1), Axis(-furthest, 3 * furthest + 1)
    found: dict[str, Mask] = {}
    for node in nodes:
        if isinstance(node, InputNode):
            found[node.name] = axis.mask([0] if node.name == IVECTOR else given)
        elif isinstance(node, DimRangeNode):
            found[node.name] = found[node.input_node]
        else:
            found[node.name] = defined(node.input, axis, axis.times, found)
    times = axis.of(found["output"])
    return max(0, int(times[0]) - given[0]), max(0, given[-1] - int(times[-1]))
