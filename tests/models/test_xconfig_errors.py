"""What an xconfig with mistakes is told: each mistake in one line, all of them at once."""

from __future__ import annotations

import re

import pytest

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models import build_model, parse_xconfig_text
from kaldi_mpi.models.config import Place, parse_config

INPUT = "input dim=12 name=input\n"
CONV = "conv-layer name=c height-in=4 height-offsets=-1,0,1 time-offsets=-1,0,1 num-filters-out=5"
ATTENTION = "attention-renorm-layer name=a key-dim=4 value-dim=5 num-left-inputs=3 num-right-inputs=2"


# A line, and below it what is told of it.
MISTAKES = """
input name=other dim=-3
    dim: must be positive, is -3
relu-layer name=l dim=-5
    dim: must be positive, is -5
output-layer name=output dim=-2
    dim: must be positive, is -2
lstmp-layer name=l cell-dim=-4
    cell-dim: must be positive, is -4
fast-gru-layer name=l cell-dim=0
    cell-dim: must be positive, is 0
lstmb-layer name=l cell-dim=4 bottleneck-dim=-1
    bottleneck-dim: must be positive, is -1
pgru-layer name=l cell-dim=3
    recurrent-projection-dim: is missing, and cell-dim / 4 is 0
idct-layer name=l dim=-4 affine-transform-file=m
    dim: must be positive, is -4
channel-average-layer name=l dim=-4
    dim: must be positive, is -4
prefinal-layer name=l big-dim=4 small-dim=-2
    small-dim: must be positive, is -2
relu-layer name=l dim=4 bottleneck-dim=0
    bottleneck-dim: 0 is not between 0 and dim 4
channel-average-layer name=l dim=5
    dim: 5 does not divide the input's 12
dim-range-component name=l dim=5 dim-offset=-1
    dim-offset: columns -1 to 4 of an input of 12
dim-range-component name=l dim=5 input=Append(-1,1)
    input: one node expected, found Append(Offset(input, -1), Offset(input, 1))
delta-layer name=l input=input@1
    input: one node expected, found Offset(input, 1)
combine-feature-maps-layer name=l height=4 num-filters1=2 num-filters2=2
    height: 4 times 4 filters for an input of 12
combine-feature-maps-layer name=l height=4 num-filters1=2 num-filters2=2 num-filters3=-1
    num-filters3: must not be negative, is -1
stats-layer name=l config=mean(-9:3:9:9) dim=13
    dim: is 13, but the statistics have 12
conv-layer name=c height-in=4 height-offsets=-1,0 time-offsets=0 num-filters-out=5 height-out=3 height-subsample-out=2
    height-out: 3 with height-subsample-out=2 is too large for height-in=4
conv-layer name=c height-in=4 height-offsets=-1,0 time-offsets=0 num-filters-out=5 height-out=4 height-subsample-out=-1
    height-subsample-out: must be positive, is -1
conv-layer name=c height-in=12 height-offsets=0 time-offsets=0 num-filters-out=5 height-out=3 height-subsample-out=3
    height-out: 3 with height-subsample-out=3 is too small for height-in=12
conv-layer name=c height-in=4 height-offsets=-1,0 time-offsets=0 num-filters-out=5 height-out=-4
    height-out: must be positive, is -4
conv-layer name=c height-in=5 height-offsets=-1,0 time-offsets=0 num-filters-out=5 height-out=5
    height-in: 5 does not divide the input's dimension 12
conv-layer name=c height-in=4 height-offsets=0,1 time-offsets=0 num-filters-out=5 height-out=4 required-time-offsets=0,0
    required-time-offsets: must ascend, is 0,0
conv-layer name=c height-in=4 height-offsets=-1,0,1 time-offsets=1,0 num-filters-out=5 height-out=4
    time-offsets: must ascend, is 1,0
conv-layer name=c height-in=4 time-offsets=-1,0,1 num-filters-out=5 height-out=4
    height-offsets: integers with commas between them expected, found ''
relu-noconv-layer name=c height-in=4 height-out=4 num-filters-out=5
    num-filters-out: 5 at height-out=4 for an input of 12
res-block name=l height=5
    height: 5 does not divide the input's dimension 12
res-block name=l height=4 num-filters=2
    num-filters: 2 at height=4 for an input of 12
res-block name=l height=4 bypass-source=conv
    bypass-source: input, noop, relu, batchnorm expected, found 'conv'
res-block name=l height=4 time-period=0
    time-period: must be positive, is 0
res2-block name=l height-in=4 num-filters=3
    height: positive height, or height-in and height-out, expected
res2-block name=l height-in=4 height-out=1 num-filters=3 time-period=1
    time-period: must be even where the height is subsampled, is 1
res2-block name=l height-in=12 height-out=3 num-filters=3
    height-out: must be 12, or about half of it, is 3
res2-block name=l height=4 num-filters=3 num-bottleneck-filters=0
    num-bottleneck-filters: must be positive, is 0
stats-layer name=l config=mean(-9:2:9:9)
    config: 2 must divide 9, and 9 both ends of the window -9 to 9
stats-layer name=l config=mean(-9:3:9:10)
    config: 3 must divide 9, and 9 both ends of the window -9 to 10
stats-layer name=l config=mean(9:3:9:9)
    config: the window must hold the frame itself, and more, is 9 to 9
stats-layer name=l config=mean(0:1:1:0)
    config: the window must hold the frame itself, and more, is 0 to 0
stats-layer name=l config=median(-9:3:9:9)
    config: mean[+stddev][+count](-left:input-period:period:right) expected, found 'median(-9:3:9:9)'
attention-renorm-layer name=a key-dim=4 value-dim=5 num-left-inputs=3 num-right-inputs=2 time-stride=0
    time-stride: must be positive, is 0
attention-renorm-layer name=a key-dim=4 value-dim=5 num-left-inputs=3 num-right-inputs=2 num-heads=-1
    num-heads: must be positive, is -1
attention-renorm-layer name=a key-dim=4 value-dim=5 num-left-inputs=-3 num-right-inputs=2
    num-left-inputs: must not be negative, is -3
attention-renorm-layer name=a value-dim=5 num-left-inputs=3 num-right-inputs=2
    key-dim: is missing
lstm-layer name=l cell-dim=8 delay=-3 decay-time=3
    decay-time: must be more than the absolute value of delay
gru-layer name=l cell-dim=8 decay-time=30
    decay-time: is not an option of gru-layer
opgru-layer name=l cell-dim=8 dropout-proportion=0.1
    dropout-proportion: is not an option of opgru-layer
norm-pgru-layer name=l cell-dim=8 dropout-proportion=1.5
    dropout-proportion: must be between 0 and 1, is 1.5
lstm-layer name=l cell-dim=8 self-repair-scale-nonlinearity=-1
    self-repair-scale-nonlinearity: must be between 0 and 1, is -1.0
relu-layer name=l dim=4 self-repair-scale=2
    self-repair-scale: must be between 0 and 1, is 2.0
relu-renorm-layer name=l dim=4 target-rms=-1
    target-rms: must not be negative, is -1.0
renorm-component name=l target-rms=0
    target-rms: must be above 0, is 0.0
relu-layer name=l dim=4 add-log-stddev=true
    add-log-stddev: needs a renorm as the last part of the layer
tdnnf-layer name=l dim=12 bottleneck-dim=4 context=right
    context: default, left-only, shift-left, none expected, found 'right'
spec-augment-layer name=l freq-max-proportion=1
    freq-max-proportion: must be above 0 and below 1, is 1.0
spec-augment-layer name=l time-mask-max-frames=0
    time-mask-max-frames: must be positive, is 0
output-layer name=output dim=5 orthonormal-constraint=-1
    orthonormal-constraint: must be above 0, is -1.0
relu-layer name=l dim=4 max-change=big
    max-change: number expected, found 'big'
"""
RECURRENT = (
    "lstm", "lstmp", "lstmp-batchnorm", "fast-lstm", "fast-lstmp", "lstmb", "gru", "pgru", "norm-pgru", "opgru",
    "norm-opgru", "fast-gru", "fast-pgru", "fast-norm-pgru", "fast-opgru", "fast-norm-opgru",
)  # fmt: skip


