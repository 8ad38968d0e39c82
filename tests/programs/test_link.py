"""``kaldi-mpi link``: the link in a recipe's directory, and what is left alone."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

import kaldi_mpi
from kaldi_mpi import cli
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.programs import link
from tests.paths import REPO


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "s5").mkdir()
    (tmp_path / "s5" / "path.sh").touch()
    return tmp_path / "s5"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = cli.main(["link", *words])
    (line,) = capsys.readouterr().err.splitlines()
    return status, line


def test_it_is_made_and_taken_out(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = said(capsys, str(recipe))
    assert status == 0 and line.startswith("LOG ")
    assert os.readlink(recipe / "steps_mpi") == str(REPO / "steps_mpi")
    assert os.access(recipe / "steps_mpi" / "nnet3" / "train_rnn.py", os.X_OK)
    status, line = said(capsys, str(recipe))
    assert status == 0 and "is there already" in line
    status, line = said(capsys, str(recipe), "--remove")
    assert status == 0 and "removed" in line and not os.path.lexists(recipe / "steps_mpi")
    (recipe / "path.sh").unlink()
    (recipe / "steps" / "utils").mkdir(parents=True)
    assert said(capsys, str(recipe))[0] == 0


def test_what_is_not_ours_stays(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = recipe / "steps_mpi"
    for words, says in (
        ([str(tmp_path / "none")], "none: no such directory"),
        ([str(tmp_path)], "not a recipe's directory: it has neither path.sh nor steps/utils"),
        ([str(recipe), "--remove"], "no such link"),
    ):
        status, line = said(capsys, *words)
        assert status == 1 and line.startswith("ERROR ") and says in line
    place.symlink_to(tmp_path)
    assert "is there already, and is not a link to" in said(capsys, str(recipe))[1]
    status, line = said(capsys, str(recipe), "--remove")
    assert status == 1 and f"leads to {tmp_path}, which is not of this installation; it stays" in line
    place.unlink()
    place.symlink_to(tmp_path / "elsewhere")
    assert said(capsys, str(recipe), "--remove")[0] == 1
    place.unlink()
    place.symlink_to(tmp_path / "old" / "steps_mpi")  # an installation that is gone
    assert said(capsys, str(recipe), "--remove")[0] == 0 and not os.path.lexists(place)
    place.mkdir()
    assert "is not a link, and stays" in said(capsys, str(recipe), "--remove")[1]
    assert place.is_dir()


def test_a_recipe_that_cannot_be_written(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    status, line = said(capsys, str(recipe))
    assert status == 1 and line.endswith("steps_mpi: cannot be made: Permission denied")


def test_an_installed_package_has_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wheel's files lie: the package below lib, the scripts below share."""
    share = tmp_path / "share" / "kaldi_mpi" / "steps_mpi"
    share.mkdir(parents=True)
    (share / "train.sh").touch()
    package = tmp_path / "lib" / "kaldi_mpi"
    monkeypatch.setattr(kaldi_mpi, "__file__", str(package / "__init__.py"))

    class Installed(metadata.PathDistribution):
        def read_text(self, filename: object) -> str | None:
            return "kaldi_mpi/cli.py,,\n../share/kaldi_mpi/steps_mpi/train.sh,,\n" if filename == "RECORD" else None

    info = tmp_path / "lib" / "kaldi_mpi-1.dist-info"
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed(info))
    assert link.steps_folder() == share
    monkeypatch.setattr(metadata, "files", lambda _: None)
    with pytest.raises(ConfigError, match="steps_mpi is neither beside"):
        link.steps_folder()
