"""The component types of nnet3 files: reading and writing one component; a family of types a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kaldi_mpi.formats.tokens import Reader, Writer
from kaldi_mpi.nnet3.components import (
    affine,
    columns,
    convolution,
    dropout,
    elements,
    gru,
    nonlinear,
    normalise,
    pooling,
    recurrent,
)
from kaldi_mpi.nnet3.components.fields import Kind

_FAMILIES = (affine, columns, convolution, dropout, elements, gru, nonlinear, normalise, pooling, recurrent)
KINDS: dict[str, Kind] = {name: kind for family in _FAMILIES for name, kind in family.KINDS.items()}


@dataclass
class Nnet3Component:
    """A component of a file: nnet3's type name and the values of its fields by token."""

    type: str
    values: dict[str, Any] = field(default_factory=dict)


_READ: dict[str, Callable[[Reader], Any]] = {
    "i": Reader.integer,
    "f": Reader.number,
    "d": Reader.number,
    "b": Reader.boolean,
    "vector": Reader.vector,
    "matrix": Reader.matrix,
    "double vector": lambda reader: reader.vector(True),
    "double matrix": lambda reader: reader.matrix(True),
    "ints": Reader.integers,
    "pairs": lambda reader: reader.integers(2),
    "ii": lambda reader: (reader.integer(), reader.integer()),
    "ff": lambda reader: (reader.number(), reader.number()),
    "flag": lambda reader: True,
    "mark": lambda reader: None,
}


def _pair(write: Callable[[Writer, Any], None]) -> Callable[[Writer, Any], None]:
    def both(writer: Writer, values: Any) -> None:
        for value in values:
            write(writer, value)

    return both


_WRITE: dict[str, Callable[[Writer, Any], None]] = {
    "i": Writer.integer,
    "f": Writer.number,
    "d": Writer.double,
    "b": Writer.boolean,
    "vector": Writer.vector,
    "matrix": Writer.matrix,
    "double vector": lambda writer, value: writer.vector(value, True),
    "double matrix": lambda writer, value: writer.matrix(value, True),
    "ints": Writer.integers,
    "pairs": lambda writer, values: writer.integers(values, 2),
    "ii": _pair(Writer.integer),
    "ff": _pair(Writer.number),
    "flag": lambda writer, value: None,
    "mark": lambda writer, value: None,
}


def read_component(reader: Reader) -> Nnet3Component:
    """Read from ``<Type>`` to ``</Type>``.

    Raises:
        DataError: a type or field that is not known, a malformed value; names file, component and offset.
    """
    before = reader.position
    tag = reader.token()
    type_ = tag[1:-1]
    if type_ not in KINDS:
        raise reader.error(f"component type {tag} is not supported yet", before)
    component = Nnet3Component(type_)
    for item in KINDS[type_].fields:
        if item.optional and reader.peek() != f"<{item.token}>":
            component.values[item.token] = False if item.kind == "flag" else item.default
            continue
        reader.expect(f"<{item.token}>")
        value = _READ[item.kind](reader)
        if item.kind != "mark":
            component.values[item.token] = value
    reader.expect(f"</{type_}>")
    return component


def write_component(component: Nnet3Component, writer: Writer) -> None:
    """Write from ``<Type>`` to ``</Type>``, as Kaldi does."""
    writer.token(f"<{component.type}>")
    for item in KINDS[component.type].fields:
        value = component.values.get(item.token)
        if item.optional and (value is None or (item.kind in "ifdb" and value == item.default)):
            continue
        if item.kind == "flag" and not value:
            continue
        writer.token(f"<{item.token}>")
        _WRITE[item.kind](writer, value)
    writer.token(f"</{component.type}>")


def empty_statistics(component: Nnet3Component) -> None:
    """Fill the fields that only hold statistics of training, where they are missing, with those of none."""
    for item in KINDS[component.type].fields:
        if item.optional or item.kind == "mark" or item.token in component.values:
            continue
        if item.kind.endswith("vector"):
            component.values[item.token] = np.zeros(0, dtype=np.float32)
        elif item.kind.endswith("matrix"):
            component.values[item.token] = np.zeros((0, 0), dtype=np.float32)
        elif item.kind == "d":
            component.values[item.token] = 0.0
