"""One line of an xconfig while it is expanded, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models.config import Options, Place
from kaldi_mpi.models.descriptor import DescriptorError, parse_descriptor


class FollowsError(ConfigError):
    """What is wrong with a line only because an earlier one is; not worth a complaint of its own."""


@dataclass
class Layer:
    """What later layers and the config get from a line.

    Attributes:
        outputs: name of an output ('' is the main one) -> (node name or descriptor, dimension).
        lines: config lines.
        lda_input: of a fixed-affine-layer, the descriptor whose statistics Kaldi takes for its transform: the output
            of the network in init.config. None: there is no such network.
        output_delay: of an output, the label delay.
        lda_delay: of a fixed-affine-layer, by how much later its frames are than the labels of its statistics.
        shapes: of transforms that are estimated or read later, by their paths.
        transforms: matrices that the layer knows itself, (out, in + 1), by the path that its line gives them.
        sure: False: the line, or one that it depends on, has been complained about; dimensions are guesses.
    """

    name: str
    outputs: Mapping[str, tuple[str, int]]
    lines: list[str]
    lda_input: str | None = None
    output_delay: int = 0
    lda_delay: int = 0
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    transforms: dict[str, NDArray[Any]] = field(default_factory=dict)
    sure: bool = True


class Lines(list[str]):
    """Config lines of a layer, in the order in which they are added; names are below the layer's."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def at(self, name: str) -> str:
        """The full name of a node or component."""
        return f"{self.layer}.{name}"

    def component(self, name: str, type_: str, options: str) -> None:
        """`type_`: nnet3's without ``Component``."""
        self.append(f"component name={self.at(name)} type={type_}Component {options}".strip())

    def node(self, name: str, input_: str, component: str | None = None) -> None:
        """A component-node; its component has its name if no other is given."""
        self.append(f"component-node name={self.at(name)} component={self.at(component or name)} input={input_}")

    def both(self, name: str, type_: str, input_: str, options: str) -> str:
        """A component and its node of the same name; returns that."""
        self.component(name, type_, options)
        self.node(name, input_)
        return self.at(name)

    def columns(self, name: str, node: str, offset: int, dim: int) -> None:
        """A dim-range-node."""
        self.append(f"dim-range-node name={self.at(name)} input-node={self.at(node)} dim-offset={offset} dim={dim}")


class Line:
    """One xconfig line while it is expanded."""

    def __init__(self, kind: str, name: str, options: Options, layers: Mapping[str, Layer], place: Place) -> None:
        self.kind, self.name, self.options, self.layers, self.place = kind, name, options, layers, place
        self.sure = True

    def input(self) -> tuple[str, int]:
        """The descriptor in node names, and its dimension."""
        text = self.options.text("input", "[-1]")
        try:
            tree = parse_descriptor(text, list(self.layers))
            nodes = str(tree.replace(lambda name: self._find(name)[0]))
            try:
                return nodes, tree.dim(lambda name: self._find(name)[1])
            except DescriptorError:
                if self.sure:
                    raise
                return nodes, 1
        except DescriptorError as error:
            raise self.place.error(str(error), "input") from error

    def input_node(self) -> tuple[str, int]:
        """The same, of a layer whose input must be one node, as it stands."""
        node, dim = self.input()
        if self.sure and "(" in node:
            raise self.place.error(f"one node expected, found {node}", "input")
        return node, dim

    def _find(self, name: str) -> tuple[str, int]:
        layer, _, output = name.partition(".")
        if name in self.layers:
            layer, output = name, ""
        if layer not in self.layers:
            raise DescriptorError(f"there is no earlier layer named {layer}")
        found = self.layers[layer]
        self.sure = self.sure and found.sure
        if output not in found.outputs:
            if not found.sure:
                return name, 1
            raise DescriptorError(f"layer {layer} has no output {name!r} that others can use")
        return found.outputs[output]

    def misfit(self, cause: str, key: str) -> ConfigError:
        """An error about an option that does not fit the input's dimension, which may be a guess."""
        return self.place.error(cause, key) if self.sure else FollowsError(cause)

    # Options; their ranges are those that Kaldi's parser or the components themselves accept.

    def dim(self, input_dim: int, key: str = "dim") -> int:
        """A dimension that is the input's if it is not given (or -1, Kaldi's default)."""
        given = self.options.integer(key, -1)
        if given <= 0 and given != -1:
            raise self.place.error(f"must be positive, is {given}", key)
        return input_dim if given == -1 else given

    def read(self, key: str, default: str | float | bool) -> str | float | bool:
        """An option of the type that its default has, as Kaldi's parser does it."""
        if isinstance(default, bool):
            return self.options.flag(key, default)
        if isinstance(default, int):
            return self.options.integer(key, default)
        return self.options.number(key, default) if isinstance(default, float) else self.options.text(key, default)

    def passed_on(self, keys: Mapping[str, str | float | bool]) -> str:
        """Options that go to the component's line; those whose value is '' are left out.

        Args:
            keys: in the line's order, with defaults.
        """
        found = ((key, self.read(key, default)) for key, default in keys.items())
        return "".join(f" {key}={value}" for key, value in found if value != "")

    def share(self, key: str, default: float) -> float:
        """A number between 0 and 1."""
        value = self.options.number(key, default)
        if not 0.0 <= value <= 1.0:
            raise self.place.error(f"must be between 0 and 1, is {value}", key)
        return value

    def dropout(self) -> float | None:
        """``dropout-proportion`` of a layer that has no dropout without it, or with -1."""
        value = self.options.number("dropout-proportion", -1.0)
        if value != -1.0 and not 0.0 <= value <= 1.0:
            raise self.place.error(f"must be between 0 and 1, is {value}", "dropout-proportion")
        return None if value == -1.0 else value

    def above_zero(self, key: str, default: float) -> float:
        value = self.options.number(key, default)
        if not value > 0.0 or math.isinf(value):
            raise self.place.error(f"must be above 0, is {value}", key)
        return value

    def l2(self) -> str:
        """`` l2-regularize=...``, or nothing where it is 0."""
        value = self.options.number("l2-regularize", 0.0)
        return f" l2-regularize={value}" if value else ""

    def affine(self, node: str, input_: tuple[str, int], dim: int, options: str) -> list[str]:
        return self.component(
            node, "NaturalGradientAffine", input_[0], f"input-dim={input_[1]} output-dim={dim} {options.strip()}"
        )

    def component(self, node: str, type_: str, input_: str, options: str) -> list[str]:
        """The two lines of a component and of its node, which has its name."""
        made = f"component name={node} type={type_}Component {options.strip()}"
        return [made.strip(), f"component-node name={node} component={node} input={input_}"]
