"""Chain training on Kaldi's examples, by real learners: what is left behind, what is said, what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.nnet3 import read_am
from tests.paths import REPO, golden
from tests.toy import environment, train

_WIDTH, _LEFT, _RIGHT, _PDFS = 60, 7, 7, 56


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a recipe has before chain/train.py: egs, the tree's directory, features that nobody reads."""
    work = tmp_path_factory.mktemp("chain")
    egs, tree = work / "egs", work / "tree"
    (egs / "info").mkdir(parents=True)
    shutil.copy(golden("chain/train/egs.ark"), egs / "cegs.1.ark")
    for name in ("valid_diagnostic", "train_diagnostic", "combine"):
        shutil.copy(golden("chain/train/egs_overlap.ark"), egs / f"{name}.cegs")
    info = {
        "feat_dim": 40, "ivector_dim": 0, "num_archives": 1, "left_context": _LEFT, "right_context": _RIGHT,
        "frames_per_eg": _WIDTH, "num_pdfs": _PDFS, "left_context_initial": -1, "right_context_final": -1,
    }  # fmt: skip
    for name, value in info.items():
        (egs / "info" / name).write_text(f"{value}\n")
    tree.mkdir()
    for source, name in (("0.trans_mdl", "final.mdl"), ("tree", "tree"), ("phones.txt", "phones.txt")):
        shutil.copy(golden(f"chain/model/{source}"), tree / name)
    (tree / "num_jobs").write_text("2\n")
    return work


def experiment(work: Path, name: str) -> Path:
    """A directory with the network and the graph."""
    folder = work / name
    (folder / "configs").mkdir(parents=True)
    shutil.copy(golden("chain/net/network.xconfig"), folder / "configs" / "network.xconfig")
    shutil.copy(golden("chain/net/idct.mat"), folder / "configs" / "idct.mat")
    text = (folder / "configs" / "network.xconfig").read_text()
    (folder / "configs" / "network.xconfig").write_text(text.replace("idct.mat", str(folder / "configs" / "idct.mat")))
    shutil.copy(golden("chain/den.fst"), folder)
    return folder


def options(work: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--program=chain", f"--feat-dir={work / 'data'}", f"--dir={folder}", f"--tree-dir={work / 'tree'}",
        f"--lat-dir={work / 'lats'}", f"--egs.dir={work / 'egs'}", f"--egs.chunk-width={_WIDTH}",
        "--chain.xent-regularize=0.1", "--chain.leaky-hmm-coefficient=0.1", "--chain.l2-regularize=0.00005",
        "--trainer.num-epochs=2", "--trainer.num-chunk-per-minibatch=16", "--trainer.frames-per-iter=4000",
        "--trainer.optimization.initial-effective-lrate=0.002", "--trainer.optimization.final-effective-lrate=0.0002",
        "--trainer.optimization.max-models-combine=4", *more,
    ]  # fmt: skip


def objectives(folder: Path, which: str) -> list[float]:
    """By iteration, of the validations' logs."""
    logs = [path for path in folder.glob(f"log/compute_prob_{which}.*.log") if path.suffixes[-2] != ".final"]
    found = []
    for path in sorted(logs, key=lambda path: int(path.suffixes[-2][1:])):
        match = re.search(
            r"Overall log-probability for 'output' is (\S+) (?:\+ \S+ = \S+ )?per frame", path.read_text()
        )
        assert match is not None
        found.append(float(match[1]))
    return found


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "allreduce"), (2, "expair")])
def test_a_training(given: Path, ranks: int, strategy: str) -> None:
    folder = experiment(given, f"{strategy}-{ranks}")
    result = train(ranks, options(given, folder, f"--strategy={strategy}"))
    assert result.returncode == 0, result.stderr
    valid = objectives(folder, "valid")
    assert valid[0] < -0.7 and valid[-1] > valid[0] + 0.3
    am = read_am(folder / "final.mdl")
    assert not len(am.priors) and am.transition_model.num_pdfs == _PDFS
    assert (folder / "frame_subsampling_factor").read_text() == "3\n"
    assert int((folder / "num_iters").read_text()) == len(valid) - 1
    report = (folder / "accuracy.report").read_text().splitlines()
    assert report[0].startswith("%Iter\tduration") and len(report) == len(valid) + 2
    logged = (folder / "log" / "train.0.1.log").read_text()
    for output in ("output", "output-xent"):
        assert re.search(rf"Overall average objective function for '{output}' is .* over \d+ frames", logged)
    final = (folder / "log" / "compute_prob_valid.final.log").read_text()
    assert "Overall log-probability for 'output-xent' is" in final


