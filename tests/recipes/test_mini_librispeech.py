"""The chain recipe of mini_librispeech is Kaldi's with one line changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import REPO, kaldi_root

SCRIPT = REPO / "egs/mini_librispeech/s5/local/kaldi_mpi/run_tdnn_chain.sh"
RECIPE = """\
#!/usr/bin/env bash
echo "recipe $*"
if true; then
  steps/nnet3/chain/train.py --stage "$1" \\
    --dir exp/x
fi
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *words], cwd=folder, capture_output=True, text=True, check=False)


def recipe(folder: Path, text: str) -> Path:
    place = folder / "local/chain/tuning/run_tdnn_1k.sh"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return place


def test_our_program_is_called_with_the_recipes_words(tmp_path: Path) -> None:
    nothing = run(tmp_path)
    assert nothing.returncode == 1 and "no local/chain/tuning/run_tdnn_1k.sh here" in nothing.stderr
    place = recipe(tmp_path, RECIPE)
    unlinked = run(tmp_path)
    assert unlinked.returncode == 1 and "kaldi-mpi link" in unlinked.stderr
    program = tmp_path / "steps_mpi/nnet3/chain/train.py"
    program.parent.mkdir(parents=True)
    program.write_text('#!/usr/bin/env bash\necho "ours $*"\n')
    program.chmod(0o755)
    done = run(tmp_path, "17", "more")
    assert done.returncode == 0 and done.stdout.splitlines() == ["recipe 17 more", "ours --stage 17 --dir exp/x"]
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    recipe(tmp_path, RECIPE * 2)
    assert "2 times, and once is expected" in run(tmp_path).stderr


@pytest.mark.kaldi
def test_kaldis_recipe_has_the_line(tmp_path: Path) -> None:
    """Run by a shell that only reads: the changed recipe differs in this line alone."""
    original = kaldi_root() / "egs/mini_librispeech/s5/local/chain/tuning/run_tdnn_1k.sh"
    place = recipe(tmp_path, "")
    shutil.copy(original, place)
    lines = original.read_text().splitlines()
    assert sum(line.lstrip().startswith("steps/nnet3/chain/train.py ") for line in lines) == 1
    program = tmp_path / "steps_mpi/nnet3/chain/train.py"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    # `bash FILE` is this one, which shows the file.
    shell = tmp_path / "bin" / "bash"
    shell.parent.mkdir()
    shell.write_text('#!/bin/sh\ncase "$1" in *.kaldi_mpi.*) cat "$1";; *) exec /bin/bash "$@";; esac\n')
    shell.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", str(SCRIPT)], cwd=tmp_path, env={"PATH": f"{shell.parent}:/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    changed = [(a, b) for a, b in zip(lines, done.stdout.splitlines(), strict=True) if a != b]
    assert len(changed) == 1
    assert changed[0][1] == changed[0][0].replace("steps/nnet3/chain/train.py", "steps_mpi/nnet3/chain/train.py")
