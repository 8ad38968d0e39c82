"""xconfig's convolutions over time and height, and the residual blocks made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kaldi_mpi.models.xconfig_line import Layer, Line, Lines

_PASSED: Mapping[str, str | float | bool] = {
    "param-stddev": "", "bias-stddev": "", "use-natural-gradient": "", "max-change": 0.75, "rank-in": "",
    "rank-out": "", "num-minibatches-history": "", "alpha-in": "", "alpha-out": "",
}  # fmt: skip


def _offsets(line: Line, key: str, needed: bool = True) -> str:
    """A list of integers, each above the one before; as it stands."""
    text = line.options.text(key, "")
    if not text and not needed:
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise line.place.error(f"integers with commas between them expected, found {text!r}", key) from None
    if numbers != sorted(set(numbers)):
        raise line.place.error(f"must ascend, is {text}", key)
    return text


@dataclass
class _Image:
    """Where an expansion has got to: what the next component takes, and its size."""

    node: str
    filters: int
    height: int

    @property
    def dim(self) -> int:
        return self.filters * self.height

    @property
    def blocks(self) -> str:
        return f"dim={self.dim} block-dim={self.filters}"


def _filters_in(line: Line, input_dim: int, height: int, key: str) -> int:
    if input_dim % height:
        raise line.misfit(f"{height} does not divide the input's dimension {input_dim}", key)
    return input_dim // height


def _conv(line: Line) -> Layer:
    """``conv-relu-batchnorm-layer`` and the like: what the layer's name says, in its order."""
    (descriptor, input_dim), options = line.input(), line.options
    parts = line.kind.split("-")[:-1]
    convolves = "noconv" not in parts
    height_in, height_out = options.positive("height-in"), options.positive("height-out")
    step, filters_out = options.positive("height-subsample-out", 1), options.positive("num-filters-out")
    filters_in = _filters_in(line, input_dim, height_in, "height-in")
    if height_out * step > height_in:
        cause = f"{height_out} with height-subsample-out={step} is too large for height-in={height_in}"
        raise line.place.error(cause, "height-out")
    height_offsets = _offsets(line, "height-offsets", convolves)
    if height_out * step < height_in - len(height_offsets.split(",")):
        cause = f"{height_out} with height-subsample-out={step} is too small for height-in={height_in}"
        raise line.place.error(cause, "height-out")
    rms, repair = line.above_zero("target-rms", 1.0), options.number("self-repair-scale", 2e-05)
    threshold, dropout = options.number("self-repair-lower-threshold", 0.05), line.share("dropout-proportion", 0.5)
    settings = line.passed_on(_PASSED)
    settings += f" num-filters-in={filters_in} num-filters-out={filters_out} height-in={height_in}"
    settings += f" height-out={height_out} height-subsample-out={step}"
    settings += f" height-offsets={height_offsets} time-offsets={_offsets(line, 'time-offsets', convolves)}"
    required = _offsets(line, "required-time-offsets", needed=False)
    settings += f" required-time-offsets={required}" if required else ""
    settings += line.passed_on({"learning-rate-factor": "", "l2-regularize": ""})
    if not convolves and filters_out * height_out != input_dim:
        raise line.misfit(f"{filters_out} at height-out={height_out} for an input of {input_dim}", "num-filters-out")
    lines, image = Lines(line.name), _Image(descriptor, filters_in, height_in)
    for part in parts[:-1] if not convolves else parts:
        if part == "conv":
            image.node = lines.both(part, "TimeHeightConvolution", image.node, settings.strip())
            image.filters, image.height = filters_out, height_out
        else:
            type_, own = {
                "batchnorm": ("BatchNorm", f"{image.blocks} target-rms={rms}"),
                "renorm": ("Normalize", f"dim={image.dim} target-rms={rms}"),
                "relu": (
                    "RectifiedLinear",
                    f"{image.blocks} self-repair-scale={repair} self-repair-lower-threshold={threshold}",
                ),
                "dropout": ("Dropout", f"dim={image.dim} dropout-proportion={dropout}"),
                "so": ("ScaleAndOffset", image.blocks),
            }[part]
            image.node = lines.both(part, type_, image.node, own)
    return Layer(line.name, {"": (image.node, filters_out * height_out)}, lines)


class _Block:
    """What both kinds of residual blocks are made of, with the options that they share."""

    def __init__(self, line: Line, image: _Image) -> None:
        options = line.options
        self.lines, self.image = Lines(line.name), image
        self.repair = options.number("self-repair-scale", 2e-05)
        self.thresholds = [options.number(f"self-repair-lower-threshold{n}", 0.05) for n in (1, 2, 3)]
        self.period = options.positive("time-period", 1)
        padding = "required-time-offsets=0" if options.flag("allow-zero-padding", True) else ""
        self.passed = line.passed_on({**_PASSED, "l2-regularize": ""})
        self.padded = f"{padding}{self.passed}"
        self.bottleneck = options.integer("num-bottleneck-filters", -1)
        if self.bottleneck <= 0 and self.bottleneck != -1:
            raise line.place.error(f"must be positive, is {self.bottleneck}", "num-bottleneck-filters")

    def relu(self, n: int) -> None:
        settings = f"{self.image.blocks} self-repair-scale={self.repair}"
        settings += f" self-repair-lower-threshold={self.thresholds[n - 1]}"
        self.image.node = self.lines.both(f"relu{n}", "RectifiedLinear", self.image.node, settings)

    def batchnorm(self, n: int) -> None:
        self.image.node = self.lines.both(f"batchnorm{n}", "BatchNorm", self.image.node, self.image.blocks)

    def scale_and_offset(self, n: int) -> None:
        self.image.node = self.lines.both(f"scaleoffset{n}", "ScaleAndOffset", self.image.node, self.image.blocks)

    def convolution(self, n: int, filters: int, height: int, settings: str) -> None:
        self.image.node = self.lines.both(f"conv{n}", "TimeHeightConvolution", self.image.node, settings.strip())
        self.image.filters, self.image.height = filters, height


