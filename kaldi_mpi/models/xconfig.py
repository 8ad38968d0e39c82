"""network.xconfig: Kaldi's layer-wise description of a network, expanded to config lines.

The lines are those that Kaldi's own expansion of the same file ends up with: the same names of nodes and
components, the same types, options and descriptors.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.models import xconfig_feedforward as feedforward
from kaldi_mpi.models.config import Config, InputNode, Node, Options, OutputNode, Place, parse_config, split_options
from kaldi_mpi.models.contexts import contexts
from kaldi_mpi.models.descriptor import parse_descriptor
from kaldi_mpi.models.xconfig_line import Layer, Line

_LAYER_TYPE = re.compile(r"^[a-z][-a-z0-9]+$")
_QUOTED = re.compile(r'"([^"]*)"')


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
        part, whole = contexts(lda), contexts(config.nodes)
    except KeyError:
        return  # no output, or another input than the network's: told where the network is built
    if part[0] > whole[0] or part[1] > whole[1]:
        raise place.error(
            f"the input takes {part[0]} frames to the left and {part[1]} to the right, the whole network only "
            f"{whole[0]} and {whole[1]}, which Kaldi refuses; the label delay must stand here too: add "
            f"delay={label_delay or ''}",
            "delay",
        )


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
    line = Line(kind, options.text("name"), options, layers, place)
    layer = _LAYERS[kind](line)
    options.done(kind)
    return layer


def _input(line: Line) -> Layer:
    dim = line.options.positive("dim")
    return Layer(line.name, {"": (line.name, dim)}, [f"input-node name={line.name} dim={dim}"])


def _fixed_affine(line: Line) -> Layer:
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


@dataclass
class _LstmOptions:
    cell: int
    delay: int
    affine: str
    nonlinearity: str
    truncation: str


def _lstm_options(line: Line) -> _LstmOptions:
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


def _fast_lstm(line: Line) -> Layer:
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
    if line.kind == "fast-lstm-batchnorm-layer":
        lines += line.component(f"{node}.m_batchnorm", "BatchNorm", f"{node}.m", f"dim={cell}")
        return Layer(node, {"": (f"{node}.m_batchnorm", cell)}, lines)
    return Layer(node, {"": (f"{node}.m", cell)}, lines)


def _fast_lstmp(line: Line) -> Layer:
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
    dropout = line.options.number("dropout-proportion", -1.0)
    if dropout != -1.0 and not 0.0 <= dropout <= 1.0:
        raise line.place.error(f"must be between 0 and 1, is {dropout}", "dropout-proportion")
    recurrent = f"Append({descriptor}, IfDefined(Offset({node}.r_trunc, {delay})))"
    old_cell = f"IfDefined(Offset({node}.c_trunc, {delay}))"
    mask, mask_node, masked = [], [], ""
    if dropout != -1.0:
        # The node's input means nothing: the component has none.
        mask = [
            f"component name={node}.dropout_mask type=DropoutMaskComponent output-dim=3 dropout-proportion={dropout}"
        ]
        mask_node = [f"component-node name={node}.dropout_mask component={node}.dropout_mask input={node}.dropout_mask"]
        masked = f", {node}.dropout_mask"
    lines = [
        f"component name={node}.W_all type=NaturalGradientAffineComponent "
        f"input-dim={input_dim + rec} output-dim={4 * cell} {lstm.affine}",
        f"component name={node}.lstm_nonlin type=LstmNonlinearityComponent cell-dim={cell} "
        f"use-dropout={'true' if mask else 'false'} {lstm.nonlinearity}",
        f"component name={node}.cr_trunc type=BackpropTruncationComponent dim={cell + rec}{lstm.truncation}",
        *mask,
        f"component name={node}.W_rp type=NaturalGradientAffineComponent "
        f"input-dim={cell} output-dim={rec + nonrec} {lstm.affine}",
        f"component-node name={node}.W_all component={node}.W_all input={recurrent}",
        *mask_node,
        f"component-node name={node}.lstm_nonlin component={node}.lstm_nonlin "
        f"input=Append({node}.W_all, {old_cell}{masked})",
        f"dim-range-node name={node}.c input-node={node}.lstm_nonlin dim-offset=0 dim={cell}",
        f"dim-range-node name={node}.m input-node={node}.lstm_nonlin dim-offset={cell} dim={cell}",
        f"component-node name={node}.rp component={node}.W_rp input={node}.m",
        f"dim-range-node name={node}.r input-node={node}.rp dim-offset=0 dim={rec}",
        f"component-node name={node}.cr_trunc component={node}.cr_trunc input=Append({node}.c, {node}.r)",
        f"dim-range-node name={node}.c_trunc input-node={node}.cr_trunc dim-offset=0 dim={cell}",
        f"dim-range-node name={node}.r_trunc input-node={node}.cr_trunc dim-offset={cell} dim={rec}",
    ]
    if line.kind == "fast-lstmp-batchnorm-layer":
        lines += line.component(f"{node}.rp_batchnorm", "BatchNorm", f"{node}.rp", f"dim={rec + nonrec}")
        return Layer(node, {"": (f"{node}.rp_batchnorm", rec + nonrec)}, lines)
    return Layer(node, {"": (f"{node}.rp", rec + nonrec)}, lines)


def _objective(line: Line) -> str:
    objective = line.options.text("objective-type", "linear")
    if objective not in ("linear", "quadratic"):
        raise line.place.error(f"linear or quadratic expected, found {objective!r}", "objective-type")
    return objective


def _output_node(line: Line, descriptor: str) -> tuple[str, int]:
    """The config line, and the label delay."""
    delay = line.options.integer("output-delay", 0)
    source = f"Offset({descriptor}, {delay})" if delay else descriptor
    return f"output-node name={line.name} input={source} objective={_objective(line)}", delay


def _output(line: Line) -> Layer:
    descriptor, _ = line.input()
    line.options.integer("dim", -1)
    node, delay = _output_node(line, descriptor)
    return Layer(line.name, {}, [node], output_delay=delay)


def _output_layer(line: Line) -> Layer:
    node, input_, options = line.name, line.input(), line.options
    dim = options.positive("dim")
    bottleneck = options.integer("bottleneck-dim", -1)
    constraint, linear = options.number("orthonormal-constraint", 1.0), options.text("ng-linear-options", "")
    rates = line.passed_on({"learning-rate-factor": "", "l2-regularize": "", "max-change": "1.5"})
    affine = options.text("ng-affine-options", "") + rates
    affine += line.passed_on({"param-stddev": "0.0", "bias-stddev": "0.0"})
    lines: list[str] = []
    if bottleneck >= 0:
        if not 0 < bottleneck < min(input_[1], dim):
            least = min(input_[1], dim)
            raise line.place.error(f"{bottleneck} is not between 0 and {least}, of input and dim", "bottleneck-dim")
        stddev = constraint / math.sqrt(input_[1])
        settings = f"orthonormal-constraint={constraint} param-stddev={stddev} input-dim={input_[1]} "
        # As Kaldi's line has it: max-change twice, of which the first holds.
        settings += f"output-dim={bottleneck} max-change=0.75 {linear}{rates}"
        lines += line.component(f"{node}.linear", "Linear", input_[0], settings)
        input_ = f"{node}.linear", bottleneck
    lines += line.affine(f"{node}.affine", input_, dim, affine)
    outputs, last = {"affine": (f"{node}.affine", dim)}, f"{node}.affine"
    if options.flag("include-log-softmax", True):
        last = f"{node}.log-softmax"
        lines.append(f"component name={last} type=LogSoftmaxComponent dim={dim}")
        lines.append(f"component-node name={last} component={last} input={node}.affine")
        outputs["log-softmax"] = (last, dim)
    last_line, delay = _output_node(line, last)
    return Layer(node, outputs, [*lines, last_line], output_delay=delay)


_LAYERS: dict[str, Callable[[Line], Layer]] = {
    "input": _input,
    "fixed-affine-layer": _fixed_affine,
    "fast-lstm-layer": _fast_lstm,
    "fast-lstm-batchnorm-layer": _fast_lstm,
    "fast-lstmp-layer": _fast_lstmp,
    "fast-lstmp-batchnorm-layer": _fast_lstmp,
    **feedforward.LAYERS,
    "output": _output,
    "output-layer": _output_layer,
}
