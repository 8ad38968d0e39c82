"""xconfig's lines that are one component, and the small layers without trained matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kaldi_mpi.models.xconfig_line import Layer, Line, Lines


def _of_input_dim(type_: str, keys: Mapping[str, str | float | bool]) -> Callable[[Line], Layer]:
    """A component that keeps the dimension."""

    def expand(line: Line) -> Layer:
        node, (descriptor, dim) = line.name, line.input()
        lines = line.component(node, type_, descriptor, f"dim={dim}{line.passed_on(keys)}")
        return Layer(node, {"": (node, dim)}, lines)

    return expand


def _normalising(type_: str) -> Callable[[Line], Layer]:
    def expand(line: Line) -> Layer:
        node, (descriptor, dim) = line.name, line.input()
        rms = line.above_zero("target-rms", 1.0)
        if type_ == "BatchNorm":
            line.options.flag("include-in-init", False)
        return Layer(node, {"": (node, dim)}, line.component(node, type_, descriptor, f"dim={dim} target-rms={rms}"))

    return expand


def _matrix(type_: str, keys: Mapping[str, str | float | bool]) -> Callable[[Line], Layer]:
    """A component with a ``dim`` of its own."""

    def expand(line: Line) -> Layer:
        node, (descriptor, input_dim) = line.name, line.input()
        dim = line.options.positive("dim")
        settings = f"input-dim={input_dim} output-dim={dim}{line.passed_on(keys)}"
        return Layer(node, {"": (node, dim)}, line.component(node, type_, descriptor, settings))

    return expand


def _dim_range(line: Line) -> Layer:
    (source, input_dim), options = line.input_node(), line.options
    dim, offset = options.positive("dim"), options.integer("dim-offset", 0)
    if offset < 0 or offset + dim > input_dim:
        raise line.misfit(f"columns {offset} to {offset + dim} of an input of {input_dim}", "dim-offset")
    lines = [f"dim-range-node name={line.name} input-node={source} dim={dim} dim-offset={offset}"]
    return Layer(line.name, {"": (line.name, dim)}, lines)


def _combine_feature_maps(line: Line) -> Layer:
    """Images of the same height next to each other -> one image: at each height the filters of all of them."""
    node, (descriptor, dim), options = line.name, line.input(), line.options
    height = options.positive("height")
    filters = [options.positive("num-filters1"), options.positive("num-filters2"), options.integer("num-filters3", 0)]
    if filters[2] < 0:
        raise line.place.error(f"must not be negative, is {filters[2]}", "num-filters3")
    if dim != sum(filters) * height:
        raise line.misfit(f"{height} times {sum(filters)} filters for an input of {dim}", "height")
    starts = [height * sum(filters[:number]) for number in range(len(filters))]
    columns = [
        start + at * count + column
        for at in range(height)
        for start, count in zip(starts, filters, strict=True)
        for column in range(count)
    ]
    settings = f"column-map={','.join(map(str, columns))}"
    return Layer(node, {"": (node, dim)}, line.component(node, "Permute", descriptor, settings))


def _delta(line: Line) -> Layer:
    """An input with its first and second differences in time, normalised."""
    node, (source, dim) = line.name, line.input_node()
    lines = Lines(node)
    # A node can stand once in a Sum with a Scale, so Kaldi copies it; its names come from the input's.
    copies = [f"{source}_copy1", f"{source}_copy2"]
    for copy in copies:
        lines.append(f"dim-range-node name={copy} input-node={source} dim={dim} dim-offset=0")
    first = f"Sum(Offset(Scale(-1.0, {copies[0]}), -1), Offset({source}, 1))"
    second = f"Sum(Offset({source}, -2), Offset({source}, 2), Offset(Scale(-2.0, {copies[1]}), 0))"
    together = f"Append(Offset({source}, 0), {first}, {second})"
    lines += line.component(f"{source}_2", "NoOp", together, f"dim={3 * dim}")
    lines += line.component(node, "BatchNorm", f"{source}_2", f"dim={3 * dim}")
    return Layer(node, {"": (node, 3 * dim)}, lines)


def _channel_average(line: Line) -> Layer:
    node, (descriptor, input_dim) = line.name, line.input()
    dim = line.options.positive("dim")
    if input_dim % dim:
        raise line.misfit(f"{dim} does not divide the input's {input_dim}", "dim")
    settings = f"input-dim={input_dim} output-dim={dim} scale={dim / input_dim}"
    return Layer(node, {"": (node, dim)}, line.component(node, "SumBlock", descriptor, settings))


def _spec_augment(line: Line) -> Layer:
    node, (descriptor, dim), options = line.name, line.input(), line.options
    shares = {"freq-max-proportion": 0.5, "time-zeroed-proportion": 0.2}
    for key, default in shares.items():
        shares[key] = options.number(key, default)
        if not 0.0 < shares[key] < 1.0:
            raise line.place.error(f"must be above 0 and below 1, is {shares[key]}", key)
    frames = options.positive("time-mask-max-frames", 20)
    options.flag("include-in-init", False)
    lines = Lines(node)
    settings = f"dim={dim} specaugment-max-proportion={shares['freq-max-proportion']}"
    last = lines.both("freq-mask", "GeneralDropout", descriptor, settings)
    settings = f"dim={dim} zeroed-proportion={shares['time-zeroed-proportion']} time-mask-max-frames={frames}"
    last = lines.both("time-mask", "SpecAugmentTimeMask", last, settings)
    return Layer(node, {"": (last, dim)}, lines)


_PER_ELEMENT: Mapping[str, str | float | bool] = {
    "learning-rate-factor": "", "max-change": 0.75, "l2-regularize": "", "param-mean": "", "param-stddev": "",
}  # fmt: skip

LAYERS: dict[str, Callable[[Line], Layer]] = {
    "spec-augment-layer": _spec_augment,
    "delta-layer": _delta,
    "combine-feature-maps-layer": _combine_feature_maps,
    "channel-average-layer": _channel_average,
    "dim-range-component": _dim_range,
    "renorm-component": _normalising("Normalize"),
    "batchnorm-component": _normalising("BatchNorm"),
    "no-op-component": _of_input_dim("NoOp", {}),
    "linear-component": _matrix(
        "Linear",
        {
            "orthonormal-constraint": "", "max-change": 0.75, "l2-regularize": "", "param-stddev": "",
            "learning-rate-factor": "",
        },
    ),
    "affine-component": _matrix(
        "NaturalGradientAffine",
        {
            "orthonormal-constraint": "", "max-change": 0.75, "l2-regularize": "", "param-stddev": "",
            "bias-stddev": "",
        },
    ),
    "scale-component": _of_input_dim("NaturalGradientPerElementScale", _PER_ELEMENT),
    "offset-component": _of_input_dim("PerElementOffset", _PER_ELEMENT),
}  # fmt: skip
