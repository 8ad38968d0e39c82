"""xconfig's feed-forward layers: affine, and what comes after it by the layer's name; TDNN-F."""

from __future__ import annotations

import math
from collections.abc import Callable

from kaldi_mpi.models.xconfig_line import Layer, Line

_PARTS = ("relu", "sigmoid", "tanh", "renorm", "batchnorm", "so", "dropout")


def _basic(line: Line) -> Layer:
    """``relu-batchnorm-dropout-layer`` and the like: affine, then what the name says, in its order."""
    node, input_, options = line.name, line.input(), line.options
    parts = line.kind.split("-")[:-1]
    dim = line.dim(input_[1])
    repair, rms = line.share("self-repair-scale", 1e-05), options.number("target-rms", 1.0)
    bottleneck = options.integer("bottleneck-dim", -1)
    dropout = line.share("dropout-proportion", 0.5)
    per_dim, continuous = options.flag("dropout-per-dim", False), options.flag("dropout-per-dim-continuous", False)
    stddev = options.flag("add-log-stddev", False)
    if stddev and parts[-1] != "renorm":
        raise line.place.error("needs a renorm as the last part of the layer", "add-log-stddev")
    if rms < 0.0:
        raise line.place.error(f"must not be negative, is {rms}", "target-rms")
    affine, linear = options.text("ng-affine-options", ""), options.text("ng-linear-options", "")
    rates = line.passed_on({"max-change": 0.75, "learning-rate-factor": ""})
    affine += rates + line.passed_on({"bias-stddev": "", "l2-regularize": ""})
    width = dim - 1 if stddev else dim
    lines: list[str] = []
    if bottleneck >= 0:
        if not 0 < bottleneck < dim:
            raise line.misfit(f"{bottleneck} is not between 0 and dim {dim}", "bottleneck-dim")
        settings = f"input-dim={input_[1]} orthonormal-constraint=1.0 output-dim={bottleneck} {linear}{rates}"
        lines += line.component(f"{node}.linear", "Linear", input_[0], settings)
        input_ = f"{node}.linear", bottleneck
    lines += line.affine(f"{node}.affine", input_, width, affine)
    last = f"{node}.affine"
    for index, part in enumerate(parts):
        if part in ("relu", "sigmoid", "tanh"):
            type_ = {"relu": "RectifiedLinear", "sigmoid": "Sigmoid", "tanh": "Tanh"}[part]
            settings = f"dim={width} self-repair-scale={repair}"
        elif part == "renorm":
            with_log = "true" if stddev and index == len(parts) - 1 else "false"
            type_, settings = "Normalize", f"dim={width} target-rms={rms} add-log-stddev={with_log}"
        elif part == "batchnorm":
            type_, settings = "BatchNorm", f"dim={width} target-rms={rms}"
        elif part == "so":
            type_, settings = "ScaleAndOffset", f"dim={width} max-change=0.5"
        else:
            type_ = "GeneralDropout" if per_dim or continuous else "Dropout"
            settings = f"dim={width} dropout-proportion={dropout}" + (" continuous=true" if continuous else "")
        lines += line.component(f"{node}.{part}", type_, last, settings)
        last = f"{node}.{part}"
    return Layer(node, {"": (last, dim)}, lines)


def _affine(line: Line) -> Layer:
    node, input_ = line.name, line.input()
    dim = line.dim(input_[1])
    stddev = line.options.number("param-stddev", -1.0)
    settings = f"param-stddev={stddev if stddev >= 0 else 1.0 / math.sqrt(input_[1])}"
    settings += line.passed_on({"bias-stddev": 1.0, "bias-mean": 0.0, "max-change": 0.75, "l2-regularize": 0.0})
    line.options.number("learning-rate-factor", 1.0)  # Kaldi takes it and does nothing with it
    settings += f" {line.options.text('ng-affine-options', '')}"
    return Layer(node, {"": (node, dim)}, line.affine(node, input_, dim, settings))


