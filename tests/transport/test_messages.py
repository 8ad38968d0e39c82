"""Messages between ranks and what runs beside them: the same promises over MPI and over threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kaldi_mpi.log import logger
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport import collectives, number_formats, thread
from kaldi_mpi.transport.thread import BrokenWorldError
from kaldi_mpi.transport.world import SoloWorld, World, sum_in_rank_order
from tests.conftest import in_ranks

Bytes = NDArray[np.uint8]


def payload_of(source: int, to: int, number: int) -> Bytes:
    """Of very different sizes, so that later messages overtake earlier ones on the way."""
    rng = np.random.default_rng([source, to, number])
    size = int(rng.choice([0, 1, 100, 5000, 70_000, 600_000], p=[0.2, 0.2, 0.2, 0.2, 0.15, 0.05]))
    return rng.integers(0, 256, size, np.uint8)


def check_order(world: World, count: int = 40) -> None:
    """Everybody sends `count` messages to everybody, itself too; all arrive whole, in the order sent."""
    messages = world.messages
    seen: list[list[int]] = [[] for _ in range(world.size)]

    def receive(source: int, numbers: tuple[int, ...], payload: Bytes) -> None:
        number, *rest = numbers
        assert rest == list(range(number % 8)) and payload.dtype == np.uint8
        assert payload.tobytes() == payload_of(source, world.rank, number).tobytes()
        seen[source].append(number)

    def send_all() -> None:
        for number in range(count):
            for to in range(world.size):
                messages.send(3, to, (number, *range(number % 8)), payload_of(world.rank, to, number))

    messages.on_message(3, receive)
    messages.post(send_all)
    messages.wait(lambda: all(len(of) == count for of in seen))
    assert seen == [list(range(count))] * world.size
    world.barrier()
    messages.on_message(3, None)


def check_large_messages_both_ways(world: World) -> None:
    """8 MB to everybody at once, from everybody: no library buffers that, so all must receive while they send."""
    messages = world.messages
    came: list[tuple[int, int, float]] = []

    def keep(source: int, numbers: tuple[int, ...], payload: NDArray[np.uint8]) -> None:
        came.append((source, numbers[0], float(payload.view("f4")[-1])))

    messages.on_message(0, keep)
    for number in range(3):
        data = np.full(2**21, world.rank + number / 4, np.float32)
        for to in range(world.size):
            messages.post(lambda to=to, number=number, data=data: messages.send(0, to, (number,), data))  # type: ignore[misc]
    messages.wait(lambda: len(came) == 3 * world.size)
    assert sorted(came) == [(r, n, r + n / 4) for r in range(world.size) for n in range(3)]
    world.barrier()
    messages.on_message(0, None)


def check_a_busy_learner_answers(world: World) -> None:
    """Rank 0 asks the others while they compute in Python or sleep; it must be answered before they end."""
    messages, rank = world.messages, world.rank
    asked = answered = 0
    released = threading.Event()

    def question(source: int, numbers: tuple[int, ...], payload: Bytes) -> None:
        nonlocal asked
        asked += 1
        messages.send(2, source, numbers, payload)

    def answer(source: int, numbers: tuple[int, ...], payload: Bytes) -> None:
        nonlocal answered
        assert payload.tobytes() == b"what?"
        answered += 1
        if numbers[0] < 9:
            messages.send(1, source, (numbers[0] + 1,), payload)

    messages.on_message(1, question)
    messages.on_message(2, answer)
    messages.on_message(4, lambda *_: released.set())
    world.barrier()
    if rank == 0:
        for to in range(1, world.size):
            messages.post(lambda to=to: messages.send(1, to, (0,), np.frombuffer(b"what?", np.uint8)))  # type: ignore[misc]
        messages.wait(lambda: answered == 10 * (world.size - 1))
        for to in range(world.size):
            messages.post(lambda to=to: messages.send(4, to, (), None))  # type: ignore[misc]
        messages.wait(released.is_set)
    elif rank % 2:
        turns, deadline = 0, time.monotonic() + 30
        while not released.is_set():
            turns += 1
            assert turns % 1000 or time.monotonic() < deadline, "no answer while this rank computes"
    else:
        while not released.is_set():
            time.sleep(0.3)
    assert asked == (10 if rank else 0)
    world.barrier()
    for channel in (1, 2, 4):
        messages.on_message(channel, None)


def contribution(rank: int, number: int, length: int) -> NDArray[np.float32]:
    return np.random.default_rng([rank, number]).standard_normal(length).astype(np.float32)


def check_sums_beside_messages(world: World) -> None:
    """Several sums pending while messages go round."""
    messages, size = world.messages, world.size
    hops, going = 0, True

    def hop(source: int, numbers: tuple[int, ...], payload: Bytes) -> None:
        nonlocal hops
        hops += 1
        if going:
            messages.send(7, (world.rank + 1) % size, numbers, payload)

    messages.on_message(7, hop)
    messages.post(lambda: messages.send(7, (world.rank + 1) % size, (), np.zeros(50_000, np.uint8)))
    buffers = [contribution(world.rank, k, 5000) for k in range(6)]
    pending = [world.start_sum(buffer) for buffer in buffers]
    for one in reversed(pending):
        one.wait()
    messages.wait(lambda: hops > 10)
    for k, buffer in enumerate(buffers):
        expected = sum_in_rank_order([contribution(r, k, buffer.size) for r in range(size)])
        assert (buffer if size > 1 else expected).tobytes() == expected.tobytes()
    going = False
    world.barrier()
    messages.on_message(7, None)


def check_split(world: World) -> None:
    """Parts of a world are worlds: ranks in order, sums and messages apart from each other and from the whole."""
    part = world.split(world.rank % 2)
    mates = [rank for rank in range(world.size) if rank % 2 == world.rank % 2]
    assert part.size == len(mates) and mates[part.rank] == world.rank
    assert part.messages.rank == part.rank and part.messages.size == part.size
    assert part.gather(world.rank) == mates
    whole_sum, part_sum = np.ones(3000, np.float32), np.ones(3000, np.float32)
    pending = world.start_sum(whole_sum)
    part.sum_(part_sum)
    pending.wait()
    assert whole_sum[-1] == world.size and part_sum[-1] == part.size
    came: list[tuple[str, int]] = []
    world.messages.on_message(0, lambda source, *_: came.append(("whole", source)))
    part.messages.on_message(0, lambda source, *_: came.append(("part", source)))
    for messages in (world.messages, part.messages):
        for to in range(messages.size):
            world.messages.post(lambda messages=messages, to=to: messages.send(0, to, (), None))  # type: ignore[misc]
    world.messages.wait(lambda: len(came) == world.size + part.size)
    assert sorted(came) == [*(("part", r) for r in range(part.size)), *(("whole", r) for r in range(world.size))]
    alone = part.split(part.rank)
    assert alone.size == 1 and alone.gather("me") == ["me"]
    alone.close()
    part.close()
    world.barrier()
    world.messages.on_message(0, None)


def check_kept_until_there_is_a_handler(world: World) -> None:
    messages = world.messages
    came: list[tuple[int, int]] = []
    messages.on_message(5, lambda *_: None)  # so that it listens at all
    for number in range(3):
        for to in range(world.size):
            messages.post(lambda to=to, n=number: messages.send(6, to, (n,), None))  # type: ignore[misc]
    world.barrier()
    messages.on_message(6, lambda source, numbers, payload: came.append((source, *numbers)))  # type: ignore[arg-type]
    messages.wait(lambda: len(came) == 3 * world.size)
    assert sorted(came) == [(r, n) for r in range(world.size) for n in range(3)]
    world.barrier()
    messages.on_message(5, None)
    messages.on_message(6, None)


def check_wire_types(world: World) -> None:
    size = world.size
    for length in (7, 3000):
        every = [contribution(r, length, length) for r in range(size)]
        for wire in ("float32", "float16", "bfloat16"):
            rounded = [number_formats.rounded(x, wire) for x in every]
            if size > 1:
                total = every[world.rank].copy()
                world.sum_(total, wire)
                assert total.tobytes() == sum_in_rank_order(rounded).tobytes()
            mixed = every[world.rank].copy()
            world.mean_into(mixed, wire)
            mean = np.sum(rounded, 0, np.float64) / size
            want = every[world.rank].astype(np.float64) + mean - rounded[world.rank]
            np.testing.assert_allclose(mixed, want, rtol=0, atol=1e-6)
            after = world.gather(mixed)
            drift = np.sum(after, 0, np.float64) / size - np.sum(every, 0, np.float64) / size
            assert np.abs(drift).max() < 2e-7
            if wire == "float32":
                assert len({x.tobytes() for x in after}) == 1


def check_objects(world: World) -> None:
    """Of very different sizes, some beyond what a library sends eagerly."""
    mine = np.arange(10 ** (1 + (world.rank + 2) % 6))
    for rank, got in enumerate(world.gather(mine)):
        assert np.array_equal(got, np.arange(10 ** (1 + (rank + 2) % 6)))
    assert np.array_equal(world.broadcast(mine), np.arange(1000))


def check_what_is_not_allowed(world: World) -> None:
    messages = world.messages
    with pytest.raises(RuntimeError, match="use post"):
        messages.send(0, 0, (), None)
    with pytest.raises(ZeroDivisionError):
        messages.wait(lambda: 1 // 0 == 1)
    refused: list[str] = []

    def wrong() -> None:
        attempts: list[Callable[[], object]] = [
            lambda: messages.send(0, world.size, (), None),
            lambda: messages.send(0, 0, range(9), None),
            lambda: world.barrier(),
        ]
        for attempt in attempts:
            try:
                attempt()
            except (RuntimeError, ValueError) as error:
                refused.append(str(error))

    messages.post(wrong)
    messages.wait(lambda: bool(refused))
    assert len(refused) == 3 and "no rank" in refused[0] and "at most 8" in refused[1] and "cannot wait" in refused[2]
    unfit: list[Any] = [np.zeros((2, 2), np.float32), np.zeros(4, np.float64), np.zeros(8, np.float32)[::2]]
    for bad in unfit:
        with pytest.raises(ValueError, match="contiguous 1-dim float32"):
            world.sum_(bad)
    world.barrier()


CHECKS = [
    check_order,
    check_large_messages_both_ways,
    check_a_busy_learner_answers,
    check_sums_beside_messages,
    check_split,
    check_kept_until_there_is_a_handler,
    check_wire_types,
    check_objects,
    check_what_is_not_allowed,
]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums of a few thousand numbers then take several pieces, in two rounds each."""
    monkeypatch.setattr(collectives, "PIECE", 1100)
    monkeypatch.setattr(collectives, "SMALL", 1000)
    yield


