"""Who takes part in a phase whose learners wait for nobody: who is lost, who comes back, and who ends it together.

Every rank sends a beat to rank 0 now and then, from its communication thread. A rank that is silent for too long is
*lost*: rank 0 tells all, its tickets go to others, nobody exchanges with it or waits for it, its model is in no mean.
When it wakes it finds this told, drops what it was doing, and asks rank 0, which sends it its own model and tells all
that it is back; or, where the others have ended the phase meanwhile, that it is over.

At the phase's end each learner says that it is ready; when all that are not lost have, rank 0 names those who meet.

Rank 0 itself cannot be lost: it hands out the tickets. Where it stands, the launcher sees it (`kaldi_mpi.hangs`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.averaging import Asynchronous
from kaldi_mpi.averaging.published import PublishedModel
from kaldi_mpi.errors import KaldiMpiError
from kaldi_mpi.log import logger
from kaldi_mpi.transport.lives import LivingMessages
from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.world import Messages

_BEATS = 10  # in the time after which a rank is lost
_LONGEST_BEAT = 1.0
_USUAL_STEPS = 20  # a step of a super-learner that takes as long as so many will not end

_BEAT, _LOST, _ASK, _MODEL, _WELCOME, _BACK, _READY, _MEET, _OVER = range(9)


class LeftBehindError(KaldiMpiError):
    """This rank was silent for too long, and the others have ended the phase without it."""


class Concerned(Protocol):
    """Who wants to know of members; on the communication thread."""

    def lost(self, rank: int) -> None:
        """`rank` takes no part any more."""

    def back(self, rank: int) -> None:
        """It does again."""


class StepClock:
    """How long steps take, for a super-learner's leader: another of its learners may stand still while it lives.

    The leader then keeps silent, as it would if it was stopped itself.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._usual = 0.0  # seconds, an exponential mean

    def begin(self) -> None:
        """A step begins."""
        self._began = time.monotonic()

    def end(self) -> float:
        """It has ended; returns its seconds."""
        assert self._began is not None
        took, self._began = time.monotonic() - self._began, None
        self._usual = 0.9 * self._usual + 0.1 * took if self._usual else took
        return took

    def is_stuck(self) -> bool:
        """Whether the step is so much longer than usual that it will not end; from any thread."""
        began = self._began
        return began is not None and time.monotonic() - began > max(_USUAL_STEPS * self._usual, 1.0)


