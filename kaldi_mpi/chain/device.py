"""By what the objective is computed on a GPU: Triton's kernels, where they prove themselves.

What a GPU, its driver and a version of Triton make of them is seen on a small case, at the first call for a device;
where that fails or differs, PyTorch's operations do it, and the log says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from kaldi_mpi.log import logger

# What the kernels of a module give of a small case on a device, or PyTorch's operations without a module.
Trial: TypeAlias = Callable[[torch.device, ModuleType | None], list[Tensor]]

_FOUND: dict[tuple[torch.device, str], ModuleType | None] = {}
_TRIALS = 3  # a kernel that is right by chance is hardly so three times


def kernels_for(device: torch.device, name: str, trial: Trial) -> ModuleType | None:
    """The module of kernels, of kaldi_mpi.chain, for a device; None: there are none that are right.

    Args:
        name: of the module, which has ERRORS, the exceptions of a GPU that cannot run them.
        trial: what they are tried with.
    """
    key = device, name
    if key not in _FOUND:
        _FOUND[key] = None
        if device.type == "cuda":
            _FOUND[key] = _loaded(device, name, trial)
    return _FOUND[key]


def _loaded(device: torch.device, name: str, trial: Trial) -> ModuleType | None:
    try:
        kernels = importlib.import_module(f"kaldi_mpi.chain.{name}")
    except ImportError as error:
        _say(device, name, f"no Triton ({error})")
        return None
    return try_kernels(device, kernels, trial)


def try_kernels(device: torch.device, kernels: ModuleType, trial: Trial) -> ModuleType | None:
    """The kernels, if they give what PyTorch's operations give, each time; else None, and the log says why."""
    wanted = trial(device, None)
    try:
        for _ in range(_TRIALS):
            for found, right in zip(trial(device, kernels), wanted, strict=True):
                if not torch.allclose(found, right, rtol=1e-4, atol=1e-4):
                    raise RuntimeError(f"results differ by {(found - right).abs().max().item():g}")
    except kernels.ERRORS as error:
        cause = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
        _say(device, kernels.__name__.rpartition(".")[2], cause)
        return None
    return kernels


def _say(device: torch.device, name: str, cause: str) -> None:
    what = name.removesuffix("_kernels")
    logger.warning(
        "%s on %s by PyTorch's operations, several times slower: Triton's kernels cannot be used: %s",
        what,
        device,
        cause,
    )
