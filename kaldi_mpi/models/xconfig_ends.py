"""xconfig's inputs and outputs, and the transforms that are not trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.models.xconfig_line import Layer, Line


def _input(line: Line) -> Layer:
    dim = line.options.positive("dim")
    return Layer(line.name, {"": (line.name, dim)}, [f"input-node name={line.name} dim={dim}"])


def _fixed(line: Line, descriptor: str, path: str) -> list[str]:
    return line.component(line.name, "FixedAffine", descriptor, f"matrix={path}")


def _fixed_affine(line: Line) -> Layer:
    node, input_ = line.name, line.input()
    dim = line.dim(input_[1])
    path = line.options.text("affine-transform-file")
    # These two shape Kaldi's init.config, the network of the LDA statistics, and not final.config.
    delay = line.options.integer("delay", 0)
    init = line.options.flag("write-init-config", True)
    return Layer(
        node,
        {"": (node, dim)},
        _fixed(line, input_[0], path),
        lda_input=f"Offset({input_[0]}, {delay})" if init else None,
        lda_delay=delay,
        shapes={path: (dim, input_[1] + 1)},
    )


def _idct(line: Line) -> Layer:
    """MFCCs back to log mel energies; the matrix needs no file, its path only names it."""
    node, (descriptor, input_dim), options = line.name, line.input(), line.options
    dim = line.dim(input_dim)
    path = options.text("affine-transform-file")
    lifter = options.number("cepstral-lifter", 22.0)
    options.flag("include-in-init", False)
    matrix = idct_matrix(input_dim, dim, lifter)
    return Layer(node, {"": (node, dim)}, _fixed(line, descriptor, path), transforms={path: matrix})


def idct_matrix(num_ceps: int, num_bins: int, lifter: float) -> NDArray[Any]:
    """The inverse of the DCT, and of the liftering, of compute-mfcc-feats; (num_bins, num_ceps + 1), offset 0, float32.

    Row n has sqrt(1/N), then sqrt(2/N) cos(pi/N (n + 1/2) k), each over 1 + Q/2 sin(pi k / Q) for the lifter Q.
    """
    k, n = np.arange(num_ceps), np.arange(num_bins)[:, None]
    matrix = np.where(
        k == 0, math.sqrt(1.0 / num_bins), math.sqrt(2.0 / num_bins) * np.cos(np.pi / num_bins * (n + 0.5) * k)
    )
    if lifter:
        matrix = matrix / (1.0 + 0.5 * lifter * np.sin(np.pi * k / lifter))
    return np.hstack([matrix, np.zeros((num_bins, 1))]).astype(np.float32)


def _output_node(line: Line, descriptor: str) -> tuple[str, int]:
    """The config line, and the label delay."""
    objective = line.options.text("objective-type", "linear")
    if objective not in ("linear", "quadratic"):
        raise line.place.error(f"linear or quadratic expected, found {objective!r}", "objective-type")
    delay = line.options.integer("output-delay", 0)
    source = f"Offset({descriptor}, {delay})" if delay else descriptor
    return f"output-node name={line.name} input={source} objective={objective}", delay


def _output(line: Line) -> Layer:
    descriptor, _ = line.input()
    line.options.integer("dim", -1)
    node, delay = _output_node(line, descriptor)
    return Layer(line.name, {}, [node], output_delay=delay)


def _output_layer(line: Line) -> Layer:
    node, input_, options = line.name, line.input(), line.options
    dim = line.dim(input_[1])
    bottleneck = options.integer("bottleneck-dim", -1)
    constraint, linear = line.above_zero("orthonormal-constraint", 1.0), options.text("ng-linear-options", "")
    rates = line.passed_on({"learning-rate-factor": "", "l2-regularize": "", "max-change": 1.5})
    affine = options.text("ng-affine-options", "") + rates
    affine += line.passed_on({"param-stddev": 0.0, "bias-stddev": 0.0})
    lines: list[str] = []
    if bottleneck >= 0:
        least = min(input_[1], dim)
        if not 0 < bottleneck < least:
            raise line.misfit(f"{bottleneck} is not between 0 and {least}, of input and dim", "bottleneck-dim")
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
        lines += line.component(last, "LogSoftmax", f"{node}.affine", f"dim={dim}")
        outputs["log-softmax"] = (last, dim)
    last_line, delay = _output_node(line, last)
    return Layer(node, outputs, [*lines, last_line], output_delay=delay)


INPUTS: dict[str, Callable[[Line], Layer]] = {
    "input": _input,
    "fixed-affine-layer": _fixed_affine,
    "idct-layer": _idct,
}
OUTPUTS: dict[str, Callable[[Line], Layer]] = {"output": _output, "output-layer": _output_layer}
