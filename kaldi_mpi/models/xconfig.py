"""network.xconfig: Kaldi's layer-wise description of a network, expanded to config lines.

The lines are those that Kaldi's own expansion of the same file ends up with: the same names of nodes and
components, the same types, options and descriptors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.models.config import Config, InputNode, Node, Options, OutputNode, Place, parse_config, split_options
from kaldi_mpi.models.contexts import computable_in_order, contexts
from kaldi_mpi.models.descriptor import DescriptorError, parse_descriptor

_LAYER_TYPE = re.compile(r"^[a-z][-a-z0-9]+$")
_QUOTED = re.compile(r'"([^"]*)"')


@dataclass
class Layer:
    """What later layers and the config get from a line.

    Attributes:
        outputs: name of an output ('' is the main one) -> (node name, dimension).
        lines: config lines.
        lda_input: of a fixed-affine-layer, the descriptor whose statistics Kaldi takes for its transform: the output
            of the network in init.config. None: there is no such network.
        output_delay: of an output, the label delay.
        lda_delay: of a fixed-affine-layer, by how much later its frames are than the labels of its statistics.
    """

    name: str
    outputs: Mapping[str, tuple[str, int]]
    lines: list[str]
    lda_input: str | None = None
    output_delay: int = 0
    lda_delay: int = 0


def parse_xconfig(path: str | os.PathLike[str]) -> Config:
    """Read a network.xconfig.

    Layers: ``input``, ``fixed-affine-layer``, ``fast-lstm-layer``, ``fast-lstmp-layer``,
    ``relu-layer``, ``relu-renorm-layer``, ``sigmoid-layer``, ``tanh-layer``, ``output``, ``output-layer``.
    Paths of transforms are kept as they are written (relative ones are relative to the working directory).

    Raises:
        ConfigError: names file, line and key.
        DataError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read: {error}", file=str(path)) from error
    return parse_xconfig_text(text, str(path))


def parse_xconfig_text(text: str, source: str = "network.xconfig") -> Config:
    """The same, from a string; `source` is named in messages."""
    layers: dict[str, Layer] = {}
    lines: list[tuple[str, Place]] = []
    places: dict[str, Place] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        place = Place(source, number)
        words = raw.split("#")[0].split(None, 1)
        if not words:
            continue
        layer = _expand(words[0], words[1] if len(words) > 1 else "", layers, place)
        if layer.name in layers:
            raise place.error(f"{layer.name} is the name of an earlier layer", "name")
        layers[layer.name], places[layer.name] = layer, place
        lines.extend((line, place) for line in layer.lines)
    if not layers:
        raise ConfigError(f"{source}: there is no layer in this file")
    config = parse_config(lines, source)
    config.lda_delays = {layer.name: layer.lda_delay for layer in layers.values() if layer.lda_delay}
    for layer in layers.values():
        if layer.lda_input is not None:
            label_delay = max((other.output_delay for other in layers.values()), key=abs)
            _check_contexts(layer.lda_input, config, label_delay, places[layer.name])
    return config


def _check_contexts(lda_input: str, config: Config, label_delay: int, place: Place) -> None:
    """Refuse what xconfig_to_configs.py refuses: a network of the LDA statistics that needs more context than all.

    Raises:
        ConfigError: names the layer's line and what to add.
    """
    inputs = [node for node in config.nodes if isinstance(node, InputNode)]
    try:
        lda: list[Node] = [*inputs, OutputNode("output", parse_descriptor(lda_input))]
        part, whole = (contexts(partial(computable_in_order, nodes)) for nodes in (lda, config.nodes))
    except KeyError:
        return  # no output, or another input than the network's: told where the network is built
    if part[0] > whole[0] or part[1] > whole[1]:
        raise place.error(
            f"the input takes {part[0]} frames to the left and {part[1]} to the right, the whole network only "
            f"{whole[0]} and {whole[1]}, which Kaldi refuses; the label delay must stand here too: add "
            f"delay={label_delay or ''}",
            "delay",
        )