def _around(period: int) -> str:
    return f"-{period},0,{period}"


def _res_block(line: Line) -> Layer:
    """ReLU, batch-norm and convolution two times, or three times through a bottleneck, beside their input."""
    (descriptor, input_dim), options = line.input(), line.options
    height, filters = options.positive("height"), options.integer("num-filters", -1)
    if filters == -1:
        filters = _filters_in(line, input_dim, height, "height")
    elif filters * height != input_dim:
        raise line.misfit(f"{filters} at height={height} for an input of {input_dim}", "num-filters")
    block, step = _Block(line, _Image(descriptor, filters, height)), options.positive("height-period", 1)
    source = options.text("bypass-source", "noop")
    if source not in ("input", "noop", "relu", "batchnorm"):
        raise line.place.error(f"input, noop, relu, batchnorm expected, found {source!r}", "bypass-source")
    narrow, lines = block.bottleneck, block.lines
    last = 2 if narrow == -1 else 3
    for n in range(1, last + 1):
        block.relu(n)
        block.batchnorm(n)
        before = block.image.filters
        after = filters if narrow == -1 or n == 3 else narrow
        heights, times = (_around(step), _around(block.period)) if narrow == -1 or n == 2 else ("0", "0")
        block.convolution(
            n,
            after,
            height,
            f"height-in={height} height-out={height} height-offsets={heights} time-offsets={times} "
            f"num-filters-in={before} num-filters-out={after} {block.padded}",
        )
    if source == "noop":
        lines.append(f"component name={lines.at('noop')} dim={input_dim} type=NoOpComponent")
        lines.node("noop", f"Sum({descriptor}, {block.image.node})")
        return Layer(line.name, {"": (lines.at("noop"), input_dim)}, lines)
    bypass = descriptor if source == "input" else lines.at(f"{source}1")
    return Layer(line.name, {"": (f"Sum({block.image.node}, {bypass})", input_dim)}, lines)


def _res2_block(line: Line) -> Layer:
    """Convolution, batch-norm, scale and offset, ReLU two or three times; the input comes in before the last ReLU."""
    (descriptor, input_dim), options = line.input(), line.options
    height = options.integer("height", -1)
    height_in, height_out = options.integer("height-in", -1), options.integer("height-out", -1)
    if height > 0 and height_in == height_out == -1:
        height_in = height_out = height
    if height_in <= 0 or height_out <= 0:
        raise line.place.error("positive height, or height-in and height-out, expected", "height")
    filters_in, filters = _filters_in(line, input_dim, height_in, "height-in"), options.positive("num-filters")
    block = _Block(line, _Image(descriptor, filters_in, height_in))
    narrow, lines, subsampled = block.bottleneck, block.lines, height_out != height_in
    if subsampled and not height_in / 2 - 1 <= height_out <= height_in / 2 + 1:
        raise line.place.error(f"must be {height_in}, or about half of it, is {height_out}", "height-out")
    if subsampled and narrow == -1 and block.period % 2:
        raise line.place.error(f"must be even where the height is subsampled, is {block.period}", "time-period")
    straight = not subsampled and filters_in == filters
    bypass = descriptor if straight else lines.at("conv_bypass")
    last = 2 if narrow == -1 else 3
    for n in range(1, last + 1):
        step, taken, image = 2 if subsampled and n == 1 else 1, block.image.height, block.image
        after = filters if narrow == -1 or n == 3 else narrow
        maps = f"num-filters-in={image.filters} num-filters-out={after}"
        if narrow == -1:
            # Before the subsampling frames are half as far apart.
            times = _around(block.period // 2 if step == 2 else block.period)
            settings = f"height-offsets=-1,0,1 height-subsample-out={step} time-offsets={times} {maps}"
        else:
            heights, times = ("-1,0,1", _around(block.period)) if n == 2 else ("0", "0")
            settings = f"height-offsets={heights} time-offsets={times} {maps} height-subsample-out={step}"
        block.convolution(n, after, height_out, f"height-in={taken} height-out={height_out} {settings} {block.padded}")
        block.batchnorm(n)
        block.scale_and_offset(n)
        if n == last:
            image.node = f"Sum({image.node}, {bypass})"
        block.relu(n)
    if not straight:
        lines.both(
            "conv_bypass",
            "TimeHeightConvolution",
            descriptor,
            f"height-in={height_in} height-out={height_out} height-offsets=0 time-offsets=0 "
            f"height-subsample-out={2 if subsampled else 1} num-filters-in={filters_in} "
            f"num-filters-out={filters}{block.passed}",
        )
    return Layer(line.name, {"": (lines.at(f"relu{last}"), height_out * filters)}, lines)


_CONVOLUTIONS = (
    "relu-conv-layer", "conv-layer", "conv-relu-layer", "conv-renorm-layer", "relu-conv-renorm-layer",
    "batchnorm-conv-layer", "conv-relu-renorm-layer", "batchnorm-conv-relu-layer", "relu-batchnorm-conv-layer",
    "relu-batchnorm-noconv-layer", "relu-noconv-layer", "conv-relu-batchnorm-layer", "conv-relu-batchnorm-so-layer",
    "conv-relu-batchnorm-dropout-layer", "conv-relu-dropout-layer",
)  # fmt: skip

LAYERS: dict[str, Callable[[Line], Layer]] = {
    **dict.fromkeys(_CONVOLUTIONS, _conv),
    "res-block": _res_block,
    "res2-block": _res2_block,
}
