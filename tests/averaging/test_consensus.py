"""Properties of asynchronous averaging, in simulation: W, the mean, contraction, no deadlock, going on from a state."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kaldi_mpi.averaging.easgd import Easgd
from kaldi_mpi.averaging.exchange import BUSY_REPLY, REPLY, REQUEST, Exchanging
from kaldi_mpi.averaging.expair import Expair
from kaldi_mpi.averaging.fixed_ring import FixedRing
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published import HostPublishedModel
from kaldi_mpi.averaging.random_ring import RandomRing
from kaldi_mpi.averaging.registry import NAMES, make_strategy
from kaldi_mpi.averaging.settings import Settings
from kaldi_mpi.averaging.strategy import Asynchronous
from kaldi_mpi.testing.simulation import (
    Deadlock,
    Event,
    SimulatedRank,
    Simulation,
    Timed,
    explore,
    fingerprint,
    run_random,
)
from kaldi_mpi.transport.number_formats import Wire
from kaldi_mpi.transport.world import Collective
from tests.gossip import GOSSIP, noise, simulation, starting_models, still, total_after

EXTRA = {"asgd": Settings(staleness_bound=1), "easgd": Settings(elastic_momentum=0.5)}
ASYNCHRONOUS: dict[str, Callable[[Collective], Exchanging]] = {
    name: lambda world, name=name: make_strategy(name, world, EXTRA.get(name, Settings(seed=5)))  # type: ignore[misc]
    for name in NAMES
    if make_strategy(name, SimulatedRank(0, 2), Settings(frames_per_average=10)).asynchronous
}
SIZES = st.integers(2, 7)
KINDS = {"learn": 0, "post": 1, "deliver": 2}


def test_all_asynchronous_strategies_are_here() -> None:
    assert set(ASYNCHRONOUS) == {"easgd", "asgd", "adpsgd-fixed", "adpsgd-random", "expair"}


def step(run: Simulation, rank: int) -> None:
    run.do(Event("learn", rank))
    run.do(Event("post", rank))


def one_after_the_other(run: Simulation, rank: int) -> None:
    """A step of one learner, and its exchange from end to end before anything else happens."""
    step(run, rank)
    while messages := [event for event in run.possible() if event.what == "deliver"]:
        run.do(messages[0])


def in_lock_step(run: Simulation) -> None:
    """All step, then all requests arrive, then all replies."""
    for rank in range(run.size):
        step(run, rank)
    for kinds in ((REQUEST,), (REPLY, BUSY_REPLY)):
        waiting = [(pair, [numbers[0] for numbers, _ in channel]) for pair, channel in sorted(run.channels.items())]
        for (source, to), found in waiting:
            assert set(found) <= set(kinds)
            for _ in found:
                run.do(Event("deliver", to, source))


def check_doubly_stochastic(matrix: NDArray[np.float64], nonnegative: bool = True) -> None:
    np.testing.assert_allclose(matrix.sum(0), 1, atol=2e-6)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=2e-6)
    assert not nonnegative or matrix.min() > -1e-6


# Mixing matrices: learners that start from the columns of the identity end as the columns of the product.


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(GOSSIP)), SIZES, st.data())
def test_mixing_matrices_are_doubly_stochastic(name: str, size: int, data: st.DataObject) -> None:
    """Exchanges one at a time, of any learners in any order."""
    order = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=30))
    run = simulation(GOSSIP[name], np.eye(size, dtype=np.float32), len(order), still)
    for rank in order:
        before = run.models()
        one_after_the_other(run, rank)
        assert np.abs(run.models() - before).max() > 0 or np.ptp(before, axis=0).max() < 1e-6 or len(order) > 1
        check_doubly_stochastic(run.models())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["adpsgd-fixed", "adpsgd-random"]), SIZES, st.integers(1, 6))
def test_rings_in_lock_step_are_doubly_stochastic(name: str, size: int, rounds: int) -> None:
    run = simulation(GOSSIP[name], np.eye(size, dtype=np.float32), rounds, still)
    for _ in range(rounds):
        in_lock_step(run)
        check_doubly_stochastic(run.models())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(GOSSIP)), SIZES, st.integers(0, 2**32))
def test_rows_and_columns_sum_to_one_whatever_overlaps(name: str, size: int, seed: int) -> None:
    """Snapshots grow old under way, so that single weights may leave [0, 1]; the sums stay."""
    run = simulation(GOSSIP[name], np.eye(size, dtype=np.float32), 8, still)
    run_random(run, seed)
    check_doubly_stochastic(run.models(), nonnegative=False)


# The mean.


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(sorted(GOSSIP)), st.integers(3, 6), st.integers(0, 2**32))
def test_the_mean_is_conserved_with_random_delays_and_one_learner_100_times_slower(
    name: str, size: int, seed: int
) -> None:
    """To 1e-6 of the models, through many hundred exchanges between learners at work."""
    steps = [30, *[3600 // (size - 1)] * (size - 1)]
    models = starting_models(size, 12)
    run = simulation(GOSSIP[name], models, steps)
    delays = np.random.default_rng(seed).uniform(0.1, 3.0, (size, size))

    def weight(event: Event) -> float:
        if event.what == "deliver":
            return float(delays[event.source, event.rank])
        return 0.01 if event == Event("learn", 0) else 1.0

    run_random(run, seed, weight)
    error = run.models().mean(0) - total_after(models, steps) / size
    scale = np.sqrt(np.mean(run.models() ** 2))
    exchanges = sum(strategy.num_averages for strategy in run.strategies)
    assert exchanges > 600
    assert np.sqrt(np.mean(error**2)) < 1e-6 * scale


def test_the_mean_is_conserved_through_five_thousand_exchanges() -> None:
    models = starting_models(4, 30)
    run = simulation(Expair, models, [40, 4000, 4000, 4000])
    run_random(run, 0, lambda event: 0.01 if event == Event("learn", 0) else 1.0)
    exchanges = sum(strategy.num_averages for strategy in run.strategies)
    assert exchanges > 5000
    error = run.models().mean(0) - total_after(models, [40, 4000, 4000, 4000]) / 4
    assert np.sqrt(np.mean(error**2) / np.mean(run.models() ** 2)) < 1e-6


def test_what_the_mean_test_measures_is_not_always_small() -> None:
    """One answer by another weight than its reply says, and the mean is off by far more."""

    class Unequal(FixedRing):
        def _weight(self, busy: bool) -> float:
            return self.weight + 1e-3 * self.world.rank

    models = starting_models(4)
    run = simulation(Unequal, models, 20)
    run_random(run, 0)
    assert np.abs(run.models().mean(0) - total_after(models, [20] * 4) / 4).max() > 1e-5


# Contraction.


def distance(models: NDArray[np.float64]) -> float:
    return float(((models - models.mean(0)) ** 2).sum())


@pytest.mark.parametrize("size", [4, 5, 8, 16])
def test_the_fixed_ring_contracts_by_its_second_eigenvalue(size: int) -> None:
    """Learners on the slowest wave of the ring come closer by 1/3 + 2/3 cos(2 pi/N) a round, exactly."""
    wave = np.cos(2 * np.pi * np.arange(size) / size)
    models = np.repeat(wave[:, None], 3, 1).astype(np.float32)
    run = simulation(FixedRing, models, 9, still)
    factor = 1 / 3 + 2 / 3 * np.cos(2 * np.pi / size)
    for _ in range(3):
        before = distance(run.models())
        in_lock_step(run)
        assert np.sqrt(distance(run.models()) / before) == pytest.approx(factor, abs=1e-4)


@pytest.mark.parametrize("size", [5, 8, 16])
def test_the_random_ring_contracts_by_one_over_root_three(size: int) -> None:
    """E |W x|^2 = (N/3 - 1)/(N - 1) |x|^2 for any x of mean zero; tolerance: 5 standard errors."""
    rounds = 300
    wave = np.cos(2 * np.pi * np.arange(size) / size)
    models = np.repeat(wave[:, None], 2, 1).astype(np.float32)
    run = simulation(lambda world: RandomRing(world, seed=11), models, rounds, still)
    ratios = []
    for _ in range(rounds):
        for shared, row in zip(run.published_models, models, strict=True):
            shared.values[:] = row
        in_lock_step(run)
        ratios.append(distance(run.models()) / distance(models.astype(np.float64)))
    want = (size / 3 - 1) / (size - 1)
    assert want < 1 / 3
    assert abs(np.mean(ratios) - want) < 5 * np.std(ratios) / np.sqrt(rounds)


def exponential_gap(size: int) -> tuple[float, int]:
    """min over waves k of the mean over hops h of 1 - cos(2 pi k h / N), and the k that has it."""
    hops = [2**h for h in range(max(1, (size - 1).bit_length()))]
    gaps = [np.mean([1 - np.cos(2 * np.pi * k * h / size) for h in hops]) for k in range(1, size)]
    return float(min(gaps)), 1 + int(np.argmin(gaps))


@pytest.mark.parametrize("size", [4, 6, 8, 16])
def test_expair_contracts_by_the_gap_of_the_exponential_graph(size: int) -> None:
    """An exchange of a learner drawn at random shrinks the slowest wave's square by gap/N; 5 standard errors."""
    trials = 600
    gap, k = exponential_gap(size)
    wave = np.cos(2 * np.pi * k * np.arange(size) / size + 0.3)
    models = np.repeat(wave[:, None], 2, 1).astype(np.float32)
    run = simulation(Expair, models, trials, still)
    rng = np.random.default_rng(2)
    lost = []
    for _ in range(trials):
        for shared, row in zip(run.published_models, models, strict=True):
            shared.values[:] = row
        rank = int(rng.integers(size))
        run.strategies[rank]._number = int(rng.integers(64))  # type: ignore[attr-defined]
        one_after_the_other(run, rank)
        lost.append(1 - distance(run.models()) / distance(models.astype(np.float64)))
    assert abs(np.mean(lost) - gap / size) < 5 * np.std(lost) / np.sqrt(trials)