class _Line:
    """One xconfig line while it is expanded."""

    def __init__(self, kind: str, name: str, options: Options, layers: Mapping[str, Layer], place: Place) -> None:
        self.kind, self.name, self.options, self.layers, self.place = kind, name, options, layers, place

    def input(self) -> tuple[str, int]:
        """The descriptor in node names, and its dimension."""
        text = self.options.text("input", "[-1]")
        try:
            tree = parse_descriptor(text, list(self.layers))
            return str(tree.replace(lambda name: self._find(name)[0])), tree.dim(lambda name: self._find(name)[1])
        except DescriptorError as error:
            raise self.place.error(str(error), "input") from error

    def _find(self, name: str) -> tuple[str, int]:
        layer, _, output = name.partition(".")
        if name in self.layers:
            layer, output = name, ""
        if layer not in self.layers:
            raise DescriptorError(f"there is no earlier layer named {layer}")
        outputs = self.layers[layer].outputs
        if output not in outputs:
            raise DescriptorError(f"layer {layer} has no output {name!r} that others can use")
        return outputs[output]

    def passed_on(self, keys: Mapping[str, str]) -> str:
        """Options that go to the component's line as they are; those whose value is '' are left out."""
        found = ((key, self.options.text(key, default)) for key, default in keys.items())
        return "".join(f" {key}={value}" for key, value in found if value != "")

    def affine(self, node: str, input_: tuple[str, int], dim: int, options: str) -> list[str]:
        component = (
            f"component name={node} type=NaturalGradientAffineComponent "
            f"input-dim={input_[1]} output-dim={dim} {options.strip()}"
        )
        return [component.strip(), f"component-node name={node} component={node} input={input_[0]}"]


def _expand(kind: str, rest: str, layers: Mapping[str, Layer], place: Place) -> Layer:
    if not _LAYER_TYPE.match(kind) or kind not in _LAYERS:
        raise place.error(f"layer type {kind!r} is not supported (known: {', '.join(_LAYERS)})")
    if rest.count('"') % 2:
        raise place.error("a double quote is not closed")
    # A quoted value may hold '=': hide those until the keys have been found.
    hidden = _QUOTED.sub(lambda match: match.group(1).replace("=", "\0"), rest)
    try:
        values = {key: value.replace("\0", "=") for key, value in split_options(hidden).items()}
    except ValueError as error:
        raise place.error(str(error)) from error
    options = Options(values, place)
    line = _Line(kind, options.text("name"), options, layers, place)
    layer = _LAYERS[kind](line)
    options.done(kind)
    return layer


def _input(line: _Line) -> Layer:
    dim = line.options.positive("dim")
    return Layer(line.name, {"": (line.name, dim)}, [f"input-node name={line.name} dim={dim}"])


def _fixed_affine(line: _Line) -> Layer:
    node, input_ = line.name, line.input()
    dim = line.options.integer("dim", -1)
    path = line.options.text("affine-transform-file")
    # These two shape Kaldi's init.config, the network of the LDA statistics, and not final.config.
    delay = line.options.integer("delay", 0)
    init = line.options.flag("write-init-config", True)
    return Layer(
        node,
        {"": (node, dim if dim > 0 else input_[1])},
        [
            f"component name={node} type=FixedAffineComponent matrix={path}",
            f"component-node name={node} component={node} input={input_[0]}",
        ],
        lda_input=f"Offset({input_[0]}, {delay})" if init else None,
        lda_delay=delay,
    )


def _relu(line: _Line) -> Layer:
    node, input_, options = line.name, line.input(), line.options
    dim = options.integer("dim", -1)
    dim = dim if dim > 0 else input_[1]
    repair = options.text("self-repair-scale", "1e-05")
    rms = options.text("target-rms", "1.0")
    affine = options.text("ng-affine-options", "")
    affine += line.passed_on({"max-change": "0.75", "learning-rate-factor": "", "bias-stddev": "", "l2-regularize": ""})
    lines = line.affine(f"{node}.affine", input_, dim, affine)
    last = f"{node}.affine"
    for part in line.kind.split("-")[:-1]:
        type_ = {"relu": "RectifiedLinear", "sigmoid": "Sigmoid", "tanh": "Tanh", "renorm": "Normalize"}[part]
        settings = f"target-rms={rms} add-log-stddev=false" if part == "renorm" else f"self-repair-scale={repair}"
        lines.append(f"component name={node}.{part} type={type_}Component dim={dim} {settings}")
        lines.append(f"component-node name={node}.{part} component={node}.{part} input={last}")
        last = f"{node}.{part}"
    return Layer(node, {"": (last, dim)}, lines)


