"""The examples of averaging run, and say what they should."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.paths import REPO
from tests.toy import environment


def said(example: str, *arguments: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(REPO / "examples" / example), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("size", [2, 3, 4])
def test_an_exchange_over_threads_brings_models_closer(size: int) -> None:
    lines = said("exchange_over_threads.py", str(size)).splitlines()
    assert len(lines) == size + 1
    numbers = [[float(number) for number in re.findall(r"\d+\.\d*", line)] for line in lines]
    before, after = [row[0] for row in numbers[:-1]], [row[-1] for row in numbers[:-1]]
    assert before == [10.0 * rank for rank in range(size)]
    assert max(after) - min(after) < max(before) - min(before)
    assert numbers[-1][-1] == pytest.approx(numbers[-1][0], rel=1e-5), "the mean has moved"


def test_a_strategy_of_ones_own_equals_its_formula() -> None:
    text = said("own_strategy.py")
    difference = re.search(r"largest difference from the formula: (\S+)", text)
    distance = re.search(r"distance of the models from their mean: (\S+)", text)
    assert difference is not None and float(difference[1]) < 1e-5
    assert distance is not None and float(distance[1]) > 0.05, "all is sent, not only the largest changes"
