"""Strategies with a centre: against the replay of their journals, and what they promise, in a simulated world."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kaldi_mpi.averaging.asgd import Asgd
from kaldi_mpi.averaging.centre import Centred
from kaldi_mpi.averaging.driver import Participant
from kaldi_mpi.averaging.easgd import Easgd
from kaldi_mpi.averaging.journal import Journal, JournalEvent, Records
from kaldi_mpi.averaging.published import HostPublishedModel
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.testing.replay_centre import ReplayedCentre, replay_centre
from kaldi_mpi.testing.simulation import Event, SimulatedRank, Simulation, explore, run_random
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.number_formats import to_wire
from kaldi_mpi.transport.world import Collective, SoloWorld, World
from tests import gossip

Make = Callable[[Collective], Centred]

# A learner of tests/gossip.py has 10 frames a step.
CENTRED: dict[str, Make] = {
    "easgd": Easgd,
    "easgd alpha 0.3, each second step": lambda world: Easgd(world, 20 * world.size, alpha=0.3),
    "eamsgd": lambda world: Easgd(world, momentum=0.6),
    "asgd": Asgd,
    "asgd s=1, each second step": lambda world: Asgd(world, 20 * world.size, staleness_bound=1),
    "asgd s=0": lambda world: Asgd(world, staleness_bound=0),
}


def replayed(journals: list[Records], strategy: Centred, size: int) -> ReplayedCentre:
    """The run of `gossip.train` again."""
    easgd = isinstance(strategy, Easgd)
    return replay_centre(
        journals,
        gossip.start_model(),
        gossip.reference_change(size),
        strategy.num_learners,
        alpha=strategy.weight if easgd else None,
        momentum=strategy.momentum if isinstance(strategy, Easgd) else 0.0,
        piece_size=gossip.PIECE,
    )


def whole_centre(world: World, strategy: Centred) -> NDArray[np.float32]:
    """The centre, from the ranks that have its pieces."""
    out = np.zeros(gossip.DIM, np.float32)
    for part in world.gather(strategy.centre):
        for piece, values in part.items():
            out[piece * gossip.PIECE : piece * gossip.PIECE + values.size] = values
    return out


def check(world: World, name: str) -> None:
    """Train, gather the journals, replay, compare."""
    strategy = CENTRED[name](world)
    own, final, journal = gossip.train(world, strategy)
    journals, models, finals = world.gather(journal), world.gather(own), world.gather(final)
    assert len({model.tobytes() for model in finals}) == 1, "the learners end with different models"
    if world.size == 1:
        assert own.tobytes() == final.tobytes() == gossip.train(SoloWorld(), Asgd(SoloWorld()))[0].tobytes()
        assert not any(journal["event"] != JournalEvent.STEP)
        return
    want = replayed(journals, strategy, world.size)
    assert want.steps == [gossip.num_steps(rank) for rank in range(world.size)]
    np.testing.assert_allclose(np.array(models), want.models, rtol=3e-5, atol=3e-6, err_msg=name)
    np.testing.assert_allclose(whole_centre(world, strategy), want.centre, rtol=3e-5, atol=3e-6, err_msg=name)
    expected = want.models.mean(0) if name.startswith("ea") else want.centre
    np.testing.assert_allclose(final, expected, rtol=3e-5, atol=3e-6, err_msg=name)
    ages = np.concatenate([j["age"][j["event"] == JournalEvent.CENTRE] for j in journals])
    assert sorted(ages) == sorted(want.staleness) and len(ages) > 0
    assert max(world.gather(strategy.max_staleness)) == max(want.staleness)
    if isinstance(strategy, Asgd):
        assert max(want.staleness) <= (world.size - 1) * (2 * strategy.staleness_bound + 1)


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_journals_over_threads_replay_to_the_trained_models(size: int, name: str) -> None:
    run_world(size, lambda world: check(world, name))


# In a simulated world.


def simulated(
    make: Make, size: int, num_steps: int | list[int], piece_size: int = 2, wire: str = "float32"
) -> Simulation:
    """Learners that start apart and take steps of unit noise."""
    return gossip.simulation(make, gossip.starting_models(size), num_steps, piece_size=piece_size, wire=wire)


def centred(simulation: Simulation) -> list[Centred]:
    """Its strategies."""
    return [strategy for strategy in simulation.strategies if isinstance(strategy, Centred)]


def centre_of(simulation: Simulation) -> NDArray[np.float64]:
    """(P,): the centre, from all ranks."""
    out = np.full(gossip.NUM_PARAMETERS, np.nan)
    for strategy in centred(simulation):
        for piece, values in strategy.centre.items():
            out[simulation.published_models[0].where[piece]] = values
    return out


def slow(rank: int, factor: float, learning: float = 1.0) -> Callable[[Event], float]:
    """Weights under which one learner is `factor` times slower than the others, and messages take their time."""

    def weight(event: Event) -> float:
        if event.what == "learn":
            return learning / factor if event.rank == rank else learning
        return 0.5

    return weight


@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("size", "server"), [(2, False), (4, False), (5, True)])
def test_models_and_centre_keep_their_sum(size: int, server: bool, wire: str) -> None:
    """Through thousands of exchanges with random delays, a learner 100 times slower, and 16 bits."""
    steps = [500] * size
    steps[0] = 5
    if server:
        steps[-1] = 0
    run = simulated(lambda world: Easgd(world, alpha=0.4, dedicated_server=server), size, steps, wire=wire)
    before = run.models().sum(0) + centre_of(run)
    run_random(run, size, slow(0, 100, learning=0.1))
    noise = gossip.total_after(gossip.starting_models(size), steps) - gossip.starting_models(size).sum(0)
    after = run.models().sum(0) + centre_of(run)
    assert sum((journal.records()["event"] == JournalEvent.CENTRE).sum() for journal in run.journals) > 1000
    np.testing.assert_allclose(after, before + noise, atol=1e-6 * np.abs(run.models()).sum())


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "server"), [(3, False), (4, True)])
def test_the_server_loses_no_change(size: int, server: bool, wire: str) -> None:
    """The centre, and what rounding left for the next push, hold the mean of all changes."""
    steps = [60] * size
    if server:
        steps[-1] = 0
    run = simulated(lambda world: Asgd(world, staleness_bound=3, dedicated_server=server), size, steps, wire=wire)
    before = centre_of(run)
    run_random(run, 1, slow(1, 10))
    num_learners = size - server
    noise = gossip.total_after(gossip.starting_models(size), steps) - gossip.starting_models(size).sum(0)
    left = np.zeros(gossip.NUM_PARAMETERS)
    for rank, strategy in enumerate(centred(run)[:num_learners]):
        assert isinstance(strategy, Asgd)
        left += run.models()[rank] - np.concatenate([strategy._base[piece] for piece in sorted(strategy._base)])
    assert (np.abs(left).max() > 1e-3) == (wire == "bfloat16")
    np.testing.assert_allclose(centre_of(run) + left / num_learners, before + noise / num_learners, atol=1e-4)


@pytest.mark.parametrize("bound", [0, 1, 4])
@pytest.mark.parametrize(("size", "server"), [(2, False), (3, False), (5, False), (4, True)])
def test_staleness_has_its_bound_and_nobody_is_stuck(size: int, server: bool, bound: int) -> None:
    """Over random schedules, with one learner 100 times slower, and learners that end at different times."""
    worst = 0
    num_learners = size - server
    limit = (num_learners - 1) * (2 * bound + 1)
    for seed in range(12):
        steps = [int(n) for n in np.random.default_rng(seed).integers(1, 25, size)]
        if server:
            steps[-1] = 0
        run = simulated(lambda world: Asgd(world, None, bound, server), size, steps)
        run_random(run, seed, slow(seed % size, 100 if seed % 2 else 1))
        worst = max(worst, *(strategy.max_staleness for strategy in centred(run)))
        assert worst <= limit
    assert worst > limit / 4, "the schedules do not come near the bound"


def test_without_a_bound_staleness_goes_where_it_likes() -> None:
    """The bound above is not one that nobody would have passed."""
    run = simulated(lambda world: Asgd(world, staleness_bound=10**6), 3, [40, 40, 4])
    run_random(run, 0, slow(2, 100))
    assert max(strategy.max_staleness for strategy in centred(run)) > 2 * (2 * 4 + 1)


@pytest.mark.parametrize(
    ("make", "steps", "piece_size"),
    [
        (lambda world: Asgd(world, staleness_bound=0), [1, 1], 3),
        (lambda world: Asgd(world, staleness_bound=0), [2, 1], 5),
        (lambda world: Asgd(world, staleness_bound=1), [2, 1], 5),
        (lambda world: Asgd(world, 20, staleness_bound=0, dedicated_server=True), [1, 1, 0], 5),
        (lambda world: Easgd(world, alpha=0.25), [1, 1], 5),
    ],
)
def test_every_order_of_events_ends(make: Make, steps: list[int], piece_size: int) -> None:
    """Exhaustively: in a small world no order of events leads to a deadlock or past the bound."""

    def at_end(run: Simulation) -> None:
        for strategy in centred(run):
            if isinstance(strategy, Asgd):
                assert strategy.max_staleness <= (strategy.num_learners - 1) * (2 * strategy.staleness_bound + 1)

    states, ends = explore(simulated(make, len(steps), steps, piece_size), at_end)
    assert states > 100 and ends >= 1


@pytest.mark.parametrize("name", CENTRED)
def test_saved_in_mid_run_it_goes_on_as_if_it_had_not_been(name: str) -> None:
    """Messages under way, held answers and all."""

    def fresh() -> Simulation:
        return simulated(CENTRED[name], 3, [9, 6, 3], piece_size=2, wire="bfloat16")

    for at in (7, 40, 90):
        whole, broken = fresh(), fresh()
        run_random(whole, 4, most=at)
        state = whole.state_dict()
        run_random(whole, 5)
        broken.load_state_dict(state)
        run_random(broken, 5)
        assert whole.models().tobytes() == broken.models().tobytes()
        assert centre_of(whole).tobytes() == centre_of(broken).tobytes()
        assert str(whole.strategies[0].state_dict()) == str(broken.strategies[0].state_dict())


@pytest.mark.parametrize("make", [Easgd, lambda world: Asgd(world, staleness_bound=0)])
def test_learners_pause_together_and_go_on(make: Make) -> None:
    """As at a checkpoint: all leave, and whoever comes back first is not taken for one that has left."""

    def learner(world: World) -> tuple[int, int]:
        strategy = make(world)
        model = HostPublishedModel(np.full(4, float(world.rank), np.float32), 1)
        participant = Participant(strategy, model, world.messages)
        participant.connect()
        for segment in range(3):
            participant.rejoin()
            # Who leaves first differs: a clock that stayed behind must not hold the others up later.
            for _ in range(1 + 3 * ((world.rank + segment) % world.size)):
                participant.publish(np.ones(4, np.float32), np.empty(4, np.float32), frames=10)
            participant.leave()
            participant.settle()
            world.barrier()
        participant.disconnect()
        return strategy.num_averages, strategy._owner_round

    results = run_world(3, learner)
    assert [owner_round for _, owner_round in results] == [2, 2, 2]
    assert all(exchanges >= 3 for exchanges, _ in results)


class _Mail:
    """What a strategy sends, kept."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, tuple[int, ...]]] = []

    def __call__(self, to: int, numbers: object, payload: object) -> None:
        self.sent.append((to, tuple(numbers)))  # type: ignore[arg-type]