@in_ranks(1, 2, 3, 4, timeout=120)
def test_over_mpi(num_ranks: int, small_pieces: None) -> None:
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    for check in CHECKS:
        check(world)
    assert world.seconds_waited > 0 and (world.bytes_sent > 0) == (num_ranks > 1)
    world.close()
    world.close()
    with pytest.raises(BrokenWorldError, match="closed"):
        world.barrier()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("communication-")]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("check", CHECKS)
def test_over_threads(check: Callable[[World], None], size: int, small_pieces: None) -> None:
    run_world(size, check)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("communication-")]


@in_ranks(2, 3)
def test_closing_with_messages_nobody_took(num_ranks: int) -> None:
    """Large ones, which leave their sender only when somebody receives them; nobody ever listened."""
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    data = np.zeros(2**22, np.uint8)
    for to in range(num_ranks):
        world.messages.post(lambda to=to: world.messages.send(0, to, (), data))  # type: ignore[misc]
    world.close()


@in_ranks(2)
def test_a_world_that_is_not_closed_still_ends(num_ranks: int) -> None:
    """With a channel that listens and a transfer that never completes; mpiexec must see a clean exit."""
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    world.messages.on_message(0, lambda *_: None)
    if world.rank == 0:
        world.messages.post(lambda: world.messages.send(0, 1, (), np.zeros(100, np.uint8)))
    world.barrier()