def told(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_xconfig_text(f"{INPUT}{text}\n", "x")
    return str(error.value)


@pytest.mark.parametrize("pair", re.findall(r"^(\S.*)\n    (.*)$", MISTAKES, re.M), ids=lambda pair: pair[0])
def test_exact_messages(pair: tuple[str, str]) -> None:
    text, message = pair
    kind, name = text.split()[0], text.split("name=")[1].split()[0]
    assert told(text) == f"x:2: {message} ({kind} {name})"


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrence_looks_elsewhere(kind: str) -> None:
    assert told(f"{kind}-layer name=l cell-dim=8 delay=0") == f"x:2: delay: must not be 0 ({kind}-layer l)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{CONV} height-out=4 required-time-offsets=-2,0",
            "c.conv: required-time-offsets [-2, 0] are not among the time offsets "
            "(conv-layer c, TimeHeightConvolutionComponent c.conv)",
        ),
        (
            f"{CONV.replace('height-offsets=-1,0,1', 'height-offsets=7,8,9')} height-out=4",
            "c.conv: height-out 4 (height-subsample-out 1) does not fit height-in 4: output height 0 has no input "
            "(conv-layer c, TimeHeightConvolutionComponent c.conv)",
        ),
        (
            f"{ATTENTION} num-left-inputs-required=4",
            "a.attention: 3 left and 2 right inputs, of which 4 and 2 are required "
            "(attention-renorm-layer a, RestrictedAttentionComponent a.attention)",
        ),
        (
            'relu-layer name=r dim=5 ng-affine-options="speed=2 colour=red"',
            "speed: is not an option of NaturalGradientAffineComponent "
            "(relu-layer r, NaturalGradientAffineComponent r.affine)\n"
            "x:2: colour: is not an option of NaturalGradientAffineComponent "
            "(relu-layer r, NaturalGradientAffineComponent r.affine)",
        ),
        (
            "tdnnf-layer name=f dim=12 bottleneck-dim=3 max-change=-1",
            "max-change: must not be negative, is -1.0 (tdnnf-layer f, TdnnComponent f.linear)\n"
            "x:2: max-change: must not be negative, is -1.0 (tdnnf-layer f, TdnnComponent f.affine)",
        ),
    ],
)  # fmt: skip
def test_what_components_refuse(text: str, message: str) -> None:
    config = parse_xconfig_text(f"{INPUT}{text}\noutput-layer name=output dim=3\n", "x")
    with pytest.raises(ConfigError) as error:
        build_model(config, seed=0)
    assert str(error.value) == f"x:2: {message}"


