"""The mean of all published models while the learners go on: what is validated in the middle of a phase.

Rank 0 tells everybody to take a snapshot; each communication thread copies its published model and adds it to
a sum in the background. The models are of slightly different moments, which a validation does not mind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.averaging import Asynchronous, Hook
from kaldi_mpi.averaging.published import PublishedModel
from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.world import Messages

_TAKE, _SQUARES = 0, 1


class Snapshots:
    """Everything here runs on the communication thread.

    Args:
        messages: between the learners (and a dedicated server).
        strategy: says what this rank's share of the model is.
        published: this rank's published model.
        begun: called on every rank with the iteration that a snapshot ends.
        done: called on rank 0 with iteration, mean model and the models' mean squared distance from it; None
            under a strategy whose model is not the mean of the published ones.
    """

    def __init__(
        self,
        messages: Messages,
        strategy: Asynchronous,
        published: PublishedModel,
        begun: Callable[[int], None],
        done: Callable[[int, NDArray[np.float32], float | None], None],
    ) -> None:
        self._messages, self._strategy, self._published = messages, strategy, published
        self._begun, self._done = begun, done
        self._under_way = 0  # on rank 0
        self._squares: dict[int, list[float]] = {}  # by iteration: |x_i|^2 of the ranks heard of
        self._means: dict[int, NDArray[np.float32]] = {}

    def attach(self) -> None:
        """Listen."""
        self._messages.on_message(Channel.SNAPSHOTS, self._receive)

    def detach(self) -> None:
        """Stop listening; nothing may be under way."""
        self._messages.on_message(Channel.SNAPSHOTS, None)

    def quiet(self) -> bool:
        """Whether all snapshots that this rank asked for have been handed to `done`."""
        return self._under_way == 0

    def take(self, iteration: int) -> None:
        """Have all ranks take a snapshot; rank 0 alone."""
        self._under_way += 1
        for rank in range(self._messages.size):
            self._messages.send(Channel.SNAPSHOTS, rank, (_TAKE, iteration), None)

    def _receive(self, source: int, numbers: tuple[int, ...], payload: NDArray[np.uint8]) -> None:
        kind, iteration = numbers
        if kind == _SQUARES:
            self._squares.setdefault(iteration, []).append(float(payload.view(np.float64)[0]))
            self._finish(iteration)
            return
        self._begun(iteration)
        own = self._published.to_numpy()
        if self._messages.rank < self._strategy.num_learners:  # a server's own model never moves
            square = np.array([np.dot(own.astype(np.float64), own)])
            self._messages.send(Channel.SNAPSHOTS, 0, (_SQUARES, iteration), square)
        total = self._strategy.share(own)

        def summed() -> None:
            if self._messages.rank == 0:
                self._means[iteration] = total / np.float32(self._strategy.num_shares)
                self._finish(iteration)

        self._messages.start_sum(total, summed)

    def _finish(self, iteration: int) -> None:
        squares: list[Any] = self._squares.get(iteration, [])
        if iteration not in self._means or len(squares) < self._strategy.num_learners:
            return
        mean = self._means.pop(iteration)
        del self._squares[iteration]
        spread = None
        if Hook.SHARE not in self._strategy.hooks:
            # sum |x_i|^2 / N - |mean|^2, whose rounding may leave it just below 0.
            spread = max(0.0, sum(squares) / len(squares) - float(np.dot(mean.astype(np.float64), mean)))
        self._under_way -= 1
        self._done(iteration, mean, spread)
