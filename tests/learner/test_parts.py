"""Parts of the asynchronous learner on their own: tickets, disturbances, published models, plans."""

from __future__ import annotations

import heapq
import itertools
import math
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.averaging.published import HostPublishedModel, PublishedModel
from kaldi_mpi.averaging.published_device import DevicePublishedModel
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner import faults
from kaldi_mpi.learner.schedule import ExponentialRate, Plan, TicketMap
from kaldi_mpi.learner.tickets import STOCK_SECONDS, TicketClient, TicketServer
from tests.paths import kaldi_root


class FakeNet:
    """Messages of several ranks whose messages are delivered one at a time, when the test says so."""

    def __init__(self, size: int) -> None:
        self.queue: deque[tuple[int, int, tuple[int, ...]]] = deque()
        self.handlers: list[Any] = [None] * size
        self.held: int | None = None  # the rank that takes no messages for now
        self.messages = [FakeMessages(self, rank, size) for rank in range(size)]

    def deliver_all(self) -> None:
        held: list[tuple[int, int, tuple[int, ...]]] = []
        while self.queue:
            source, to, numbers = self.queue.popleft()
            if to == self.held:
                held.append((source, to, numbers))
            else:
                self.handlers[to](source, numbers, None)
        self.queue.extend(held)


class FakeMessages:
    """One rank's."""

    def __init__(self, net: FakeNet, rank: int, size: int) -> None:
        self.net, self.rank, self.size = net, rank, size

    def post(self, action: Callable[[], None]) -> None:
        action()

    def on_message(self, channel: int, handler: Any) -> None:
        self.net.handlers[self.rank] = handler

    def send(self, channel: int, to: int, numbers: tuple[int, ...], payload: Any) -> None:
        self.net.queue.append((self.rank, to, numbers))

    def wait(self, ready: Callable[[], bool]) -> float:
        self.net.deliver_all()
        assert ready(), "a learner would wait for ever"
        return 0.0


class Sharing:
    """Event simulation: who gets which tickets, and when; a step of learner i takes speeds[i]."""

    def __init__(self, speeds: list[float]) -> None:
        self.speeds, self.net = speeds, FakeNet(len(speeds))
        self.rests: list[list[bool]] = [[] for _ in speeds]
        self.clients = [
            TicketClient(messages, lambda _: None, self.rests[rank].append)  # type: ignore[arg-type]
            for rank, messages in enumerate(self.net.messages)
        ]
        self.server = TicketServer(self.net.messages[0], len(speeds), lambda _: None)  # type: ignore[arg-type]
        for client in self.clients:
            client.attach(self.server if client is self.clients[0] else None)
        self.taken: list[list[int]] = [[] for _ in speeds]
        self.now = 0.0
        self.lost: set[int] = set()
        self._busy: list[tuple[float, int]] = []
        self._free: set[int] = set()

    def open(self, first: int, end: int, again: Sequence[int] = ()) -> None:
        self.server.open(first, end, again)
        for client in self.clients:
            client.start()
        self._free = set(range(len(self.speeds)))
        self._begin_steps()

    def run(self, until: float = math.inf) -> None:
        """Until the segment's end, which all present learners must come to."""
        while self._busy:
            if self._busy[0][0] > until:
                return
            self.now, rank = heapq.heappop(self._busy)
            if rank not in self.lost:
                self.clients[rank].done(self.speeds[rank])
                self._free.add(rank)
                self._begin_steps()
        for rank, client in enumerate(self.clients):
            assert rank in self.lost or (client.next() is None and client.ended), "a learner would wait for ever"

    def lose(self, rank: int) -> None:
        """It stands still; what it was at is never done."""
        self.lost.add(rank)
        self._free.discard(rank)
        for ticket in self.server._in_hand(rank):
            if ticket in self.taken[rank]:
                self.taken[rank].remove(ticket)
        self.server.lost(rank)
        self.clients[rank].forget()
        self._begin_steps()

    def _begin_steps(self) -> None:
        self.net.deliver_all()
        for rank in sorted(self._free):
            if self.clients[rank].peek() is not None:
                ticket = self.clients[rank].next()
                assert ticket is not None
                self.taken[rank].append(ticket)
                self._free.discard(rank)
                heapq.heappush(self._busy, (self.now + self.speeds[rank], rank))


