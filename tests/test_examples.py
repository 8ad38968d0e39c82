"""Each file of examples/ runs as its header says, and prints what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPO
from tests.toy import make_toy

EXAMPLES = sorted(path.name for path in (REPO / "examples").glob("*.py"))


def run(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, REPO / "examples" / name, *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_loader_alone(tmp_path: Path) -> None:
    """Two epochs of 64 chunks a step, in which each labelled frame comes once."""
    toy = make_toy(tmp_path)
    said = run("loader_alone.py", toy.feat_dir, toy.ali_dir)
    steps = re.findall(
        r"^epoch (\d) step (\d+): features \((\d+), 67, 6\), labels \(\3, 20\), (\d+) labelled", said, re.M
    )
    assert [int(step) for _, step, _, _ in steps] == list(range(len(steps)))
    frames = [sum(int(n) for epoch, _, _, n in steps if int(epoch) == e) for e in (0, 1)]
    assert frames[0] == frames[1] > 1000 and "Counters(" in said


@pytest.mark.parametrize("name", EXAMPLES)
def test_header_tells_how_to_run_it(name: str) -> None:
    header = (REPO / "examples" / name).read_text().split('"""')[1]
    assert len(header.splitlines()) <= 6 and f"python examples/{name}" in header
