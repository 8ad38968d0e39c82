"""Every synchronous strategy against its float64 reference, over threads and alone (tests/averaging/test_ranks.py:
over real ranks), and what all strategies have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kaldi_mpi.averaging.names import NAMES
from numpy.typing import NDArray

from kaldi_mpi.averaging import Step, Strategy, make_strategy
from kaldi_mpi.averaging.bmuf import Bmuf
from kaldi_mpi.averaging.delay1 import Delay1
from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.periodic import Periodic
from kaldi_mpi.averaging.settings import OPTIONS, USERS, Settings, check_settings
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.flat import ComponentSlice, FlatParameters
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.testing import reference
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import SoloWorld, World
from tests import gossip

DIM, NUM_STEPS = 12, 9
MAX_CHANGE = [(slice(0, 5), 0.05), (slice(5, DIM), 0.02)]
RATES = [0.002 * 0.9**step for step in range(NUM_STEPS)]

# Cases: a strategy, its settings, and what its reference wants to know of them.
Case = tuple[str, Settings, dict[str, Any]]
CASES: list[Case] = [
    ("allreduce", Settings(), {}),
    *[("periodic", Settings(frames_per_average=k), {"frames_per_average": k}) for k in (1, 10, 10**9)],
    *[
        ("bmuf", Settings(frames_per_average=k, **more), {"frames_per_average": k, **more})
        for k, more in (
            (10, {}),
            (1, {"nesterov": True}),
            (10, {"nesterov": True, "reset_momentum": False}),
            (20, {"block_momentum": 0.3, "block_learning_rate": 1.5}),
            (10**9, {"block_momentum": 0.6, "nesterov": True}),
        )
    ],
    ("adpsgd-delay1", Settings(), {}),
]
REFERENCES = {
    "allreduce": reference.allreduce,
    "periodic": reference.periodic,
    "bmuf": reference.bmuf,
    "adpsgd-delay1": reference.delay1,
}


def gradient(w: NDArray[np.float64], learner: int, step: int) -> tuple[NDArray[np.float64], int]:
    """Least squares on this learner's minibatch of this step; sizes differ, and some are empty."""
    frames = (5 * learner + 3 * step + 4) % 7
    rng = np.random.default_rng([learner, step])
    x, y = rng.standard_normal((frames, DIM)), rng.standard_normal(frames)
    return x.T @ (x @ w - y), frames


def start() -> NDArray[np.float64]:
    return np.random.default_rng(99).standard_normal(DIM)


