"""Published models whose bytes MPI takes from, and brings to, where the tensors are: the way of CUDA-aware libraries.

On CPU tensors, which mpi4py takes by the same protocol as those of a device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kaldi_mpi.averaging import Asynchronous, Participant, make_strategy
from kaldi_mpi.averaging.journal import Journal, JournalEvent
from kaldi_mpi.averaging.published_device import DevicePublishedModel
from tests.conftest import in_ranks

DIM, STEPS = 5000, 12


@in_ranks(3)
@pytest.mark.parametrize(("name", "wire"), [("adpsgd-random", "float32"), ("expair", "bfloat16")])
def test_tensors_travel_without_a_copy_in_main_memory(
    num_ranks: int, name: str, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    rng = np.random.default_rng([world.rank, 5])
    start = torch.from_numpy(rng.standard_normal(DIM).astype(np.float32))
    published, journal = DevicePublishedModel(start, 700, wire, direct=True), Journal()
    strategy = make_strategy(name, world)
    assert isinstance(strategy, Asynchronous)
    arrived: list[type] = []
    receive = strategy.receive

    def watched(source: int, numbers: Sequence[int], payload: Any) -> None:
        arrived.append(type(payload))
        receive(source, numbers, payload)

    monkeypatch.setattr(strategy, "receive", watched)
    participant = Participant(strategy, published, world.messages, journal)
    participant.connect()
    world.barrier()
    total, copy = start.double(), torch.zeros(DIM)
    for _ in range(STEPS):
        change = torch.from_numpy(rng.standard_normal(DIM).astype(np.float32))
        total += change.double()
        participant.publish(change, copy, 1)
        time.sleep(0.005 * (1 + 3 * (world.rank == 1)))
    participant.leave()
    participant.settle()
    world.barrier()
    events = journal.records()["event"]
    assert np.isin(events, (JournalEvent.MIX, JournalEvent.CROSS, JournalEvent.ANSWER)).sum() > 10
    assert set(arrived) == {torch.Tensor}
    mean = world.sum_float64(published.to_numpy().astype(np.float64)) / world.size
    want = world.sum_float64(total.numpy()) / world.size
    np.testing.assert_allclose(mean, want, rtol=0, atol=2e-6 * np.abs(want).max())
    world.close()
