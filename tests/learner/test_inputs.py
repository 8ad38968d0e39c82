"""What is wrong is told before anything is read that takes long: no alignment is opened for a typing error."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.learner.options import parse
from kaldi_mpi.learner.run import train
from kaldi_mpi.loader.tables import peek_columns
from kaldi_mpi.transport.world import SoloWorld
from tests.toy import FEAT_DIM, Toy, make_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files that are opened from now on."""
    names: list[str] = []

    def watch(original: Callable[..., Any]) -> Callable[..., Any]:
        def spy(path: Any, *args: Any, **kwargs: Any) -> Any:
            names.append(Path(path).name if isinstance(path, str | Path) else "")
            return original(path, *args, **kwargs)

        return spy

    for module in (builtins, os):
        monkeypatch.setattr(module, "open", watch(module.open))
    return names


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (f"dim={FEAT_DIM} name=input", "dim=7 name=input", r"the input has dim=7, but the features have 6"),
        ("dim=5 ", "dim=9 ", r"the output has dim=9, but the tree has 5 pdf-ids"),
        ("cell-dim=8 delay=-1", "cell-dim=8 delay=1.5", r"network\.xconfig"),
        ("fast-lstm-layer name=lstm1", "fast-lstm-leyer name=lstm1", r"network\.xconfig.*fast-lstm-leyer"),
        (f"input dim={FEAT_DIM}", f"input dim=3 name=ivector\ninput dim={FEAT_DIM}", r"i-vector"),
    ],
)
def test_a_wrong_network_is_told_before_alignments_are_read(
    toy: Toy, old: str, new: str, says: str, opened: list[str]
) -> None:
    folder = toy.experiment(f"wrong-{abs(hash((old, new)))}")
    config = folder / "configs" / "network.xconfig"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=says):
        train(parse(toy.options(folder)), SoloWorld())
    assert "ali.1.gz" not in opened
    assert not (folder / "log").exists(), "nothing is written either"


def test_a_right_network_goes_on_to_the_alignments(toy: Toy, opened: list[str]) -> None:
    """Were they opened unseen, the test above would prove nothing."""
    train(parse(toy.options(toy.experiment("right"), "--trainer.num-epochs=0.1")), SoloWorld())
    assert "ali.1.gz" in opened


def test_the_columns_of_the_first_matrix(toy: Toy, tmp_path: Path) -> None:
    assert peek_columns(toy.feat_dir / "feats.scp") == FEAT_DIM
    assert peek_columns(tmp_path / "none.scp") is None
    scp = tmp_path / "feats.scp"
    scp.write_text("a touch ran |\nb /nowhere:3\nc cat ran |\n")
    assert peek_columns(scp) is None and not Path("ran").exists()
    first = (toy.feat_dir / "feats.scp").read_text().splitlines()[0]
    scp.write_text(f"a /nowhere:3\n{first}\n")
    assert peek_columns(scp) == FEAT_DIM


def test_a_missing_file_is_told_first(toy: Toy) -> None:
    with pytest.raises(DataError, match=r"/nowhere: no such directory \(given by --ali-dir\)"):
        train(parse([*toy.options(toy.experiment("no-ali")), "--ali-dir=/nowhere"]), SoloWorld())