ALL_AT_ONCE = """
relu-layer name=a dim=8 ng-affine-options="speed=2"
trnn-layer name=b cell-dim=16
relu-layer name=c dim=8 colour=red size=3
tdnnf-layer name=d dim=16 bottleneck-dim=4
fast-lstmp-layer name=e cell-dim=16 delay=0
conv-layer name=f height-in=7 height-out=7 height-offsets=0 time-offsets=0 num-filters-out=2
gru-layer cell-dim=16
relu-layer name=g dim=8 input=Append(-1, e, f)
lstm-layer name=h cell-dim=3 input=k
relu-layer name=a dim=8 input=input
output-layer name=output dim=-3 input=Sum(g, h)
"""


def test_all_complaints_at_once() -> None:
    """Lines that only follow from others (tdnnf after b, a Sum of unequal dimensions after h) add nothing."""
    assert told(ALL_AT_ONCE).splitlines() == [
        "x:3: speed: is not an option of NaturalGradientAffineComponent "
        "(relu-layer a, NaturalGradientAffineComponent a.affine)",
        "x:4: layer type 'trnn-layer' is not supported; near it: tdnnf-layer, tanh-layer, gru-layer (trnn-layer b)",
        "x:5: colour: is not an option of relu-layer (relu-layer c)",
        "x:5: size: is not an option of relu-layer (relu-layer c)",
        "x:7: delay: must not be 0 (fast-lstmp-layer e)",
        "x:9: name: is missing (gru-layer)",
        "x:11: input: there is no earlier layer named k (lstm-layer h)",
        "x:12: name: a is the name of an earlier layer (relu-layer a)",
        "x:13: dim: must be positive, is -3 (output-layer output)",
    ]


FINAL_CONFIG = """input-node name=input dim=4
component name=a type=FancyComponent dim=4
component-node name=a component=a input=input
component name=b type=NaturalGradientAffineComponent input-dim=4 output-dim=-2
component-node name=b component=b input=a
component name=c type=DropoutComponent dim=4 dropout-proportion=0.5 colour=red
component-node name=c component=c input=b
output-node name=output input=c
"""
NODES = """input-node name=input dim=4
component name=b type=NaturalGradientAffineComponent input-dim=5 output-dim=2
component-node name=b component=b input=input
component-node name=c component=d input=b
output-node name=output input=f
"""


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            FINAL_CONFIG,
            [
                "f:2: a: component type FancyComponent is not supported yet (FancyComponent a)",
                "f:4: output-dim: must be positive, is -2 (NaturalGradientAffineComponent b)",
                "f:6: colour: is not an option of DropoutComponent (DropoutComponent c)",
            ],
        ),
        (
            NODES,
            [
                "f:4: node c: there is no component d",
                "f:3: node b: input of dimension 4 for a component of 5",
                "f:5: node output: its input f does not exist",
            ],
        ),
    ],
)
def test_config_lines_of_kaldi(text: str, messages: list[str]) -> None:
    """What is told of a final.config: components all at once, and nodes all at once where components are in order."""
    lines = ((line, Place("f", number)) for number, line in enumerate(text.splitlines(), start=1))
    with pytest.raises(ConfigError) as error:
        build_model(parse_config(lines, "f"), seed=0)
    assert str(error.value).splitlines() == messages
