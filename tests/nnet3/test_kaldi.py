"""Our networks and Kaldi's own programs: the same numbers. Needs KALDI_ROOT."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from kaldi_mpi.formats.tokens import read_matrix, write_matrix
from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.models import AcousticModel, LdaStats, build_model, parse_xconfig_text
from kaldi_mpi.nnet3 import from_torch, make_am, read_nnet, to_torch, write_am, write_nnet
from tests.paths import golden, kaldi_root

pytestmark = pytest.mark.kaldi

NETWORK = """
input dim=40 name=input
fixed-affine-layer name=lda delay=2 input=Append(-2,-1,0,1,2) affine-transform-file=lda.mat
relu-renorm-layer name=r1 dim=24
fast-lstm-layer name=lstm1 cell-dim=16 delay=-1 decay-time=20
fast-lstmp-layer name=lstm2 cell-dim=16 recurrent-projection-dim=6 non-recurrent-projection-dim=5 delay=-3
fast-lstm-layer name=back input=Append(lstm1, lstm2@1) cell-dim=8 delay=2
output-layer name=output output-delay=2 dim=112 max-change=1.5 param-stddev=0.1 bias-stddev=0.1
"""


def program(name: str) -> str:
    found = [path for path in (kaldi_root() / "src").glob(f"*bin/{name}") if os.access(path, os.X_OK)]
    if not found:
        pytest.skip(f"this Kaldi has no {name}")
    return str(found[0])


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def network(seed: int = 3) -> tuple[AcousticModel, np.ndarray]:
    transform = np.random.default_rng(seed).normal(size=(200, 201)).astype(np.float32) * 0.01
    model = build_model(parse_xconfig_text(NETWORK), seed=seed, transforms={"lda.mat": transform})
    return model, transform


def features() -> dict[str, np.ndarray]:
    from kaldi_native_io import SequentialFloatMatrixReader

    with SequentialFloatMatrixReader(f"ark:{golden('net_input.ark')}") as reader:
        return {key: np.array(value) for key, value in reader}


@pytest.mark.parametrize("binary", [True, False])
def test_am_info_and_compute(tmp_path: Path, binary: bool) -> None:
    model, _ = network()
    priors = np.random.default_rng(0).random(112).astype(np.float32) + 0.1
    am = make_am(model, read_transition_model(golden("trans.mdl")), priors / priors.sum())
    write_am(am, tmp_path / "final.mdl", binary=binary)
    info = run(program("nnet3-am-info"), "final.mdl", cwd=tmp_path)
    assert f"left-context: {model.left_context}\nright-context: {model.right_context}\n" in info
    parameters = sum(p.numel() for c in model.updatable_components() for p in c.parameters)
    assert f"num-parameters: {parameters}\n" in info
    command = [program("nnet3-compute"), "--use-gpu=no", "--use-priors=true", "--frames-per-chunk=10000"]
    run(*command, "final.mdl", f"ark:{golden('net_input.ark')}", "ark:out.ark", cwd=tmp_path)
    from kaldi_native_io import SequentialFloatMatrixReader

    given, seen = features(), 0
    with SequentialFloatMatrixReader(f"ark:{tmp_path}/out.ark") as reader:
        for key, theirs in reader:
            ours = model.whole_utterance(torch.from_numpy(given[key])).numpy() - np.log(am.priors)
            assert np.abs(ours - np.array(theirs)).max() < 1e-4
            seen += 1
    assert seen == len(given)


def settings(text: str) -> list[str]:
    """The parts of nnet3-info that do not depend on random numbers."""
    return re.findall(
        r"(?:^|, )((?:input-node|component-node|dim-range-node|output-node|component) [^,]*)", text, re.M
    ) + [
        re.sub(r"-?\d+\.\d+(e-\d+)?$|\(.*", "", part)
        for part in re.findall(
            r"(?:max-change|rank-in|rank-out|alpha|update-period|scale|[a-z-]*threshold|"
            r"zeroing-interval|recurrence-interval|learning-rate|use-dropout)=[^, ]*",
            text,
        )
    ]


def test_initialisation_is_that_of_nnet3_init(tmp_path: Path) -> None:
    """The same nodes, types and settings; parameters with the same spread."""
    model, transform = network()
    write_matrix(tmp_path / "lda.mat", transform)
    lines = []
    for spec in model.config.components:
        options = " ".join(f"{key}={value}" for key, value in spec.options.items())
        lines.append(f"component name={spec.name} type={spec.type} {options}")
    (tmp_path / "net.config").write_text("\n".join([*lines, *model.config.node_lines()]) + "\n")
    run(program("nnet3-init"), "net.config", "theirs.raw", cwd=tmp_path)
    write_nnet(from_torch(model), tmp_path / "ours.raw")
    infos = [run(program("nnet3-info"), name, cwd=tmp_path) for name in ("theirs.raw", "ours.raw")]
    assert settings(infos[0]) == settings(infos[1])
    theirs = read_nnet(tmp_path / "theirs.raw")
    for name, component in read_nnet(tmp_path / "ours.raw").components.items():
        assert component.values.keys() == theirs.components[name].values.keys()
        for token, ours in component.values.items():
            other = theirs.components[name].values[token]
            if isinstance(ours, np.ndarray):
                if ours.size > 500 and np.std(ours) > 0:
                    assert np.std(ours) == pytest.approx(np.std(other), rel=0.1), (name, token)
                elif token not in ("LinearParams", "BiasParams", "Params"):
                    assert np.array_equal(ours, other), (name, token)
            else:
                assert ours == other or ours == pytest.approx(other, rel=1e-6), (name, token)


def merged_example() -> tuple[torch.Tensor, torch.Tensor]:
    """(6, 45, 40) features for times -20 .. 24, and (6, 20, 112) label weights, of golden egs_merged."""
    text = golden("egs_merged.txt").read_text().split("</Nnet3Eg>")[0]
    rows = [line.split() for line in text.splitlines()[1:] if "rows=" not in line]
    values = [[float(word) for word in row if word != "]"] for row in rows if len(row) in (40, 41)]
    feats = torch.tensor(values).reshape(6, 45, 40)
    weights = torch.zeros(120, 112)
    labels = re.findall(r"dim=112 \[ ([^\]]*)\]", text)
    for row, pairs in enumerate(labels):
        words = pairs.split()
        for pdf, weight in zip(words[::2], words[1::2], strict=True):
            weights[row, int(pdf)] = float(weight)
    return feats, weights.reshape(6, 20, 112)


@pytest.mark.parametrize("name", ["lstm", "lstmp", "blstm", "ours"])
@pytest.mark.parametrize("limited", [False, True])
def test_gradient_is_that_of_nnet3_train(tmp_path: Path, name: str, limited: bool) -> None:
    """One minibatch of nnet3-train, its natural gradient and other additions switched off."""
    nnet = from_torch(network()[0]) if name == "ours" else read_nnet(golden(f"{name}.raw"))
    for values in (component.values for component in nnet.components.values()):
        if "LearningRate" in values:
            # IsGradient makes Kaldi's components add plain gradients times the learning rate.
            values.update(LearningRate=1.0, IsGradient=True, MaxChange=0.0)
        for token, value in {"SelfRepairScale": 0.0, "SelfRepairConfig": np.zeros(10), "Count": 0.0}.items():
            if token in values:
                values[token] = value
        if limited and "ClippingThreshold" in values:
            values.update(ClippingThreshold=0.05, ZeroingThreshold=0.02, ZeroingInterval=5)
    write_nnet(nnet, tmp_path / "in.raw")
    span = {"min_deriv_time": -10, "max_deriv_time": 21} if limited else {}
    options = [f"--optimization.{key.replace('_', '-')}={value}" for key, value in span.items()]
    command = [program("nnet3-train"), "--use-gpu=no", "--momentum=0", "--max-param-change=1e10", *options]
    (tmp_path / "one.txt").write_text(golden("egs_merged.txt").read_text().split("</Nnet3Eg>")[0] + "</Nnet3Eg> \n")
    run(*command, "in.raw", "ark,t:one.txt", "out.raw", cwd=tmp_path)

    before, after = read_nnet(tmp_path / "in.raw"), read_nnet(tmp_path / "out.raw")
    model = to_torch(before)
    feats, weights = merged_example()
    objective = (model(feats, -20, 20, **span) * weights).sum()
    objective.backward()
    for component in model.updatable_components():
        tokens = ("LinearParams", "BiasParams") if len(component.parameters) == 2 else ("Params",)
        for token, parameter in zip(tokens, component.parameters, strict=True):
            old, new = (net.components[component.name].values[token] for net in (before, after))
            want = new - old
            assert parameter.grad is not None
            error = np.abs(parameter.grad.numpy() - want).max()
            assert error < 2e-4 * max(1.0, np.abs(want).max()), (component.name, token, error)
            assert np.abs(want).max() > 1e-3


def test_lda_is_that_of_nnet_get_feature_transform(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    classes = rng.integers(0, 9, 900)
    mixing = rng.normal(size=(6, 6))
    feats = (rng.normal(size=(900, 6)) + rng.normal(size=(9, 6))[classes]) @ mixing
    stats = LdaStats(6, 10)
    stats.accumulate(feats.astype(np.float32), classes)
    seen = stats.counts > 0
    within = stats.squares - (stats.sums[seen] / stats.counts[seen, None]).T @ stats.sums[seen]
    rows = [" ".join(map(str, within[row, : row + 1])) for row in range(6)]
    parts = [
        "<LDAACCS> <VECSIZE> 6 <NUMCLASSES> 10",
        "<ZERO_ACCS> [ " + " ".join(map(str, stats.counts)) + " ]",
        "<FIRST_ACCS> [\n" + "\n".join(" ".join(map(str, row)) for row in stats.sums) + " ]",
        "<SECOND_ACCS> [\n" + "\n".join(rows) + " ]",
        "</LDAACCS> ",
    ]
    (tmp_path / "acc").write_text("\n".join(parts))
    run(program("nnet-get-feature-transform"), "lda.mat", "acc", cwd=tmp_path)
    theirs, ours = read_matrix(tmp_path / "lda.mat"), stats.estimate()
    signs = np.sign((theirs[:, :-1] * ours[:, :-1]).sum(axis=1, keepdims=True))
    assert theirs.shape == ours.shape == (6, 7)
    assert np.abs(theirs - signs * ours).max() < 1e-3 * np.abs(theirs).max()
