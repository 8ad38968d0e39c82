"""Exchanges, message by message: the transaction, crossing requests, pieces, wire types, rounds, one learner."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kaldi_mpi.averaging import Settings, make_strategy, topology
from kaldi_mpi.averaging.exchange import BUSY_REPLY, REPLY, REQUEST, Exchanging
from kaldi_mpi.averaging.expair import Expair
from kaldi_mpi.averaging.fixed_ring import FixedRing
from kaldi_mpi.averaging.journal import Journal, JournalEvent
from kaldi_mpi.averaging.published import HostPublishedModel
from kaldi_mpi.averaging.random_ring import RandomRing
from kaldi_mpi.errors import DataError
from kaldi_mpi.testing.replay import replay
from kaldi_mpi.testing.simulation import Event, SimulatedRank, Simulation, run_random
from tests.gossip import GOSSIP, noise, simulation, starting_models, still, total_after


def step(run: Simulation, rank: int) -> None:
    """A whole step of a learner, with what it posts."""
    run.do(Event("learn", rank))
    while run.ranks[rank].piece:
        run.do(Event("learn", rank))
    run.do(Event("post", rank))


def deliver(run: Simulation, source: int, to: int) -> None:
    run.do(Event("deliver", to, source))


def deliver_all(run: Simulation, kinds: tuple[int, ...]) -> None:
    """Deliver the messages of these kinds that are under way now."""
    for (source, to), channel in sorted(run.channels.items()):
        for numbers, _ in list(channel):
            if numbers[0] in kinds:
                deliver(run, source, to)


def lockstep_matrix(run: Simulation, models: NDArray[np.float32]) -> NDArray[np.float64]:
    """All step, all requests arrive, all replies arrive; returns the matrix W that this came to."""
    for rank in range(run.size):
        step(run, rank)
    deliver_all(run, (REQUEST,))
    deliver_all(run, (REPLY, BUSY_REPLY))
    assert not any(run.channels.values())
    return run.models() @ np.linalg.inv(models.astype(np.float64))


def circulant(size: int, ring: list[int] | None = None) -> NDArray[np.float64]:
    """(N, N): the paper's T_1, on the ranks in the order of `ring`."""
    matrix = np.zeros((size, size))
    ring = ring or list(range(size))
    for at in range(size):
        for other in (at - 1, at, at + 1):
            matrix[ring[at], ring[other % size]] += 1 / 3
    return matrix


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_in_lock_step_the_fixed_ring_is_the_papers_matrix(size: int) -> None:
    """Also for two learners, each of whom is both neighbours of the other: 1/3 and 2/3."""
    models = np.eye(size, dtype=np.float32)
    matrix = lockstep_matrix(simulation(FixedRing, models, 1, still), models)
    np.testing.assert_allclose(matrix, circulant(size), atol=1e-6)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_in_lock_step_the_random_ring_is_the_papers_matrix(size: int) -> None:
    """A new permutation each round, the same on all ranks, and another one for another seed."""
    models = np.eye(size, dtype=np.float32)
    run = simulation(lambda world: RandomRing(world, seed=7), models, 6, still)
    rings = []
    for round_number in range(6):
        rings.append(topology.shuffled_ring(size, round_number, 7))
        for shared, row in zip(run.published_models, models, strict=True):
            shared.values[:] = row
        np.testing.assert_allclose(lockstep_matrix(run, models), circulant(size, rings[-1]), atol=1e-6)
    assert all(sorted(ring) == list(range(size)) for ring in rings)
    if size > 3:
        assert len({tuple(ring) for ring in rings}) > 1
        assert rings != [topology.shuffled_ring(size, k, 8) for k in range(6)]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9])
def test_partners_of_expair_reach_every_distance_and_both_sides(size: int) -> None:
    hops = max(1, (size - 1).bit_length())
    for rank in range(size):
        partners = [topology.exponential(rank, size, number) for number in range(2 * hops)]
        assert {(partner - rank) % size for partner in partners} == {2**k % size for k in range(hops)}
        assert partners[hops:] == partners[:hops]


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_all_hops_of_expair_once_are_the_full_mean(size: int) -> None:
    """With time for each exchange, log2 N pairings over hops 1, 2, 4.. leave all learners with the mean."""
    models = starting_models(size)
    run = simulation(Expair, models, 100, still)
    for hop in range(size.bit_length() - 1):
        for rank in range(size):
            if rank // 2**hop % 2 == 0:  # one side of each pair asks
                expair = run.strategies[rank]
                while list(expair.partners(0)) != [rank + 2**hop]:  # type: ignore[attr-defined]
                    expair._number += 1  # type: ignore[attr-defined]
                step(run, rank)
                deliver(run, rank, rank + 2**hop)
                deliver(run, rank + 2**hop, rank)
    np.testing.assert_allclose(run.models(), np.tile(models.astype(np.float64).mean(0), (size, 1)), atol=1e-6)


