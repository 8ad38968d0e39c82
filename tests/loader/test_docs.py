"""The Python of docs/loader.md runs as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.loader_data import random_matrix, write_archive
from tests.paths import REPO, golden


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (REPO / "docs" / "loader.md").read_text("utf-8"), re.M | re.S)


def lay_out(folder: Path) -> tuple[int, int]:
    """The folders that the page names, alignments and egs being a real Kaldi's; labelled frames of corpus and egs."""
    for name in ("data/train", "exp/tri3_ali", "exp/lstm/egs/info"):
        (folder / name).mkdir(parents=True)
    rng, objects = np.random.default_rng(0), {}
    for line in golden("ali.txt").read_text("utf-8").splitlines():
        key, *tids = line.split()
        objects[key], _ = random_matrix(rng, "CM", len(tids), 40)
    write_archive(folder / "data/train", "feats", objects)
    shutil.copy(golden("trans.mdl"), folder / "exp/tri3_ali/final.mdl")
    shutil.copy(golden("ali.ark"), folder / "exp/tri3_ali/ali.1")
    shutil.copy(golden("egs.ark"), folder / "exp/lstm/egs/egs.1.ark")
    aligned = sum(len(line.split()) - 1 for line in golden("ali.txt").read_text("utf-8").splitlines())
    in_egs = sum(int(rows) for rows in re.findall(r" rows=(\d+) ", golden("egs.txt").read_text("utf-8")))
    return aligned, in_egs


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    frames, frames_in_egs = lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    from_features, from_egs = snippets()
    exec(compile(from_features, "docs/loader.md", "exec"), {})
    *minibatches, counters = capsys.readouterr().out.splitlines()
    assert sum(int(line.split()[-1]) for line in minibatches) == 2 * frames
    assert all(re.fullmatch(r"[01] \d+ \(\d+, 67, 40\) \(\d+, 20\) \d+", line) for line in minibatches)
    assert f"frames={2 * frames}" in counters
    exec(compile(from_egs, "docs/loader.md", "exec"), {})
    assert capsys.readouterr().out == f"{frames_in_egs} frames\n"
