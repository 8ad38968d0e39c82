"""What decides how a training goes, by name: a checkpoint is gone on from only where all of it is the same."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import IO

from kaldi_mpi.errors import DataError
from kaldi_mpi.learner.options import TrainOptions

# Options that may differ between the run that saved and the run that goes on: they change no result.
_FREE = (
    "dir", "checkpoint_interval", "checkpoint_minutes", "checkpoints_kept", "lost_after", "resume", "loader_threads",
    "skip_bad_utterances", "binary", "journal", "faults", "stage", "exit_stage", "cleanup", "remove_egs",
    "preserve_model_interval", "compute_per_dim_accuracy",
)  # fmt: skip
_PIECE = 2**20  # bytes
RANKS = "the number of learners"

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
    found[RANKS] = str(num_ranks)
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
                whole.update(digest_of(stream).encode())
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=str(path)) from error
    return whole.hexdigest()


def digest_of(stream: IO[bytes]) -> str:
    """SHA-256 of what is left of a stream, in hexadecimal digits."""
    found = hashlib.sha256()
    while piece := stream.read(_PIECE):
        found.update(piece)
    return found.hexdigest()


def difference(name: str, saved: str | None, own: str | None) -> str:
    """One fact that is not the same, for a message."""
    if name.startswith("the ") and not name.startswith(RANKS):
        return f"{name} {'have' if name.endswith('s') else 'has'} changed"
    return f"{name} was {saved}, is {own}"
