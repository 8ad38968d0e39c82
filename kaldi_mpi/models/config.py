"""A network's definition: nodes and component options, as nnet3's config lines give them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.files import read_text
from kaldi_mpi.models.descriptor import Descriptor, DescriptorError, parse_descriptor

# Label delays are looked for up to this; recipes have 5 to 10.
_LARGEST_DELAY = 100
_KEY = re.compile(r"\s*([-A-Za-z0-9_]+)=")


@dataclass(frozen=True)
class Place:
    """Where a line stands, and what it is about (a layer, a component), for messages."""

    file: str = "config"
    line: int = 0
    what: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    def about(self, what: str) -> Place:
        """The same place, about something more."""
        return replace(self, what=f"{self.what}, {what}" if self.what else what)

    def error(self, cause: str, key: str | None = None) -> ConfigError:
        about = f" ({self.what})" if self.what else ""
        return ConfigError(f"{self}: {key}: {cause}{about}" if key else f"{self}: {cause}{about}")


@dataclass(frozen=True)
class InputNode:
    """``input-node``: features of `dim` columns."""

    name: str
    dim: int

    def __str__(self) -> str:
        return f"input-node name={self.name} dim={self.dim}"


@dataclass(frozen=True)
class ComponentNode:
    """``component-node``: a component applied to a descriptor."""

    name: str
    component: str
    input: Descriptor

    def __str__(self) -> str:
        return f"component-node name={self.name} component={self.component} input={self.input}"


@dataclass(frozen=True)
class DimRangeNode:
    """``dim-range-node``: `dim` columns of another node, from `offset`."""

    name: str
    input_node: str
    offset: int
    dim: int

    def __str__(self) -> str:
        return f"dim-range-node name={self.name} input-node={self.input_node} dim-offset={self.offset} dim={self.dim}"


@dataclass(frozen=True)
class OutputNode:
    """``output-node``: what the network gives out; `objective` is ``linear`` or ``quadratic``."""

    name: str
    input: Descriptor
    objective: str = "linear"

    def __str__(self) -> str:
        return f"output-node name={self.name} input={self.input} objective={self.objective}"


Node = InputNode | ComponentNode | DimRangeNode | OutputNode


@dataclass(frozen=True)
class ComponentSpec:
    """``component``: a name, nnet3's type name, and the options of its line."""

    name: str
    type: str
    options: dict[str, str]
    place: Place = Place()


