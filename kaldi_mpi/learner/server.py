"""The rank that only keeps the centre (``--dedicated-server``): it has no data and no learner's loop.

Its communication thread answers the learners, as theirs do; its main thread follows the first learner, which
tells it at each point where all ranks meet what comes next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kaldi_mpi.averaging import make_strategy
from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published_device import make_published
from kaldi_mpi.averaging.settings import CENTRES
from kaldi_mpi.learner import checkpoint
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.learner.snapshots import Snapshots
from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.world import World


def tell(everyone: World, dedicated: bool, command: str, *arguments: Any) -> None:
    """Called by all learners: tell the server, where there is one, what comes next."""
    if dedicated:
        everyone.broadcast((command, arguments) if everyone.rank == 0 else None)


class Server:
    """The last rank of `everyone`.

    Args:
        options: of the training, the same as the learners'.
        everyone: learners and server.
    """

    def __init__(self, options: TrainOptions, everyone: World) -> None:
        self._options, self._everyone = options, everyone
        self._strategies = [
            make_strategy(phase.name, everyone, options.settings) if phase.name in CENTRES else None
            for phase in options.phases
        ]
        self.step = 0

    def run(self, folder: Path) -> None:
        """Serve until the training's end."""
        options, everyone = self._options, self._everyone
        if options.resume:
            checkpoint.load(folder, options, everyone, self)
        while True:
            command, arguments = everyone.broadcast(None)
            if command == "end":
                return
            if command == "save":
                (self.step,) = arguments
                checkpoint.save(folder, options, everyone, self)
            else:
                assert command == "start", f"told to {command} outside a phase"
                self._serve_phase(*arguments)

    def _serve_phase(self, number: int, is_new: bool, values: Any) -> None:
        options, everyone, messages = self._options, self._everyone, self._everyone.messages
        strategy = self._strategies[number]
        assert isinstance(strategy, Exchanging)
        if is_new:
            strategy.begin(values)
        shared = make_published(torch.from_numpy(values), options.settings.piece_size, options.settings.transfer_dtype)
        path = Path(options.dir) / "journal" / f"learner.{everyone.rank}" if options.journal else None
        journal = Journal(path, wanted=path is not None)
        strategy.connect(
            shared, lambda to, numbers, payload: messages.send(Channel.STRATEGY, to, numbers, payload), journal
        )
        snapshots = Snapshots(messages, strategy, shared, lambda _: None, lambda *_: None)
        messages.on_message(Channel.STRATEGY, strategy.receive)
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
                (self.step,) = arguments
                checkpoint.save(Path(options.dir), options, everyone, self)
            else:
                break
        snapshots.detach()
        messages.on_message(Channel.STRATEGY, None)
        journal.close()

    def state_dict(self) -> dict[str, object]:
        """The centres."""
        return {"strategies": [s.state_dict() if s is not None else None for s in self._strategies]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for strategy, saved in zip(self._strategies, state["strategies"], strict=True):
            if strategy is not None:
                strategy.load_state_dict(saved)
