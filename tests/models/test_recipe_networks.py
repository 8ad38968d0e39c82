"""Every network of Kaldi's recipes, as Kaldi's own parser expands it: it builds, computes what nnet3-compute does, and
its file is one that Kaldi writes again byte for byte. Needs KALDI_ROOT."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.formats.tokens import read_matrix
from kaldi_mpi.learner.network import stand_in
from kaldi_mpi.models import AcousticModel, build_model, parse_xconfig_text, transform_files
from kaldi_mpi.models.components import Affine, BatchNorm
from kaldi_mpi.models.config import Config, Place, parse_config
from kaldi_mpi.models.xconfig import expand_xconfig
from kaldi_mpi.nnet3 import from_torch, read_nnet, to_torch, write_nnet
from tests.models.kaldi_xconfig import comparable, kaldi_lines
from tests.paths import kaldi_root
from tests.recipe_networks import RecipeNetwork, recipe_networks

pytestmark = [pytest.mark.kaldi, pytest.mark.timeout(1500)]

PARTS = 8  # so that a part stays within a test's time

# Networks with the lines of Kaldi's final.config; what its parser refuses, by the xconfig; where files of layers lie.
Expanded = tuple[list[tuple[RecipeNetwork, list[str]]], dict[str, str], Path]


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Expanded:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "exp" / "configs").mkdir(parents=True)
    networks = recipe_networks()
    lines = kaldi_lines([network.text for network in networks], folder)
    refused = {
        network.text: f"{network.script}: {x}" for network, x in zip(networks, lines, strict=True) if isinstance(x, str)
    }
    return [(n, x) for n, x in zip(networks, lines, strict=True) if not isinstance(x, str)], refused, folder


def program(name: str) -> str:
    return str(kaldi_root() / "src" / "nnet3bin" / name)


def run(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def transforms(config: Config, folder: Path) -> dict[str, NDArray[Any]]:
    """Those that a layer has written itself (idct), and others made up."""
    rng, found = np.random.default_rng(0), {}
    for component, path in transform_files(config):
        written = folder / path
        if written.exists():
            found[path] = read_matrix(written)
        else:
            shape = stand_in(config, component)
            found[path] = shape + rng.normal(size=shape.shape).astype(np.float32) * 0.01
    return found


def put_numbers(model: AcousticModel, rng: np.random.Generator) -> None:
    """Statistics of batch-norm, and parameters of output layers, which start at 0."""
    for name, module in model.by_name.items():
        if isinstance(module, BatchNorm):
            size = module.block_dim
            moments = np.concatenate([rng.normal(size=size) * 0.1, rng.uniform(0.5, 1.5, size)])
            module.moments.copy_(torch.from_numpy(moments))
            module.count.fill_(100.0)
        elif name.startswith("output") and isinstance(module, Affine) and not module.linear.detach().any():
            module.linear.data.normal_(0, 0.05)


def kaldis_output(folder: Path, feats: NDArray[np.float32], ivector: NDArray[np.float32] | None) -> NDArray[np.float32]:
    import kaldi_native_io as io

    with io.FloatMatrixWriter(f"ark:{folder}/feats.ark") as writer:
        writer.write("u", feats)
    command: list[str | Path] = [program("nnet3-compute"), "--use-gpu=no", "--frames-per-chunk=10000"]
    if ivector is not None:
        with io.FloatVectorWriter(f"ark:{folder}/ivector.ark") as vectors:
            vectors.write("u", ivector)
        command.append("--ivectors=ark:ivector.ark")
    run(*command, "net.raw", "ark:feats.ark", "ark:out.ark", cwd=folder)
    with io.SequentialFloatMatrixReader(f"ark:{folder}/out.ark") as reader:
        return next(np.array(value) for _, value in reader)


@pytest.mark.parametrize("part", range(PARTS))
def test_they_compute_what_kaldi_computes(
    expanded: Expanded,
    part: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    networks, _, folder = expanded
    assert len(networks) > 200
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    torch.set_num_threads(1)
    wrong = []
    for network, _ in networks[part::PARTS]:
        # Ours: what Kaldi's modules make under Python 3 of a default width, 256.0, its programs refuse.
        places = ((line, Place(network.script)) for line in expand_xconfig(network.text, network.script))
        config = parse_config(places, network.script)
        model = build_model(config, seed=0, transforms=transforms(config, folder))
        model.eval()
        write_nnet(from_torch(model), tmp_path / "net.raw")
        run(program("nnet3-copy"), "net.raw", "copy.raw", cwd=tmp_path)
        if (tmp_path / "net.raw").read_bytes() != (tmp_path / "copy.raw").read_bytes():
            wrong.append(f"{network.script}: nnet3-copy gives other bytes")
        rng = np.random.default_rng(1)
        put_numbers(model, rng)
        write_nnet(from_torch(model), tmp_path / "net.raw")
        again = to_torch(read_nnet(tmp_path / "net.raw"))
        write_nnet(from_torch(again), tmp_path / "again.raw")
        if (tmp_path / "net.raw").read_bytes() != (tmp_path / "again.raw").read_bytes():
            wrong.append(f"{network.script}: reading and writing gives other bytes")
        feats = rng.normal(size=(40, model.input_dim)).astype(np.float32)
        ivector = rng.normal(size=model.ivector_dim).astype(np.float32) if model.ivector_dim else None
        theirs = kaldis_output(tmp_path, feats, ivector) if model.main_output == "output" else None
        given = None if ivector is None else torch.from_numpy(ivector)
        ours = again.eval().whole_utterance(torch.from_numpy(feats), given).numpy()
        if theirs is not None and (
            ours.shape != theirs.shape or np.abs(ours - theirs).max() > 1e-4 * max(1.0, np.abs(theirs).max())
        ):
            wrong.append(f"{network.script}: another output than nnet3-compute's")
    assert not wrong, "\n".join(wrong)


def test_few_are_out(expanded: Expanded) -> None:
    """What is left out is what Kaldi's own parser refuses."""
    networks, refused, _ = expanded
    kinds = [network.kind for network, _ in networks]
    assert kinds.count("chain") >= 200 and kinds.count("nnet3") >= 45 and kinds.count("rnnlm") >= 18
    assert sum(network.documents for network, _ in networks) >= 470
    assert len(refused) < 10, "\n".join(refused.values())


