"""Networks with an i-vector input: their xconfig, contexts, values; and the same out of Kaldi's programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.scorers import ChunkOptions, load_scorer
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.models import AcousticModel, build_model, parse_xconfig_text
from kaldi_mpi.nnet3 import from_torch, make_am, read_nnet, to_torch, write_am, write_nnet
from tests.paths import golden, kaldi_root

DIM, IVECTOR_DIM = 40, 7
RECIPE = f"""
input dim={IVECTOR_DIM} name=ivector
input dim={DIM} name=input
fixed-affine-layer name=lda delay=5 input=Append(-2,-1,0,1,2,ReplaceIndex(ivector, t, 0)) \
affine-transform-file=conf/lda.mat
fast-lstmp-layer name=lstm1 cell-dim=16 recurrent-projection-dim=6 non-recurrent-projection-dim=5 delay=-1 decay-time=20
fast-lstm-layer name=lstm2 cell-dim=8 delay=-3
output-layer name=output output-delay=5 dim=112 max-change=1.5 param-stddev=0.1 bias-stddev=0.1
"""


def recipe_network() -> AcousticModel:
    spliced = 5 * DIM + IVECTOR_DIM
    transform = np.random.default_rng(3).normal(size=(spliced, spliced + 1)).astype(np.float32) * 0.01
    return build_model(parse_xconfig_text(RECIPE), seed=3, transforms={"conf/lda.mat": transform})


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_what_a_network_says_of_its_inputs() -> None:
    model = recipe_network()
    assert (model.input_name, model.input_dim, model.ivector_dim) == ("input", DIM, IVECTOR_DIM)
    assert (model.left_context, model.right_context) == (0, 7)
    plain = build_model(parse_xconfig_text("input dim=4 name=feats\noutput-layer name=output dim=3"), seed=0)
    assert (plain.input_name, plain.ivector_dim) == ("feats", 0)


def test_an_ivector_is_a_column_of_every_frame() -> None:
    """The same network over features that carry the i-vector in each frame has the same output and gradients."""
    layers = (
        "tanh-layer name=t dim=9 input={}\nfast-lstm-layer name=l cell-dim=5 delay=-2\n"
        "output-layer name=output dim=3 param-stddev=1"
    )
    kinds = [
        ("input dim=2 name=ivector\ninput dim=4 name=input\n", "Append(input, ReplaceIndex(ivector, t, 0))"),
        ("input dim=6 name=input\n", "input"),
    ]
    with_ivector, appended = (
        build_model(parse_xconfig_text(inputs + layers.format(name)), seed=7) for inputs, name in kinds
    )
    feats, ivectors = rand(3, 25, 4), rand(3, 2)
    both = torch.cat([feats, ivectors[:, None].expand(-1, 25, -1)], dim=2)
    one = with_ivector(feats, -6, 18, ivectors=ivectors, min_deriv_time=-3)
    two = appended(both, -6, 18, min_deriv_time=-3)
    assert torch.allclose(one, two, atol=1e-6) and one.std() > 0.01
    for output in (one, two):
        output.square().sum().backward()
    for p, q in zip(with_ivector.parameters(), appended.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.allclose(p.grad, q.grad, atol=1e-6)
    whole = with_ivector.whole_utterance(feats[1], ivectors[1])
    assert torch.allclose(whole, with_ivector(feats, 0, 25, ivectors=ivectors)[1], atol=1e-6)


def test_a_layer_of_the_ivector_alone() -> None:
    text = """
