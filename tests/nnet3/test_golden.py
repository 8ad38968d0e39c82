"""Networks that Kaldi wrote: read, written back, and computed with Kaldi's results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kaldi_mpi.models import build_model, parse_xconfig
from kaldi_mpi.nnet3 import from_torch, read_am, read_nnet, to_torch, write_am, write_nnet
from tests.paths import golden


def archive(name: str) -> dict[str, np.ndarray]:
    from kaldi_native_io import SequentialFloatMatrixReader

    with SequentialFloatMatrixReader(f"ark:{golden(name)}") as reader:
        return {key: np.array(value) for key, value in reader}


@pytest.mark.parametrize("name", ["lstm", "lstmp", "blstm"])
def test_outputs(name: str) -> None:
    model = to_torch(read_nnet(golden(f"{name}.raw")))
    expected = archive(f"{name}.out.ark")
    for key, feats in archive("net_input.ark").items():
        ours = model.whole_utterance(torch.from_numpy(feats)).numpy()
        assert np.abs(ours - expected[key]).max() < 1e-4
    assert len(expected) == 2


def test_outputs_of_the_text_form() -> None:
    """7 digits of each parameter are not all bits, but enough for 1e-4."""
    model = to_torch(read_nnet(golden("lstm.raw.txt")))
    key, feats = next(iter(archive("net_input.ark").items()))
    ours = model.whole_utterance(torch.from_numpy(feats)).numpy()
    assert np.abs(ours - archive("lstm.out.ark")[key]).max() < 1e-4


def test_am_outputs_with_priors() -> None:
    am = read_am(golden("am.mdl"))
    model = to_torch(am.nnet)
    assert (model.left_context, model.right_context) == (am.left_context, am.right_context) == (0, 5)
    assert (model.input_dim, model.output_dim, am.transition_model.num_pdfs) == (40, 112, 112)
    expected = archive("am.out.ark")
    for key, feats in archive("net_input.ark").items():
        ours = model.whole_utterance(torch.from_numpy(feats)).numpy() - np.log(am.priors)
        assert np.abs(ours - expected[key]).max() < 1e-4


def test_am_info() -> None:
    """What nnet3-am-info printed of the same file."""
    info = golden("am.info").read_text()
    am = read_am(golden("am.mdl"))
    model = to_torch(am.nnet)
    for component in model.updatable_components():
        line = next(line for line in info.splitlines() if line.startswith(f"component name={component.name} "))
        assert f"max-change={component.max_change:g}," in line
        assert f"learning-rate={model.by_name[component.name].learning_rate:.4g}," in line
    count = sum(p.numel() for c in model.updatable_components() for p in c.parameters)
    assert f"num-parameters: {count}\n" in info
    assert f"prior-min: {am.priors.min():.6g}\n" in info


@pytest.mark.parametrize("name", ["lstm", "lstmp", "blstm", "tdnn", "cnn"])
@pytest.mark.parametrize("suffix", [".raw", ".raw.txt"])
def test_read_and_write_give_the_same_bytes(tmp_path: Path, name: str, suffix: str) -> None:
    source = golden(name + suffix)
    write_nnet(read_nnet(source), tmp_path / "out", binary=suffix == ".raw")
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ["lstm", "lstmp", "blstm"])
def test_through_torch_the_same_bytes(tmp_path: Path, name: str) -> None:
    write_nnet(from_torch(to_torch(read_nnet(golden(f"{name}.raw")))), tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == golden(f"{name}.raw").read_bytes()


def test_am_through_torch_the_same_bytes(tmp_path: Path) -> None:
    """Also with an orphan node (lda.delayed), which train_rnn.py left in this one."""
    am = read_am(golden("am.mdl"))
    write_am(am, tmp_path / "plain.mdl")
    assert (tmp_path / "plain.mdl").read_bytes() == golden("am.mdl").read_bytes()
    am.nnet = from_torch(to_torch(am.nnet))
    write_am(am, tmp_path / "torch.mdl")
    assert (tmp_path / "torch.mdl").read_bytes() == golden("am.mdl").read_bytes()
    write_am(am, tmp_path / "text.mdl", binary=False)
    again = read_am(tmp_path / "text.mdl")
    assert again.nnet.config_lines == am.nnet.config_lines
    assert np.allclose(again.priors, am.priors, rtol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "lstmp", "blstm"])
def test_xconfig_gives_kaldis_config_lines(name: str) -> None:
    config = parse_xconfig(golden(f"xconfig/{name}"))
    kaldi = read_nnet(golden(f"{name}.raw.txt"))
    assert config.node_lines() == kaldi.config_lines
    assert [(spec.name, spec.type) for spec in config.components] == [
        (component, value.type) for component, value in kaldi.components.items()
    ]


@pytest.mark.parametrize("name", ["lstm", "lstmp", "blstm"])
def test_xconfig_gives_kaldis_settings(name: str) -> None:
    """Everything but parameters, statistics and the learning rate, which ten minibatches of training changed."""
    ours = from_torch(build_model(parse_xconfig(golden(f"xconfig/{name}")), seed=1)).components
    kaldi = read_nnet(golden(f"{name}.raw")).components
    checked = 0
    for component, value in kaldi.items():
        for token, theirs in value.values.items():
            mine = ours[component].values.get(token)
            if isinstance(theirs, np.ndarray):
                assert isinstance(mine, np.ndarray), (component, token)
                if token not in ("OderivRms", "ValueAvg", "DerivAvg") or mine.size:
                    assert mine.shape == theirs.shape, (component, token)
            elif "Count" not in token and "Num" not in token[:3] and token != "LearningRate":
                if mine is None:
                    assert theirs in (None, False), (component, token)
                else:
                    assert mine == pytest.approx(theirs), (component, token)
                    checked += 1
    assert checked > 50