def test_our_lines_are_kaldis(expanded: Expanded) -> None:
    """And what Kaldi's parser refuses is refused."""
    networks, refused, _ = expanded
    wrong = [
        network.script
        for network, lines in networks
        if comparable(expand_xconfig(network.text, network.script)) != comparable(lines)
    ]
    assert not wrong
    for text in refused:
        with pytest.raises(ConfigError):
            expand_xconfig(text)


def test_kaldi_refuses_the_contexts_that_we_do(expanded: Expanded, tmp_path: Path) -> None:
    """Recipes of a time when a label delay did not have to stand in the fixed-affine-layer."""
    networks, _, _ = expanded
    refused = []
    for network, _ in networks:
        try:
            parse_xconfig_text(network.text, network.script)
        except ConfigError as error:
            assert "which Kaldi refuses" in str(error)
            refused.append(network)
    assert 0 < len(refused) < 10
    recipe = kaldi_root() / "egs" / "wsj" / "s5"
    for network in refused[:3]:
        (tmp_path / "network.xconfig").write_text(network.text)
        done = subprocess.run(
            [
                *[sys.executable, str(recipe / "steps" / "nnet3" / "xconfig_to_configs.py")],
                *["--xconfig-file", str(tmp_path / "network.xconfig"), "--config-dir", str(tmp_path / "configs")],
            ],
            env=os.environ | {"PATH": f"{kaldi_root()}/src/nnet3bin:{recipe}/utils:{os.environ['PATH']}"},
            cwd=recipe, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode != 0 and "Please use delay=$label_delay" in done.stderr, network.script
