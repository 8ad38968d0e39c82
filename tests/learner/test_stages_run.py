"""Trainings that stop before an iteration, skip what is done, begin with a model: real ranks on a toy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.learner.alignment_counts import PRIOR_SCALE_FILE, AlignmentCounts
from kaldi_mpi.nnet3 import read_am, read_nnet, write_nnet
from tests.paths import golden, kaldi_root
from tests.toy import XCONFIG, Toy, make_toy, train

COMBINE = "--trainer.optimization.do-final-combination=true"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def whole(toy: Toy) -> Path:
    """A training from its beginning to its end, of whose iterations all models are kept."""
    folder = toy.experiment("whole")
    run(toy, folder, COMBINE, "--cleanup=false")
    return folder


def run(toy: Toy, folder: Path, *options: str, learners: int = 2) -> subprocess.CompletedProcess[str]:
    result = train(learners, toy.options(folder, *options))
    assert result.returncode == 0, result.stderr
    return result


def test_models_of_iterations(whole: Path, toy: Toy) -> None:
    numbers = sorted(int(path.stem) for path in whole.glob("[0-9]*.mdl"))
    assert numbers == list(range(len(numbers))) and len(numbers) >= 4
    assert read_am(whole / "1.mdl").priors.sum() == pytest.approx(1.0)
    said = (whole / "log/combine.log").read_text().splitlines()
    assert "nnets, objective function changed from" in said[-1]
    assert (whole / "log/compute_prob_valid.final.log").exists()
    cleaned = toy.experiment("cleaned")
    run(toy, cleaned, COMBINE, "--cleanup.preserve-model-interval=2")
    last = len(numbers) - 1
    left = {int(path.stem) for path in cleaned.glob("[0-9]*.mdl")}
    assert left == {number for number in numbers if number % 2 == 0} | {last}
    assert (cleaned / "final.mdl").read_bytes() == (whole / "final.mdl").read_bytes()


def test_leaving_before_an_iteration_and_going_on_is_the_whole_training(toy: Toy, whole: Path) -> None:
    folder = toy.experiment("left")
    options = (COMBINE, "--cleanup=false")
    left = run(toy, folder, *options, "--exit-stage=2")
    assert "stopped before iteration 2 (--exit-stage)" in left.stderr
    assert not (folder / "final.mdl").exists() and not (folder / "3.mdl").exists()
    run(toy, folder, *options, "--stage=2")
    for name in ("2.mdl", "3.mdl", "combined.mdl", "final.mdl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_asynchronous_learners_leave_too(toy: Toy) -> None:
    folder = toy.experiment("left-expair")
    run(toy, folder, "--strategy=expair", "--exit-stage=1", learners=3)
    assert (folder / "1.mdl").exists() and not (folder / "2.mdl").exists() and (folder / "checkpoint").exists()
    run(toy, folder, "--strategy=expair", learners=3)
    assert (folder / "final.mdl").exists() and not (folder / "checkpoint").exists()


def test_a_stage_begins_with_the_model_of_its_iteration(toy: Toy, whole: Path) -> None:
    """Without a checkpoint; what comes after differs, since momentum and preconditioners begin anew."""
    folder = toy.experiment("from-2")
    (folder / "configs/lda.mat").write_bytes((whole / "configs/lda.mat").read_bytes())
    result = train(2, toy.options(folder, "--stage=2"))
    assert result.returncode != 0
    assert f"{folder}/2.mdl: no such file (--stage 2 begins with it)" in result.stderr
    (folder / "2.mdl").write_bytes((whole / "2.mdl").read_bytes())
    run(toy, folder, "--stage=2", "--cleanup=false")
    assert not (folder / "1.mdl").exists()
    assert (folder / "final.mdl").read_bytes() != (whole / "final.mdl").read_bytes()
    last = max(int(path.stem) for path in folder.glob("[0-9]*.mdl"))
    assert last == max(int(path.stem) for path in whole.glob("[0-9]*.mdl"))


def test_only_combination_and_only_priors(toy: Toy, whole: Path) -> None:
    numbers = sorted(int(path.stem) for path in whole.glob("[0-9]*.mdl"))
    folder = toy.experiment("combines")
    (folder / "configs/lda.mat").write_bytes((whole / "configs/lda.mat").read_bytes())
    for path in whole.glob("*.mdl"):
        if path.stem != "final":
            (folder / path.name).write_bytes(path.read_bytes())
    run(toy, folder, COMBINE, f"--stage={numbers[-1]}", "--cleanup=false")
    assert (folder / "final.mdl").read_bytes() == (whole / "final.mdl").read_bytes()
    (folder / "final.mdl").unlink()
    run(toy, folder, COMBINE, f"--stage={numbers[-1] + 1}", "--cleanup=false")
    assert (folder / "final.mdl").read_bytes() == (whole / "final.mdl").read_bytes()
    (folder / f"{numbers[-2]}.mdl").unlink()
    result = train(2, toy.options(folder, COMBINE, f"--stage={numbers[-1]}"))
    assert result.returncode != 0
    assert f"{numbers[-2]}.mdl: no such file (the final combination takes it)" in result.stderr


def test_an_input_model_is_trained_further(toy: Toy, whole: Path) -> None:
    from kaldi_mpi.learner.flat import FlatParameters
    from kaldi_mpi.nnet3 import to_torch

    folder = toy.experiment("further")
    (folder / "configs/network.xconfig").unlink()
    raw = folder / "input.raw"
    write_nnet(read_nnet(whole / "final.mdl"), raw)
    run(toy, folder, f"--trainer.input-model={raw}", "--trainer.num-epochs=1", "--cleanup=false")
    first, start = (FlatParameters.of_model(to_torch(read_nnet(path))).to_numpy() for path in (folder / "0.mdl", raw))
    np.testing.assert_array_equal(first, start)
    assert "compute_prob_valid.final.log" in {path.name for path in (folder / "log").iterdir()}


def test_an_input_model_of_another_tree(toy: Toy) -> None:
    folder = toy.experiment("other-tree")
    text = (
        XCONFIG.format(lda=folder / "configs/lda.mat").replace("dim=5", "dim=7").replace("input dim=7", "input dim=6")
    )
    (folder / "configs/network.xconfig").write_text(text)
    from kaldi_mpi.models import build_model, parse_xconfig
    from kaldi_mpi.nnet3 import from_torch

    config = parse_xconfig(folder / "configs/network.xconfig")
    model = build_model(config, seed=0, transforms={str(folder / "configs/lda.mat"): np.eye(18, 19, dtype=np.float32)})
    write_nnet(from_torch(model), folder / "other.raw")
    result = train(1, toy.options(folder, f"--trainer.input-model={folder}/other.raw"))
    assert result.returncode != 0
    assert f"{folder}/other.raw: the output has dim=7, but the tree has 5 pdf-ids" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_scale_by_priors(toy: Toy) -> None:
    """A final.config that reads presoftmax_prior_scale.vec, as old scripts make it."""
    from kaldi_mpi.models import parse_xconfig

    folder = toy.experiment("scaled")
    config = parse_xconfig(folder / "configs/network.xconfig")
    scale = "component name=scale type=FixedScaleComponent scales=" + str(folder / "configs" / PRIOR_SCALE_FILE)
    lines = [
        f"component name={spec.name} type={spec.type} "
        + " ".join(f"{key}={value}" for key, value in spec.options.items())
        for spec in config.components
    ]
    for line in config.node_lines():
        last = "name=output.log-softmax" in line
        lines.append(line.replace("input=output.affine", "input=scale") if last else line)
    lines += [scale, "component-node name=scale component=scale input=output.affine"]
    (folder / "configs/final.config").write_text("\n".join(lines) + "\n")
    run(toy, folder, "--trainer.num-epochs=0.5", "--trainer.presoftmax-prior-scale-power=-0.5")
    transitions = read_transition_model(toy.ali_dir / "final.mdl")
    wanted = AlignmentCounts.of_directory(str(toy.ali_dir), transitions).prior_scale(-0.5)
    scales = read_nnet(folder / "final.mdl").components["scale"].values["Scales"]
    np.testing.assert_allclose(scales, wanted, rtol=1e-6)
    assert (folder / "configs" / PRIOR_SCALE_FILE).resolve() == folder / PRIOR_SCALE_FILE


@pytest.mark.kaldi
def test_transitions_and_priors_are_nnet3_am_train_transitions(toy: Toy, whole: Path, tmp_path: Path) -> None:
    programs = kaldi_root() / "src/nnet3bin"
    raw, wanted = tmp_path / "0.raw", tmp_path / "0.mdl"
    write_nnet(read_nnet(whole / "0.mdl"), raw)
    subprocess.run(
        f"{programs}/nnet3-am-init {toy.ali_dir}/final.mdl {raw} - | "
        f"{programs}/nnet3-am-train-transitions - 'ark:gunzip -c {toy.ali_dir}/ali.*.gz|' {wanted}",
        shell=True, check=True, capture_output=True,
    )  # fmt: skip
    ours, theirs = read_am(whole / "0.mdl"), read_am(wanted)
    np.testing.assert_allclose(ours.transition_model.log_probs[1:], theirs.transition_model.log_probs[1:], rtol=2e-7)
    np.testing.assert_allclose(ours.priors, theirs.priors, rtol=1e-6)


@pytest.mark.kaldi
def test_the_scale_is_kaldis() -> None:
    import sys

    sys.path.insert(0, str(kaldi_root() / "egs/wsj/s5/steps"))
    try:
        from libs.nnet3.train.common import (  # type: ignore[import-not-found]
            smooth_presoftmax_prior_scale_vector,
        )
    finally:
        sys.path.pop(0)
    transitions = read_transition_model(golden("trans.mdl"))
    rng = np.random.default_rng(0)
    counts = np.append(0.0, rng.integers(0, 1000, transitions.num_transition_ids)).astype(np.float64)
    ours = AlignmentCounts(transitions, counts)
    theirs = smooth_presoftmax_prior_scale_vector(ours.pdf_counts().tolist(), -0.25, 0.01)
    np.testing.assert_allclose(ours.prior_scale(-0.25), theirs, rtol=1e-12)
