"""Checkpoints: what a killed training goes on from.

DIR/checkpoint/ holds one file a learner, ``learner.RANK.STEP.pt``, and ``current.json``, which names the step
that is complete on all ranks. It is written last, so a kill at any moment leaves a whole checkpoint, the
new one or the one before. A training that ends well removes the directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.log import logger
from kaldi_mpi.transport.world import World

# Options that may differ between the run that saved and the run that goes on: they change no result.
_FREE = (
    "dir", "checkpoint_interval", "resume", "loader_threads", "skip_bad_utterances", "binary", "journal", "faults",
    "stage", "exit_stage", "cleanup", "remove_egs", "preserve_model_interval", "compute_per_dim_accuracy",
)  # fmt: skip


_ARRAY = "numpy array"  # marks a tensor that was a NumPy array


def fingerprint(options: TrainOptions, size: int) -> str:
    """A digest of all that decides how a training goes: options, network, number of ranks."""
    fields = {k: v for k, v in dataclasses.asdict(options).items() if k not in _FREE}
    fields["data"] = {k: v for k, v in fields["data"].items() if k not in _FREE}
    network = Path(options.input_model or options.xconfig).read_bytes()
    text = json.dumps([fields, hashlib.sha256(network).hexdigest(), size], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save(folder: Path, fingerprint: str, world: World, step: int, state: Mapping[str, Any]) -> None:
    """Write all ranks' states, then make them the current checkpoint, then drop the one before.

    Args:
        folder: the training's directory.
        fingerprint: of the training.
        world: all ranks, each of which has a state.
        step: that all ranks have come to.
        state: this rank's.

    Raises:
        DataError: the disk refused; the checkpoint before is still whole.
    """
    place = folder / "checkpoint"
    if world.rank == 0:
        place.mkdir(exist_ok=True)
    world.barrier()
    with atomic_write(place / f"learner.{world.rank}.{step}.pt") as stream:
        torch.save(_to_tensors(state), stream)
    world.barrier()
    if world.rank == 0:
        with atomic_write(place / "current.json", "w") as stream:
            json.dump({"step": step, "fingerprint": fingerprint}, stream)
        for old in place.glob("learner.*.pt"):
            if old.suffixes[-2] != f".{step}":
                old.unlink()
    world.barrier()


def load(folder: Path, fingerprint: str, world: World) -> Any:
    """This rank's state in the current checkpoint; None where there is none.

    A checkpoint of another configuration is left alone, with a warning, and the training starts anew.

    Raises:
        DataError: the checkpoint is damaged.
    """
    place = folder / "checkpoint"
    current = place / "current.json"
    if not world.broadcast(current.exists()):
        return None
    try:
        saved = json.loads(current.read_text(encoding="utf-8"))
        if saved["fingerprint"] != fingerprint:
            if world.rank == 0:
                logger.warning("%s is of another configuration or number of learners; starting anew", place)
            return None
        state = torch.load(place / f"learner.{world.rank}.{saved['step']}.pt", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise DataError(
            f"damaged checkpoint ({type(error).__name__}); remove the directory or give --resume=false", file=str(place)
        ) from error
    return _to_arrays(state)


def _to_tensors(state: Any) -> Any:
    """The same state with marked tensors for NumPy's arrays, which PyTorch's safe loading does not take."""
    if isinstance(state, np.ndarray):
        return {_ARRAY: torch.from_numpy(np.ascontiguousarray(state))}
    if isinstance(state, dict):
        return {key: _to_tensors(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_to_tensors(value) for value in state]
    return state


def _to_arrays(state: Any) -> Any:
    """The inverse of `_to_tensors`."""
    if isinstance(state, dict):
        return state[_ARRAY].numpy() if _ARRAY in state else {key: _to_arrays(value) for key, value in state.items()}
    return [_to_arrays(value) for value in state] if isinstance(state, list) else state


def remove(folder: Path) -> None:
    """Forget the checkpoint of a training that has ended."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
