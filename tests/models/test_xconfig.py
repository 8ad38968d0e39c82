"""xconfig files and descriptors: what is understood, and what the errors say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.models import parse_xconfig, parse_xconfig_text
from kaldi_mpi.models.contexts import contexts
from kaldi_mpi.models.descriptor import DescriptorError, parse_descriptor
from tests.paths import REPO, kaldi_root

INPUT = "input dim=40 name=input\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sum(foo,bar)", "Sum(foo, bar)"),
        ("Append(input@-3, input@0, input@3)", "Append(Offset(input, -3), input, Offset(input, 3))"),
        ("Append(-3,0,3)", "Append(Offset(last, -3), last, Offset(last, 3))"),
        ("[-1]", "last"),
        ("[-2].c@2", "Offset(but-one.c, 2)"),
        ("Scale(2.0,foo)", "Scale(2.0, foo)"),
        ("Const(0.5, 500)", "Const(0.5, 500)"),
        ("Offset(foo, 1, 2)", "Offset(foo, 1, 2)"),
        ("IfDefined(ReplaceIndex(ivector, t, 0))", "IfDefined(ReplaceIndex(ivector, t, 0))"),
        ("Failover(a, Round(b, 3))", "Failover(a, Round(b, 3))"),
        ("Switch(a, Offset(b, 2))", "Switch(a, Offset(b, 2))"),
    ],
)
def test_descriptors(text: str, expected: str) -> None:
    tree = parse_descriptor(text, ["but-one", "last"])
    assert str(tree) == expected
    assert parse_descriptor(expected) == tree


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Append(Append(a, b), c)", "Append(a, b, c)"),
        ("Append(a)", "a"),
        ("Offset(Append(a, Offset(b, 1)), -1)", "Append(Offset(a, -1), b)"),
        ("Offset(Offset(a, 2), -3)", "Offset(a, -1)"),
        ("Offset(Sum(a, b), 2)", "Sum(Offset(a, 2), Offset(b, 2))"),
    ],
)
def test_normal_form(text: str, expected: str) -> None:
    assert str(parse_descriptor(text).normalized()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Append(a", "descriptor ends where '\\)'|ends where"),
        ("Append(a))", r"unexpected '\)' after the end"),
        ("Offset(a)", "',' expected"),
        ("Offset(a, b)", "integer expected in descriptor, found 'b'"),
        ("Scale(a, b)", "number expected"),
        ("ReplaceIndex(a, y, 0)", "t or x expected"),
        ("", "descriptor ends where a term is expected"),
        ("[-3]", r"\[-3\] does not name an earlier layer"),
        ("(a)", "node name expected"),
        ("Append(" * 60 + "a" + ")" * 60, "nested too deeply"),
    ],
)
def test_malformed_descriptors(text: str, message: str) -> None:
    with pytest.raises(DescriptorError, match=message):
        parse_descriptor(text, ["one", "two"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast-lstm-layer name=l", r"x:2: cell-dim: is missing"),
        ("fast-lstm-layer name=l cell-dim=128 delay=0", r"x:2: delay: must not be 0"),
        ("fast-lstm-layer name=l cell-dim=big", r"x:2: cell-dim: integer expected, found 'big'"),
        ("fast-lstm-layer name=l cell-dim=8 delay=-3 decay-time=2", r"x:2: decay-time: must be more than"),
        ("fast-lstm-layer name=l cell-dim=8 cell-dims=9", r"x:2: cell-dims: is not an option of fast-lstm-layer"),
        ("fast-lstm-layer cell-dim=8", r"x:2: name: is missing"),
        ("fast-lstm-layer name=input cell-dim=8", r"x:2: name: input is the name of an earlier layer"),
        ("fast-lstm-layer name=l cell-dim=8 cell-dim=8", r"x:2: cell-dim is given twice"),
        ("fast-lstm-layer name=l cell-dim=8 input=foo", r"x:2: input: there is no earlier layer named foo"),
        ("fast-lstm-layer name=l cell-dim=8 input=input.c", r"x:2: input: layer input has no output 'input.c'"),
        ("fast-lstm-layer name=l cell-dim=8 input=Sum(input, Append(-1,0))", r"x:2: input: terms of different dim"),
        ("fast-lstmp-layer name=l cell-dim=8 recurrent-projection-dim=6", r"x:2: recurrent-projection-dim: the two"),
        (
            "fast-lstmp-layer name=l cell-dim=8 dropout-proportion=1.1",
            r"x:2: dropout-proportion: must be between 0 and",
        ),
        ("relu-dropout-layer name=d dim=8 dropout-proportion=-1", r"x:2: dropout-proportion: must be between 0 and 1"),
        ("tdnnf-layer name=f dim=9 bottleneck-dim=9", r"x:2: bottleneck-dim: must be below dim 9, is 9"),
        ("tdnnf-layer name=f dim=9 bottleneck-dim=2", r"x:2: bypass-scale: needs a dim as the input's"),
        ("prefinal-layer name=p big-dim=4 small-dim=4", r"x:2: big-dim: must be above small-dim 4, is 4"),
        ("linear-component name=l dim=-3", r"x:2: dim: must be positive, is -3"),
        ("dim-range-component name=r dim=3 dim-offset=39", r"x:2: dim-offset: columns 39 to 42 of an input of"),
        ("trnn-layer name=l cell-dim=8", r"x:2: layer type 'trnn-layer' is not supported; near it: tdnnf-layer"),
        ("output-layer name=output dim=10 include-log-softmax=maybe", r"x:2: include-log-softmax: true or false"),
        ("output-layer name=output dim=10 bottleneck-dim=11", r"x:2: bottleneck-dim: 11 is not between 0 and 10"),
        ("output-layer name=output dim=10 objective-type=mmi", r"x:2: objective-type: linear or quadratic"),
        ("output-layer name=output dim=0", r"x:2: dim: must be positive, is 0"),
        ('relu-layer name=r dim=5 ng-affine-options="max-change=1', r"x:2: a double quote is not closed"),
        ("relu-layer dim=5 and name=r more", r"x:2: dim: integer expected, found '5 and'"),
        ("relu-layer and name=r", r"x:2: key=value expected, found 'and'"),
        ("fixed-affine-layer name=lda", r"x:2: affine-transform-file: is missing"),
    ],
)
def test_errors_name_file_line_and_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_xconfig_text(INPUT + text + "\n", "x")


def test_bad_value_in_passed_on_options_names_the_line() -> None:
    from kaldi_mpi.models import build_model

    config = parse_xconfig_text(
        INPUT + 'relu-layer name=r dim=5 ng-affine-options="speed=2"\noutput name=output\n', "x"
    )
    with pytest.raises(ConfigError, match=r"x:2: speed: is not an option of NaturalGradientAffineComponent"):
        build_model(config, seed=1)


def test_comments_quotes_and_spaces() -> None:
    text = (
        "# a network\n\n  input   name=input dim=3  # features\n"
        'fast-lstm-layer name=l cell-dim=4 input = Append( -1, 0 ) lstm-nonlinearity-options=" max-change=0.5"\n'
    )
    with pytest.raises(ConfigError):
        parse_xconfig_text(text)  # Kaldi takes no space before '=' either
    config = parse_xconfig_text(text.replace("input = ", "input="))
    assert config.components[1].options == {"cell-dim": "4", "max-change": "0.5"}
    assert config.node_lines()[1].endswith("input=Append(Offset(input, -1), input, IfDefined(Offset(l.m_trunc, -1)))")


def test_output_delay_and_nested_append() -> None:
    text = INPUT + (
        "fast-lstm-layer name=f cell-dim=4 delay=-1\nfast-lstm-layer name=b cell-dim=4 delay=1 input=input\n"
        "output-layer name=output dim=9 input=Append(f, b@1) output-delay=3\n"
    )
    lines = parse_xconfig_text(text).node_lines()
    assert lines[-3] == "component-node name=output.affine component=output.affine input=Append(f.m, Offset(b.m, 1))"
    assert lines[-1] == "output-node name=output input=Offset(output.log-softmax, 3) objective=linear"


LDA = "fixed-affine-layer name=lda {}input=Append(-2,-1,0,1,2) affine-transform-file=lda.mat\n"
TDNNF = (
    "tdnnf-layer name=f dim=200 bottleneck-dim=4 time-stride=3\n"
    "tdnnf-layer name=g dim=200 bottleneck-dim=4 time-stride=3\n"
    "output-layer name=output dim=9 output-delay=5\n"
)
LSTM = "fast-lstm-layer name=l cell-dim=4 delay=-1\noutput-layer name=output dim=9 output-delay={}\n"


def test_a_label_delay_must_stand_in_the_fixed_affine_layer_too() -> None:
    """As xconfig_to_configs.py has it; there it changes no line of the network."""
    with pytest.raises(ConfigError, match=r"x:2: delay: the input takes 2 frames .* only 0 and 5, .*: add delay=3$"):
        parse_xconfig_text(INPUT + LDA.format("") + LSTM.format(3), "x")
    with pytest.raises(ConfigError, match=r"x:2: delay: .* only 4 and 0, which Kaldi refuses; .*: add delay=-2$"):
        parse_xconfig_text(INPUT + LDA.format("") + LSTM.format(-2), "x")
    with pytest.raises(ConfigError, match=r"takes 0 frames to the left and 6 to the right, .*: add delay=3$"):
        parse_xconfig_text(INPUT + LDA.format("delay=4 ") + LSTM.format(3), "x")
    given = parse_xconfig_text(INPUT + LDA.format("delay=3 ") + LSTM.format(3))
    free = parse_xconfig_text(INPUT + LDA.format("write-init-config=false ") + LSTM.format(3))
    assert given.node_lines() == free.node_lines()
    parse_xconfig_text(INPUT + LDA.format("") + LSTM.format(0))
    # What components take of other frames counts: 6 to the left here, which make up for the label delay.
    parse_xconfig_text(INPUT + LDA.format("") + TDNNF)
    with pytest.raises(ConfigError, match=r"only 1 and 7, which Kaldi refuses; .* fixed-affine-layer lda too: add"):
        parse_xconfig_text(INPUT + LDA.format("") + TDNNF.replace("time-stride=3", "time-stride=2 context=left-only"))


def test_contexts_are_the_models() -> None:
    from kaldi_mpi.models import build_model

    texts = (
        "fast-lstm-layer name=l cell-dim=4 delay=-1\noutput-layer name=output dim=9 output-delay=3\n",
        "relu-layer name=a dim=6 input=Append(-3,0,2)\noutput-layer name=output dim=3 output-delay=-4\n",
        "fast-lstmp-layer name=f cell-dim=8 delay=-3 input=Append(-1,0)\nfast-lstm-layer name=b cell-dim=8 delay=3\n"
        "output-layer name=output dim=3 input=Append(f@2, b)\n",
        "tdnnf-layer name=f dim=40 bottleneck-dim=4 time-stride=3\noutput-layer name=output dim=3 output-delay=1\n",
        "conv-layer name=c height-in=4 height-out=4 num-filters-out=2 height-offsets=0 time-offsets=-2,0,3 "
        "required-time-offsets=0,3\noutput-layer name=output dim=3\n",
        "stats-layer name=s config=mean(-9:3:9:18)\noutput-layer name=output dim=3 input=Append(input, s)\n",
        "attention-renorm-layer name=a key-dim=4 value-dim=5 num-left-inputs=3 num-right-inputs=2 time-stride=2 "
        "num-left-inputs-required=1\noutput-layer name=output dim=3\n",
    )
    for text in texts:
        config = parse_xconfig_text(INPUT + text)
        model = build_model(config, seed=0)
        assert contexts(config) == [(model.left_context, model.right_context)]


def recipes_xconfig(folder: Path) -> Path:
    """The network of the digits recipe, as its script writes it."""
    script = (REPO / "egs/digits/s5/local/train_lstm.sh").read_text()
    text = script.split('network.xconfig" <<EOF\n')[1].split("EOF\n")[0]
    path = folder / "network.xconfig"
    path.write_text(text.replace("$num_targets", "67").replace("$dir", "exp/lstm"))
    return path


def test_the_recipes_network_is_accepted(tmp_path: Path) -> None:
    lines = parse_xconfig(recipes_xconfig(tmp_path)).node_lines()
    assert lines[0] == "input-node name=input dim=40" and not any("delayed" in line for line in lines)


@pytest.mark.kaldi
@pytest.mark.parametrize("delay", ["delay=3 ", ""])
def test_kaldi_accepts_and_refuses_what_we_do(tmp_path: Path, delay: str) -> None:
    recipe = kaldi_root() / "egs" / "wsj" / "s5"
    xconfig = recipes_xconfig(tmp_path)
    assert xconfig.read_text().count("delay=3 ") == 2  # "output-delay=3 " is the other
    xconfig.write_text(xconfig.read_text().replace(" delay=3 ", f" {delay}"))
    done = subprocess.run(
        [
            *[sys.executable, str(recipe / "steps" / "nnet3" / "xconfig_to_configs.py")],
            *["--xconfig-file", str(xconfig), "--config-dir", str(tmp_path / "configs")],
        ],
        env=os.environ | {"PATH": f"{kaldi_root()}/src/nnet3bin:{recipe}/utils:{os.environ['PATH']}"},
        cwd=recipe, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if delay:
        assert done.returncode == 0, done.stderr
        parse_xconfig(xconfig)
    else:
        assert done.returncode != 0 and "Please use delay=$label_delay" in done.stderr
        with pytest.raises(ConfigError, match="add delay=3"):
            parse_xconfig(xconfig)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.xconfig: cannot read"):
        parse_xconfig(tmp_path / "no.xconfig")
    (tmp_path / "empty.xconfig").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"empty\.xconfig: there is no layer in this file"):
        parse_xconfig(tmp_path / "empty.xconfig")
    (tmp_path / "bytes.xconfig").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"bytes\.xconfig: cannot read"):
        parse_xconfig(tmp_path / "bytes.xconfig")
