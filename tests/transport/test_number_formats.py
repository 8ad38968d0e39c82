"""Numbers as they travel: each narrow type rounds as PyTorch's of that name does, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kaldi_mpi.transport import number_formats
from kaldi_mpi.transport.number_formats import WIRE_TYPES, from_wire, quantized, rounded, to_wire


def numbers() -> NDArray[np.float32]:
    """Of all sizes, with ties, the largest that a type holds and the smallest."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(5000) * 10.0 ** rng.integers(-8, 5, 5000)
    ties = (np.arange(256, dtype=np.uint32) << 16 | 0x3F808000).view(np.float32)
    return np.concatenate([spread, ties, [0.0, -0.0, 1e-40, 65504.0, np.inf, -np.inf]]).astype(np.float32)


@pytest.mark.parametrize("wire", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_ties_to_even(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_formats, "_BLOCK", 777)
    values = numbers() if wire == "bfloat16" else np.clip(numbers(), -65504, 65504)
    want = torch.from_numpy(values).to(getattr(torch, wire))
    travelling = quantized(values, wire)
    assert travelling.dtype == WIRE_TYPES[wire] and travelling.tobytes() == want.view(torch.int16).numpy().tobytes()
    assert rounded(values, wire).tobytes() == want.float().numpy().tobytes()
    into = np.zeros(values.size, WIRE_TYPES[wire])
    to_wire(values, into)
    assert into.tobytes() == travelling.tobytes()


def test_float32_travels_as_it_is() -> None:
    values = numbers()
    assert from_wire(values) is values
    copy = rounded(values, "float32")
    assert copy.tobytes() == values.tobytes() and not np.shares_memory(copy, values)
