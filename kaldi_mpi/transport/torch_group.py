"""The learners of one super-learner as a group of torch.distributed: NCCL on GPUs, gloo on CPUs.

On GPUs of one node NCCL sums gradients without leaving device memory. The group finds itself through the world
that it is made from: its rank 0 opens a store and tells the others where. Unlike `World.sum_`, its sums are
in the order that the backend chooses, in the tensor's own type; all ranks still get the same bits.
"""

from __future__ import annotations

import datetime
import socket

import torch
import torch.distributed as distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.world import World

TIMEOUT = datetime.timedelta(minutes=30)  # a collective of which the others hear nothing for so long fails


class TorchGroup:
    """All ranks of `world`, for tensors on `device`. Collective; one such group in a process.

    Args:
        world: the ranks, as made by `World.split`.
        device: where the tensors are; decides the backend.
        timeout: of one collective.

    Raises:
        ConfigError: this torch lacks the backend, or the store cannot be reached.
    """

    def __init__(self, world: World, device: torch.device, timeout: datetime.timedelta = TIMEOUT) -> None:
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
        self._store = store
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor on the group's device by its sum over ranks."""
        distributed.all_reduce(tensor)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by rank 0's."""
        distributed.broadcast(tensor, 0)

    def close(self) -> None:
        """Leave the group; the ranks come here together."""
        distributed.destroy_process_group()
