"""network.xconfig: Kaldi's layer-wise description of a network, expanded to config lines.

The lines are those that Kaldi's own expansion of the same file ends up with, in its order: the same names of nodes
and components, the same types, options and descriptors. All layers that Kaldi's parser has are known, a family a file.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.models import (
    xconfig_convolution,
    xconfig_ends,
    xconfig_fast_gru,
    xconfig_feedforward,
    xconfig_gru,
    xconfig_pooling,
    xconfig_recurrent,
    xconfig_single,
)
from kaldi_mpi.models.config import Config, Options, Place, all_of, parse_config, split_options
from kaldi_mpi.models.contexts import complaints, contexts
from kaldi_mpi.models.xconfig_line import FollowsError, Layer, Line

_LAYER_TYPE = re.compile(r"^[a-z][-a-z0-9]+$")
_QUOTED = re.compile(r'"([^"]*)"')
_NAME = re.compile(r"(?:^|\s)name=([A-Za-z_][-A-Za-z_0-9.]*)")
_DIM = re.compile(r"(?:^|\s)(?:dim|cell-dim|small-dim)=(\d+)")

LAYERS: dict[str, Callable[[Line], Layer]] = {
    **xconfig_ends.INPUTS,
    **xconfig_feedforward.LAYERS,
    **xconfig_convolution.LAYERS,
    **xconfig_recurrent.LAYERS,
    **xconfig_gru.LAYERS,
    **xconfig_fast_gru.LAYERS,
    **xconfig_pooling.LAYERS,
    **xconfig_single.LAYERS,
    **xconfig_ends.OUTPUTS,
}


def parse_xconfig(path: str | os.PathLike[str]) -> Config:
    """Read a network.xconfig.

    Layers: those of `LAYERS`, which are all that Kaldi's parser knows.
    Paths of transforms are kept as they are written (relative ones are relative to the working directory).

    Raises:
        ConfigError: names file, line, key, and the layer's name and type; all complaints at once, a line each.
        DataError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read: {error}", file=str(path)) from error
    return parse_xconfig_text(text, str(path))


def parse_xconfig_text(text: str, source: str = "network.xconfig") -> Config:
    """The same, from a string; `source` is named in messages."""
    found = _expanded(text, source)
    config = found.config(source)
    for layer in found.layers.values():
        if layer.lda_input is not None:
            label_delay = max((other.output_delay for other in found.layers.values()), key=abs)
            needed = contexts(config, layer.lda_input, found.shapes())
            _check_contexts(needed, label_delay, found.places[layer.name])
    return config


def expand_xconfig(text: str, source: str = "network.xconfig") -> list[str]:
    """The lines of the final.config that Kaldi's xconfig_to_configs.py makes of an xconfig, without its comments."""
    return [line for line, _ in _expanded(text, source).lines]


@dataclass
class _Expansion:
    """Layers by name, in their order, with the places of their lines, and the config lines of all of them."""

    layers: dict[str, Layer] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    lines: list[tuple[str, Place]] = field(default_factory=list)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the transforms that are estimated or read later, by path."""
        return {path: shape for layer in self.layers.values() for path, shape in layer.shapes.items()}

    def config(self, source: str) -> Config:
        config = parse_config(self.lines, source)
        for layer in self.layers.values():
            config.transforms.update(layer.transforms)
            if layer.lda_delay:
                config.lda_delays[layer.name] = layer.lda_delay
        return config


def _expanded(text: str, source: str) -> _Expansion:
    found, errors = _Expansion(), list[tuple[Place, ConfigError]]()
    for number, raw in enumerate(text.splitlines(), start=1):
        words = raw.split("#")[0].split(None, 1)
        if not words:
            continue
        kind, rest = words[0], words[1] if len(words) > 1 else ""
        name = _NAME.search(rest)
        place = Place(source, number, f"{kind} {name[1]}" if name else kind)
        try:
            layer = _expand(kind, rest, found.layers, place)
            if layer.name in found.layers:
                raise place.error(f"{layer.name} is the name of an earlier layer", "name")
        except ConfigError as error:
            if not isinstance(error, FollowsError):
                errors.append((place, error))
            layer = _guess(name[1] if name else f"_line_{number}", rest, found.layers)
        # Where a line uses the name of another again, later ones are about the last of them.
        found.layers.pop(layer.name, None)
        found.layers[layer.name], found.places[layer.name] = layer, place
        found.lines.extend((line, place) for line in layer.lines if layer.sure)
    if errors:
        # What the builder would say of the layers that are in order: who mends the file should hear of it as well.
        errors += complaints(found.config(source), found.shapes())
        raise all_of([error for _, error in sorted(errors, key=lambda pair: pair[0].line)])
    if not found.layers:
        raise ConfigError(f"{source}: there is no layer in this file")
    return found


def _guess(name: str, rest: str, layers: Mapping[str, Layer]) -> Layer:
    """What stands for a layer that has been complained about, so that later lines are looked at as well."""
    dim = _DIM.search(rest)
    widths = [width for layer in layers.values() for _, width in layer.outputs.values()]
    width = int(dim[1]) if dim else widths[-1] if widths else 1
    return Layer(name, {"": (name, max(width, 1))}, [], sure=False)


def _check_contexts(needed: list[tuple[int, int]] | None, label_delay: int, place: Place) -> None:
    """Refuse what xconfig_to_configs.py refuses: a network of the LDA statistics that needs more context than all.

    Raises:
        ConfigError: names the layer's line and what to add.
    """
    if needed is None:
        return
    whole, part = needed
    if part[0] > whole[0] or part[1] > whole[1]:
        raise Place(place.file, place.line).error(
            f"the input takes {part[0]} frames to the left and {part[1]} to the right, the whole network only "
            f"{whole[0]} and {whole[1]}, which Kaldi refuses; the label delay must stand in {place.what} too: add "
            f"delay={label_delay or ''}",
            "delay",
        )


def _expand(kind: str, rest: str, layers: Mapping[str, Layer], place: Place) -> Layer:
    if not _LAYER_TYPE.match(kind) or kind not in LAYERS:
        near = difflib.get_close_matches(kind, LAYERS, n=3)
        raise place.error(f"layer type {kind!r} is not supported" + (f"; near it: {', '.join(near)}" if near else ""))
    if rest.count('"') % 2:
        raise place.error("a double quote is not closed")
    # A quoted value may hold '=': hide those until the keys have been found.
    hidden = _QUOTED.sub(lambda match: match.group(1).replace("=", "\0"), rest)
    try:
        values = {key: value.replace("\0", "=") for key, value in split_options(hidden).items()}
    except ValueError as error:
        raise place.error(str(error)) from error
    options = Options(values, place)
    line = Line(kind, options.text("name"), options, layers, place)
    layer = LAYERS[kind](line)
    options.done(kind)
    layer.sure = line.sure
    return layer
