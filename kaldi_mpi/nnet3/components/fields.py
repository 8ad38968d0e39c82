"""What the fields of nnet3's components are, and how a family of components says which it has.

A field is a token followed by a value; one with a default is left out of the file when it has that value.
Source: the Read and Write functions of Kaldi's components (commit f4007661).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.formats.tokens import FloatArray
from kaldi_mpi.models.components import ComponentModule

# Of one component: token -> value.
Values = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """A token and its value.

    Attributes:
        token: without ``<`` and ``>``.
        kind: ``i`` int32, ``f`` float, ``d`` double, ``b`` bool, ``vector``, ``matrix`` (``double vector``, ``double
            matrix``), ``ints``, ``pairs`` (int32 vectors), ``ii`` and ``ff`` (two numbers), ``flag`` (a bare token
            that is there or not), ``mark`` (a bare token that is always there).
        optional: whether it may be missing; then the value is `default`.
    """

    token: str
    kind: str
    optional: bool = False
    default: Any = None


def optional(token: str, kind: str, default: Any = None) -> Field:
    """A field that the file may lack."""
    return Field(token, kind, True, default)


COMMON = (
    optional("LearningRateFactor", "f", 1.0),
    optional("IsGradient", "b", False),
    optional("MaxChange", "f", 0.0),
    optional("L2Regularize", "f", 0.0),
    Field("LearningRate", "f"),
)


@dataclass(frozen=True)
class Kind:
    """A component type: its fields, and the ways between them and a module.

    Attributes:
        fields: in the file's order.
        to_torch: takes the values that make the module out of a component's (what it leaves becomes the module's
            `attributes`). Raises ValueError with the cause where they do not fit.
        to_file: the values that the module knows itself.
    """

    fields: tuple[Field, ...]
    to_torch: Callable[[Values], ComponentModule]
    to_file: Callable[[Any], Values]


def settings(cls: Callable[..., ComponentModule], fields: tuple[Field, ...], names: Mapping[str, str]) -> Kind:
    """A kind of which the file has what the module is made with.

    Args:
        fields: all, in the file's order.
        names: of those that are arguments, by token and in the arguments' order, the module's attribute; other fields
            are carried along.
    """

    def to_torch(values: Values) -> ComponentModule:
        return cls(*(values.pop(token) for token in names))

    def to_file(module: Any) -> Values:
        return {token: getattr(module, name) for token, name in names.items()}

    return Kind(fields, to_torch, to_file)


def tensor(values: Values, token: str, dims: int) -> Tensor:
    """Take a matrix or vector that must not be empty."""
    array: FloatArray = values.pop(token)
    if array.ndim != dims or not array.size:
        raise ValueError(f"<{token}> has shape {array.shape}")
    return torch.from_numpy(array.copy())


def sums(average: NDArray[Any], count: float) -> Tensor:
    """The sums of which a file has the `average` over `count` rows, float64."""
    return torch.from_numpy(average.astype(np.float64) * count)


def mean(total: Tensor, count: Tensor) -> FloatArray:
    """The average that a file has of such sums; of no rows, the sums themselves."""
    return array(total / count if count.item() else total)


def array(value: Tensor) -> FloatArray:
    """As float32 in main memory, a copy."""
    return value.detach().to("cpu", torch.float32).numpy().copy()