def _tdnnf(line: Line) -> Layer:
    """A factored TDNN layer (Povey et al., Interspeech 2018): a constrained factor, another, ReLU, and a bypass."""
    node, (descriptor, input_dim), options = line.name, line.input(), line.options
    dim, bottleneck = options.positive("dim"), options.positive("bottleneck-dim")
    bypass, dropout = options.number("bypass-scale", 0.66), options.number("dropout-proportion", -1.0)
    stride, context = options.integer("time-stride", 1), options.text("context", "default")
    l2, change = options.number("l2-regularize", 0.0), options.number("max-change", 0.75)
    repair = options.number("self-repair-scale", 1e-05)
    if dim <= bottleneck:
        raise line.place.error(f"must be below dim {dim}, is {bottleneck}", "bottleneck-dim")
    if dropout != -1.0 and not 0.0 <= dropout < 1.0:
        raise line.place.error(f"must be in [0, 1), is {dropout}", "dropout-proportion")
    if abs(bypass) > 1.0:
        raise line.place.error(f"must be between -1 and 1, is {bypass}", "bypass-scale")
    if bypass and dim != input_dim:
        raise line.misfit(f"needs a dim as the input's {input_dim}, or to be 0; dim is {dim}", "bypass-scale")
    after = {"default": f"0,{stride}", "left-only": "0", "shift-left": f"{-stride},0", "none": "0"}
    if context not in after:
        raise line.place.error(f"{', '.join(after)} expected, found {context!r}", "context")
    spliced = stride != 0 and context != "none"
    first, second = (f"{-stride},0", after[context]) if spliced else ("0", "0")
    common = f"l2-regularize={l2} max-change={change}"
    lines = [
        *line.component(
            f"{node}.linear", "Tdnn", descriptor,
            f"input-dim={input_dim} output-dim={bottleneck} {common} use-bias=false time-offsets={first} "
            "orthonormal-constraint=-1.0",
        ),
        *line.component(
            f"{node}.affine", "Tdnn", f"{node}.linear",
            f"input-dim={bottleneck} output-dim={dim} {common} time-offsets={second}",
        ),
        *line.component(f"{node}.relu", "RectifiedLinear", f"{node}.affine", f"dim={dim} self-repair-scale={repair}"),
        *line.component(f"{node}.batchnorm", "BatchNorm", f"{node}.relu", f"dim={dim}"),
    ]  # fmt: skip
    last = f"{node}.batchnorm"
    if dropout != -1.0:
        settings = f"dim={dim} dropout-proportion={dropout} continuous=true"
        lines += line.component(f"{node}.dropout", "GeneralDropout", last, settings)
        last = f"{node}.dropout"
    if bypass:
        lines += line.component(f"{node}.noop", "NoOp", f"Sum(Scale({bypass}, {descriptor}), {last})", f"dim={dim}")
        last = f"{node}.noop"
    return Layer(node, {"": (last, dim)}, lines)


def _prefinal(line: Line) -> Layer:
    node, (descriptor, input_dim), options = line.name, line.input(), line.options
    big, small = options.positive("big-dim"), options.positive("small-dim")
    if big <= small:
        raise line.place.error(f"must be above small-dim {small}, is {big}", "big-dim")
    l2, change = options.number("l2-regularize", 0.0), options.number("max-change", 0.75)
    repair, common = options.number("self-repair-scale", 1e-05), f"l2-regularize={l2} max-change={change}"
    lines = [
        *line.affine(f"{node}.affine", (descriptor, input_dim), big, common),
        *line.component(f"{node}.relu", "RectifiedLinear", f"{node}.affine", f"dim={big} self-repair-scale={repair}"),
        *line.component(f"{node}.batchnorm1", "BatchNorm", f"{node}.relu", f"dim={big}"),
        *line.component(
            f"{node}.linear", "Linear", f"{node}.batchnorm1",
            f"input-dim={big} output-dim={small} {common} orthonormal-constraint=-1",
        ),
        *line.component(f"{node}.batchnorm2", "BatchNorm", f"{node}.linear", f"dim={small}"),
    ]  # fmt: skip
    return Layer(node, {"": (f"{node}.batchnorm2", small)}, lines)


_BASIC = (
    "relu-layer", "relu-renorm-layer", "relu-batchnorm-dropout-layer", "relu-dropout-layer", "relu-batchnorm-layer",
    "relu-batchnorm-so-layer", "batchnorm-so-relu-layer", "batchnorm-layer", "sigmoid-layer", "tanh-layer",
)  # fmt: skip

LAYERS: dict[str, Callable[[Line], Layer]] = {
    **dict.fromkeys(_BASIC, _basic),
    "affine-layer": _affine,
    "tdnnf-layer": _tdnnf,
    "prefinal-layer": _prefinal,
}
