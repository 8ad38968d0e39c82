"""Messages of a former life are dropped, on either side, and a new life is noticed before anybody tells of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kaldi_mpi.transport.lives import LivingMessages

CHANNEL = 7


class Wire:
    """Messages of two ranks, kept until they are handed over."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, tuple[int, ...]]] = []
        self.handlers: dict[int, Callable[[int, tuple[int, ...], Any], None]] = {}

    def end(self, rank: int) -> Any:
        wire = self

        class End:
            size = 2

            def __init__(self) -> None:
                self.rank = rank

            def send(self, channel: int, to: int, numbers: Sequence[int], payload: Any) -> None:
                wire.sent.append((rank, to, tuple(numbers)))

            def on_message(self, channel: int, handler: Any, allocate: Any = None) -> None:
                wire.handlers[rank] = handler

        return End()

    def deliver(self) -> None:
        while self.sent:
            source, to, numbers = self.sent.pop(0)
            self.handlers[to](source, numbers, None)


class Pair:
    """Two ranks; `heard` is what each was handed, `returned` who was noticed to be back."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.heard: list[list[tuple[int, ...]]] = [[], []]
        self.returned: list[tuple[int, int, int]] = []
        self.ends = [LivingMessages(self.wire.end(rank), self._returned(rank)) for rank in (0, 1)]
        for rank, end in enumerate(self.ends):
            end.on_message(CHANNEL, lambda _source, numbers, _payload, rank=rank: self.heard[rank].append(numbers))  # type: ignore[misc]

    def _returned(self, rank: int) -> Callable[[int, int], None]:
        def note(other: int, life: int) -> None:
            self.returned.append((rank, other, life))
            self.ends[rank].lives[other] = life
            self.ends[rank].gone.discard(other)

        return note


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_they_pass_as_they_are(pair: Pair) -> None:
    pair.ends[0].send(CHANNEL, 1, (1, 2, 3), None)
    pair.wire.deliver()
    assert pair.heard == [[], [(1, 2, 3)]] and not pair.returned


def test_nothing_is_sent_to_or_taken_from_who_is_lost(pair: Pair) -> None:
    pair.ends[1].send(CHANNEL, 0, (1,), None)  # on its way when it is lost
    pair.ends[0].lives[1], pair.ends[0].gone = 1, {1}
    pair.ends[0].send(CHANNEL, 1, (2,), None)
    pair.wire.deliver()
    assert pair.heard == [[], []]


def test_what_was_meant_for_a_former_life(pair: Pair) -> None:
    pair.ends[0].send(CHANNEL, 1, (1,), None)
    pair.ends[1].lives[1] = 1  # it has heard that it was lost
    pair.wire.deliver()
    assert pair.heard == [[], []]


def test_a_new_life_is_noticed_at_its_first_message(pair: Pair) -> None:
    """Also by who has not heard yet that it was lost."""
    for gone in (False, True):
        life = pair.ends[1].lives[1] = pair.ends[1].lives[1] + 1
        if gone:
            pair.ends[0].lives[1], pair.ends[0].gone = life, {1}
        pair.ends[1].send(CHANNEL, 0, (life,), None)
        pair.wire.deliver()
    assert pair.heard[0] == [(1,), (2,)] and pair.returned == [(0, 1, 1), (0, 1, 2)]
