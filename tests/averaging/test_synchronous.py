"""Every synchronous strategy against its float64 reference, over threads and alone (tests/averaging/test_ranks.py:
over real ranks), and what all strategies have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kaldi_mpi.averaging import (
    NAMES,
    Asynchronous,
    Settings,
    Synchronous,
    make_strategy,
    synchronous_step,
)
from kaldi_mpi.averaging.bmuf import Bmuf
from kaldi_mpi.averaging.delay1 import Delay1
from kaldi_mpi.averaging.periodic import Periodic
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.testing import reference
from kaldi_mpi.testing.array_learner import ArrayLearner
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import Collective, SoloWorld, World
from tests import gossip
from tests.gossip import DIM, MAX_CHANGE, NUM_STEPS
from tests.gossip import start_model as start

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
REFERENCES: dict[str, Callable[..., NDArray[np.float64]]] = {
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


class LeastSquaresLearner(ArrayLearner):
    """A `SteppingLearner` with the training's real optimiser, and a problem small enough to repeat in float64."""

    def __init__(self, momentum: float, limits: bool) -> None:
        self._flat = gossip.flat_parameters(limits)
        super().__init__(self._flat.values.numpy())
        self.gradients = self._flat.gradients.numpy()
        self.optimiser = KaldiSgd(self._flat, momentum, 0.04 if limits else 0.0)
        self.frames = 0

    def update(self, base: NDArray[np.float32] | None, together: bool) -> None:
        if self.frames or together:
            self.optimiser.step(self.rate, 1, base=None if base is None else torch.from_numpy(base))
        elif base is not None:
            self.parameters[:] = base

    def forget_momentum(self) -> None:
        self.optimiser.forget()