class Training:
    """The learner's step with its real optimiser, around a problem small enough to repeat in float64."""

    def __init__(self, world: World, strategy: Strategy, momentum: float, limits: bool) -> None:
        self.world, self.strategy = world, strategy
        flat = FlatParameters.__new__(FlatParameters)
        flat.values = torch.from_numpy(start().astype(np.float32))
        flat.gradients = torch.zeros(DIM)
        flat.components = [
            ComponentSlice(f"c{i}", where, limit if limits else 0.0, 1.0, 0.0)
            for i, (where, limit) in enumerate(MAX_CHANGE)
        ]
        self.optimiser = KaldiSgd(flat, momentum, 0.04 if limits else 0.0)
        self.w, self.g = flat.values.numpy(), flat.gradients.numpy()

    def step(self, index: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """One step; `meanwhile` is called in the middle of it."""
        world, strategy = self.world, self.strategy
        own, frames = gradient(self.w.astype(np.float64), world.rank, index)
        total = sum(gradient(start(), i, index)[1] for i in range(world.size))
        step = Step(index, frames, total)
        strategy.start_step(self.w, step)
        self.g[:] = own
        meanwhile()
        self.strategy.combine_gradients(self.g, step)
        base = self.strategy.base(step)
        if frames or strategy.moves_together:
            rate = world.size * RATES[index] * strategy.rate_factor
            self.optimiser.step(rate, 1, base=None if base is None else torch.from_numpy(base))
        elif base is not None:
            self.w[:] = base
        if self.strategy.note(step) and self.strategy.mix_parameters(self.w):
            self.optimiser.forget()

    def run(self) -> NDArray[np.float32]:
        """All steps; returns the final model."""
        self.strategy.begin(self.w)
        for index in range(NUM_STEPS):
            self.step(index)
        self.strategy.finish(self.w)
        return self.w


def expected(name: str, size: int, momentum: float, limits: bool, more: dict[str, Any]) -> NDArray[np.float64]:
    optimiser = {"momentum": momentum, "max_change": MAX_CHANGE if limits else (), "max_param_change": 0.04 * limits}
    return REFERENCES[name](start(), gradient, size, RATES, **more, **optimiser)  # type: ignore[operator]


def check_all(world: World, momentum: float, limits: bool) -> None:
    """All cases over one world."""
    for name, settings, more in CASES:
        ours = Training(world, make_strategy(name, world, settings), momentum, limits).run()
        if world.size == 1 and name != "allreduce":  # whatever it is told: plain SGD
            want = expected("periodic", 1, momentum, limits, {"frames_per_average": 1})
        else:
            want = expected(name, world.size, momentum, limits, more)
        np.testing.assert_allclose(ours, want, rtol=3e-5, atol=3e-6, err_msg=f"{name} {settings}")
        assert len({w.tobytes() for w in world.gather(ours)}) == 1, "the learners end with different models"


@pytest.mark.parametrize(("momentum", "limits"), [(0.0, False), (0.5, False), (0.5, True)])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_strategies_equal_their_reference_over_threads(size: int, momentum: float, limits: bool) -> None:
    run_world(size, lambda world: check_all(world, momentum, limits))


def test_the_reference_tells_strategies_apart() -> None:
    """Were the settings without effect, the tests above would prove nothing."""
    results = [expected(name, 3, momentum, False, more) for name, _, more in CASES for momentum in (0.0, 0.5)]
    results.append(expected("allreduce", 3, 0.5, True, {}))
    for i, one in enumerate(results):
        for j, other in enumerate(results[:i]):
            # With one block, look-ahead and forgetting come too late to matter: none of the cases is such.
            assert np.abs(one - other).max() > 3e-5, (i, j)


def test_frequent_averaging_without_momentum_is_allreduce() -> None:
    """Averaging after each step and averaging gradients are one rule where the optimiser is linear in g."""
    full = lambda w, i, t: gradient(w, i, 2 * t)  # noqa: E731 - steps in which weights are equal need equal sizes

    def equal_sizes(w: NDArray[np.float64], learner: int, step: int) -> tuple[NDArray[np.float64], int]:
        return full(w, learner, step)[0], 5

    one = reference.allreduce(start(), equal_sizes, 3, RATES)
    other = reference.periodic(start(), equal_sizes, 3, RATES, 1)
    np.testing.assert_allclose(one, other, rtol=1e-12)
    # Block momentum 0 is plain averaging.
    np.testing.assert_allclose(one, reference.bmuf(start(), equal_sizes, 3, RATES, 1, 0.0), rtol=1e-12)


def usual(name: str, **more: Any) -> Settings:
    """Settings with what the strategy cannot do without."""
    return Settings(frames_per_average=25 if name in ("periodic", "bmuf") else None, **more)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_one_learner_is_plain_sgd_bit_for_bit(name: str, momentum: float) -> None:
    """Whatever its strategy is told, a learner alone trains as without one, to the last bit."""
    told = {"block_momentum": 0.5, "nesterov": True, "elastic_momentum": 0.5, "elastic_alpha": 0.5}
    strategy = make_strategy(name, SoloWorld(), dataclasses.replace(usual(name), transfer_dtype="bfloat16", **told))
    if isinstance(strategy, Exchanging):
        own, final, _ = gossip.train(SoloWorld(), strategy)
        plain = gossip.train(SoloWorld(), Exchanging(SoloWorld()))[0]
        assert own.tobytes() == final.tobytes() == plain.tobytes()
    else:
        ours = Training(SoloWorld(), strategy, momentum, True)
        plain_sgd = Training(SoloWorld(), Strategy(SoloWorld()), momentum, True)
        # In a step without any frames, which no run has, allreduce would still apply the momentum.
        plain_sgd.strategy.moves_together = strategy.moves_together  # type: ignore[misc]
        assert ours.run().tobytes() == plain_sgd.run().tobytes()
        assert strategy.mean_model(ours.w).tobytes() == ours.w.tobytes()
    assert strategy.bytes_sent == 0 and strategy.rate_factor == 1.0


# Saving and restoring.


def saved_run(world: World, name: str, settings: Settings, at: int, in_mid_step: bool) -> NDArray[np.float32]:
    """A run whose strategy is thrown away before, or in the middle of, step `at`; a new one goes on from its state."""
    training = Training(world, make_strategy(name, world, settings), 0.5, True)
    training.strategy.begin(training.w)

    def replace() -> None:
        state = training.strategy.state_dict()
        training.w += 0  # the state must not share memory with what changes later
        training.strategy = make_strategy(name, world, settings)
        training.strategy.load_state_dict(state)

    for index in range(NUM_STEPS):
        if index == at and not in_mid_step:
            replace()
        training.step(index, replace if index == at and in_mid_step else lambda: None)
    training.strategy.finish(training.w)
    return training.w


def check_saving(world: World) -> None:
    """Saved and restored, each strategy goes on as if nothing had been, bit for bit."""
    for wire in ("float32", "bfloat16"):
        for name in ("periodic", "bmuf", "adpsgd-delay1"):
            settings = dataclasses.replace(usual(name), transfer_dtype=wire, nesterov=True)
            whole = Training(world, make_strategy(name, world, settings), 0.5, True).run().tobytes()
            for at in (1, 4, 8):
                for in_mid_step in (False, True):
                    got = saved_run(world, name, settings, at, in_mid_step).tobytes()
                    assert got == whole, f"{name} {wire}, saved at step {at}"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_strategy_goes_on_from_its_state(size: int) -> None:
    run_world(size, check_saving)


# Single rules.


def after_step(strategy: Strategy, w: NDArray[np.float32], step: Step) -> None:
    """What the learner's loop does after the optimiser."""
    if strategy.note(step):
        strategy.mix_parameters(w)


def test_periodic_weighs_by_frames_and_counts_over_all_learners() -> None:
    """A mean weighted by frames, after the first step that completes K frames over all learners."""

    def learner(world: World) -> list[float]:
        strategy = make_strategy("periodic", world, frames_per_average=100)
        w = np.full(1, float(world.rank), np.float32)
        seen = []
        for index, frames in enumerate((30, 10)):
            own = frames * (1 + world.rank)  # 30 and 60, then 10 and 20
            after_step(strategy, w, Step(index, own, 3 * frames))
            seen.append(float(w[0]))
        return [*seen, strategy.num_averages]

    results = run_world(2, learner)
    assert results[0][:1] == [0.0] and results[1][:1] == [1.0]  # 90 frames: not yet
    assert results[0][1] == results[1][1] == pytest.approx(80 / 120)
    assert results[0][2] == results[1][2] == 1


def test_validation_of_the_mean_leaves_the_learners_alone() -> None:
    def learner(world: World) -> tuple[float, float]:
        strategy = make_strategy("periodic", world, frames_per_average=10**9)
        w = np.full(3, float(world.rank), np.float32)
        after_step(strategy, w, Step(0, 10 * world.rank, 30))
        return float(strategy.mean_model(w)[0]), float(w[0])

    assert run_world(3, learner) == [
        (pytest.approx(5 / 3), 0.0),
        (pytest.approx(5 / 3), 1.0),
        (pytest.approx(5 / 3), 2.0),
    ]


def test_block_learning_rate_means_the_same_for_any_number_of_learners() -> None:
    """BMUF divides by N: learners that all move by 1 move the model by zeta, not by N zeta."""

    def learner(world: World) -> float:
        strategy = Bmuf(world, 1, momentum=0.0, learning_rate=0.25)
        w = np.zeros(3, np.float32)
        strategy.begin(w)
        w += 1
        strategy.note(Step(0, 5, 5 * world.size))
        strategy.mix_parameters(w)
        return float(w[0])

    assert [run_world(size, learner)[0] for size in (2, 3, 5)] == pytest.approx([0.25] * 3)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_block_momentum_leaves_the_effective_rate_alone(momentum: float | None) -> None:
    """Under a constant gradient, blocks come to move the model by N times the actual rate's step by one learner."""

    def learner(world: World) -> float:
        strategy = Bmuf(world, 1, momentum=momentum, nesterov=True)
        w = np.zeros(1, np.float32)
        strategy.begin(w)
        for index in range(60):
            before = float(strategy._centre[0])
            w += np.float32(0.01 * strategy.rate_factor)  # by the actual rate: N times the effective one
            strategy.note(Step(index, 5, 5 * world.size))
            strategy.mix_parameters(w)
        return float(strategy._centre[0]) - before

    assert run_world(3, learner) == pytest.approx([0.01] * 3, rel=1e-3)


def test_the_optimiser_forgets_where_a_block_ends_unless_told_otherwise() -> None:
    def learner(world: World) -> list[bool]:
        out = []
        for reset in (True, False):
            strategy = Bmuf(world, 1, reset_momentum=reset)
            strategy.begin(np.zeros(2, np.float32))
            out.append(strategy.mix_parameters(np.zeros(2, np.float32)))
        return out

    assert run_world(2, learner) == [[True, False]] * 2
    assert run_world(1, learner) == [[False, False]]


def test_delay_by_one_uses_models_without_the_step_that_is_being_taken() -> None:
    def learner(world: World) -> list[float]:
        strategy = Delay1(world)
        w = np.full(2, float(world.rank), np.float32)
        seen = []
        for index in range(2):
            step = Step(index, 5, 10)
            strategy.start_step(w, step)
            base = strategy.base(step)
            assert base is not None
            w[:] = base
            seen.append(float(w[0]))
            w += 10 * (1 + world.rank)  # the optimiser
        return seen

    assert run_world(2, learner) == [[0.5, 15.5]] * 2  # (0+1)/2; then (10.5+20.5)/2


# Narrow types on the way.


def spread_and_mean(world: World, strategy: Strategy, frames: int) -> tuple[float, float]:
    """How far one averaging moves the (weighted) mean, and how far apart it leaves the models; relative."""
    w = np.random.default_rng(world.rank).standard_normal(1000).astype(np.float32)
    weight = frames / sum(world.gather(frames))
    before = world.sum_float64(weight * w.astype(np.float64))
    step = Step(0, frames, sum(world.gather(frames)))
    strategy.begin(w)
    strategy.start_step(w, step)
    base = strategy.base(step)
    if base is not None:
        w[:] = base
    after_step(strategy, w, step)
    after = world.sum_float64(weight * w.astype(np.float64))
    models = world.gather(w)
    return float(np.abs(after - before).max()), float(max(np.abs(m - models[0]).max() for m in models))


@pytest.mark.parametrize("wire", ["float16", "bfloat16"])
def test_narrow_types_keep_the_mean(wire: str) -> None:
    """To float32 rounding, although what travels is far coarser; a learner without frames takes the mean as it is."""

    def learner(world: World) -> list[tuple[float, float]]:
        return [
            spread_and_mean(world, Periodic(world, 1, wire), 3 * world.rank),
            spread_and_mean(world, Delay1(world, wire), 7),
        ]

    for result in run_world(3, learner):
        for moved, spread in result:
            assert moved < 2e-6
            assert 1e-5 < spread < 3 * 2.0**-8 * 4


@pytest.mark.parametrize("wire", ["float16", "bfloat16"])
def test_block_updates_lose_nothing_to_narrow_types(wire: str) -> None:
    """What rounding keeps back goes with the next block: with no block momentum, c + mean(kept back) is the mean."""

    def learner(world: World) -> tuple[float, float]:
        strategy = Bmuf(world, 1, momentum=0.0, transfer_dtype=wire)
        w = np.zeros(500, np.float32)
        strategy.begin(w)
        truth = np.zeros(500)
        for index in range(20):
            moves = [np.random.default_rng([r, index]).standard_normal(500) for r in range(world.size)]
            truth += np.mean(moves, axis=0)
            w += moves[world.rank].astype(np.float32)
            strategy.note(Step(index, 5, 5 * world.size))
            strategy.mix_parameters(w)
        kept = world.sum_float64(strategy._residue.astype(np.float64)) / world.size
        assert len({m.tobytes() for m in world.gather(w)}) == 1
        return float(np.abs(w + kept - truth).max()), float(np.abs(w - truth).max())

    for exact, rough in run_world(3, learner):
        assert exact < 2e-5 < 1e-4 < rough < 0.05


def test_narrow_gradients_leave_the_models_equal_and_close() -> None:
    def learner(world: World) -> tuple[bytes, float]:
        exact = Training(world, make_strategy("allreduce", world), 0.5, False).run()
        narrow = Training(
            world, make_strategy("allreduce", world, Settings(transfer_dtype="bfloat16")), 0.5, False
        ).run()
        return narrow.tobytes(), float(np.abs(narrow - exact).max())

    results = run_world(3, learner)
    assert len({bits for bits, _ in results}) == 1
    assert 0 < results[0][1] < 1e-2


def test_bytes_are_counted_as_they_travel() -> None:
    """A sum by pieces: (N-1)/N of the buffer out, in the narrow type, and as much back in float32."""

    def learner(world: World) -> list[int]:
        sent = []
        for wire in ("float32", "bfloat16"):
            strategy = make_strategy("allreduce", world, Settings(transfer_dtype=wire))
            strategy.combine_gradients(np.ones(1000, np.float32), Step(0, 1, 4))
            sent.append(strategy.bytes_sent)
        return sent

    assert run_world(4, learner) == [[6000, 4500]] * 4


# Settings.


@pytest.mark.parametrize(
    ("name", "frames_per_average", "message"),
    [
        ("periodic", None, "--strategy periodic needs --frames-per-average"),
        ("bmuf", None, "--strategy bmuf needs --frames-per-average"),
        ("periodic", 0, "--frames-per-average 0: must be a number of frames above 0"),
        ("allreduce", 100, "--frames-per-average: strategy allreduce has no use for it; it is for periodic, bmuf"),
        ("adpsgd-delay1", 100, "--frames-per-average: strategy adpsgd-delay1 has no use for it"),
        ("gossip", None, "--strategy gossip: unknown; there are allreduce, periodic, "),
    ],
)
def test_bad_settings_are_named(name: str, frames_per_average: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_strategy(name, SoloWorld(), frames_per_average=frames_per_average)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames_per_average", -3),
        ("block_momentum", 1.0),
        ("block_momentum", -0.1),
        ("block_learning_rate", 0.0),
        ("elastic_alpha", 0.0),
        ("elastic_alpha", 1.5),
        ("elastic_momentum", 1.0),
        ("staleness_bound", -1),
        ("exchanges_per_step", 0),
        ("piece_size", 0),
        ("transfer_dtype", "float8"),
        ("super_learner_size", 0),
    ],
)
def test_values_that_cannot_be_are_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**{field: value})
    assert str(caught.value).startswith(f"{OPTIONS[field]} {value}: must be ")
    assert "\n" not in str(caught.value)


