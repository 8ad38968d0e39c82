"""xconfig's layers that gather many frames: statistics over a window, and restricted attention."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from kaldi_mpi.models.xconfig_line import Layer, Line, Lines

_STATISTICS = re.compile(r"mean(\+stddev)?(\+count)?\((-?\d+):(-?\d+):(-?\d+):(-?\d+)\)")


def _stats(line: Line) -> Layer:
    """``config=mean+stddev(-LEFT:INPUT_PERIOD:PERIOD:RIGHT)``: moments of a window, anew every PERIOD frames."""
    node, (descriptor, input_dim), options = line.name, line.input(), line.options
    config = options.text("config")
    match = _STATISTICS.search(config)
    if match is None:
        cause = f"mean[+stddev][+count](-left:input-period:period:right) expected, found {config!r}"
        raise line.place.error(cause, "config")
    stddev, count = match[1] is not None, match[2] is not None
    left, input_period, period, right = -int(match[3]), *map(int, match.group(4, 5, 6))
    if left < 0 or right < 0 or left + right == 0:
        cause = f"the window must hold the frame itself, and more, is {-left} to {right}"
        raise line.place.error(cause, "config")
    if input_period <= 0 or period <= 0 or period % input_period or left % period or right % period:
        cause = f"{input_period} must divide {period}, and {period} both ends of the window {-left} to {right}"
        raise line.place.error(cause, "config")
    dim = input_dim * (2 if stddev else 1) + count
    given = options.integer("dim", -1)
    if given > 0 and given != dim:
        raise line.misfit(f"is {given}, but the statistics have {dim}", "dim")
    extraction, pooling = f"{node}-extraction-{left}-{right}", f"{node}-pooling-{left}-{right}"
    variance = "true" if stddev else "false"
    lines = line.component(
        extraction,
        "StatisticsExtraction",
        descriptor,
        f"input-dim={input_dim} input-period={input_period} output-period={period} include-variance={variance}",
    )
    lines += line.component(
        pooling,
        "StatisticsPooling",
        extraction,
        f"input-dim={1 + input_dim * (2 if stddev else 1)} input-period={period} left-context={left} "
        f"right-context={right} num-log-count-features={int(count)} output-stddevs={variance}",
    )
    return Layer(node, {"": (f"Round({pooling}, {period})", dim)}, lines)


def _attention(line: Line) -> Layer:
    """Restricted self-attention (Povey et al., ICASSP 2018): affine, then what the layer's name says, in its order."""
    node, (descriptor, input_dim), options = line.name, line.input(), line.options
    options.integer("dim", -1)  # Kaldi takes it and does nothing with it
    repair, rms = line.share("self-repair-scale", 1e-05), options.number("target-rms", 1.0)
    if rms < 0.0:
        raise line.place.error(f"must not be negative, is {rms}", "target-rms")
    change, factor = options.number("max-change", 0.75), line.above_zero("learning-rate-factor", 1.0)
    affine, l2 = options.text("ng-affine-options", ""), line.l2()
    heads, key, value = options.positive("num-heads", 1), options.positive("key-dim"), options.positive("value-dim")
    sides = {}
    for side in ("left", "right"):
        sides[side] = options.integer(f"num-{side}-inputs")
        if sides[side] < 0:
            raise line.place.error(f"must not be negative, is {sides[side]}", f"num-{side}-inputs")
    required = [options.integer(f"num-{side}-inputs-required", -1) for side in sides]
    with_context, stride = options.flag("output-context", True), options.positive("time-stride", 1)
    scale = options.number("key-scale", 0.0) or 1.0 / math.sqrt(key)
    line.share("dropout-proportion", 0.5)  # of attention with dropout, which no layer type of Kaldi's has
    context = sum(sides.values()) + 1
    before, after = heads * (2 * key + context + value), heads * (value + (context if with_context else 0))
    lines, dim = Lines(node), before
    rates = f"max-change={change} {affine} " + (f"learning-rate-factor={factor}" if factor != 1.0 else "") + l2
    last = lines.both(
        "affine", "NaturalGradientAffine", descriptor, f"input-dim={input_dim} output-dim={before} {rates}"
    )
    for part in line.kind.split("-")[:-1]:
        if part == "attention":
            type_ = "RestrictedAttention"
            settings = (
                f"value-dim={value} key-dim={key} num-left-inputs={sides['left']} num-right-inputs={sides['right']} "
                f"num-left-inputs-required={required[0]} num-right-inputs-required={required[1]} "
                f"output-context={with_context} time-stride={stride} num-heads={heads} key-scale={scale}"
            )
            dim = after
        elif part == "relu":
            type_, settings = "RectifiedLinear", f"dim={dim} self-repair-scale={repair}"
        else:
            type_ = {"renorm": "Normalize", "batchnorm": "BatchNorm"}[part]
            settings = f"dim={dim} target-rms={rms}"
        last = lines.both(part, type_, last, settings)
    return Layer(node, {"": (last, after)}, lines)


_ATTENTION = (
    "attention-renorm-layer", "attention-relu-renorm-layer", "attention-relu-batchnorm-layer",
    "relu-renorm-attention-layer",
)  # fmt: skip

LAYERS: dict[str, Callable[[Line], Layer]] = {"stats-layer": _stats, **dict.fromkeys(_ATTENTION, _attention)}
