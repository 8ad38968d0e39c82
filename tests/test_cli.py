"""The command kaldi-mpi: its verbs, what they load, and how their errors reach the user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kaldi_mpi import cli
from tests.paths import REPO
from tests.toy import environment

IN_PROCESS = [name for name in cli.VERBS if name != "train"]  # that one starts MPI


def kaldi_mpi(*words: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kaldi_mpi", *words],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, (_, _, what) in cli.VERBS.items():
        assert f"  {name} " in listed and what in listed
    assert cli.main([]) == 1 and cli.main(["fly"]) == 1
    assert "no verb 'fly'" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", IN_PROCESS)
def test_every_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: kaldi-mpi {name} ")


def test_a_learner_explains_itself() -> None:
    result = kaldi_mpi("train", "--help")
    assert result.returncode == 0 and result.stdout.startswith("usage: kaldi-mpi train "), result.stderr


@pytest.mark.parametrize("name", IN_PROCESS)
def test_what_cannot_be_used_is_one_line_and_status_1(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--no-such-option=1"]) == 1
    line, *others = capsys.readouterr().err.splitlines()
    # Those that train say at once what else is wrong.
    training = cli.VERBS[name][0] == "kaldi_mpi.programs.start"
    assert bool(others) == training and all("is needed" in other for other in others)
    assert line.startswith(f"ERROR (kaldi-mpi-{name}[") and f"kaldi-mpi {name}: " in line


def test_errors_in_the_data_are_one_line_too(tmp_path: Path) -> None:
    for words, message in (
        (["validate-data-dir", "none"], "none: no such directory"),
        (["model-info", "none.mdl"], "none.mdl: "),
        (["best-wer", "none"], "none: it has no wer_* files: was it scored?"),
        (["journal", "none"], "none/journal: no journals"),
        (["launch", "-n", "0", "--", "true"], "--num-learners 0: at least 1 is needed"),
    ):
        result = kaldi_mpi(*words, cwd=tmp_path)
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.startswith(f"ERROR (kaldi-mpi-{words[0]}[") and result.stderr.count("\n") == 1
        assert message in result.stderr


def test_a_verb_loads_no_more_than_it_needs() -> None:
    """PyTorch takes seconds to load; MPI starts with the import."""
    # Those that train check their options, which are the learners'.
    heavy = {"journal", "model-info", *(name for name, verb in cli.VERBS.items() if verb[0].endswith(".start"))}
    light = [name for name in IN_PROCESS if name not in heavy]
    script = (
        "import contextlib, sys\nfrom kaldi_mpi import cli\n"
        f"for name in {light}:\n"
        "    with contextlib.suppress(SystemExit): cli.main([name, '--help'])\n"
        "    assert not {'torch', 'mpi4py'} & set(sys.modules), name\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


def test_no_module_is_a_program_of_its_own() -> None:
    for path in (REPO / "kaldi_mpi").rglob("*.py"):
        assert "__name__ ==" not in path.read_text(), path