def test_settings_without_a_user_are_named() -> None:
    values = {
        "block_momentum": 0.5, "block_learning_rate": 2.0, "nesterov": True, "reset_momentum": False,
        "elastic_alpha": 0.5, "elastic_momentum": 0.5, "staleness_bound": 2, "exchanges_per_step": 2,
        "piece_size": 100, "super_learner_size": 2, "dedicated_server": True, "frames_per_average": 100,
    }  # fmt: skip
    assert set(values) == set(USERS)
    for field, value in values.items():
        for name in NAMES:
            frames = 100 if name in ("periodic", "bmuf") else None
            settings = Settings(**({"frames_per_average": frames} | {field: value}))
            if name in USERS[field]:
                check_settings([name], settings)
            else:
                with pytest.raises(ConfigError, match=f"{OPTIONS[field]}: strategy {name} has no use for it"):
                    check_settings([name], settings)


def test_settings_need_a_user_in_one_phase_only() -> None:
    settings = Settings(frames_per_average=100)
    check_settings(["allreduce", "periodic"], settings)
    with pytest.raises(ConfigError, match="strategy allreduce, adpsgd-delay1 have no use for it"):
        check_settings(["allreduce", "adpsgd-delay1"], settings)
    assert make_strategy("allreduce", SoloWorld(), settings).name == "allreduce"


