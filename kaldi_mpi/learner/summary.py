"""The figures of a whole training in one small file, DIR/log/summary.json, for tables and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kaldi_mpi.files import atomic_write


class Summary:
    """Collects the validations and, at the end, speed and communication.

    The file has ``validations`` (name, valid and train log-probability per frame, spread: the models' mean
    squared distance from their mean), ``seconds`` and ``frames`` of the (last) run, and ``learners``: for each
    its own frames, seconds waited for other learners and for data, averagings and bytes sent.
    """

    def __init__(self) -> None:
        self._validations: list[dict[str, Any]] = []
        self._end: dict[str, Any] = {}

    def validation(self, name: int | str, valid: float, train: float, spread: float | None) -> None:
        """Take down one validation."""
        self._validations.append({"iteration": name, "valid": valid, "train": train, "spread": spread})

    def last_valid(self) -> float | None:
        """The log-probability per frame of the last validation, None before the first."""
        return self._validations[-1]["valid"] if self._validations else None

    def finish(self, seconds: float, frames: int, by_learner: Sequence[Mapping[str, float]]) -> None:
        """Take down the end of a run: its seconds of training and its frames over all learners."""
        self._end = {"seconds": seconds, "frames": frames, "learners": [dict(figures) for figures in by_learner]}

    def write(self, path: Path, **more: Any) -> None:
        """Write it all as JSON, with `more` beside."""
        with atomic_write(path, "w") as stream:
            json.dump(more | self._end | {"validations": self._validations}, stream, indent=1)
            stream.write("\n")

    def state_dict(self) -> list[dict[str, Any]]:
        """The validations so far."""
        return list(self._validations)

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take back what `state_dict` gave."""
        self._validations = list(state)