def test_the_spread_does_not_know_of_a_slow_learner() -> None:
    """Unit noise a step, 8 learners: below delay-by-one's 7/8 with one learner 100 times slower as without."""

    def spread(slow: float) -> float:
        rng = np.random.default_rng(0)
        run = simulation(Expair, np.zeros((8, 64), np.float32), 10**6, piece_size=16)
        clock = Timed(run, lambda rank, _: (slow if rank == 0 else 1.0) * rng.uniform(0.95, 1.05), 0.02, 64 * 4 * 4)
        found, due = [], 20.0
        for now, _ in clock.run():
            if now > due:
                due = now + 0.31
                models = run.models()
                found.append(((models - models.mean(0)) ** 2).mean(1)[1:].mean())
            if now > 80:
                break
        return float(np.mean(found))

    even, uneven = spread(1.0), spread(100.0)
    assert even < 0.75 and uneven < 0.75 and uneven < 1.2 * even


# No deadlock.


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_no_deadlock_in_hundreds_of_random_schedules(name: str) -> None:
    """Sizes, steps, pieces and speeds are drawn as well; `run_random` raises Deadlock if anybody is stuck."""
    most_at_once = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(1, 6))
        steps = [int(n) for n in rng.integers(0, 5, size)]
        models = np.tile(starting_models(1), (size, 1))
        run = simulation(ASYNCHRONOUS[name], models, steps, piece_size=int(rng.choice([2, 3, 9])))
        speeds = rng.choice([0.01, 1.0, 30.0], (3, size))
        run_random(run, seed, lambda event, s=speeds: float(s[KINDS[event.what], event.rank]))  # type: ignore[misc]
        most_at_once = max(most_at_once, max((s._number for s in run.strategies), default=0))  # type: ignore[attr-defined]
        if name in GOSSIP:
            np.testing.assert_allclose(run.models().sum(0), total_after(models, steps), rtol=1e-5, atol=1e-5)
    assert most_at_once > 2


