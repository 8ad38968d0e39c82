"""The preconditioner against a real Kaldi's, call by call (golden/training/preconditioner)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kaldi_mpi.models.natural_gradient import NaturalGradient
from tests.paths import golden

FOLDER = "training/preconditioner"
CASES = [
    *["plain", "wide", "zeros_first", "few_rows", "minibatches", "frozen", "rank_too_high", "one_column"],
    "big_history_step",
]


def matrices(name: str) -> dict[str, NDArray[np.float32]]:
    from kaldi_native_io import SequentialFloatMatrixReader

    path = golden(f"{FOLDER}/{name}")
    with SequentialFloatMatrixReader(f"ark:{path}") as reader:
        return {key: np.array(value) for key, value in reader}


def settings(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads(golden(f"{FOLDER}/cases.json").read_text())[name]
    return case


@pytest.mark.parametrize("name", CASES)
def test_each_call_is_kaldis(name: str) -> None:
    case, given, wanted = settings(name), matrices(f"{name}.in.ark"), matrices(f"{name}.out.ark")
    frozen, spread = case.pop("frozen"), case.pop("spread")
    ours = NaturalGradient(**case)
    tolerance = max(5 * spread, 2e-6)
    for index, (key, rows) in enumerate(sorted(given.items())):
        ours.frozen = frozen[index : index + 1] == "1"
        out = ours(torch.from_numpy(rows)).numpy()
        theirs = wanted[f"{key}-y"]
        assert np.abs(out - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-30), key
        assert np.linalg.norm(out) == pytest.approx(np.linalg.norm(rows), rel=1e-5)
        if name != "one_column":
            state = wanted[f"{key}-state"].reshape(-1)
            assert ours.calls == round(float(state[1]))
            # Of rank D - 1, rho is what is left over of the trace: mostly rounding.
            rel = 2e-3 if name == "rank_too_high" else max(20 * spread, 1e-4)
            assert ours.rho == pytest.approx(state[2], rel=rel), key