def owner(bound: int) -> tuple[Asgd, _Mail, Callable[[int, int], list[int]]]:
    """Rank 0 of three, its mail, and a function by which a learner pushes; it returns who is answered."""
    strategy, mail = Asgd(SimulatedRank(0, 3), staleness_bound=bound), _Mail()
    strategy.connect(HostPublishedModel(np.zeros(2, np.float32)), mail, Journal())

    def push(source: int, number: int) -> list[int]:
        mail.sent.clear()
        strategy.receive(source, (0, number, 0, number + 1), np.ones(2, np.float32).view(np.uint8))
        return [to for to, _ in mail.sent]

    return strategy, mail, push


def test_answers_are_held_back_from_who_is_ahead() -> None:
    strategy, mail, push = owner(bound=1)
    assert push(0, 0) == [0] and push(1, 0) == [1]  # both one ahead of learner 2
    assert push(0, 1) == []
    assert push(2, 0) == [0, 2]  # now the lowest clock is 1
    assert push(1, 1) == [1]
    assert push(1, 2) == []
    mail.sent.clear()
    strategy.receive(2, (10, 0, 0, 0), np.empty(0, np.uint8))  # learner 2 leaves: it holds nobody back
    assert mail.sent == [(2, (11, 0, 0, 0)), (1, (1, 2, 0, 6))]
    np.testing.assert_allclose(strategy.centre[0], 6 / 3)


