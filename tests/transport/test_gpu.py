"""Groups of torch.distributed for super-learners, and what is told of device memory."""

from __future__ import annotations

import pytest

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport import gpu
from tests.conftest import in_ranks


@in_ranks(1, 2, 3)
def test_a_group_sums_and_broadcasts(num_ranks: int) -> None:
    import torch

    from kaldi_mpi.transport.gpu import TorchGroup
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    group = TorchGroup(world, torch.device("cpu"))
    assert (group.rank, group.size) == (world.rank, num_ranks)
    tensor = torch.arange(1000.0) * (world.rank + 1)
    group.sum_(tensor)
    assert torch.equal(tensor, torch.arange(1000.0) * (num_ranks * (num_ranks + 1) // 2))
    tensor = torch.full((3,), float(world.rank))
    group.broadcast(tensor)
    assert tensor.tolist() == [0.0, 0.0, 0.0]
    group.close()
    world.close()


@in_ranks(3)
def test_each_part_of_a_split_world_has_its_group(num_ranks: int) -> None:
    import torch

    from kaldi_mpi.transport.gpu import TorchGroup
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    part = world.split(world.rank // 2)
    group = TorchGroup(part, torch.device("cpu"))
    tensor = torch.tensor([float(world.rank)])
    group.sum_(tensor)
    assert tensor.item() == {0: 1.0, 1: 1.0, 2: 2.0}[world.rank]
    group.close()
    world.close()


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch.distributed

    from kaldi_mpi.transport.gpu import TorchGroup
    from kaldi_mpi.transport.world import SoloWorld

    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="on cuda:1 needs torch with nccl"):
        TorchGroup(SoloWorld(), torch.device("cuda", 1))


@in_ranks(1)
def test_device_memory_is_for_libraries_that_say_so(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels of the test matrix are built without CUDA; the environment overrules what a library says."""
    monkeypatch.delenv(gpu.CUDA_AWARE_ENV, raising=False)
    assert not gpu.takes_device_pointers()
    assert gpu.describe().endswith("(this MPI library takes no device addresses)")
    monkeypatch.setenv(gpu.CUDA_AWARE_ENV, "1")
    assert gpu.takes_device_pointers() and "to MPI by their device addresses" in gpu.describe()
    monkeypatch.setenv(gpu.CUDA_AWARE_ENV, "yes")
    with pytest.raises(ConfigError, match="KALDI_MPI_CUDA_AWARE=yes: expected 0 or 1"):
        gpu.takes_device_pointers()