def share_out(num_tickets: int, speeds: list[float], segments: int = 1) -> tuple[list[list[int]], float]:
    """Who gets which tickets, and when the last is done."""
    sharing = Sharing(speeds)
    for segment in range(segments):
        sharing.open(segment * num_tickets, (segment + 1) * num_tickets)
        sharing.run()
    return sharing.taken, sharing.now


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6), st.data())
@settings(max_examples=40, deadline=None)
def test_the_tickets_of_a_lost_learner_go_to_others(speeds: list[float], data: st.DataObject) -> None:
    """Whenever it happens: also when the others have nothing left to do but wait for it."""
    sharing = Sharing(speeds)
    sharing.open(0, 100)
    rank = data.draw(st.integers(1, len(speeds) - 1))
    sharing.run(until=data.draw(st.floats(0.0, 1.2)) * 100 / sum(1 / s for s in speeds))
    sharing.lose(rank)
    sharing.run()
    assert sorted(t for mine in sharing.taken for t in mine) == list(range(100))


def test_who_has_nothing_to_do_leaves_and_comes_back() -> None:
    sharing = Sharing([1.0, 1.0, 50.0])
    sharing.open(0, 5)
    sharing.run(until=20.0)
    assert sharing.rests[0] == [True] and sharing.rests[1] == [True] and not sharing.rests[2]
    sharing.lose(2)
    sharing.run()
    assert [True, False, True] in sharing.rests
    assert sorted(t for mine in sharing.taken[:2] for t in mine) == list(range(5))


def test_nobody_notices_that_rank_0_stands_still_for_some_seconds() -> None:
    sharing = Sharing([0.1] * 4)
    sharing.open(0, 10000)
    sharing.run(until=60.0)
    sharing.net.held = 0
    before = [len(mine) for mine in sharing.taken]
    sharing.run(until=60.0 + 0.9 * STOCK_SECONDS)
    assert [len(mine) - had for mine, had in zip(sharing.taken, before, strict=True)] == [90] * 4
    sharing.net.held = None
    sharing.run()
    assert sorted(t for mine in sharing.taken for t in mine) == list(range(10000))
    assert sharing.now == pytest.approx(250.0, abs=0.3)


def test_who_becomes_slow_returns_what_it_has_not_read() -> None:
    """It is left with the ticket in work and the one that is read."""
    sharing = Sharing([0.1] * 4)
    sharing.open(0, 1000)
    sharing.run(until=10.0)
    sharing.speeds[3], had = 2.0, len(sharing.taken[3])
    sharing.run()
    assert sorted(t for mine in sharing.taken for t in mine) == list(range(1000))
    assert sharing.now <= 10.0 + 600 * 0.1 / 3 + 2 * 2.0
    assert len(sharing.taken[3]) - had <= 12


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.floats(0.0, 1.0), st.data())
@settings(max_examples=40, deadline=None)
def test_a_stop_leaves_what_is_not_done(speeds: list[float], when: float, data: st.DataObject) -> None:
    """What is read is done; what is not stands in the checkpoint, from which a run goes on, in any number of turns."""
    sharing = Sharing(speeds)
    left: dict[str, Any] = {"again": [], "next": 0}
    for _ in range(data.draw(st.integers(1, 3))):
        sharing.open(left["next"], 200, left["again"])
        began = sharing.now
        sharing.run(until=began + when * 200 / sum(1 / s for s in speeds))
        sharing.server.stop()
        sharing.run()
        assert sharing.now <= began + when * 200 / sum(1 / s for s in speeds) + 4 * max(speeds)
        left = sharing.server.not_done()
        done = sorted(t for mine in sharing.taken for t in mine)
        assert sorted(done + left["again"]) == list(range(left["next"]))
    sharing.open(left["next"], 200, left["again"])
    sharing.run()
    assert sorted(t for mine in sharing.taken for t in mine) == list(range(200))


