"""How parameters get from a GPU to another rank: by way of main memory, by their device address, or by NCCL.

An MPI library that is CUDA-aware takes addresses of device memory where any other crashes on them. Setting
KALDI_MPI_CUDA_AWARE to 0 or 1 overrules what the library says of itself.

The learners of one super-learner sum their gradients by `TorchGroup`, which on GPUs of one node does not leave device
memory. PyTorch is imported where it is used: a learner on CPUs talks without it.
"""

from __future__ import annotations

import datetime
import os
import socket
from typing import TYPE_CHECKING

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.world import World

if TYPE_CHECKING:
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

CUDA_AWARE_ENV = "KALDI_MPI_CUDA_AWARE"
TIMEOUT = datetime.timedelta(minutes=30)  # a collective of which the others hear nothing for so long fails


def takes_device_pointers() -> bool:
    """Whether the MPI library of this process takes addresses of device memory; starts MPI if need be.

    Raises:
        ConfigError: KALDI_MPI_CUDA_AWARE is neither 0 nor 1.
    """
    setting = os.environ.get(CUDA_AWARE_ENV, "")
    if setting:
        if setting not in ("0", "1"):
            raise ConfigError(f"{CUDA_AWARE_ENV}={setting}: expected 0 or 1")
        return setting == "1"
    from kaldi_mpi.transport.mpi import is_cuda_aware

    return is_cuda_aware()


def describe() -> str:
    """One line for the log: how parameters of a GPU travel between learners that exchange by pairs.

    Pieces are rounded to the wire type and mixed on a stream of their own in either case. Sums over all
    learners (of synchronous strategies) and centres are in main memory always.
    """
    if takes_device_pointers():
        return "exchanged parameters go to MPI by their device addresses (it is CUDA-aware); sums by page-locked memory"
    return "parameters pass through page-locked memory (this MPI library takes no device addresses)"


class TorchGroup:
    """All ranks of `world` as a group of torch.distributed, for tensors on `device`.

    Made by all of them together; one such group in a process. It finds itself through `world`: its rank 0 opens a
    store and tells the others where. Unlike `World.sum_`, its sums are in the order that the backend chooses, in the
    tensor's own type; all ranks still get the same bits.

    Args:
        world: the ranks, as made by `World.split`.
        device: where the tensors are; decides the backend.
        timeout: of one collective.

    Raises:
        ConfigError: this torch lacks the backend, or the store cannot be reached.
    """

    def __init__(self, world: World, device: torch.device, timeout: datetime.timedelta = TIMEOUT) -> None:
        import torch.distributed as distributed
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

        self.rank, self.size, self.device = world.rank, world.size, device
        backend = "nccl" if device.type == "cuda" else "gloo"
        there = distributed.is_nccl_available() if backend == "nccl" else distributed.is_gloo_available()
        if not all(world.gather(bool(there))):
            raise ConfigError(f"a group of learners on {device} needs torch with {backend}, which this one lacks")
        hosts = world.gather(socket.gethostname())
        host = "127.0.0.1" if len(set(hosts)) == 1 else socket.getfqdn()
        store: TCPStore | None = None
        where: tuple[str, int] | str = ""
        if self.rank == 0:
            try:
                store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
                where = (host, store.port)
            except RuntimeError as error:
                where = f"cannot open a port on {host}: {error}"
        where = world.broadcast(where)
        if isinstance(where, str):
            raise ConfigError(where)
        if store is None:
            try:
                store = TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timeout)
            except RuntimeError as error:
                raise ConfigError(f"cannot reach {where[0]} port {where[1]}: {error}") from error
        self._store, self._distributed = store, distributed
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor on the group's device by its sum over ranks."""
        self._distributed.all_reduce(tensor)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by rank 0's."""
        self._distributed.broadcast(tensor, 0)

    def close(self) -> None:
        """Leave the group; the ranks come here together."""
        self._distributed.destroy_process_group()