def test_what_is_refused(given: Path) -> None:
    """One line each, before anything is trained."""
    cases = {
        "no-den": r"den.fst: no such file \(--stage -4 begins after it is made\)",
        "no-xent": "it has no output-xent, which --chain.xent-regularize trains",
        "other-tree": "output-xent has dim=57, but the tree has 56 pdf-ids",
        "no-egs": "--egs.dir is needed",
        "width": "the examples in .* are of 60 frames, and --egs.chunk-width asks for 45",
        "factor": "output frames are 3 input frames apart, and the frame subsampling factor is 2",
    }
    for name, says in cases.items():
        folder = experiment(given, name)
        words = options(given, folder)
        xconfig = folder / "configs" / "network.xconfig"
        if name == "no-den":
            (folder / "den.fst").unlink()
        elif name == "no-xent":
            xconfig.write_text(re.sub(r".*(output|prefinal)-xent.*\n", "", xconfig.read_text()))
        elif name == "other-tree":
            xconfig.write_text(xconfig.read_text().replace("dim=56", "dim=57"))
        elif name == "no-egs":
            words = [word for word in words if not word.startswith("--egs.dir")]
        elif name == "width":
            words.append("--egs.chunk-width=45")
        else:
            words += ["--chain.frame-subsampling-factor=2"]
        result = train(1, words)
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        assert result.returncode == 1 and any(re.search(says, line) for line in errors), (name, result.stderr)
        assert not (folder / "final.mdl").exists()


GET_EGS = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" > get_egs.words
cp -r "{egs}" "${{@: -1}}"
"""


def test_a_recipe_without_examples(given: Path) -> None:
    """Kaldi's script makes them, in its place a program that copies some; it gets what chain/train.py gives it."""
    recipe = given / "recipe"
    (recipe / "steps/nnet3/chain").mkdir(parents=True)
    folder = experiment(recipe, "exp")
    shutil.copy(golden("chain/normalization.fst"), folder)
    (given / "data").mkdir()
    (given / "data" / "feats.scp").touch()
    (given / "lats").mkdir()
    (given / "lats" / "lat.1.gz").touch()
    words = [word for word in options(given, folder)[1:] if not word.startswith("--egs.dir")]
    words += [f"--cmd={REPO / 'steps_mpi' / 'run.py'}", "--num-learners=1", "--egs.opts=--num-utts-subset 17"]
    command = [sys.executable, str(REPO / "steps_mpi/nnet3/chain/train.py"), *words]

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=recipe, env=environment(), capture_output=True, text=True, check=False)

    without = call()
    assert without.returncode == 1 and "there is no steps/nnet3/chain/get_egs.sh here" in without.stderr
    script = recipe / "steps/nnet3/chain/get_egs.sh"
    script.write_text(GET_EGS.format(egs=given / "egs"))
    script.chmod(0o755)
    done = call()
    assert done.returncode == 0, done.stderr
    found = (recipe / "get_egs.words").read_text().splitlines()
    assert found[:2] == ["--num-utts-subset", "17"] and found[-4:] == [
        str(given / "data"), str(folder), str(given / "lats"), str(folder / "egs")
    ]  # fmt: skip
    given_options = dict(zip(found[2:-4:2], found[3:-4:2], strict=True))
    assert given_options["--left-context"] == given_options["--right-context"] == str(_LEFT)
    assert given_options["--frames-per-eg"] == str(_WIDTH) and given_options["--right-context-final"] == "-1"
    assert (folder / "final.mdl").exists()
    assert not list((folder / "egs").glob("cegs.*.ark")) and (folder / "egs" / "combine.cegs").exists()


@pytest.mark.thorough
def test_it_goes_on_after_a_stop(given: Path) -> None:
    """To the same bytes, in the middle of the frame shifts, too."""
    whole, parts = experiment(given, "whole"), experiment(given, "parts")
    assert train(1, options(given, whole)).returncode == 0
    stopped = train(1, options(given, parts, "--exit-stage=3"))
    assert stopped.returncode == 0 and not (parts / "final.mdl").exists()
    again = train(1, options(given, parts))
    assert again.returncode == 0 and "going on at step" in again.stderr
    np.testing.assert_equal((whole / "final.mdl").read_bytes(), (parts / "final.mdl").read_bytes())
