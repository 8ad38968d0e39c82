"""Each layer type of Kaldi's xconfig parser with its options: our config lines are those that Kaldi writes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kaldi_mpi.formats.tokens import read_matrix, write_matrix
from kaldi_mpi.learner.network import stand_in
from kaldi_mpi.models import build_model, parse_xconfig_text, transform_files
from kaldi_mpi.models.components import FixedAffine
from kaldi_mpi.models.config import Place, parse_config
from kaldi_mpi.models.xconfig import LAYERS, expand_xconfig
from kaldi_mpi.models.xconfig_ends import idct_matrix
from tests.models.kaldi_xconfig import comparable, kaldi_lines
from tests.paths import golden, kaldi_root

INPUT = "input dim=12 name=input\n"
PROJECTED = "cell-dim=16 recurrent-projection-dim=3 non-recurrent-projection-dim=5"
CONV = "height-in=4 height-out=2 height-subsample-out=2 height-offsets=-1,0,1 time-offsets=-1,0,1 num-filters-out=5"
RATES = "learning-rate-factor=0.5 l2-regularize=1e-4 max-change=0.25"

# A layer type and its options; `name=x` is added.
TEXTS = [
    # Inputs, outputs, transforms.
    "fixed-affine-layer affine-transform-file=lda.mat input=Append(-1,0,1)",
    "fixed-affine-layer affine-transform-file=lda.mat dim=5 write-init-config=false delay=3",
    "idct-layer affine-transform-file=idct.mat",
    "idct-layer affine-transform-file=idct.mat dim=9 cepstral-lifter=0 include-in-init=true",
    "output",
    "output input=input@2 objective-type=quadratic output-delay=4 dim=7",
    "output-layer",
    "output-layer dim=30 include-log-softmax=false objective-type=quadratic output-delay=-2",
    f"output-layer dim=30 bottleneck-dim=6 orthonormal-constraint=0.5 {RATES} param-stddev=0.1 bias-stddev=0.2",
    'output-layer dim=30 bottleneck-dim=6 ng-affine-options="update-period=2" ng-linear-options="rank-in=3 rank-out=4"',
    # Affine layers.
    "relu-layer",
    "relu-layer dim=8 input=Append(-3, 0, input@3) self-repair-scale=0 bias-stddev=0.5 l2-regularize=0.01",
    "relu-renorm-layer dim=8 add-log-stddev=true target-rms=0.5 max-change=1",
    "relu-renorm-layer dim=8 bottleneck-dim=3",
    'relu-batchnorm-layer dim=8 bottleneck-dim=3 ng-affine-options="rank-in=5" ng-linear-options="rank-in=2"',
    "relu-batchnorm-dropout-layer dim=8 dropout-proportion=0.0 dropout-per-dim=true dropout-per-dim-continuous=true",
    "relu-batchnorm-dropout-layer dim=8 dropout-per-dim=true",
    "relu-dropout-layer dim=8",
    "relu-dropout-layer dim=8 dropout-proportion=0.125 dropout-per-dim-continuous=True",
    "relu-batchnorm-so-layer dim=8",
    "batchnorm-so-relu-layer dim=8 target-rms=2",
    "batchnorm-layer dim=8",
    "sigmoid-layer dim=8 self-repair-scale=1e-4",
    "tanh-layer dim=8",
    "affine-layer",
    "affine-layer dim=7 param-stddev=0 bias-stddev=0 bias-mean=1 max-change=2 l2-regularize=1e-3",
    "tdnnf-layer dim=12 bottleneck-dim=4",
    "tdnnf-layer dim=12 bottleneck-dim=4 time-stride=3 dropout-proportion=0 bypass-scale=0.8 l2-regularize=0.01",
    "tdnnf-layer dim=20 bottleneck-dim=4 time-stride=0 bypass-scale=0 max-change=1.5 self-repair-scale=2e-5",
    "tdnnf-layer dim=12 bottleneck-dim=4 context=left-only dropout-proportion=0.5 bypass-scale=0",
    "tdnnf-layer dim=12 bottleneck-dim=4 context=shift-left",
    "tdnnf-layer dim=12 bottleneck-dim=4 context=none",
    "prefinal-layer big-dim=20 small-dim=6",
    "prefinal-layer big-dim=20 small-dim=6 l2-regularize=1e-2 max-change=1 self-repair-scale=0",
    # Single components, and layers without matrices.
    "renorm-component target-rms=0.5",
    "batchnorm-component include-in-init=true",
    "no-op-component input=Append(-1,1)",
    "linear-component dim=7",
    f"linear-component dim=7 orthonormal-constraint=-1 param-stddev=0.2 {RATES}",
    "affine-component dim=7",
    "affine-component dim=7 orthonormal-constraint=1.0 param-stddev=0.2 bias-stddev=0 l2-regularize=1e-4 max-change=3",
    "scale-component",
    f"scale-component param-mean=1 param-stddev=0.1 {RATES}",
    f"offset-component param-mean=1 param-stddev=0.1 {RATES}",
    "dim-range-component dim=5",
    "dim-range-component dim=5 dim-offset=7",
    "spec-augment-layer",
    "spec-augment-layer freq-max-proportion=.25 time-zeroed-proportion=0.1 time-mask-max-frames=3 include-in-init=true",
    "delta-layer",
    "combine-feature-maps-layer num-filters1=2 num-filters2=1 height=4",
    "combine-feature-maps-layer num-filters1=1 num-filters2=3 num-filters3=2 height=2",
    "channel-average-layer dim=4",
    # Convolutions.
    f"conv-relu-layer {CONV} required-time-offsets=0 {RATES}",
    f"conv-layer {CONV} param-stddev=0.1 bias-stddev=0 use-natural-gradient=false rank-in=3 rank-out=4 alpha-in=2",
    f"conv-layer {CONV} alpha-out=3 num-minibatches-history=2",
    f"conv-relu-batchnorm-layer {CONV} target-rms=0.5 self-repair-scale=1e-3 self-repair-lower-threshold=0.1",
    f"conv-relu-batchnorm-dropout-layer {CONV} dropout-proportion=0",
    *(
        f"{kind}-layer {CONV}"
        for kind in (
            "relu-conv", "conv-renorm", "relu-conv-renorm", "batchnorm-conv", "conv-relu-renorm",
            "batchnorm-conv-relu", "relu-batchnorm-conv", "conv-relu-batchnorm-so", "conv-relu-dropout",
        )
    ),
    "relu-batchnorm-noconv-layer height-in=4 height-out=4 num-filters-out=3",
    "relu-noconv-layer height-in=4 height-out=4 num-filters-out=3",
    "res-block height=4",
    "res-block height=4 num-filters=3 bypass-source=input time-period=3 height-period=2 allow-zero-padding=false",
    "res-block height=4 bypass-source=relu num-bottleneck-filters=2 self-repair-lower-threshold2=0.1 max-change=1",
    "res-block height=4 bypass-source=batchnorm param-stddev=0.1 rank-in=2 l2-regularize=0.1 self-repair-scale=0",
    "res2-block height=4 num-filters=3",
    "res2-block height-in=4 height-out=2 num-filters=5 time-period=2 allow-zero-padding=false",
    "res2-block height-in=4 height-out=2 num-filters=5 num-bottleneck-filters=2 time-period=3 l2-regularize=0.1",
    "res2-block height=4 num-filters=3 num-bottleneck-filters=2 self-repair-lower-threshold3=0.5",
    # Many frames.
    "stats-layer config=mean(-99:3:9:99)",
    "stats-layer config=mean+stddev(0:1:1:9) dim=24 input=Append(input)",
    "stats-layer config=mean+count(-9:1:3:6)",
    "stats-layer config=mean+stddev+count(-9:3:3:0) input=input@1",
    *(
        f"{kind}-layer key-dim=4 value-dim=5 num-left-inputs=3 num-right-inputs=2"
        for kind in ("attention-renorm", "attention-relu-renorm", "attention-relu-batchnorm", "relu-renorm-attention")
    ),
    "attention-relu-renorm-layer key-dim=4 value-dim=5 num-left-inputs=3 num-right-inputs=0 num-heads=2 time-stride=3 "
    "num-left-inputs-required=1 num-right-inputs-required=0 output-context=false key-scale=0.25 target-rms=0.5 "
    'ng-affine-options="rank-in=2" ' + RATES,
    # LSTMs.
    "lstm-layer cell-dim=8",
    "lstm-layer cell-dim=8 delay=-3 decay-time=20 l2-regularize=0.01 self-repair-scale-nonlinearity=1e-4 "
    "clipping-threshold=15 zeroing-threshold=7 zeroing-interval=10",
    'lstm-layer cell-dim=8 delay=2 ng-per-element-scale-options="param-stddev=0.5" ng-affine-options="max-change=1"',
    f"lstmp-layer {PROJECTED}",
    f"lstmp-layer {PROJECTED} dropout-proportion=0.0 dropout-per-frame=true decay-time=20",
    "lstmp-batchnorm-layer cell-dim=16 dropout-proportion=0.2 l2-regularize=0.01",
    "fast-lstm-layer cell-dim=8",
    "fast-lstm-batchnorm-layer cell-dim=8 delay=3 decay-time=30 l2-regularize=0.1",
    'fast-lstm-layer cell-dim=8 lstm-nonlinearity-options="max-change=0.5" ng-affine-options="update-period=3"',
    f"fast-lstmp-layer {PROJECTED} dropout-proportion=0",
    "fast-lstmp-batchnorm-layer cell-dim=16 l2-regularize=0.1 decay-time=40 delay=-3 zeroing-interval=30",
    "fast-lstmp-layer cell-dim=17 recurrent-projection-dim=4",
    "lstmb-layer cell-dim=8 bottleneck-dim=4",
    "lstmb-layer cell-dim=8 bottleneck-dim=4 self-scale=0.5 orthonormal-constraint=0.7 delay=-2 l2-regularize=0.1",
    # GRUs.
    "gru-layer cell-dim=8",
    'gru-layer cell-dim=8 delay=-3 self-repair-scale-nonlinearity=0 clipping-threshold=9 ng-affine-options="rank-in=3"',
    "fast-gru-layer cell-dim=8",
    'fast-gru-layer cell-dim=8 delay=2 gru-nonlinearity-options="max-change=0.5" zeroing-interval=3',
    *(
        f"{kind}-layer {options}"
        for kind in ("pgru", "opgru", "norm-pgru", "norm-opgru")
        for options in (PROJECTED, 'cell-dim=16 delay=-3 ng-affine-options="max-change=1" zeroing-threshold=3')
    ),
    *(
        f"fast-{kind}-layer {options}"
        for kind in ("pgru", "opgru", "norm-pgru", "norm-opgru")
        for options in (PROJECTED, 'cell-dim=16 delay=3 gru-nonlinearity-options="max-change=0.5"')
    ),
    *(
        f"{kind}-layer {PROJECTED} dropout-proportion=0.1 {frame}"
        for kind in ("norm-pgru", "norm-opgru", "fast-norm-pgru", "fast-norm-opgru")
        for frame in ("", "dropout-per-frame=false")
    ),
    f"norm-opgru-layer {PROJECTED} l2-regularize=0.01",
    f'opgru-layer {PROJECTED} ng-per-element-scale-options="param-mean=0.5"',
]  # fmt: skip


def network(text: str) -> str:
    kind, _, options = text.partition(" ")
    if kind in ("output", "output-layer"):
        return f"{INPUT}{kind} name=output {options}\n"
    return f"{INPUT}{kind} name=x {options}\noutput-layer name=output dim=3\n"


def test_the_table_has_every_layer() -> None:
    assert {text.split()[0] for text in TEXTS} | {"input"} == set(LAYERS)


@pytest.mark.kaldi
def test_layers_are_those_of_kaldis_parser() -> None:
    parser = kaldi_root() / "egs" / "wsj" / "s5" / "steps" / "libs" / "nnet3" / "xconfig" / "parser.py"
    table = parser.read_text().split("config_to_layer = {")[1].split("}")[0]
    assert set(re.findall(r"'([\w-]+)'\s*:", table)) == set(LAYERS)


@pytest.mark.kaldi
def test_lines_are_kaldis(tmp_path: Path) -> None:
    texts = [network(text) for text in TEXTS]
    for text, theirs in zip(texts, kaldi_lines(texts, tmp_path), strict=True):
        assert not isinstance(theirs, str), (text, theirs)
        assert comparable(expand_xconfig(text)) == comparable(theirs), text


@pytest.mark.kaldi
@pytest.mark.parametrize("options", ["", "dim=9 cepstral-lifter=0", "dim=15 cepstral-lifter=10.5"])
def test_the_idct_is_kaldis(tmp_path: Path, options: str) -> None:
    text = network(f"idct-layer affine-transform-file=idct.mat {options}")
    kaldi_lines([text], tmp_path)
    ours = parse_xconfig_text(text).transforms["idct.mat"]
    theirs = read_matrix(tmp_path / "idct.mat")
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("text", TEXTS)
def test_they_can_be_built(text: str) -> None:
    """Also without Kaldi: what a layer expands to is accepted by the components, and fits together."""
    config = parse_xconfig_text(network(text))
    columns, rows = 36 if "Append(-1,0,1)" in text else 12, 5 if "dim=5" in text else 36
    transforms = {path: np.zeros((rows, columns + 1), np.float32) for _, path in transform_files(config)}
    model = build_model(config, seed=0, transforms=transforms)
    assert [model.main_output] == ["output"]


def test_lines_that_kaldi_wrote() -> None:
    """For where there is no Kaldi: one network of many kinds of layers, with the final.config that Kaldi made of it."""
    text = golden("xconfig/layers").read_text()
    assert comparable(expand_xconfig(text)) == comparable(golden("xconfig/layers.config").read_text().splitlines())


def test_a_transform_to_be_estimated_may_stand_after_an_idct(tmp_path: Path) -> None:
    """Its size is known from what stands before it, also where another config has the matrix in a file."""
    layers = (
        "idct-layer name=idct dim=10 affine-transform-file={}\nbatchnorm-component name=bn include-in-init=true\n"
        "fixed-affine-layer name=lda input=Append(-1,0,1) affine-transform-file=lda.mat\noutput-layer name=output dim=3"
    )
    config = parse_xconfig_text(INPUT + layers.format("idct.mat"))
    assert transform_files(config) == [("lda", "lda.mat")]
    assert stand_in(config, "lda").shape == (30, 31)
    model = build_model(config, seed=0, transforms={"lda.mat": stand_in(config, "lda")})
    idct = model.by_name["idct"]
    assert isinstance(idct, FixedAffine) and torch.equal(
        idct.linear, torch.from_numpy(idct_matrix(12, 10, 22.0)[:, :-1])
    )
    path = tmp_path / "idct.mat"
    write_matrix(path, idct_matrix(12, 10, 22.0))
    lines = expand_xconfig(INPUT + layers.format(path))
    assert stand_in(parse_config(((line, Place()) for line in lines), "f"), "lda").shape == (30, 31)
