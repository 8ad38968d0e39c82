"""How parameters get from a GPU to another rank: by way of main memory, or by their device address.

An MPI library that is CUDA-aware takes addresses of device memory where any other crashes on them. Open MPI and
MPICH both answer `MPIX_Query_cuda_support`, at run time; where a library has no such function, it is not aware.
Setting KALDI_MPI_CUDA_AWARE to 0 or 1 overrules it, for libraries that err.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from kaldi_mpi.errors import ConfigError

CUDA_AWARE_ENV = "KALDI_MPI_CUDA_AWARE"


def takes_device_pointers() -> bool:
    """Whether the MPI library of this process takes addresses of device memory; starts MPI if need be.

    Raises:
        ConfigError: KALDI_MPI_CUDA_AWARE is neither 0 nor 1.
    """
    said = os.environ.get(CUDA_AWARE_ENV, "")
    if said:
        if said not in ("0", "1"):
            raise ConfigError(f"{CUDA_AWARE_ENV}={said}: expected 0 or 1")
        return said == "1"
    from mpi4py import MPI

    # Looked up through mpi4py's extension, the symbol is found in the library that it is bound to.
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    if query is None:
        return False
    query.restype = ctypes.c_int
    return query() == 1


def device_bytes(tensor: Any) -> Any:
    """The bytes of a contiguous tensor, as a flat uint8 tensor in the same memory."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def describe() -> str:
    """One line for the log: how parameters of a GPU travel between learners that exchange by pairs.

    Pieces are rounded to the wire type and mixed on a stream of their own in either case. Sums over all
    learners (of synchronous strategies) and centres are in main memory always.
    """
    if takes_device_pointers():
        return "exchanged parameters go to MPI by their device addresses (it is CUDA-aware); sums by page-locked memory"
    return "parameters pass through page-locked memory (this MPI library takes no device addresses)"