CASES: list[tuple[str, list[int], int]] = [
    ("expair", [2, 2], 1),
    ("adpsgd-fixed", [2, 1], 1),
    ("adpsgd-random", [1, 2], 1),
    *[(name, [1, 1, 1], 1) for name in ("adpsgd-fixed", "expair")],
    *[(name, [1, 1], 2) for name in ASYNCHRONOUS],
    *[(name, [2, 1], 1) for name in ("easgd", "asgd")],
    ("expair", [2, 1, 0], 1),
]


@pytest.mark.parametrize(("name", "steps", "pieces"), CASES)
def test_no_order_of_events_ends_in_a_deadlock_or_moves_the_mean(name: str, steps: list[int], pieces: int) -> None:
    """All orders of all events of a small run, tried systematically."""
    models = np.tile(starting_models(1, 2), (len(steps), 1))
    if name in GOSSIP:
        models = starting_models(len(steps), 2)
    run = explorable(ASYNCHRONOUS[name], models, steps, 2 // pieces)
    want = total_after(models, steps)

    def at_end(end: Simulation) -> None:
        total = end.models().sum(0)
        if name == "easgd":  # the centre holds what the models lack; it starts as a model
            centre = {piece: values for s in end.strategies for piece, values in s.centre.items()}  # type: ignore[attr-defined]
            total = total + np.concatenate([centre[piece] for piece in sorted(centre)]) - models[0]
        if name != "asgd":
            np.testing.assert_allclose(total, own_total(end, want), rtol=1e-5, atol=1e-5)

    states, ends = explore(run, at_end)
    assert ends >= 1 and states > 10


def own_total(run: Simulation, want: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the sum must be: momentum of easgd turns a step u into another that depends on earlier ones alone."""
    if not isinstance(run.strategies[0], Easgd):
        return want
    total = run.published_models[0].values * 0.0
    models = np.tile(starting_models(1, total.size), (run.size, 1))
    total = models.sum(0)
    for rank, steps in enumerate(run.num_steps):
        filtered = ASYNCHRONOUS["easgd"](SimulatedRank(rank, run.size))
        for index in range(steps):
            change = noise(rank, index, models[0])[0]
            filtered.filter_change(change)
            total = total + change
    return total


def explorable(
    make: Callable[[Collective], Asynchronous], models: NDArray[np.float32], steps: Sequence[int], piece_size: int
) -> Simulation:
    size = len(models)
    return Simulation(
        [make(SimulatedRank(rank, size)) for rank in range(size)],
        [HostPublishedModel(row, piece_size) for row in models],
        [Journal(wanted=False)] * size,  # explored orders are no one run
        noise,
        steps,
    )


def test_exploring_finds_a_deadlock_where_there_is_one() -> None:
    """A learner that answers only when it asks for nothing itself: all wait in a circle, in some orders."""

    class Polite(FixedRing):
        def answer(
            self, source: int, number: int, piece: int, their_steps: int, theirs: Wire
        ) -> tuple[int, Wire] | None:
            return None if piece in self._open else super().answer(source, number, piece, their_steps, theirs)

    with pytest.raises(Deadlock, match=r"an exchange of rank \d is never answered"):
        explore(explorable(Polite, starting_models(3, 1), [1, 1, 1], 1), lambda end: None)


def test_exploring_finds_crossing_requests_that_swap() -> None:
    """With weight 1/2 and no merging some order of events ends with the models exchanged, not averaged."""

    class Unmerged(Expair):
        merges = False
        busy_weight = None

    models = np.array([[0.0], [1.0]], np.float32)
    ends: dict[type, set[tuple[float, float]]] = {Unmerged: set(), Expair: set()}
    for kind, found in ends.items():
        run = explorable(kind, models, [1, 1], 1)
        run.change = still
        explore(run, lambda end, found=found: found.add(tuple(np.round(end.models()[:, 0], 3))))  # type: ignore[misc]
    assert (1.0, 0.0) in ends[Unmerged]
    assert ends[Expair] == {(0.5, 0.5)}


# Going on from a state.


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_a_run_goes_on_from_its_state_with_messages_under_way(name: str, wire: str) -> None:
    """Saved at various points of a run, restored into new objects: all that follows is the same, bit for bit."""

    def fresh() -> Simulation:
        models = np.tile(starting_models(1, 11), (4, 1))
        return simulation(ASYNCHRONOUS[name], models, [6, 5, 6, 3], piece_size=4, wire=wire)

    in_flight = 0
    for seed, at in enumerate([0, 1, 17, 40, 71, 120]):
        whole = fresh()
        run_random(whole, seed, most=at)
        saved = pickle.dumps(whole.state_dict())
        in_flight += sum(map(len, whole.channels.values()))
        run_random(whole, seed + 100)
        restored = fresh()
        restored.load_state_dict(pickle.loads(saved))
        assert fingerprint(restored.state_dict()) == fingerprint(pickle.loads(saved))
        run_random(restored, seed + 100)
        assert fingerprint(restored.state_dict()) == fingerprint(whole.state_dict())
    assert in_flight > 5
