"""The mean of all published models while the learners go on: what is validated in the middle of a phase.

Rank 0 fetches the models piece by piece from whoever has them, a few pieces at a time, so that it never holds more than
one model besides the sum. The pieces are of slightly different moments, which a validation does not mind. Who does not
answer within a bound, or is lost, is left out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.averaging import Asynchronous, Hook
from kaldi_mpi.averaging.published import PublishedModel
from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.world import Messages

_ASK, _PIECE = 0, 1
_AT_ONCE = 4  # pieces asked for and not there yet
_BOUND = 5.0  # seconds for a piece
_LOOK = 0.5

Done = Callable[[int, NDArray[np.float32], "float | None", list[int]], None]


class Snapshots:
    """Everything here runs on the communication thread.

    Args:
        messages: between the learners (and a dedicated server).
        strategy: says who has what of the model.
        published: this rank's published model.
    """

    def __init__(self, messages: Messages, strategy: Asynchronous, published: PublishedModel) -> None:
        self._messages, self._strategy, self._published = messages, strategy, published
        # On rank 0.
        self._iterations: deque[tuple[int, Done]] = deque()  # to be fetched; the first is being
        self._to_ask: deque[tuple[int, int]] = deque()  # rank and piece
        self._asked: dict[tuple[int, int], float] = {}  # and since when
        self._silent: set[int] = set()
        self._total = np.zeros(0, np.float32)
        self._count = np.zeros(0, np.int64)  # by piece: who has answered
        self._squares = np.zeros(0)  # by piece: the sum of |x_i|^2
        self._end_looking: Callable[[], None] = lambda: None

    def attach(self) -> None:
        """Listen."""
        self._messages.on_message(Channel.SNAPSHOTS, self._receive)
        if self._messages.rank == 0:
            self._end_looking = self._messages.every(_LOOK, self._look)

    def detach(self) -> None:
        """Stop listening; nothing may be under way."""
        self._end_looking()
        self._messages.on_message(Channel.SNAPSHOTS, None)

    def quiet(self) -> bool:
        """Whether all snapshots that this rank asked for have been handed over."""
        return not self._iterations

    def take(self, iteration: int, done: Done) -> None:
        """Fetch all learners' models, after those of earlier iterations; rank 0 alone.

        Args:
            iteration: that they end.
            done: called with iteration, mean model, the models' mean squared distance from it (None under a strategy
                whose model is not the mean of the published ones), and the ranks that have not answered.
        """
        self._iterations.append((iteration, done))
        if len(self._iterations) == 1:
            self._begin()

    def lost(self, rank: int) -> None:
        """See `members.Concerned`."""
        self._leave_out(rank)

    def back(self, rank: int) -> None:
        """See `members.Concerned`; it has part in the next one."""

    def _begin(self) -> None:
        pieces, strategy = range(self._published.num_pieces), self._strategy
        self._total = np.zeros(sum(where.stop - where.start for where in self._published.where), np.float32)
        self._count, self._squares = np.zeros(len(pieces), np.int64), np.zeros(len(pieces))
        self._silent = {rank for rank in strategy.gone if rank < strategy.num_learners}
        # One rank after the other, so that the pieces of a model are of about one moment.
        self._to_ask = deque(sorted((rank, piece) for piece in pieces for rank in strategy.sources(piece)))
        self._go_on()

    def _go_on(self) -> None:
        while self._to_ask and len(self._asked) < _AT_ONCE:
            rank, piece = self._to_ask.popleft()
            if rank == self._messages.rank:
                self._add(piece, self._strategy.piece_of_share(piece))
                continue
            self._asked[rank, piece] = time.monotonic()
            self._messages.send(Channel.SNAPSHOTS, rank, (_ASK, self._iterations[0][0], piece), None)
        if not self._to_ask and not self._asked:
            self._finish()

    def _look(self) -> None:
        now = time.monotonic()
        for rank in {rank for (rank, _), since in self._asked.items() if now - since > _BOUND}:
            self._leave_out(rank)

    def _leave_out(self, rank: int) -> None:
        waits = any(other == rank for other, _ in (*self._asked, *self._to_ask))
        if not self._iterations or not waits:
            return
        self._silent.add(rank)
        self._asked = {key: since for key, since in self._asked.items() if key[0] != rank}
        self._to_ask = deque(key for key in self._to_ask if key[0] != rank)
        self._go_on()

    def _receive(self, source: int, numbers: tuple[int, ...], payload: NDArray[np.uint8]) -> None:
        kind, iteration, piece = numbers
        if kind == _ASK:
            share = self._strategy.piece_of_share(piece)
            self._messages.send(Channel.SNAPSHOTS, source, (_PIECE, iteration, piece), share)
        elif self._iterations and self._iterations[0][0] == iteration and (source, piece) in self._asked:
            del self._asked[source, piece]
            self._add(piece, payload.view(np.float32))
            self._go_on()

    def _add(self, piece: int, values: NDArray[np.float32]) -> None:
        self._total[self._published.where[piece]] += values
        self._count[piece] += 1
        self._squares[piece] += float(values.astype(np.float64) @ values)

    def _finish(self) -> None:
        mean, square = self._total, 0.0
        for piece, where in enumerate(self._published.where):
            if not self._count[piece]:  # whoever had it is silent
                mean[where] = self._published.to_numpy()[where]
                continue
            mean[where] /= np.float32(self._count[piece])
            # sum |x_i|^2 / N - |mean|^2, whose rounding may leave it just below 0.
            part = self._squares[piece] / self._count[piece] - float(mean[where].astype(np.float64) @ mean[where])
            square += max(0.0, float(part))
        self._total = np.zeros(0, np.float32)
        spread = None if Hook.SHARE in self._strategy.hooks else square
        iteration, done = self._iterations.popleft()
        done(iteration, mean, spread, sorted(self._silent))
        if self._iterations:
            self._begin()
