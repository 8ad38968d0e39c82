"""Transforms of the network's input (``lda.mat``): their files, and what stands in before they exist."""

from __future__ import annotations

import os
from pathlib import Path

import kaldi_native_io
import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.models import Config
from kaldi_mpi.models.config import ComponentNode, InputNode


def stand_in(config: Config, component: str) -> NDArray[np.float32]:
    """An identity of the right size for a transform that is not known yet, (dim, dim + 1) float32.

    Raises:
        ConfigError: the component's input is not made of the network's inputs alone, so that its statistics
            would depend on layers that are still to be trained.
    """
    dims = {node.name: node.dim for node in config.nodes if isinstance(node, InputNode)}
    node = next(n for n in config.nodes if isinstance(n, ComponentNode) and n.component == component)
    try:
        dim = node.input.dim(dims.__getitem__)
    except KeyError as above:
        raise ConfigError(
            f"{config.source}: layer {component} takes {above} as its input; "
            "a fixed-affine-layer can only transform the network's input"
        ) from None
    return np.eye(dim, dim + 1, dtype=np.float32)


def read_matrix(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """A Kaldi matrix file, text or binary.

    Raises:
        DataError: it is missing or malformed.
    """
    if not Path(path).is_file():
        raise DataError("no such file", file=str(path))
    try:
        return np.array(kaldi_native_io.FloatMatrix.read(str(path)).numpy(), np.float32)
    except RuntimeError as error:
        raise DataError("not a Kaldi matrix", file=str(path)) from error


def write_matrix(matrix: NDArray[np.float32], path: str | os.PathLike[str]) -> None:
    """Write a matrix as Kaldi does in binary; the file appears whole or not at all.

    Raises:
        DataError: it could not be written.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.tmp{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        kaldi_native_io.FloatMatrix(matrix).write(str(temporary), binary=True)
        os.replace(temporary, final)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write: {error}", file=str(final)) from error