def test_whoever_left_before_a_pause_is_back_with_the_first_that_returns() -> None:
    strategy, _, push = owner(bound=1)
    for learner in range(3):
        strategy.receive(learner, (10, 0, 0, 0), np.empty(0, np.uint8))
    assert all(strategy.has_left(learner) for learner in range(3))
    strategy.receive(1, (12, 1, 0, 0), np.empty(0, np.uint8))
    assert not any(strategy.has_left(learner) for learner in range(3))
    assert push(1, 0) == [1] and push(1, 1) == []  # 0 and 2 have not been heard of, but are waited for
    strategy.receive(2, (10, 1, 0, 0), np.empty(0, np.uint8))
    strategy.receive(0, (12, 1, 0, 0), np.empty(0, np.uint8))  # late, and no new round
    assert strategy.has_left(2) and not strategy.has_left(0)


def test_the_centre_is_spread_over_the_learners_or_kept_by_the_server() -> None:
    run = simulated(Easgd, 2, 1, piece_size=2)
    assert [sorted(strategy.centre) for strategy in centred(run)] == [[0, 2], [1]]
    run = simulated(lambda world: Easgd(world, dedicated_server=True), 3, [1, 1, 0], piece_size=2)
    assert [sorted(strategy.centre) for strategy in centred(run)] == [[], [], [0, 1, 2]]
    assert [strategy.learns for strategy in centred(run)] == [True, True, False]
    with pytest.raises(ConfigError, match="--dedicated-server: needs a rank besides"):
        Easgd(SoloWorld(), dedicated_server=True)


