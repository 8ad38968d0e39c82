"""What can be said of a network before it is built, from components that have their shapes and no numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models.components import Initializer, component_errors, make_components
from kaldi_mpi.models.config import Config, OutputNode, Place
from kaldi_mpi.models.descriptor import parse_descriptor
from kaldi_mpi.models.graph import Graph

_STATISTICS = "statistics-of-the-transform"


class _Shapes(Initializer):
    """Gives tensors of the right shape that are one number in memory."""

    def normal(self, *shape: int, stddev: float) -> Tensor:
        return torch.zeros(1).expand(shape)


def contexts(
    config: Config, lda_input: str = "", shapes: Mapping[str, tuple[int, int]] | None = None
) -> list[tuple[int, int]] | None:
    """Frames to the left and right that are needed by the output named ``output``, and by the descriptor `lda_input`.

    The rule is the graph's own.

    Args:
        shapes: of transforms that are not known yet, by path.

    Returns:
        one pair, or two with `lda_input`; None: there is no such output, or something is wrong with the network, which
        is told where it is built.
    """
    if not any(isinstance(node, OutputNode) and node.name == "output" for node in config.nodes):
        return None
    wanted, nodes = ["output"], list(config.nodes)
    if lda_input:
        wanted.append(_STATISTICS)
        nodes.append(OutputNode(_STATISTICS, parse_descriptor(lda_input).normalized()))
    try:
        components = make_components(config, _stand_ins(config, shapes or {}))
        graph = Graph(dataclasses.replace(config, nodes=nodes), components)
        return [graph.contexts([output]) for output in wanted]
    except ConfigError:
        return None


def complaints(config: Config, shapes: Mapping[str, tuple[int, int]]) -> list[tuple[Place, ConfigError]]:
    """What is wrong with the components, each for itself, with the places of their lines."""
    return component_errors(config, _stand_ins(config, shapes))


def _stand_ins(config: Config, shapes: Mapping[str, tuple[int, int]]) -> Initializer:
    zeros = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    return _Shapes(0, {**zeros, **config.transforms})
