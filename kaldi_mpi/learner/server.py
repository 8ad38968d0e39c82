"""The rank that only keeps the centre (``--dedicated-server``): it has no data and no learner's loop.

Its communication thread answers the learners, as theirs do; its main thread follows the first learner, which
tells it at each point where all ranks meet what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kaldi_mpi.averaging import Asynchronous, Participant, Settings, Strategy
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published_device import make_published
from kaldi_mpi.learner.checkpoint import Checkpoints
from kaldi_mpi.learner.snapshots import Snapshots
from kaldi_mpi.transport.world import World


def command_server(everyone: World, dedicated: bool, command: str, *arguments: Any) -> None:
    """Called by all learners: say to the server, where there is one, what comes next."""
    if dedicated:
        everyone.broadcast((command, arguments) if everyone.rank == 0 else None)


class Server:
    """The last rank of `everyone`.

    Args:
        everyone: learners and server.
        strategies: of the training's phases; None: one without a centre.
        settings: of the strategies.
        folder: the training's directory.
        checkpoints: of the training.
        journal: whether exchanges are journaled.
    """

    def __init__(
        self,
        everyone: World,
        strategies: Sequence[Strategy | None],
        settings: Settings,
        folder: Path,
        checkpoints: Checkpoints,
        journal: bool,
    ) -> None:
        self._everyone, self._strategies, self._settings = everyone, strategies, settings
        self._folder, self._checkpoints, self._journal = folder, checkpoints, journal

    def run(self) -> str:
        """Serve until the training's end; returns why it has been stopped before, or ""."""
        if (saved := self._checkpoints.load()) is not None:
            for strategy, state in zip(self._strategies, saved["strategies"], strict=True):
                if strategy is not None:
                    strategy.load_state_dict(state)
        while True:
            command, arguments = self._everyone.broadcast(None)
            if command == "end":
                return str(arguments[0])
            if command == "save":
                self._save(*arguments)
            else:
                assert command == "start", f"told to {command} outside a phase"
                self._serve_phase(*arguments)

    def _serve_phase(self, number: int, is_new: bool, values: Any) -> None:
        everyone, settings = self._everyone, self._settings
        strategy = self._strategies[number]
        assert isinstance(strategy, Asynchronous)
        published = make_published(torch.from_numpy(values), settings.piece_size, settings.transfer_dtype)
        path = self._folder / "journal" / f"learner.{everyone.rank}" if self._journal else None
        journal = Journal(path, wanted=path is not None)
        participant = Participant(strategy, published, everyone.messages, journal)
        snapshots = Snapshots(everyone.messages, strategy, published, lambda _: None, lambda *_: None)
        participant.connect()
        snapshots.attach()
        everyone.barrier()
        while True:
            command, arguments = everyone.broadcast(None)
            if command == "meet":
                everyone.barrier()
            elif command == "mean":
                strategy.mean_model(values)
            elif command == "finish":
                strategy.finish(values)
            elif command == "save":
                self._save(*arguments)
            else:
                break
        snapshots.detach()
        participant.disconnect()
        journal.close()

    def _save(self, step: int) -> None:
        states = [strategy.state_dict() if strategy is not None else None for strategy in self._strategies]
        self._checkpoints.save(step, {"strategies": states})