class Training:
    """One rank's part in a synchronous training."""

    def __init__(self, world: World, strategy: Synchronous, momentum: float, limits: bool) -> None:
        self.world, self.strategy = world, strategy
        self.learner = LeastSquaresLearner(momentum, limits)
        self.w = self.learner.parameters

    def step(self, index: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """One step; `meanwhile` is called when the gradient is there."""
        learner, size = self.learner, self.world.size
        own, learner.frames = gradient(self.w.astype(np.float64), self.world.rank, index)
        learner.rate = size * RATES[index] * self.strategy.rate_factor
        total = sum(gradient(start(), rank, index)[1] for rank in range(size))

        def compute() -> None:
            learner.gradients[:] = own
            meanwhile()

        synchronous_step(self.strategy, learner, compute, learner.frames, total)

    def run(self) -> NDArray[np.float32]:
        """All steps; returns the final model."""
        self.strategy.begin(self.w)
        for index in range(NUM_STEPS):
            self.step(index)
        self.strategy.finish(self.w)
        return self.w


def synchronous(name: str, world: Collective, settings: Settings | None = None) -> Synchronous:
    strategy = make_strategy(name, world, settings)
    assert isinstance(strategy, Synchronous)
    return strategy


def expected(name: str, size: int, momentum: float, limits: bool, more: dict[str, Any]) -> NDArray[np.float64]:
    optimiser = {"momentum": momentum, "max_change": MAX_CHANGE if limits else (), "max_param_change": 0.04 * limits}
    return REFERENCES[name](start(), gradient, size, RATES, **more, **optimiser)


def check_all(world: World, momentum: float, limits: bool) -> None:
    """All cases over one world."""
    for name, settings, more in CASES:
        ours = Training(world, synchronous(name, world, settings), momentum, limits).run()
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

    def equal_sizes(w: NDArray[np.float64], learner: int, step: int) -> tuple[NDArray[np.float64], int]:
        return gradient(w, learner, 2 * step)[0], 5  # steps in which weights are equal need equal sizes

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
    told: dict[str, Any] = {"block_momentum": 0.5, "nesterov": True, "elastic_momentum": 0.5, "elastic_alpha": 0.5}
    strategy = make_strategy(name, SoloWorld(), dataclasses.replace(usual(name), transfer_dtype="bfloat16", **told))
    if isinstance(strategy, Asynchronous):
        own, final, _ = gossip.train(SoloWorld(), strategy)
        plain = gossip.train(SoloWorld(), Asynchronous(SoloWorld()))[0]
        assert own.tobytes() == final.tobytes() == plain.tobytes()
    else:
        assert isinstance(strategy, Synchronous)
        ours = Training(SoloWorld(), strategy, momentum, True)
        plain_sgd = Training(SoloWorld(), Synchronous(SoloWorld()), momentum, True)
        # In a step without any frames, which no run has, allreduce would still apply the momentum.
        plain_sgd.strategy.moves_together = strategy.moves_together  # type: ignore[misc]
        assert ours.run().tobytes() == plain_sgd.run().tobytes()
        assert strategy.mean_model(ours.w).tobytes() == ours.w.tobytes()
    assert strategy.bytes_sent == 0 and strategy.rate_factor == 1.0


# Saving and restoring.


class Killed(Exception):
    """The end of a run in the middle of a step."""


def saved_run(world: World, name: str, settings: Settings, at: int, in_mid_step: bool) -> NDArray[np.float32]:
    """A run that ends before, or in the middle of, step `at`; that step is taken with a new strategy, of its state."""
    training = Training(world, synchronous(name, world, settings), 0.5, True)
    training.strategy.begin(training.w)
    state: dict[str, Any] = {}

    def save() -> None:
        state.update(training.strategy.state_dict())
        training.w += 0  # the state must not share memory with what changes later

    def die() -> None:
        save()
        raise Killed

    for index in range(NUM_STEPS):
        if index == at:
            if in_mid_step:
                with pytest.raises(Killed):
                    training.step(index, die)
            else:
                save()
            training.strategy = synchronous(name, world, settings)
            training.strategy.load_state_dict(state)
        training.step(index)
    training.strategy.finish(training.w)
    return training.w


def check_saving(world: World) -> None:
    """Saved and restored, each strategy goes on as if nothing had been, bit for bit."""
    for wire in ("float32", "bfloat16"):
        for name in ("periodic", "bmuf", "adpsgd-delay1"):
            settings = dataclasses.replace(usual(name), transfer_dtype=wire, nesterov=True)
            whole = Training(world, synchronous(name, world, settings), 0.5, True).run().tobytes()
            for at in (1, 4, 8):
                for in_mid_step in (False, True):
                    got = saved_run(world, name, settings, at, in_mid_step).tobytes()
                    assert got == whole, f"{name} {wire}, saved at step {at}"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_strategy_goes_on_from_its_state(size: int) -> None:
    run_world(size, check_saving)


# Single rules.


class Moving(ArrayLearner):
    """A learner that moves by what it is told, whatever its model is."""

    def __init__(self, world: World, strategy: Synchronous, parameters: NDArray[np.float32]) -> None:
        super().__init__(parameters, rate=-1.0)
        self.world, self.strategy = world, strategy
        self.has_forgotten = False

    def move(self, change: float | NDArray[np.float32], frames: int, global_frames: int) -> None:
        """One step of all learners."""

        def compute() -> None:
            self.gradients[:] = change

        synchronous_step(self.strategy, self, compute, frames, global_frames)

    def forget_momentum(self) -> None:
        self.has_forgotten = True


def test_periodic_weighs_by_frames_and_counts_over_all_learners() -> None:
    """A mean weighted by frames, after the first step that completes K frames over all learners."""

    def run(world: World) -> list[float]:
        strategy = Periodic(world, frames_per_average=100)
        learner = Moving(world, strategy, np.full(1, float(world.rank), np.float32))
        seen = []
        for frames in (30, 10):
            learner.move(0.0, frames * (1 + world.rank), 3 * frames)  # 30 and 60, then 10 and 20
            seen.append(float(learner.parameters[0]))
        return [*seen, strategy.num_averages]

    results = run_world(2, run)
    assert results[0][:1] == [0.0] and results[1][:1] == [1.0]  # 90 frames: not yet
    assert results[0][1] == results[1][1] == pytest.approx(80 / 120)
    assert results[0][2] == results[1][2] == 1


def test_validation_of_the_mean_leaves_the_learners_alone() -> None:
    def run(world: World) -> tuple[float, float]:
        strategy = Periodic(world, frames_per_average=10**9)
        learner = Moving(world, strategy, np.full(3, float(world.rank), np.float32))
        learner.move(0.0, 10 * world.rank, 30)
        return float(strategy.mean_model(learner.parameters)[0]), float(learner.parameters[0])

    means, models = zip(*run_world(3, run), strict=True)
    assert means == pytest.approx([5 / 3] * 3) and models == (0.0, 1.0, 2.0)


def test_block_learning_rate_means_the_same_for_any_number_of_learners() -> None:
    """BMUF divides by N: learners that all move by 1 move the model by zeta, not by N zeta."""

    def run(world: World) -> float:
        learner = Moving(world, Bmuf(world, 1, momentum=0.0, learning_rate=0.25), np.zeros(3, np.float32))
        learner.strategy.begin(learner.parameters)
        learner.move(1.0, 5, 5 * world.size)
        return float(learner.parameters[0])

    assert [run_world(size, run)[0] for size in (2, 3, 5)] == pytest.approx([0.25] * 3)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_block_momentum_leaves_the_effective_rate_alone(momentum: float | None) -> None:
    """Under a constant gradient, blocks come to move the model by N times the actual rate's step by one learner."""

    def run(world: World) -> float:
        strategy = Bmuf(world, 1, momentum=momentum, nesterov=True)
        learner = Moving(world, strategy, np.zeros(1, np.float32))
        strategy.begin(learner.parameters)
        for _ in range(60):
            before = float(strategy._centre[0])
            learner.move(0.01 * strategy.rate_factor, 5, 5 * world.size)  # the actual rate: N times the effective one
        return float(strategy._centre[0]) - before

    assert run_world(3, run) == pytest.approx([0.01] * 3, rel=1e-3)


def test_the_optimiser_forgets_where_a_block_ends_unless_told_otherwise() -> None:
    def run(world: World) -> list[bool]:
        out = []
        for reset in (True, False):
            learner = Moving(world, Bmuf(world, 1, reset_momentum=reset), np.zeros(2, np.float32))
            learner.strategy.begin(learner.parameters)
            learner.move(1.0, 5, 5 * world.size)
            out.append(learner.has_forgotten)
        return out

    assert run_world(2, run) == [[True, False]] * 2
    assert run_world(1, run) == [[False, False]]


def test_delay_by_one_uses_models_without_the_step_that_is_being_taken() -> None:
    def run(world: World) -> list[float]:
        learner = Moving(world, Delay1(world), np.full(2, float(world.rank), np.float32))
        change = 10 * (1 + world.rank)
        bases = []
        for _ in range(2):
            learner.move(change, 5, 10)
            bases.append(float(learner.parameters[0]) - change)
        return bases

    assert run_world(2, run) == [[0.5, 15.5]] * 2  # (0+1)/2; then (10.5+20.5)/2


# Narrow types on the way.


def spread_and_mean(world: World, strategy: Synchronous, frames: int) -> tuple[float, float]:
    """How far one averaging moves the (weighted) mean, and how far apart it leaves the models; relative."""
    w = np.random.default_rng(world.rank).standard_normal(1000).astype(np.float32)
    weight = frames / sum(world.gather(frames))
    before = world.sum_float64(weight * w.astype(np.float64))
    strategy.begin(w)
    Moving(world, strategy, w).move(0.0, frames, sum(world.gather(frames)))
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
        moving = Moving(world, strategy, w)
        truth = np.zeros(500)
        for index in range(20):
            moves = [np.random.default_rng([r, index]).standard_normal(500) for r in range(world.size)]
            truth += np.mean(moves, axis=0)
            moving.move(moves[world.rank].astype(np.float32), 5, 5 * world.size)
        kept = world.sum_float64(strategy._residue.astype(np.float64)) / world.size
        assert len({m.tobytes() for m in world.gather(w)}) == 1
        return float(np.abs(w + kept - truth).max()), float(np.abs(w - truth).max())

    for exact, rough in run_world(3, learner):
        assert exact < 2e-5 < 1e-4 < rough < 0.05


def test_narrow_gradients_leave_the_models_equal_and_close() -> None:
    def learner(world: World) -> tuple[bytes, float]:
        exact = Training(world, synchronous("allreduce", world), 0.5, False).run()
        settings = Settings(transfer_dtype="bfloat16")
        narrow = Training(world, synchronous("allreduce", world, settings), 0.5, False).run()
        return narrow.tobytes(), float(np.abs(narrow - exact).max())

    results = run_world(3, learner)
    assert len({bits for bits, _ in results}) == 1
    assert 0 < results[0][1] < 1e-2


def test_bytes_are_counted_as_they_travel() -> None:
    """A sum by pieces: (N-1)/N of the buffer out, in the narrow type, and as much back in float32."""

    def learner(world: World) -> list[int]:
        sent = []
        for wire in ("float32", "bfloat16"):
            strategy = synchronous("allreduce", world, Settings(transfer_dtype=wire))
            Moving(world, strategy, np.zeros(1000, np.float32)).move(1.0, 1, 4)
            sent.append(strategy.bytes_sent)
        return sent

    assert run_world(4, learner) == [[6000, 4500]] * 4