def test_what_a_checkpoint_leaves_over() -> None:
    """Each has saved at a moment of its own: what it did afterwards is done again."""
    sharing = Sharing([1.0, 1.0])
    sharing.open(0, 100)
    sharing.run(until=3.5)
    sharing.server.save(7)
    sharing.net.deliver_all()
    assert [client.to_save() for client in sharing.clients] == [7, 7]
    sharing.clients[0].say_saved()
    sharing.net.deliver_all()
    saved = set(sharing.taken[0][:3])
    sharing.run(until=6.5)
    sharing.clients[1].say_saved()
    sharing.net.deliver_all()
    saved |= set(sharing.taken[1][:6])
    left = sharing.server.left()
    assert saved.isdisjoint(left["again"]) and saved | set(left["again"]) == set(range(left["next"]))


@given(st.integers(0, 300), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_ticket_is_taken_once(num_tickets: int, speeds: list[float], segments: int) -> None:
    taken, _ = share_out(num_tickets, speeds, segments)
    assert sorted(t for mine in taken for t in mine) == list(range(segments * num_tickets))


def test_learners_of_one_speed_share_alike() -> None:
    taken, finish = share_out(400, [0.01] * 4)
    assert [len(mine) for mine in taken] == [100] * 4
    assert finish == pytest.approx(1.0)


@pytest.mark.parametrize("slow", [5, 10, 100])
def test_a_slow_learner_holds_nobody_up(slow: int) -> None:
    """The others take over; at the end it is refused what it would finish too late."""
    speeds = [0.01] * 3 + [0.01 * slow]
    taken, finish = share_out(3000, speeds)
    ideal = 3000 / sum(1 / s for s in speeds)
    assert finish <= 1.02 * ideal + 0.02
    assert len(taken[3]) == pytest.approx(3000 / (1 + 3 * slow), abs=3)


def test_disturbances_are_read() -> None:
    found = faults.parse_faults("device:20ms, slow:100x@rank2,jitter:30%,pause:5s@rank1@step50,kill@rank3@step7")
    assert [(d.kind, d.amount, d.rank, d.step) for d in found] == [
        ("device", 0.02, None, None), ("slow", 100.0, 2, None), ("jitter", 0.3, None, None),
        ("pause", 5.0, 1, 50), ("kill", 0.0, 3, 7),
    ]  # fmt: skip
    assert faults.parse_faults("") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slow", "slow: expected"),
        ("slow:0.5x", "factor below 1"),
        ("slow:3x@node1", "'@node1' is neither"),
        ("pause:1s@rank1", "pause needs @stepK"),
        ("kill@step3", "kill needs @stepK and @rankR"),
        ("device:20ms@step3", "device takes no @stepK"),
        ("speed:2x", "speed:2x: expected"),
    ],
)
def test_bad_disturbances_are_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="--inject") as error:
        faults.parse_faults(text)
    assert says.removeprefix("slow: ") in str(error.value)


def test_a_step_takes_the_time_that_was_asked_for() -> None:
    slept: list[float] = []
    now = [0.0]
    injector = faults.Injector(
        faults.parse_faults("device:20ms,slow:10x@rank1,pause:3s@rank1@step1,slow:2x@rank0"),
        1,
        slept.append,
        lambda: now[0],
    )
    for computing in (0.005, 0.01):
        injector.begin()
        now[0] += computing
        injector.end()
    assert slept == pytest.approx([0.25 - 0.005, 3.0, 0.3 - 0.01])


