"""The rank that only keeps the centre (``--dedicated-server``): it has no data and no learner's loop.

Its communication thread answers the learners, as theirs do; its main thread follows the first learner, which
tells it at each point where all ranks meet what comes next.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kaldi_mpi.averaging import Asynchronous, Participant, Settings, Strategy
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published_device import make_published
from kaldi_mpi.learner.checkpoint import Checkpoints
from kaldi_mpi.learner.members import Members
from kaldi_mpi.learner.snapshots import Snapshots
from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.world import World


def command_server(everyone: World, dedicated: bool, command: str, *arguments: Any) -> None:
    """Called by all learners, of which the first says to the server, where there is one, what comes next.

    By a message, which does not go through the hands of a learner that is lost.
    """
    messages = everyone.messages
    if dedicated and messages.rank == 0:
        data = np.frombuffer(pickle.dumps((command, arguments)), np.uint8)
        messages.post(lambda: messages.send(Channel.SERVER, messages.size - 1, (), data))


class Server:
    """The last rank of `everyone`.

    Args:
        everyone: learners and server.
        strategies: of the training's phases; None: one without a centre.
        settings: of the strategies.
        folder: the training's directory.
        checkpoints: of the training.
        journal: whether exchanges are journaled.
        lost_after: see `Members`.
    """

    def __init__(
        self,
        everyone: World,
        strategies: Sequence[Strategy | None],
        settings: Settings,
        folder: Path,
        checkpoints: Checkpoints,
        journal: bool,
        lost_after: float,
    ) -> None:
        self._everyone, self._strategies, self._settings = everyone, strategies, settings
        self._folder, self._checkpoints, self._journal, self._lost_after = folder, checkpoints, journal, lost_after
        self._rank = everyone.rank
        self._commands: deque[tuple[str, tuple[Any, ...]]] = deque()

    def run(self) -> str:
        """Serve until the training's end; returns why it has been stopped before, or ""."""
        if (saved := self._checkpoints.load()) is not None:
            for strategy, state in zip(self._strategies, saved["strategies"], strict=True):
                if strategy is not None:
                    strategy.load_state_dict(state)
        self._everyone.messages.on_message(
            Channel.SERVER, lambda _source, _numbers, data: self._commands.append(pickle.loads(data.tobytes()))
        )
        while True:
            command, arguments = self._next()
            if command == "end":
                self._everyone.messages.on_message(Channel.SERVER, None)
                return str(arguments[0])
            if command == "save":
                self._save(*arguments)
            elif command == "wait":
                self._checkpoints.wait()
            elif command == "shrink":
                self._everyone.shrink(*arguments)
            else:
                assert command == "start", f"told to {command} outside a phase"
                self._serve_phase(*arguments)

    def _next(self) -> tuple[str, tuple[Any, ...]]:
        self._everyone.messages.wait(lambda: bool(self._commands))
        return self._commands.popleft()

    def _serve_phase(self, number: int, values: Any) -> None:
        everyone, settings = self._everyone, self._settings
        strategy = self._strategies[number]
        assert isinstance(strategy, Asynchronous)
        published = make_published(torch.from_numpy(values), settings.piece_size, settings.transfer_dtype)
        strategy.forget_exchanges()  # of a checkpoint
        path = self._folder / "journal" / f"learner.{self._rank}" if self._journal else None
        journal = Journal(path, wanted=path is not None)
        names = everyone.gather(f"the server on {os.uname().nodename}")
        members = Members(
            everyone.messages, strategy.num_learners, strategy, published, names, self._lost_after
        )  # fmt: skip
        participant = Participant(strategy, published, members.messages, journal)
        snapshots = Snapshots(members.messages, strategy, published)
        participant.connect()
        snapshots.attach()
        members.attach()
        everyone.barrier()
        while True:
            command, arguments = self._next()
            if command == "meet":
                everyone.barrier()
            elif command == "shrink":
                everyone.shrink(*arguments)
            elif command == "mean":
                strategy.mean_model(values)
            elif command == "finish":
                strategy.finish(values)
            elif command == "save":
                self._save(*arguments)
            elif command == "wait":
                self._checkpoints.wait()
            else:
                break
        snapshots.detach()
        participant.disconnect()
        members.detach()
        journal.close()

    def _save(self, step: int) -> None:
        states: list[Any] = []

        def take() -> None:  # between two messages
            states.extend(strategy.state_dict() if strategy is not None else None for strategy in self._strategies)

        messages = self._everyone.messages
        messages.post(take)
        messages.wait(lambda: bool(states))
        self._checkpoints.save(step, {"strategies": states})
