"""xconfig's feed-forward layers, and the lines that are one component."""

from __future__ import annotations

from collections.abc import Callable

from kaldi_mpi.models.xconfig_line import Layer, Line

_PARTS = ("relu", "sigmoid", "tanh", "renorm", "batchnorm", "so", "dropout")


def _basic(line: Line) -> Layer:
    """``relu-batchnorm-dropout-layer`` and the like: affine, then what the name says, in its order."""
    node, input_, options = line.name, line.input(), line.options
    parts = line.kind.split("-")[:-1]
    dim = options.integer("dim", -1)
    dim = dim if dim > 0 else input_[1]
    repair, rms = options.text("self-repair-scale", "1e-05"), options.text("target-rms", "1.0")
    bottleneck = options.integer("bottleneck-dim", -1)
    dropout = options.number("dropout-proportion", 0.5)
    per_dim, continuous = options.flag("dropout-per-dim", False), options.flag("dropout-per-dim-continuous", False)
    stddev = options.flag("add-log-stddev", False)
    if stddev and parts[-1] != "renorm":
        raise line.place.error("needs a renorm as the last part of the layer", "add-log-stddev")
    if not 0.0 <= dropout <= 1.0:
        raise line.place.error(f"must be between 0 and 1, is {dropout}", "dropout-proportion")
    affine, linear = options.text("ng-affine-options", ""), options.text("ng-linear-options", "")
    rates = line.passed_on({"max-change": "0.75", "learning-rate-factor": ""})
    affine += rates + line.passed_on({"bias-stddev": "", "l2-regularize": ""})
    width = dim - 1 if stddev else dim
    lines: list[str] = []
    if bottleneck >= 0:
        if not 0 < bottleneck < dim:
            raise line.place.error(f"{bottleneck} is not between 0 and dim {dim}", "bottleneck-dim")
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


def _tdnnf(line: Line) -> Layer:
    """A factored TDNN layer (Povey et al., Interspeech 2018): a constrained factor, another, ReLU, and a bypass."""
    node, (descriptor, input_dim), options = line.name, line.input(), line.options
    dim, bottleneck = options.positive("dim"), options.positive("bottleneck-dim")
    bypass, dropout = options.number("bypass-scale", 0.66), options.number("dropout-proportion", -1.0)
    stride, context = options.integer("time-stride", 1), options.text("context", "default")
    l2, change = options.text("l2-regularize", "0.0"), options.text("max-change", "0.75")
    repair = options.text("self-repair-scale", "1e-05")
    if dim <= bottleneck:
        raise line.place.error(f"must be below dim {dim}, is {bottleneck}", "bottleneck-dim")
    if dropout != -1.0 and not 0.0 <= dropout < 1.0:
        raise line.place.error(f"must be in [0, 1), is {dropout}", "dropout-proportion")
    if abs(bypass) > 1.0:
        raise line.place.error(f"must be between -1 and 1, is {bypass}", "bypass-scale")
    if bypass and dim != input_dim:
        raise line.place.error(f"needs a dim as the input's {input_dim}, or to be 0; dim is {dim}", "bypass-scale")
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
    l2, change = options.text("l2-regularize", "0.0"), options.text("max-change", "0.75")
    repair, common = options.text("self-repair-scale", "1e-05"), f"l2-regularize={l2} max-change={change}"
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


def _single(type_: str, keys: dict[str, str], dims: str) -> Callable[[Line], Layer]:
    """A line that is one component; `dims`: ``both`` if it has an input-dim and a dim, else ``input``: the input's."""

    def expand(line: Line) -> Layer:
        node, (descriptor, input_dim), options = line.name, line.input(), line.options
        dim = options.positive("dim") if dims == "both" else input_dim
        settings = f"input-dim={input_dim} output-dim={dim}" if dims == "both" else f"dim={dim}"
        if type_ == "BatchNorm":
            options.flag("include-in-init", False)
        lines = line.component(node, type_, descriptor, settings + line.passed_on(keys))
        return Layer(node, {"": (node, dim)}, lines)

    return expand


def _dim_range(line: Line) -> Layer:
    node, (descriptor, input_dim), options = line.name, line.input(), line.options
    dim, offset = options.positive("dim"), options.integer("dim-offset", 0)
    if offset < 0 or offset + dim > input_dim:
        raise line.place.error(f"columns {offset} to {offset + dim} of an input of {input_dim}", "dim-offset")
    lines = [f"dim-range-node name={node} input-node={descriptor} dim={dim} dim-offset={offset}"]
    return Layer(node, {"": (node, dim)}, lines)


def _spec_augment(line: Line) -> Layer:
    node, (descriptor, dim), options = line.name, line.input(), line.options
    share, zeroed = options.number("freq-max-proportion", 0.5), options.number("time-zeroed-proportion", 0.2)
    frames = options.positive("time-mask-max-frames", 20)
    options.flag("include-in-init", False)
    lines = [
        *line.component(
            f"{node}.freq-mask", "GeneralDropout", descriptor, f"dim={dim} specaugment-max-proportion={share}"
        ),
        *line.component(
            f"{node}.time-mask", "SpecAugmentTimeMask", f"{node}.freq-mask",
            f"dim={dim} zeroed-proportion={zeroed} time-mask-max-frames={frames}",
        ),
    ]  # fmt: skip
    return Layer(node, {"": (f"{node}.time-mask", dim)}, lines)


_SCALE_KEYS = {
    "l2-regularize": "", "max-change": "0.75", "param-mean": "", "param-stddev": "", "learning-rate-factor": "",
}  # fmt: skip
_BASIC = (
    "relu-layer", "relu-renorm-layer", "relu-batchnorm-dropout-layer", "relu-dropout-layer", "relu-batchnorm-layer",
    "relu-batchnorm-so-layer", "batchnorm-so-relu-layer", "sigmoid-layer", "tanh-layer",
)  # fmt: skip

LAYERS: dict[str, Callable[[Line], Layer]] = {
    **dict.fromkeys(_BASIC, _basic),
    "tdnnf-layer": _tdnnf,
    "prefinal-layer": _prefinal,
    "spec-augment-layer": _spec_augment,
    "dim-range-component": _dim_range,
    "renorm-component": _single("Normalize", {"target-rms": "1.0"}, "input"),
    "batchnorm-component": _single("BatchNorm", {"target-rms": "1.0"}, "input"),
    "no-op-component": _single("NoOp", {}, "input"),
    "linear-component": _single(
        "Linear",
        {
            "orthonormal-constraint": "", "max-change": "0.75", "l2-regularize": "", "param-stddev": "",
            "learning-rate-factor": "",
        },
        "both",
    ),
    "affine-component": _single(
        "NaturalGradientAffine",
        {
            "orthonormal-constraint": "", "max-change": "0.75", "param-stddev": "", "bias-stddev": "",
            "l2-regularize": "",
        },
        "both",
    ),
    "scale-component": _single("NaturalGradientPerElementScale", _SCALE_KEYS, "input"),
    "offset-component": _single("PerElementOffset", _SCALE_KEYS, "input"),
}  # fmt: skip