@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16"])
def test_a_published_model_is_the_same_wherever_it_lives(wire: str) -> None:
    """The code for GPUs, on CPU tensors, against NumPy's, bit for bit."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal(1000).astype(np.float32)
    host, device = HostPublishedModel(start, 300, wire), DevicePublishedModel(torch.from_numpy(start), 300, wire)
    models: list[PublishedModel] = [host, device]
    other = HostPublishedModel(rng.standard_normal(1000).astype(np.float32), 300, wire)
    change = torch.from_numpy(rng.standard_normal(1000).astype(np.float32))
    copies = [torch.zeros(1000), torch.zeros(1000)]
    for piece in range(host.num_pieces):
        theirs = other.snapshot(piece)
        results = []
        for model, copy in zip(models, copies, strict=True):
            with model.lock(piece):
                mine = model.snapshot(piece)
                model.push_pull(piece, change, copy)
                model.mix(piece, mine, theirs, 1 / 3)
                results.append((mine.tobytes(), mine.dtype, model.read(piece).tobytes(), model.steps[piece]))
        assert results[0] == results[1]
    assert host.to_numpy().tobytes() == device.to_numpy().tobytes()
    assert torch.equal(*copies)
    device.load(start)
    assert np.array_equal(device.to_numpy(), start)


@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 10), st.integers(0, 5))
def test_tickets_number_the_minibatches_of_all_epochs(units: int, chunks: int, per_unit: int, epochs: int) -> None:
    tickets = -(-chunks // per_unit)
    steps = -(-chunks // (per_unit * units))
    where = TicketMap(units, steps, tickets)
    assert where.ticket(epochs * steps) == epochs * tickets
    numbers = [where.ticket(step) for step in range((epochs + 1) * steps + 1)]
    assert numbers == sorted(numbers)
    assert all(b - a <= units for a, b in itertools.pairwise(numbers))
    assert where.epochs(numbers[-1]) == epochs + 1


def test_a_plan_says_where_iterations_end_and_checkpoints_are_due() -> None:
    plan = Plan(20, 9, 6, 20 / 9, checkpoint_interval=2)
    assert [step for step in range(1, 21) if plan.ends_iteration(step)] == [6, 12, 18, 20]
    assert [step for step in (6, 12, 18, 20) if plan.saves(step)] == [12]


def test_accuracy_by_class_counts_rows_by_their_weights() -> None:
    """Against a loop over rows, with soft labels, weights and frames without a label."""
    import torch

    from kaldi_mpi.learner.objective import right_weight, right_weight_by_class
    from kaldi_mpi.loader import ChunkShape, Minibatch

    rng = np.random.default_rng(4)
    output = rng.standard_normal((3, 5, 4)).astype(np.float32)
    labels = rng.integers(-1, 4, (3, 5, 2))
    weights = rng.uniform(0.1, 1.0, (3, 5, 2)).astype(np.float32)
    batch = Minibatch(
        torch.zeros(3, 5, 1), torch.from_numpy(labels), 15, 15, 15.0, 0, 0, ChunkShape(5, 0, 0),
        torch.from_numpy(weights), None,
    )  # fmt: skip
    right, all_ = np.zeros(4), np.zeros(4)
    for row in np.ndindex(3, 5):
        there = [(weights[row][k], labels[row][k]) for k in range(2) if labels[row][k] >= 0]
        if there:
            best = max(there)[1]
            all_[best] += sum(weight for weight, _ in there)
            right[best] += sum(weight for weight, _ in there) * (output[row].argmax() == best)
    ours = right_weight_by_class(torch.from_numpy(output), batch).numpy()
    np.testing.assert_allclose(ours, [right, all_], rtol=1e-6)
    assert ours[0].sum() == pytest.approx(float(right_weight(torch.from_numpy(output), batch)))


@pytest.mark.kaldi
def test_learning_rates_are_those_of_kaldis_iterations() -> None:
    """As its training programs count: with the archives that were processed before each iteration."""
    archives, jobs, initial, final = 69, 4, 0.001, 0.0001
    iterations = -(-archives // jobs)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import libs.nnet3.train.common as common; "
        f"print(*(common.get_learning_rate(k, {jobs}, {iterations}, k * {jobs}, {archives}, {initial}, {final}) "
        f"for k in range({iterations})))"
    )
    steps = str(kaldi_root() / "egs/wsj/s5/steps")
    done = subprocess.run([sys.executable, "-c", program, steps], capture_output=True, text=True, check=True)
    rate = ExponentialRate(initial, final, archives * 100, iterations)
    ours = [jobs * rate.of_iteration(k, k * jobs * 100) for k in range(iterations)]
    assert ours == pytest.approx([float(word) for word in done.stdout.split()], rel=1e-12)
    assert rate.by_iteration and not ExponentialRate(initial, final, 100).by_iteration