def test_a_server_of_its_own_ends_with_the_same_final_model() -> None:
    """The final model is the learners' mean, or the centre; a server adds nothing of its own to it."""

    def learner(world: World, make: Make) -> NDArray[np.float32]:
        strategy = make(world)
        model = HostPublishedModel(np.full(4, float(world.rank), np.float32))
        Participant(strategy, model, world.messages).connect()
        if not strategy.learns:
            strategy.centre[0][:] = 7
        final = model.to_numpy()
        strategy.finish(final)
        return final

    for final in run_world(3, lambda world: learner(world, lambda w: Easgd(w, dedicated_server=True))):
        assert final.tolist() == [0.5] * 4
    for final in run_world(3, lambda world: learner(world, lambda w: Asgd(w, dedicated_server=True))):
        assert final.tolist() == [7] * 4


def test_journals_that_do_not_fit_are_named() -> None:
    run = simulated(Easgd, 2, 2)
    run_random(run, 0)
    journals = [journal.records() for journal in run.journals]
    where = int(np.flatnonzero(journals[1]["event"] == JournalEvent.SNAPSHOT)[0])
    journals[1] = np.delete(journals[1], where)
    with pytest.raises(DataError, match="has no other side"):
        replay_centre(journals, np.zeros(5), lambda rank, step, w: w, 2, alpha=0.45, piece_size=2)


def test_the_replay_tells_settings_apart() -> None:
    """Were they without effect on this problem, the comparison with the replay would prove nothing."""

    def learner(world: World) -> list[float]:
        strategy = Easgd(world, alpha=0.3, momentum=0.6)
        own, _, journal = gossip.train(world, strategy)
        journals = world.gather(journal)
        gaps = []
        for alpha, momentum in ((0.3, 0.6), (0.2, 0.6), (0.3, 0.0)):
            other = replay_centre(
                journals, gossip.start_model(), gossip.reference_change(world.size), world.size,
                alpha=alpha, momentum=momentum, piece_size=gossip.PIECE,
            )  # fmt: skip
            gaps.append(float(np.abs(other.models[world.rank] - own).max()))
        return gaps

    for same, other_alpha, other_momentum in run_world(3, learner):
        assert same < 1e-4 < 1e-3 < min(other_alpha, other_momentum)


def test_wires_round_to_nearest() -> None:
    """What the conservation above rests on is tested with the transport; here that a tie goes to even."""
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    out = np.empty(2, np.uint16)
    to_wire(values, out)
    assert (out.astype(np.uint32) << 16).view(np.float32).tolist() == [1.0, 1 + 2**-6]