class Members:
    """One rank's view of them. What has no other remark runs on the communication thread.

    Attributes:
        messages: among them, for everybody else's use.
        is_lost: whether this rank has been given up.

    Args:
        messages: of all ranks of the phase.
        num_learners: of them, which come first; a dedicated server comes after them.
        strategy, model: of this rank; connected before anything is lost.
        names: of the ranks, for the log.
        patience: seconds of silence after which a learner is lost; 0: none ever is.
        forget: called when this rank has been given up.
        is_stuck: whether this rank had better be.
    """

    def __init__(
        self,
        messages: Messages,
        num_learners: int,
        strategy: Asynchronous,
        model: PublishedModel,
        names: Sequence[str],
        patience: float,
        forget: Callable[[], None] = lambda: None,
        is_stuck: Callable[[], bool] = lambda: False,
    ) -> None:
        self.messages = LivingMessages(messages, self._is_back)
        self.rank, self.is_lost = messages.rank, False
        self._raw, self._num_learners = messages, num_learners
        self._strategy, self._model, self._names, self._forget = strategy, model, names, forget
        self._patience, self._is_stuck = patience, is_stuck
        self._beat = min(_LONGEST_BEAT, patience / _BEATS) if patience else 0.0
        self._heard: dict[int, float] = {}  # on rank 0
        self._looked = 0.0
        self._ready: set[int] = set()
        self._meeting: list[int] | None = None
        self._over = False
        self._concerned: list[Concerned] = []
        self._end_beats: Callable[[], None] = lambda: None

    # On the learner's thread.

    def attach(self, *concerned: Concerned) -> None:
        """Begin, and tell these of everything."""
        self._concerned = list(concerned)
        self._raw.on_message(Channel.MEMBERS, self._receive)
        if self._beat:
            self._end_beats = self._raw.every(self._beat, self._watch if self.rank == 0 else self._say_beat)

    def detach(self) -> None:
        """End, when all have met; rank 0 goes on to tell those that were lost that it is over."""
        self._end_beats()
        if self.rank or not self.messages.gone:
            self._raw.on_message(Channel.MEMBERS, None)

    def come_back(self) -> None:
        """After this rank was lost: return when it has rank 0's model, and the others know.

        Raises:
            LeftBehindError: they have ended the phase.
        """
        self._raw.post(lambda: self._raw.send(Channel.MEMBERS, 0, (_ASK, self._life), None))
        self._raw.wait(lambda: self._over or not self.is_lost)
        if self._over:
            raise LeftBehindError("this learner was silent for too long, and the others have ended without it")

    def meet(self) -> list[int] | None:
        """Say that this rank is through; returns all ranks that are, and meet now; None: this one has been lost."""
        self._raw.post(lambda: self._raw.send(Channel.MEMBERS, 0, (_READY, self._life), None))
        self._raw.wait(lambda: self._meeting is not None or self.is_lost)
        return None if self.is_lost else self._meeting

    # Rank 0.

    def _watch(self) -> None:
        now = time.monotonic()
        if now - self._looked > self._patience / 2:  # this process itself has stood still
            self._heard = dict.fromkeys(range(1, self._raw.size), now)
        self._looked = now
        for rank, heard in list(self._heard.items()):
            if now - heard > self._patience and rank not in self.messages.gone and self._meeting is None:
                self._give_up(rank, now - heard)

    def _give_up(self, rank: int, seconds: float) -> None:
        if rank >= self._num_learners:
            logger.warning("the server (%s) has been silent for %.1f s", self._names[rank], seconds)
            self._heard[rank] += self._patience
            return
        logger.warning(
            "%s has been silent for %.1f s: it is lost; its tickets go to others, who go on without its model",
            self._names[rank], seconds,
        )  # fmt: skip
        life = self.messages.lives[rank] + 1
        self._tell_all((_LOST, rank, life))
        self._is_gone(rank, life)
        self._meet_if_ready()

    def _tell_all(self, numbers: tuple[int, ...], but: int = 0) -> None:
        for rank in range(1, self._raw.size):
            if rank != but:
                self._raw.send(Channel.MEMBERS, rank, numbers, None)

    def _asked(self, rank: int, life: int) -> None:
        if life != self.messages.lives[rank]:
            return
        if self._meeting is not None:
            self._raw.send(Channel.MEMBERS, rank, (_OVER,), None)
            return
        for piece in range(self._model.num_pieces):
            with self._model.lock(piece):
                values = self._model.read(piece)
            self._raw.send(Channel.MEMBERS, rank, (_MODEL, piece), values)
        gone = [int(other in self.messages.gone and other != rank) for other in range(self._raw.size)]
        self._raw.send(Channel.MEMBERS, rank, (_WELCOME,), np.array([self.messages.lives, gone], np.int64))
        self._tell_all((_BACK, rank, life), but=rank)
        self._is_back(rank, life)
        self._heard[rank] = time.monotonic()
        logger.warning("%s is back, with another learner's model", self._names[rank])

    def _meet_if_ready(self) -> None:
        present = [rank for rank in range(self._raw.size) if rank not in self.messages.gone]
        if self._meeting is None and all(rank in self._ready or rank >= self._num_learners for rank in present):
            for rank in present:
                if 0 < rank < self._num_learners:
                    self._raw.send(Channel.MEMBERS, rank, (_MEET,), np.array(present, np.int64))
            self._meeting = present

    # Every rank.

    @property
    def _life(self) -> int:
        return self.messages.lives[self.rank]

    def _say_beat(self) -> None:
        if not self._is_stuck():
            self._raw.send(Channel.MEMBERS, 0, (_BEAT,), None)

    def _receive(self, source: int, numbers: tuple[int, ...], payload: NDArray[np.uint8]) -> None:
        kind = numbers[0]
        if kind == _BEAT:
            self._heard[source] = time.monotonic()
        elif kind == _LOST:
            self._is_gone(*numbers[1:])
        elif kind == _BACK:
            self._is_back(*numbers[1:])
        elif kind == _ASK:
            self._asked(source, numbers[1])
        elif kind == _MODEL:
            with self._model.lock(numbers[1]):
                self._model.write(numbers[1], payload.view(np.float32))
        elif kind == _WELCOME:
            self._welcomed(*payload.view(np.int64).reshape(2, -1).tolist())
        elif kind == _READY:
            if numbers[1] == self.messages.lives[source]:
                self._ready.add(source)
                self._meet_if_ready()
        elif kind == _MEET:
            self._meeting = payload.view(np.int64).tolist()
        else:
            self._over = True

    def _is_gone(self, rank: int, life: int) -> None:
        messages = self.messages
        if life <= messages.lives[rank]:
            return  # it is back already, and this comes late
        messages.lives[rank] = life
        if rank == self.rank:
            self.is_lost = True
            self._strategy.abandon()
            self._forget()
            return
        messages.gone.add(rank)
        self._ready.discard(rank)
        self._strategy.drop(rank)
        for one in self._concerned:
            one.lost(rank)

    def _is_back(self, rank: int, life: int) -> None:
        messages = self.messages
        if life < messages.lives[rank] or (life == messages.lives[rank] and rank not in messages.gone):
            return
        if rank not in messages.gone:  # what was under way with its former life is over
            self._strategy.drop(rank)
        messages.lives[rank] = life
        messages.gone.discard(rank)
        self._strategy.admit(rank)
        for one in self._concerned:
            one.back(rank)

    def _welcomed(self, lives: list[int], gone: list[int]) -> None:
        self.messages.lives[:] = lives
        for rank, is_gone in enumerate(gone):
            if is_gone and rank not in self._strategy.gone:
                self._strategy.drop(rank)
            elif not is_gone and rank in self._strategy.gone:
                self._strategy.admit(rank)
        self.messages.gone = {rank for rank, is_gone in enumerate(gone) if is_gone}
        self._strategy.adopt()
        self.is_lost = False
