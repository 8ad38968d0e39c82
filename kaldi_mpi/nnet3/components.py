"""The component types of nnet3 files: which fields each has, in which order, and how they are encoded.

A field is a token followed by a value; one with a default is left out of the file when it has that value.
Source: the Read and Write functions of Kaldi's components (commit f4007661).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kaldi_mpi.formats.tokens import Reader, Writer


@dataclass(frozen=True)
class Field:
    """A token and its value.

    Attributes:
        token: without ``<`` and ``>``.
        kind: ``i`` int32, ``f`` float, ``d`` double, ``b`` bool, ``vector``, ``matrix``, ``ints``, ``pairs``
            (int32 vectors), ``ii`` and ``ff`` (two numbers), ``flag`` (a bare token that is there or not),
            ``mark`` (a bare token that is always there).
        optional: whether it may be missing; then the value is `default`.
    """

    token: str
    kind: str
    optional: bool = False
    default: Any = None


def _optional(token: str, kind: str, default: Any = None) -> Field:
    return Field(token, kind, True, default)


_COMMON = (
    _optional("LearningRateFactor", "f", 1.0),
    _optional("IsGradient", "b", False),
    _optional("MaxChange", "f", 0.0),
    _optional("L2Regularize", "f", 0.0),
    Field("LearningRate", "f"),
)
_AFFINE = (*_COMMON, Field("LinearParams", "matrix"), Field("BiasParams", "vector"))
_ORTHONORMAL = _optional("OrthonormalConstraint", "f", 0.0)
_NONLINEAR = (
    Field("Dim", "i"),
    _optional("BlockDim", "i"),
    Field("ValueAvg", "vector"),
    Field("DerivAvg", "vector"),
    Field("Count", "d"),
    _optional("OderivRms", "vector"),
    _optional("OderivCount", "d"),
    _optional("NumDimsSelfRepaired", "d"),
    _optional("NumDimsProcessed", "d"),
    _optional("SelfRepairLowerThreshold", "f"),
    _optional("SelfRepairUpperThreshold", "f"),
    _optional("SelfRepairScale", "f", 0.0),
)

SCHEMAS: dict[str, tuple[Field, ...]] = {
    "NaturalGradientAffineComponent": (
        *_AFFINE,
        Field("RankIn", "i"),
        Field("RankOut", "i"),
        _ORTHONORMAL,
        Field("UpdatePeriod", "i"),
        Field("NumSamplesHistory", "f"),
        Field("Alpha", "f"),
    ),
    "AffineComponent": (*_AFFINE, _ORTHONORMAL),
    "FixedAffineComponent": (Field("LinearParams", "matrix"), Field("BiasParams", "vector")),
    "LinearComponent": (
        *_COMMON,
        Field("Params", "matrix"),
        _ORTHONORMAL,
        Field("UseNaturalGradient", "b"),
        Field("RankInOut", "ii"),
        Field("Alpha", "f"),
        Field("NumSamplesHistory", "f"),
        Field("UpdatePeriod", "i"),
    ),
    **{f"{name}Component": _NONLINEAR for name in ("RectifiedLinear", "Sigmoid", "Tanh", "LogSoftmax", "Softmax")},
    "BatchNormComponent": (
        Field("Dim", "i"),
        Field("BlockDim", "i"),
        Field("Epsilon", "f"),
        Field("TargetRms", "f"),
        Field("TestMode", "b"),
        Field("Count", "d"),
        Field("StatsMean", "vector"),
        Field("StatsVar", "vector"),
    ),
    "NormalizeComponent": (
        Field("InputDim", "i"),
        _optional("BlockDim", "i"),
        Field("TargetRms", "f"),
        Field("AddLogStddev", "b"),
    ),
    "NoOpComponent": (Field("Dim", "i"), Field("BackpropScale", "f")),
    "BackpropTruncationComponent": (
        Field("Dim", "i"),
        Field("Scale", "f"),
        Field("ClippingThreshold", "f"),
        Field("ZeroingThreshold", "f"),
        Field("ZeroingInterval", "i"),
        Field("RecurrenceInterval", "i"),
        Field("NumElementsClipped", "d"),
        Field("NumElementsZeroed", "d"),
        Field("NumElementsProcessed", "d"),
        Field("NumZeroingBoundaries", "d"),
    ),
    "LstmNonlinearityComponent": (
        *_COMMON,
        Field("Params", "matrix"),
        Field("ValueAvg", "matrix"),
        Field("DerivAvg", "matrix"),
        Field("SelfRepairConfig", "vector"),
        Field("SelfRepairProb", "vector"),
        _optional("UseDropout", "b", False),
        Field("Count", "d"),
    ),
    "TimeHeightConvolutionComponent": (
        *_COMMON,
        Field("Model", "mark"),
        Field("ConvolutionModel", "mark"),
        Field("NumFiltersIn", "i"),
        Field("NumFiltersOut", "i"),
        Field("HeightIn", "i"),
        Field("HeightOut", "i"),
        Field("HeightSubsampleOut", "i"),
        Field("Offsets", "pairs"),
        Field("RequiredTimeOffsets", "ints"),
        Field("/ConvolutionModel", "mark"),
        Field("LinearParams", "matrix"),
        Field("BiasParams", "vector"),
        Field("MaxMemoryMb", "f"),
        Field("UseNaturalGradient", "b"),
        Field("NumMinibatchesHistory", "f"),
        Field("AlphaInOut", "ff"),
        Field("RankInOut", "ii"),
    ),
}


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
    if type_ not in SCHEMAS:
        raise reader.error(f"component type {tag} is not supported yet", before)
    component = Nnet3Component(type_)
    for item in SCHEMAS[type_]:
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
    for item in SCHEMAS[component.type]:
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
    for item in SCHEMAS[component.type]:
        if item.optional or item.kind == "mark" or item.token in component.values:
            continue
        if item.kind == "vector":
            component.values[item.token] = np.zeros(0, dtype=np.float32)
        elif item.kind == "d":
            component.values[item.token] = 0.0