input dim=3 name=ivector
input dim=4 name=input
tanh-layer name=i dim=2 input=ReplaceIndex(ivector, t, 0)
tanh-layer name=a dim=5 input=Append(input@-1, i@2)
output-layer name=output dim=3 param-stddev=1
"""
    model = build_model(parse_xconfig_text(text), seed=0)
    assert (model.left_context, model.right_context) == (1, 0)
    feats = rand(2, 6, 4)
    one, other = model(feats, -1, 5, ivectors=torch.zeros(2, 3)), model(feats, -1, 5, ivectors=torch.ones(2, 3))
    assert not torch.allclose(one, other, atol=1e-3)


def test_what_the_lda_layer_receives() -> None:
    model, feats, ivectors = recipe_network(), rand(2, 12, DIM), rand(2, IVECTOR_DIM)
    got = model.node_input("lda", feats, -3, 6, ivectors)
    assert got.shape == (2, 6, 5 * DIM + IVECTOR_DIM)
    assert torch.equal(got[1, 4, :DIM], feats[1, 4 + 3 - 2]) and torch.equal(got[1, 4, 4 * DIM : 5 * DIM], feats[1, 9])
    assert torch.equal(got[..., 5 * DIM :], ivectors[:, None].expand(-1, 6, -1))


@pytest.mark.parametrize(
    ("given", "says"),
    [(None, "none given"), (rand(2, 3), r"\(2, 3\) given, \(2, 7\) expected"), (rand(1, 7), r"\(1, 7\) given")],
)
def test_ivectors_that_do_not_fit(given: torch.Tensor | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        recipe_network()(rand(2, 40, DIM), -5, 10, ivectors=given)


def test_ivectors_that_nobody_wants() -> None:
    model = build_model(parse_xconfig_text("input dim=4 name=input\noutput-layer name=output dim=3"), seed=0)
    with pytest.raises(ValueError, match=r"\(2, 3\) given, none expected"):
        model(rand(2, 5, 4), 0, 5, ivectors=rand(2, 3))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("tanh-layer name=a dim=2 input=Append(input, ivector)", r"ivector has time 0 alone: take it by ReplaceIndex"),
        ("tanh-layer name=a dim=2 input=ivector", r"ivector has time 0 alone: take it by ReplaceIndex"),
        ("input dim=3 name=third", "this has inputs .*'ivector', 'input', 'third'"),
    ],
)
def test_unsupported_uses_are_named(line: str, says: str) -> None:
    text = f"input dim=3 name=ivector\ninput dim=4 name=input\n{line}\noutput-layer name=output dim=3"
    with pytest.raises(ConfigError, match=says):
        build_model(parse_xconfig_text(text), seed=0)


@pytest.mark.parametrize("binary", [True, False])
def test_a_model_file_keeps_both_inputs(tmp_path: Path, binary: bool) -> None:
    model = recipe_network()
    write_nnet(from_torch(model), tmp_path / "net.raw", binary=binary)
    again = to_torch(read_nnet(tmp_path / "net.raw"))
    assert f"input-node name=ivector dim={IVECTOR_DIM}" in again.config.node_lines()
    assert (again.input_name, again.ivector_dim) == ("input", IVECTOR_DIM)
    feats, ivectors = rand(2, 40, DIM), rand(2, IVECTOR_DIM)
    one, other = (m(feats, -5, 10, ivectors=ivectors) for m in (model, again))
    assert torch.allclose(one, other, atol=1e-5)


def kaldi(name: str, *arguments: str | Path, cwd: Path) -> str:
    path = next((p for p in (kaldi_root() / "src").glob(f"*bin/{name}") if os.access(p, os.X_OK)), None)
    if path is None:
        pytest.skip(f"this Kaldi has no {name}")
    done = subprocess.run([str(path), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.kaldi
def test_expansion_is_that_of_kaldi(tmp_path: Path) -> None:
    recipe = kaldi_root() / "egs" / "wsj" / "s5"
    script = recipe / "steps" / "nnet3" / "xconfig_to_configs.py"
    if not script.exists():
        pytest.skip("this Kaldi has no recipes")
    (tmp_path / "net.xconfig").write_text(RECIPE.replace("conf/lda.mat", "configs/lda.mat"))
    environment = {**os.environ, "PATH": f"{kaldi_root()}/src/nnet3bin:{recipe}/utils:{os.environ['PATH']}"}
    command = [
        sys.executable,
        str(script),
        "--xconfig-file",
        str(tmp_path / "net.xconfig"),
        "--config-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environment, cwd=recipe, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = (tmp_path / "final.config").read_text().splitlines()
    theirs = [" ".join(line.split()) for line in theirs if line and not line.startswith("#")]
    config = parse_xconfig_text((tmp_path / "net.xconfig").read_text())
    assert sorted(theirs_nodes(theirs)) == sorted(theirs_nodes(config.node_lines()))
    assert [line for line in theirs if line.startswith("input-node")] == config.node_lines()[:2]


def theirs_nodes(lines: list[str]) -> list[str]:
    """Node lines in one spelling: spaces, brackets."""
    nodes = [line.replace(", ", ",").replace("objective-type=", "objective=") for line in lines if "-node " in line]
    return [line.replace("objective=linear", "").strip() for line in nodes]


def decoding(tmp_path: Path) -> tuple[AcousticModel, np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A model file and a directory of i-vectors; the network, log-priors, features and i-vectors by utterance."""
    from kaldi_native_io import FloatMatrixWriter, SequentialFloatMatrixReader

    model = recipe_network()
    priors = np.random.default_rng(0).random(112).astype(np.float32) + 0.1
    am = make_am(model, read_transition_model(golden("trans.mdl")), priors / priors.sum())
    write_am(am, tmp_path / "final.mdl")
    with SequentialFloatMatrixReader(f"ark:{golden('net_input.ark')}") as reader:
        feats = {key: np.array(value) for key, value in reader}
    rng, ivectors = np.random.default_rng(1), {}
    with FloatMatrixWriter(f"ark,scp:{tmp_path}/online.ark,{tmp_path}/ivector_online.scp") as rows:
        for key, value in feats.items():
            ivectors[key] = rng.normal(size=(-(-len(value) // 10), IVECTOR_DIM)).astype(np.float32)
            rows.write(key, ivectors[key])
    (tmp_path / "ivector_period").write_text("10\n")
    return model, np.log(am.priors), feats, ivectors


def our_scores(folder: Path, feats: dict[str, np.ndarray], chunks: ChunkOptions) -> dict[str, np.ndarray]:
    """What the decoder without Kaldi takes from the model."""
    for name, lines in (("utt2spk", "{0} {0}"), ("feats.scp", "{0} feats.ark:0"), ("wav.scp", "{0} none")):
        (folder / name).write_text("".join(lines.format(key) + "\n" for key in sorted(feats)))
    scorer, _ = load_scorer(folder / "final.mdl", DataDir(folder), chunks)
    return {key: scorer(key, value) for key, value in feats.items()}


@pytest.mark.parametrize("frames_per_chunk", [0, 50])
def test_decoding_takes_the_ivector_in_the_middle_of_each_chunk(tmp_path: Path, frames_per_chunk: int) -> None:
    model, log_priors, feats, ivectors = decoding(tmp_path)
    chunks = ChunkOptions(frames_per_chunk, 10, online_ivector_dir=str(tmp_path))
    for key, scores in our_scores(tmp_path, feats, chunks).items():
        whole = len(feats[key])
        begin, count = (0, whole) if not frames_per_chunk else (100, 50)
        row = torch.from_numpy(ivectors[key][(begin + (count - 1) // 2) // 10])
        left = 0 if not frames_per_chunk else 10
        times = np.arange(begin - left, begin + count + model.right_context).clip(0, whole - 1)
        with torch.no_grad():
            wanted = model(torch.from_numpy(feats[key][times])[None], -left, count, ivectors=row[None])[0].numpy()
        assert np.abs(scores[begin : begin + count] - (wanted - log_priors)).max() < 1e-4


def test_decoding_without_the_ivectors_is_refused(tmp_path: Path) -> None:
    _, _, feats, _ = decoding(tmp_path)
    with pytest.raises(ConfigError, match="takes i-vectors of dimension 7: --online-ivector-dir is needed"):
        our_scores(tmp_path, feats, ChunkOptions())
    (tmp_path / "ivector_online.scp").write_text("")
    with pytest.raises(DataError, match=r"ivector_online\.scp, key .*: the utterance has no i-vectors"):
        our_scores(tmp_path, feats, ChunkOptions(online_ivector_dir=str(tmp_path)))


@pytest.mark.kaldi
@pytest.mark.parametrize("options", ["online", "one", "chunks"])
def test_nnet3_compute_gives_the_same(tmp_path: Path, options: str) -> None:
    """With online i-vectors nnet3-compute takes the row in the middle of the chunk, as the utterance or 50 frames."""
    from kaldi_native_io import FloatVectorWriter, SequentialFloatMatrixReader

    _, _, feats, ivectors = decoding(tmp_path)
    assert f"ivector-dim: {IVECTOR_DIM}" in kaldi("nnet3-am-info", "final.mdl", cwd=tmp_path)
    with FloatVectorWriter(f"ark:{tmp_path}/one.ark") as one:
        for key, rows in ivectors.items():
            one.write(key, rows[(len(feats[key]) - 1) // 2 // 10])
    source = ["--online-ivectors=scp:ivector_online.scp", "--online-ivector-period=10"]
    if options == "one":
        source = ["--ivectors=ark:one.ark"]
    frames = 50 if options == "chunks" else 10000
    left = 10 if options == "chunks" else 0
    more = ["--use-gpu=no", "--use-priors=true", f"--frames-per-chunk={frames}", f"--extra-left-context={left}"]
    kaldi("nnet3-compute", *more, *source, "final.mdl", f"ark:{golden('net_input.ark')}", "ark:out.ark", cwd=tmp_path)
    chunks = ChunkOptions(50 if options == "chunks" else 0, left, online_ivector_dir=str(tmp_path))
    ours, seen = our_scores(tmp_path, feats, chunks), 0
    with SequentialFloatMatrixReader(f"ark:{tmp_path}/out.ark") as reader:
        for key, theirs in reader:
            assert np.abs(ours[key] - np.array(theirs)).max() < 1e-4
            seen += 1
    assert seen == len(feats) > 0
