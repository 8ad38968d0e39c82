"""Checkpoints: what a training that was killed, or stopped, goes on from.

DIR/checkpoint/ holds one file a rank, ``learner.RANK.STEP.pt``, of each of the last checkpoints, and ``current.json``:
their steps, newest first, with each file's SHA-256, and all that decides how the training goes. It is written last,
when all files have been read back, so a kill at any moment leaves a whole checkpoint. A training that ends well removes
the directory.

A run goes on from the newest checkpoint whose files all are what was written, and says so if that is not the newest. It
does not where anything differs that decides how the training goes: it names what, and leaves the checkpoint alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.log import logger
from kaldi_mpi.transport.world import World

# Options that may differ between the run that saved and the run that goes on: they change no result.
_FREE = (
    "dir", "checkpoint_interval", "checkpoints_kept", "resume", "loader_threads", "skip_bad_utterances", "binary",
    "journal", "faults", "stage", "exit_stage", "cleanup", "remove_egs", "preserve_model_interval",
    "compute_per_dim_accuracy",
)  # fmt: skip
_ARRAY = "numpy array"  # marks a tensor that was a NumPy array
_PIECE = 2**20  # bytes
_MOST_NAMED = 8  # differences in a message
_RANKS = "the number of learners"
_REMOVE = "remove {} or give --resume=false to begin anew"

Facts = dict[str, str]


def facts(options: TrainOptions, num_ranks: int, transforms: list[str]) -> Facts:
    """All that decides how a training goes, by name: options, the number of ranks, digests of what is read.

    Args:
        options: of the training.
        num_ranks: learners, and a dedicated server.
        transforms: files that the network reads, ``lda.mat``.

    Raises:
        DataError: a file cannot be read.
    """
    data = {f"--{k}": str(v) for k, v in dataclasses.asdict(options.data).items() if k not in _FREE}
    own = {f"--{k}": str(v) for k, v in dataclasses.asdict(options).items() if k not in (*_FREE, "data")}
    found = {name.replace("_", "-"): value for name, value in (data | own).items()}
    found[_RANKS] = str(num_ranks)
    for name, paths in _files(options, transforms).items():
        if paths:
            found[name] = _digest_of(paths)
    return found


def _files(options: TrainOptions, transforms: list[str]) -> dict[str, list[Path]]:
    """What is read, by what messages call it; of an egs directory what tells of it."""
    data = options.data
    found = {
        "the network": [Path(options.input_model or options.xconfig)],
        "the network's transforms": [Path(path) for path in transforms],
    }
    if data.ali_dir:
        found["the alignments"] = [Path(data.ali_dir, "final.mdl"), *sorted(Path(data.ali_dir).glob("ali.*.gz"))]
    if data.targets_scp and data.egs_dir is None:
        found["the targets"] = [Path(data.targets_scp)]
    if data.egs_dir is not None:
        found["the examples"] = sorted(path for path in Path(data.egs_dir, "info").glob("*") if path.is_file())
    elif data.feat_dir is not None:
        names = ("feats.scp", "utt2spk", "cmvn.scp")
        found["the features"] = [path for name in names if (path := Path(data.feat_dir, name)).exists()]
    return found


def _digest_of(paths: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as stream:
                whole.update(_digest(stream).encode())
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=str(path)) from error
    return whole.hexdigest()


def _digest(stream: IO[bytes]) -> str:
    found = hashlib.sha256()
    while piece := stream.read(_PIECE):
        found.update(piece)
    return found.hexdigest()


class Checkpoints:
    """Those of one training; all ranks make the same calls.

    Args:
        folder: the training's directory.
        world: all ranks, each of which has a state.
        facts: of the training; needed on rank 0 alone.
        kept: how many are kept.
    """

    def __init__(self, folder: Path, world: World, facts: Facts | None, kept: int = 2) -> None:
        self.place = folder / "checkpoint"
        self._world, self._facts, self._kept = world, facts, kept
        self._there: list[dict[str, Any]] = []  # what current.json has; on rank 0
        self.step: int | None = None  # of the one that was loaded

    def _file(self, step: int, rank: int) -> Path:
        return self.place / f"learner.{rank}.{step}.pt"

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write all ranks' states, read them back, make them the newest checkpoint, and drop the oldest.

        Args:
            step: that all ranks have come to.
            state: this rank's.

        Raises:
            DataError: the disk refused, or did not keep what it was given; the checkpoint before is still whole.
        """
        world, path = self._world, self._file(step, self._world.rank)
        if world.rank == 0:
            try:
                self.place.mkdir(exist_ok=True)
            except OSError as error:
                raise DataError(f"cannot write: {error.strerror or error}", file=str(self.place)) from error
        world.barrier()
        buffer = io.BytesIO()
        torch.save({"rank": world.rank, "step": step, "state": _to_tensors(state)}, buffer)
        with atomic_write(path) as stream:
            stream.write(buffer.getbuffer())
        digest = _digest(io.BytesIO(buffer.getvalue()))
        with open(path, "rb") as stream:
            if _digest(stream) != digest:
                raise DataError("what was read back is not what was written", file=str(path))
        digests = world.gather(digest)
        if world.rank == 0:
            self._there = [c for c in self._there if c["step"] != step]
            self._there = [{"step": step, "files": digests}, *self._there][: max(1, self._kept)]
            with atomic_write(self.place / "current.json", "w") as stream:
                json.dump({"step": step, "checkpoints": self._there, "facts": self._facts}, stream, indent=1)
            steps = {f".{c['step']}" for c in self._there}
            for old in self.place.glob("learner.*.pt"):
                if old.suffixes[-2] not in steps:
                    old.unlink()
        world.barrier()

    def load(self) -> Any:
        """This rank's state in the newest checkpoint that is whole; None where there is no checkpoint.

        Raises:
            ConfigError: it is of another training; says in what.
            DataError: none is whole; says why, file by file.
        """
        if self._world.rank == 0:
            self._there = self._read()
        there: list[dict[str, Any]] = self._world.broadcast(self._there)
        complaints: list[str] = []
        for number, one in enumerate(there):
            state, complaint = self._read_state(one["step"], one["files"][self._world.rank])
            found = [each for each in self._world.gather(complaint) if each]
            if not found:
                if complaints and self._world.rank == 0:
                    logger.warning("going on from the checkpoint before, of step %d", one["step"])
                self._there, self.step = there[number:], one["step"]
                return _to_arrays(state)
            complaints += found
            if self._world.rank == 0:
                for line in found:
                    logger.warning("damaged checkpoint: %s", line)
        if complaints:
            raise DataError("\n".join([f"damaged checkpoint; {_REMOVE.format(self.place)}", *complaints]))
        return None

    def _read(self) -> list[dict[str, Any]]:
        """The checkpoints that current.json has, if they are of this training; half-written files go."""
        for path in (*self.place.parent.glob(".*.tmp*"), *self.place.glob(".*.tmp*")):
            if re.fullmatch(r"\..+\.tmp[0-9]+", path.name):
                logger.info("removed %s, left by a run that was killed", path)
                path.unlink(missing_ok=True)
        current = self.place / "current.json"
        if not self.place.exists():
            return []
        if not self.place.is_dir():
            raise DataError("a file where the directory of checkpoints should be; remove it", file=str(self.place))
        if not current.exists():  # a run that was killed before it had its first checkpoint
            return []
        try:
            said = json.loads(current.read_text(encoding="utf-8"))
            there, saved = list(said["checkpoints"]), dict(said["facts"])
            ranks = [len(one["files"]) for one in there]
            assert there and all(isinstance(one["step"], int) for one in there)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            why = f"it is not what a checkpoint has ({type(error).__name__}); {_REMOVE.format(self.place)}"
            raise DataError(why, file=str(current)) from error
        own = self._facts or {}
        other = [name for name in sorted(own | saved) if own.get(name) != saved.get(name)]
        if set(ranks) != {self._world.size} and _RANKS not in other:
            other.append(_RANKS)
        if other:
            lines = [_difference(name, saved.get(name), own.get(name)) for name in other[:_MOST_NAMED]]
            more = f" and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
            raise ConfigError(
                f"{self.place} is of another training ({'; '.join(lines)}{more}): go on as it began, or give another "
                "--dir, or --resume=false, which begins anew and removes it"
            )
        return there

    def _read_state(self, step: int, digest: str) -> tuple[Any, str]:
        """This rank's state, and what is wrong with it, or ""."""
        path = self._file(step, self._world.rank)
        try:
            content = path.read_bytes()
            if _digest(io.BytesIO(content)) != digest:
                return None, f"{path}: its bytes ({len(content)}) are not those that were written"
            saved = torch.load(io.BytesIO(content), weights_only=True)
            if (saved["rank"], saved["step"]) != (self._world.rank, step):
                return None, f"{path}: it is of rank {saved['rank']}, step {saved['step']}"
            return saved["state"], ""
        except OSError as error:
            return None, f"{path}: {error.strerror or error}"
        except (ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            return None, f"{path}: {type(error).__name__}: {str(error).splitlines()[0]}"

    def begin_anew(self) -> None:
        """Forget those that are there, on rank 0."""
        if self._world.rank == 0 and self.place.exists():
            logger.warning("--resume=false: removing %s", self.place)
            self.remove()

    def remove(self) -> None:
        """Forget the checkpoints of a training that has ended; on rank 0."""
        if self.place.is_dir():
            shutil.rmtree(self.place, ignore_errors=True)
        else:
            self.place.unlink(missing_ok=True)


def _difference(name: str, saved: str | None, own: str | None) -> str:
    if name.startswith("the ") and name != _RANKS:
        return f"{name} {'have' if name.endswith('s') else 'has'} changed"
    return f"{name} was {saved}, is {own}"


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