@dataclass
class _LstmOptions:
    cell: int
    delay: int
    affine: str
    nonlinearity: str
    truncation: str


def _lstm_options(line: _Line) -> _LstmOptions:
    options = line.options
    cell = options.positive("cell-dim")
    delay = options.integer("delay", -1)
    if delay == 0:
        raise line.place.error("must not be 0", "delay")
    decay = options.number("decay-time", -1.0)
    scale = 1.0 if decay < 0 else 1.0 - abs(delay) / decay if decay > 0 else 0.0
    if scale <= 0:
        raise line.place.error("must be more than the absolute value of delay", "decay-time")
    l2 = options.number("l2-regularize", 0.0)
    l2_option = f" l2-regularize={l2}" if l2 else ""
    truncation = line.passed_on({"clipping-threshold": "30.0", "zeroing-threshold": "15.0", "zeroing-interval": "20"})
    return _LstmOptions(
        cell,
        delay,
        options.text("ng-affine-options", "max-change=1.5") + l2_option,
        options.text("lstm-nonlinearity-options", "max-change=0.75") + l2_option,
        f"{truncation} recurrence-interval={abs(delay)} scale={scale}",
    )


def _fast_lstm(line: _Line) -> Layer:
    node, (descriptor, input_dim) = line.name, line.input()
    lstm = _lstm_options(line)
    cell, delay = lstm.cell, lstm.delay
    recurrent = f"Append({descriptor}, IfDefined(Offset({node}.m_trunc, {delay})))"
    lines = [
        f"component name={node}.W_all type=NaturalGradientAffineComponent "
        f"input-dim={input_dim + cell} output-dim={4 * cell} {lstm.affine}",
        f"component name={node}.lstm_nonlin type=LstmNonlinearityComponent cell-dim={cell} {lstm.nonlinearity}",
        f"component name={node}.cm_trunc type=BackpropTruncationComponent dim={2 * cell}{lstm.truncation}",
        f"component-node name={node}.W_all component={node}.W_all input={recurrent}",
        f"component-node name={node}.lstm_nonlin component={node}.lstm_nonlin "
        f"input=Append({node}.W_all, IfDefined(Offset({node}.c_trunc, {delay})))",
        f"dim-range-node name={node}.m input-node={node}.lstm_nonlin dim-offset={cell} dim={cell}",
        f"component-node name={node}.cm_trunc component={node}.cm_trunc input={node}.lstm_nonlin",
        f"dim-range-node name={node}.c_trunc input-node={node}.cm_trunc dim-offset=0 dim={cell}",
        f"dim-range-node name={node}.m_trunc input-node={node}.cm_trunc dim-offset={cell} dim={cell}",
    ]
    return Layer(node, {"": (f"{node}.m", cell)}, lines)


