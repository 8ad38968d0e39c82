"""The components (layers' inner parts) that a network is made of, as torch modules: a family a file."""

from __future__ import annotations

from collections.abc import Callable

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models.components import (
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
from kaldi_mpi.models.components.affine import Affine, FixedAffine, Linear, NaturalGradientAffine, split_transform
from kaldi_mpi.models.components.base import Call, ComponentModule, Initializer
from kaldi_mpi.models.components.elements import FixedScale
from kaldi_mpi.models.components.nonlinear import LogSoftmax, NoOp, RectifiedLinear, Sigmoid, Softmax, Tanh
from kaldi_mpi.models.components.normalise import BatchNorm, Normalize
from kaldi_mpi.models.components.recurrent import BackpropTruncation, LstmNonlinearity
from kaldi_mpi.models.config import ComponentSpec, Config, Options, Place, all_of

__all__ = [
    "Affine",
    "BackpropTruncation",
    "BatchNorm",
    "Call",
    "ComponentModule",
    "FixedAffine",
    "FixedScale",
    "Initializer",
    "Linear",
    "LogSoftmax",
    "LstmNonlinearity",
    "NaturalGradientAffine",
    "NoOp",
    "Normalize",
    "RectifiedLinear",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "component_errors",
    "make_component",
    "make_components",
    "split_transform",
]

_FAMILIES = (affine, columns, convolution, dropout, elements, gru, nonlinear, normalise, pooling, recurrent)
_MAKERS: dict[str, Callable[[Options, Initializer], ComponentModule]] = {
    kind: maker for family in _FAMILIES for kind, maker in family.MAKERS.items()
}


def make_component(spec: ComponentSpec, init: Initializer) -> ComponentModule:
    """A freshly initialised component.

    Raises:
        ConfigError: unknown type, unknown or bad option; names file, line and key.
    """
    if spec.type not in _MAKERS:
        raise spec.place.error(f"component type {spec.type} is not supported yet", spec.name)
    options = Options(spec.options, spec.place)
    try:
        component = _MAKERS[spec.type](options, init)
    except ValueError as error:  # what the component itself says of its settings
        raise spec.place.error(str(error), spec.name) from None
    options.done(spec.type)
    return component


def make_components(config: Config, init: Initializer) -> dict[str, ComponentModule]:
    """All components of a network, freshly initialised, by name.

    Raises:
        ConfigError: what is wrong with any of them, a line each.
    """
    made, errors = _tried(config, init)
    if errors:
        raise all_of([error for _, error in errors])
    return made


def component_errors(config: Config, init: Initializer) -> list[tuple[Place, ConfigError]]:
    """What `make_components` would say, with the places of the components' lines."""
    return _tried(config, init)[1]


def _tried(config: Config, init: Initializer) -> tuple[dict[str, ComponentModule], list[tuple[Place, ConfigError]]]:
    made: dict[str, ComponentModule] = {}
    errors: list[tuple[Place, ConfigError]] = []
    for spec in config.components:
        try:
            made[spec.name] = make_component(spec, init)
        except ConfigError as error:
            errors.append((spec.place, error))
    return made, errors