@dataclass
class Config:
    """Nodes and components, in the order of the lines that defined them; `source` is named in messages.

    `lda_delays`: of a component whose transform is estimated, by how much later its frames are than their labels.
    `transforms`: those that the config knows itself, (out, in + 1), by the path that stands in their component's line.
    `places`: where each node's line stands.
    """

    nodes: list[Node] = field(default_factory=list)
    components: list[ComponentSpec] = field(default_factory=list)
    source: str = "config"
    lda_delays: dict[str, int] = field(default_factory=dict)
    transforms: dict[str, NDArray[Any]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)

    def node_lines(self) -> list[str]:
        """The lines of a model file: nodes only, in nnet3's spelling."""
        return [str(node) for node in self.nodes]


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read a final.config as Kaldi's ``xconfig_to_configs.py`` writes it, and the LDA's delay from its init.config.

    Raises:
        ConfigError: names file, line and key.
        DataError: the file cannot be read.
    """
    config = parse_config(_lines_of(Path(path)), str(path))
    init = Path(path).with_name("init.config")
    if not init.exists():
        return config
    outputs = [node for node in parse_config(_lines_of(init), str(init)).nodes if isinstance(node, OutputNode)]
    fixed = {spec.name for spec in config.components if "matrix" in spec.options}
    for node in config.nodes:
        if isinstance(node, ComponentNode) and node.component in fixed and outputs:
            # The statistics' network is the transform's input, moved in time by the label delay.
            for delay in range(-_LARGEST_DELAY, _LARGEST_DELAY + 1):
                if Descriptor("Offset", (node.input, str(delay))).normalized() == outputs[0].input:
                    config.lda_delays[node.component] = delay
    return config


def _lines_of(path: Path) -> list[tuple[str, Place]]:
    return [(line, Place(str(path), number)) for number, line in enumerate(read_text(path).splitlines(), start=1)]


def split_options(text: str, first_wins: bool = False) -> dict[str, str]:
    """``a=1 input=Append(x, y) b=2`` as a dict; a value goes on to the next ``key=``.

    Args:
        first_wins: of a key given twice, as in nnet3's config lines, whose makers rely on it; else that is an error.

    Raises:
        ValueError: something before the first key, or a key given twice.
    """
    fields = _KEY.split(text)
    if fields[0].strip():
        raise ValueError(f"key=value expected, found {fields[0].strip()!r}")
    options: dict[str, str] = {}
    for key, value in zip(fields[1::2], fields[2::2], strict=True):
        if key in options:
            if first_wins:
                continue
            raise ValueError(f"{key} is given twice")
        options[key] = value.strip()
    return options


def all_of(errors: Sequence[ConfigError]) -> ConfigError:
    """One error of several, a line each."""
    return errors[0] if len(errors) == 1 else ConfigError("\n".join(map(str, errors)))


class Options:
    """The options of one line, each taken once; what is left over at `done` is an error.

    Raises (all methods):
        ConfigError: names file, line and key.
    """

    def __init__(self, options: dict[str, str], place: Place) -> None:
        self.values, self.place = dict(options), place

    def text(self, key: str, default: str | None = None) -> str:
        if key in self.values:
            return self.values.pop(key)
        if default is None:
            raise self.place.error("is missing", key)
        return default

    def integer(self, key: str, default: int | None = None) -> int:
        if key not in self.values and default is not None:
            return default
        value = self.text(key)
        try:
            return int(value)
        except ValueError:
            raise self.place.error(f"integer expected, found {value!r}", key) from None

    def number(self, key: str, default: float | None = None) -> float:
        if key not in self.values and default is not None:
            return default
        value = self.text(key)
        try:
            return float(value)
        except ValueError:
            raise self.place.error(f"number expected, found {value!r}", key) from None

    def flag(self, key: str, default: bool) -> bool:
        value = self.text(key, str(default)).lower()
        if value not in ("true", "false"):
            raise self.place.error(f"true or false expected, found {value!r}", key)
        return value == "true"

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value <= 0:
            raise self.place.error(f"must be positive, is {value}", key)
        return value

    def done(self, what: str) -> None:
        if self.values:
            raise all_of([self.place.error(f"is not an option of {what}", key) for key in self.values])


def parse_config(lines: Iterable[tuple[str, Place]], source: str) -> Config:
    """Build a `Config` out of nnet3 config lines; comments and empty lines are skipped.

    Raises:
        ConfigError: names file, line and key.
    """
    config = Config(source=source)
    seen: set[tuple[bool, str]] = set()
    for text, place in lines:
        words = text.split("#")[0].split(None, 1)
        if not words:
            continue
        try:
            options = Options(split_options(words[1] if len(words) > 1 else "", first_wins=True), place)
            _add_line(config, words[0], options, place)
        except ValueError as error:
            raise place.error(str(error)) from error
        item: Node | ComponentSpec = config.components[-1] if words[0] == "component" else config.nodes[-1]
        if (words[0] == "component", item.name) in seen:
            raise place.error(f"{words[0]} is defined twice", item.name)
        seen.add((words[0] == "component", item.name))
        if words[0] != "component":
            config.places[item.name] = place
    return config


def _add_line(config: Config, kind: str, options: Options, place: Place) -> None:
    name = options.text("name")
    if kind == "component":
        type_ = options.text("type")
        config.components.append(ComponentSpec(name, type_, options.values, place.about(f"{type_} {name}")))
        return
    node: Node
    if kind == "input-node":
        node = InputNode(name, options.positive("dim"))
    elif kind == "component-node":
        node = ComponentNode(name, options.text("component"), _descriptor(options))
    elif kind == "dim-range-node":
        node = DimRangeNode(name, options.text("input-node"), options.integer("dim-offset"), options.positive("dim"))
    elif kind == "output-node":
        node = OutputNode(name, _descriptor(options), options.text("objective", "linear"))
    else:
        raise place.error(f"unknown kind of line {kind!r}")
    options.done(kind)
    config.nodes.append(node)


def _descriptor(options: Options) -> Descriptor:
    try:
        return parse_descriptor(options.text("input")).normalized()
    except DescriptorError as error:
        raise options.place.error(str(error), "input") from error
