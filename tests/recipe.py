"""The digits recipe, run once a test session on a few minutes of synthetic speech, without Kaldi."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPO

# Enough for a model whose decoding is stable, little enough for a test.
OPTIONS = ["--hours", "0.2", "--test-hours", "0.05", "--num-epochs", "8", "--num-learners", "2", "--nj", "2"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe that has been run: `folder` is its s5 directory, `output` what it printed."""

    folder: Path
    output: str

    def run(self, *command: str, kaldi: bool = False, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command in s5 with the recipe's path.sh; `kaldi` keeps KALDI_ROOT."""
        return subprocess.run(
            ["bash", "-c", '. ./path.sh && exec "$@"', "bash", *command],
            cwd=self.folder, env=recipe_environment(kaldi),
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip


def recipe_environment(kaldi: bool) -> dict[str, str]:
    """The environment of a user who has activated the tests' Python."""
    environment = {k: v for k, v in os.environ.items() if k not in ("KALDI_ROOT", "PYTHONPATH")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["VIRTUAL_ENV"] = sys.prefix
    if kaldi:
        environment["KALDI_ROOT"] = os.environ["KALDI_ROOT"]
    return environment


def copy_recipe(root: Path) -> Path:
    """Lay out a project tree in `root` with a copy of the recipe's own files; returns its s5 directory."""
    s5 = root / "egs" / "digits" / "s5"
    s5.mkdir(parents=True)
    for name in ("run.sh", "path.sh", "cmd.sh", "conf", "local"):
        source = REPO / "egs" / "digits" / "s5" / name
        shutil.copytree(source, s5 / name) if source.is_dir() else shutil.copy2(source, s5 / name)
    for name in ("steps_mpi", "kaldi_mpi"):
        (root / name).symlink_to(REPO / name)
    return s5


def run_recipe(s5: Path, *options: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """run.sh without Kaldi."""
    return subprocess.run(
        ["./run.sh", *options],
        cwd=s5, env=recipe_environment(False), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe from audio to word error rates."""
    for module in ("espeakng_loader", "kaldi_hmm_gmm"):
        pytest.importorskip(module, reason=f"the recipe without Kaldi needs {module}", exc_type=ImportError)
    s5 = copy_recipe(tmp_path_factory.mktemp("recipe"))
    result = run_recipe(s5, *OPTIONS)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return Recipe(s5, result.stdout)