def test_a_busy_partner_takes_less_and_says_so() -> None:
    """0 asks 1, which has asked 2 already: a third of the difference moves, on both sides."""
    models = starting_models(3)
    run = simulation(Expair, models, 9, still)
    run.strategies[1]._number = 1  # type: ignore[attr-defined] # hop 2^((1 + 1) mod 2) = 1: to 2
    step(run, 1)
    step(run, 0)
    assert run.channels[0, 1][0][0][0] == run.channels[1, 2][0][0][0] == REQUEST
    deliver(run, 0, 1)
    assert run.channels[1, 0][0][0][0] == BUSY_REPLY
    deliver(run, 1, 0)
    np.testing.assert_allclose(run.models()[0], (2 * models[0] + models[1]) / 3, atol=1e-6)
    np.testing.assert_allclose(run.models()[1], (2 * models[1] + models[0]) / 3, atol=1e-6)
    deliver(run, 1, 2)  # 2 is free: a half, of what 1 was when it asked
    assert run.channels[2, 1][0][0][0] == REPLY
    np.testing.assert_allclose(run.models()[2], (models[2] + models[1]) / 2, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_crossing_requests_are_one_exchange(order: tuple[int, int]) -> None:
    """Answered both, two exchanges of weight 1/2 would swap the models; merged, both become the mean."""
    models = starting_models(2)
    run = simulation(Expair, models, 1, still)
    for rank in order:
        step(run, rank)
    deliver(run, 0, 1)
    deliver(run, 1, 0)
    assert not any(run.channels.values()), "a crossed request was answered"
    np.testing.assert_allclose(run.models(), np.tile(models.mean(0), (2, 1)), atol=1e-6)
    for rank in (0, 1):
        events = [JournalEvent(event) for event in run.journals[rank].records()["event"]]
        assert events == [JournalEvent.STEP, JournalEvent.SNAPSHOT, JournalEvent.CROSS]
        assert run.strategies[rank].quiet() and run.strategies[rank].num_averages == 1


def test_local_steps_that_land_in_between_are_kept() -> None:
    models = starting_models(2)
    run = simulation(FixedRing, models, 3)
    step(run, 0)
    asked = run.models()[0]
    step(run, 1)
    step(run, 0)
    step(run, 1)
    mine = run.models()
    deliver(run, 0, 1)
    np.testing.assert_allclose(run.models()[1], mine[1] + (asked - mine[1]) / 3, atol=1e-6)
    deliver(run, 1, 0)  # 1's own request, which is older than its reply
    deliver(run, 1, 0)
    last = run.journals[0].records()[-2]  # the last one starts the exchange that was due
    assert JournalEvent(last["event"]) is JournalEvent.MIX and last["age"] == 1 and last["own_steps"] == 1
    run_random(run, 0)
    np.testing.assert_allclose(run.models().sum(0), total_after(models, [3, 3]), atol=1e-5)


def test_exchanges_that_there_was_no_time_for_are_let_go() -> None:
    """A hundred steps while one reply is on its way leave one round to do, not a hundred."""
    run = simulation(lambda world: Expair(world, exchanges_per_step=3), starting_models(8), 200)
    for _ in range(100):
        step(run, 0)
    assert sum(map(len, run.channels.values())) == 1
    run.num_steps[0] = 100
    messages = 0
    while run.channels[0, 1] or not run.strategies[0].quiet():
        for (source, to), channel in sorted(run.channels.items()):
            if channel:
                deliver(run, source, to)
                messages += 1
    assert messages == 2 * (1 + 3)


def test_a_model_in_pieces_goes_two_at_a_time() -> None:
    models = starting_models(3, 11)
    run = simulation(FixedRing, models, 4, piece_size=2)
    step(run, 0)
    assert [numbers[2] for numbers, _ in run.channels[0, 1]] == [0, 1]
    deliver(run, 0, 1)
    assert [numbers[2] for numbers, _ in run.channels[0, 1]] == [1], "the next piece must wait for an answer"
    deliver(run, 1, 0)
    assert [numbers[2] for numbers, _ in run.channels[0, 1]] == [1, 2]
    assert run.strategies[0].num_averages == 0
    run_random(run, 5)
    np.testing.assert_allclose(run.models().sum(0), total_after(models, [4] * 3), rtol=1e-6, atol=1e-5)
    sizes = {payload.nbytes for channel in run.channels.values() for _, payload in channel}
    assert not sizes
    assert all(1 <= strategy.num_averages <= 4 for strategy in run.strategies)


@pytest.mark.parametrize("name", GOSSIP)
@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16"])
def test_narrow_numbers_conserve_the_mean_to_float32_rounding(name: str, wire: str) -> None:
    models = starting_models(5, 40)
    run = simulation(GOSSIP[name], models, 60, piece_size=16, wire=wire)
    run_random(run, 1)
    want = total_after(models, [60] * 5) / 5
    np.testing.assert_allclose(run.models().mean(0), want, atol=1e-6 * np.abs(run.models()).max())
    sent = sum(strategy.bytes_sent for strategy in run.strategies)
    kinds = (JournalEvent.SNAPSHOT, JournalEvent.ANSWER)
    copies = [r["piece"][np.isin(r["event"], kinds)] for r in map(Journal.records, run.journals)]
    width = 4 if wire == "float32" else 2
    assert sent == width * np.array([16, 16, 8])[np.concatenate(copies)].sum()


@pytest.mark.parametrize("name", GOSSIP)
def test_one_learner_is_left_alone(name: str) -> None:
    """N = 1: no message, and the steps of the learner bit for bit."""
    models = starting_models(1)
    run = simulation(GOSSIP[name], models, 7)
    run_random(run, 0)
    want = models[0].copy()
    for index in range(7):
        want += noise(0, index, want)[0]
    assert run.models().astype(np.float32).tobytes() == want.tobytes()
    assert not run.channels and {int(e) for e in run.journals[0].records()["event"]} == {int(JournalEvent.STEP)}


@pytest.mark.parametrize("name", GOSSIP)
def test_exchanges_each_so_many_frames(name: str) -> None:
    """K frames over all of 4 learners, minibatches of 10: an exchange after each third step."""
    strategy = make_strategy(name.removesuffix("-2"), SimulatedRank(0, 4), Settings(frames_per_average=4 * 25, seed=1))
    assert isinstance(strategy, Exchanging)
    strategy.connect(HostPublishedModel(starting_models(1)[0]), lambda to, numbers, payload: None, Journal())
    started = []
    for _ in range(9):
        strategy.step_taken(10)
        started.append(strategy._number)
        if strategy._open:
            strategy.receive(strategy._partner, (REPLY, strategy._number - 1, 0, 0), np.zeros(20, np.uint8))
    assert started == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_who_leaves_starts_nothing_and_goes_on_answering() -> None:
    run = simulation(FixedRing, starting_models(2), [1, 5])
    run.do(Event("learn", 0))
    run.do(Event("learn", 0))
    run.do(Event("post", 0))
    run.do(Event("post", 0))
    assert run.ranks[0].left and not run.strategies[0].quiet()
    run_random(run, 2)
    answers = [JournalEvent(e) for e in run.journals[0].records()["event"]].count(JournalEvent.ANSWER)
    assert 1 <= answers <= 5 and run.strategies[0].quiet()


def test_a_reply_to_no_request_is_an_error() -> None:
    run = simulation(FixedRing, starting_models(2), 1)
    with pytest.raises(AssertionError, match="a reply to no request"):
        run.strategies[0].receive(1, (REPLY, 0, 0, 0), np.zeros(20, np.uint8))


def test_journals_of_different_runs_do_not_fit_together() -> None:
    run = simulation(FixedRing, starting_models(3), 4)
    run_random(run, 2)
    records = [journal.records() for journal in run.journals]
    with pytest.raises(DataError, match=r"event \d+ of rank \d .* has no other side"):
        replay([records[0], records[1][:3], records[2]], np.zeros(5), lambda i, k, w: np.zeros(5), 1 / 3)