def test_every_name_makes_its_strategy_with_its_settings() -> None:
    settings = Settings(
        frames_per_average=40, block_momentum=0.4, block_learning_rate=2.0, nesterov=True, reset_momentum=False,
        elastic_alpha=0.3, elastic_momentum=0.2, staleness_bound=3, exchanges_per_step=2, seed=5,
        transfer_dtype="float16",
    )  # fmt: skip
    made = {name: vars(make_strategy(name, SoloWorld(), settings)) for name in NAMES}
    assert all(make_strategy(name, SoloWorld(), settings).name == name for name in NAMES)
    assert all(made[name]["transfer_dtype"] == "float16" for name in ("allreduce", "periodic", "bmuf", "adpsgd-delay1"))
    assert all(
        made[name]["frames_per_average"] == 40
        for name in ("periodic", "bmuf", "easgd", "asgd", "adpsgd-fixed", "adpsgd-random", "expair")
    )
    wanted = {"momentum": 0.4, "learning_rate": 2.0, "nesterov": True, "reset_momentum": False}
    assert made["bmuf"].items() >= wanted.items()
    assert made["easgd"].items() >= {"weight": 0.3, "momentum": 0.2}.items()
    assert made["asgd"]["staleness_bound"] == 3 and made["adpsgd-random"]["seed"] == 5
    assert made["expair"]["exchanges_per_step"] == 2