def test_closing_over_threads() -> None:
    def learner(world: World) -> None:
        for to in range(world.size):
            world.messages.post(lambda to=to: world.messages.send(0, to, (), np.zeros(10**6, np.uint8)))  # type: ignore[misc]
        world.close()

    run_world(3, learner)


def test_a_handler_that_fails_reaches_the_caller() -> None:
    def handler(*_: object) -> None:
        raise ValueError("rank 1 cannot take this")

    def learner(world: World) -> None:
        if world.rank == 1:
            world.messages.on_message(0, handler)
        elif world.rank == 0:
            world.messages.post(lambda: world.messages.send(0, 1, (), None))
        world.messages.wait(lambda: False)

    with pytest.raises(ValueError, match="rank 1 cannot take this"):
        run_world(3, learner)


def test_a_fake_world_that_hangs_says_who_waits_for_what() -> None:
    def learner(world: World) -> None:
        if world.rank != 2:
            world.sum_(np.zeros(10, np.float32))

    with pytest.raises(BrokenWorldError, match=r"has waited \d+ s for sum of 10; at collective 0 \(sum of 10\)"):
        run_world(3, learner, timeout=0.5)


def test_long_waits_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Once after LONG_WAIT, then each time twice as late; and the wait goes on."""
    monkeypatch.setattr(thread, "LONG_WAIT", 0.1)
    monkeypatch.setattr(logger, "propagate", True)

    def sum_waits() -> list[logging.LogRecord]:  # a busy machine is slow at the barrier too
        return [r for r in caplog.records if "learner rank 0 has waited" in r.message and "for sum of 5" in r.message]

    def learner(world: World) -> float:
        world.barrier()
        deadline = time.monotonic() + 30
        while world.rank == 1 and len(sum_waits()) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        total = np.ones(5, np.float32)
        world.sum_(total)
        return float(total[0])

    with caplog.at_level(logging.WARNING, logger="kaldi_mpi"):
        assert run_world(2, learner) == [2.0, 2.0]
    told = sum_waits()
    assert len(told) >= 3
    assert "for sum of 5; at collective 1 (sum of 5); transfers under way: from rank 1" in told[0].message
    # At 0.1, 0.3, 0.7 .. s of waiting, or later where the machine is slow, but no closer together.
    for earlier, later, least in zip(told, told[1:], (0.2, 0.4), strict=False):
        assert later.created - earlier.created > 0.9 * least


def test_a_learner_alone() -> None:
    world = SoloWorld()
    came: list[object] = []

    def handler(source: int, numbers: tuple[int, ...], payload: Bytes) -> None:
        came.append((source, numbers, payload.tobytes()))
        if numbers[0] < 2:
            world.messages.send(0, 0, (numbers[0] + 1,), payload)
            came.append("sent")  # handed over later, not inside `send`

    world.messages.send(0, 0, (0,), np.frombuffer(b"x", np.uint8))
    assert came == []
    world.messages.on_message(0, handler)
    assert came == [(0, (0,), b"x"), "sent", (0, (1,), b"x"), "sent", (0, (2,), b"x")]
    assert world.messages.wait(lambda: len(came) == 5) == 0.0
    with pytest.raises(RuntimeError, match="nobody"):
        world.messages.wait(lambda: False)
    buffer = np.arange(3, dtype=np.float32)
    world.start_sum(buffer).wait()
    world.mean_into(buffer, "bfloat16")
    assert buffer.tolist() == [0.0, 1.0, 2.0] and world.split(3).size == 1
    world.close()