def _fast_lstmp(line: _Line) -> Layer:
    node, (descriptor, input_dim) = line.name, line.input()
    lstm = _lstm_options(line)
    cell, delay = lstm.cell, lstm.delay
    # Kaldi's defaults are cell-dim / 4, and for the second what the first is; 0 counts as not given.
    rec = line.options.integer("recurrent-projection-dim", -1)
    rec = rec if rec > 0 else cell // 4
    nonrec = line.options.integer("non-recurrent-projection-dim", -1)
    nonrec = nonrec if nonrec > 0 else rec
    if rec + nonrec > cell:
        raise line.place.error("the two projections together are wider than cell-dim", "recurrent-projection-dim")
    if line.options.number("dropout-proportion", -1.0) != -1.0:
        raise line.place.error("gate dropout is not supported yet", "dropout-proportion")
    recurrent = f"Append({descriptor}, IfDefined(Offset({node}.r_trunc, {delay})))"
    lines = [
        f"component name={node}.W_all type=NaturalGradientAffineComponent "
        f"input-dim={input_dim + rec} output-dim={4 * cell} {lstm.affine}",
        f"component name={node}.lstm_nonlin type=LstmNonlinearityComponent cell-dim={cell} {lstm.nonlinearity}",
        f"component name={node}.cr_trunc type=BackpropTruncationComponent dim={cell + rec}{lstm.truncation}",
        f"component name={node}.W_rp type=NaturalGradientAffineComponent "
        f"input-dim={cell} output-dim={rec + nonrec} {lstm.affine}",
        f"component-node name={node}.W_all component={node}.W_all input={recurrent}",
        f"component-node name={node}.lstm_nonlin component={node}.lstm_nonlin "
        f"input=Append({node}.W_all, IfDefined(Offset({node}.c_trunc, {delay})))",
        f"dim-range-node name={node}.c input-node={node}.lstm_nonlin dim-offset=0 dim={cell}",
        f"dim-range-node name={node}.m input-node={node}.lstm_nonlin dim-offset={cell} dim={cell}",
        f"component-node name={node}.rp component={node}.W_rp input={node}.m",
        f"dim-range-node name={node}.r input-node={node}.rp dim-offset=0 dim={rec}",
        f"component-node name={node}.cr_trunc component={node}.cr_trunc input=Append({node}.c, {node}.r)",
        f"dim-range-node name={node}.c_trunc input-node={node}.cr_trunc dim-offset=0 dim={cell}",
        f"dim-range-node name={node}.r_trunc input-node={node}.cr_trunc dim-offset={cell} dim={rec}",
    ]
    return Layer(node, {"": (f"{node}.rp", rec + nonrec)}, lines)


def _objective(line: _Line) -> str:
    objective = line.options.text("objective-type", "linear")
    if objective not in ("linear", "quadratic"):
        raise line.place.error(f"linear or quadratic expected, found {objective!r}", "objective-type")
    return objective


def _output_node(line: _Line, descriptor: str) -> tuple[str, int]:
    """The config line, and the label delay."""
    delay = line.options.integer("output-delay", 0)
    source = f"Offset({descriptor}, {delay})" if delay else descriptor
    return f"output-node name={line.name} input={source} objective={_objective(line)}", delay


def _output(line: _Line) -> Layer:
    descriptor, _ = line.input()
    line.options.integer("dim", -1)
    node, delay = _output_node(line, descriptor)
    return Layer(line.name, {}, [node], output_delay=delay)


def _output_layer(line: _Line) -> Layer:
    node, input_, options = line.name, line.input(), line.options
    dim = options.positive("dim")
    if options.integer("bottleneck-dim", -1) >= 0:
        raise line.place.error("is not supported yet", "bottleneck-dim")
    options.number("orthonormal-constraint", 1.0)  # both only matter with a bottleneck
    options.text("ng-linear-options", "")
    affine = options.text("ng-affine-options", "") + line.passed_on(
        {
            "learning-rate-factor": "",
            "l2-regularize": "",
            "max-change": "1.5",
            "param-stddev": "0.0",
            "bias-stddev": "0.0",
        }
    )
    lines = line.affine(f"{node}.affine", input_, dim, affine)
    outputs, last = {"affine": (f"{node}.affine", dim)}, f"{node}.affine"
    if options.flag("include-log-softmax", True):
        last = f"{node}.log-softmax"
        lines.append(f"component name={last} type=LogSoftmaxComponent dim={dim}")
        lines.append(f"component-node name={last} component={last} input={node}.affine")
        outputs["log-softmax"] = (last, dim)
    last_line, delay = _output_node(line, last)
    return Layer(node, outputs, [*lines, last_line], output_delay=delay)


_LAYERS: dict[str, Callable[[_Line], Layer]] = {
    "input": _input,
    "fixed-affine-layer": _fixed_affine,
    "fast-lstm-layer": _fast_lstm,
    "fast-lstmp-layer": _fast_lstmp,
    "relu-layer": _relu,
    "relu-renorm-layer": _relu,
    "sigmoid-layer": _relu,
    "tanh-layer": _relu,
    "output": _output,
    "output-layer": _output_layer,
}
