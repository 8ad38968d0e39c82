"""Each file of examples/ runs as its header says, and prints what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("num_learners", [2, 3, 4])
def test_an_exchange_over_threads_brings_models_closer(num_learners: int) -> None:
    """Their mean stays."""
    *learners, mean = run("exchange_over_threads.py", str(num_learners)).splitlines()
    models = np.array([[vector_of(side) for side in line.split(" -> ")] for line in learners])
    assert models.shape == (num_learners, 2, 3) and np.array_equal(models[:, 0, 0], 10.0 * np.arange(num_learners))
    before, after = (vector_of(side) for side in mean.split(" -> "))
    np.testing.assert_allclose(before, models[:, 0].mean(0))
    np.testing.assert_allclose(after, before, rtol=1e-6)
    assert np.ptp(models[:, 1], axis=0).max() < np.ptp(models[:, 0], axis=0).min()


def vector_of(text: str) -> list[float]:
    return [float(word) for word in text[text.index("[") + 1 : text.index("]")].split()]


def test_a_strategy_of_ones_own_equals_its_formula() -> None:
    """It compares itself with its formula; what it sends is not everything, so the models stay apart."""
    said = run("own_strategy.py")
    difference, distance = (float(line.rpartition(" ")[2]) for line in said.splitlines())
    assert difference < 1e-5 and distance > 0.05


@pytest.mark.parametrize("name", EXAMPLES)
def test_header_tells_how_to_run_it(name: str) -> None:
    header = (REPO / "examples" / name).read_text().split('"""')[1]
    assert len(header.splitlines()) <= 6 and f"python examples/{name}" in header
