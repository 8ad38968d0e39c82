"""What is wrong is told before anything is read that takes long: no alignment is opened for a typing error."""

from __future__ import annotations

import builtins
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
    toy: Toy, old: str, new: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = toy.experiment(f"wrong-{abs(hash((old, new)))}")
    config = folder / "configs" / "network.xconfig"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new, 1))
    opened: list[str] = []
    original = builtins.open

    def spy(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(path).name if isinstance(path, str | Path) else "")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    with pytest.raises(ConfigError, match=says):
        train(parse(toy.options(folder)), SoloWorld())
    assert not [name for name in opened if name.startswith("ali.")]
    assert not (folder / "log").exists(), "nothing is written either"


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
