"""Every strategy against its float64 reference, over real ranks, threads and alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kaldi_mpi.averaging import Step, Strategy, make_strategy, reference
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.fake import run_world
from kaldi_mpi.transport.world import SoloWorld, World
from tests.conftest import in_ranks

DIM, NUM_STEPS = 12, 9
MAX_CHANGE = [(slice(0, 5), 0.05), (slice(5, DIM), 0.02)]
RATES = [0.002 * 0.9**step for step in range(NUM_STEPS)]


def gradient(w: NDArray[np.float64], learner: int, step: int) -> tuple[NDArray[np.float64], int]:
    """Least squares on this learner's minibatch of this step; sizes differ, and some are empty."""
    frames = (5 * learner + 3 * step + 4) % 7
    rng = np.random.default_rng([learner, step])
    x, y = rng.standard_normal((frames, DIM)), rng.standard_normal(frames)
    return x.T @ (x @ w - y), frames


def start() -> NDArray[np.float64]:
    return np.random.default_rng(99).standard_normal(DIM)


def after_step(strategy: Strategy, w: NDArray[np.float32], step: Step) -> None:
    """What the learner's loop does after the optimiser."""
    if strategy.note(step):
        strategy.mix_parameters(w)


def train(world: World, strategy: Strategy, momentum: float, limits: bool) -> NDArray[np.float32]:
    """The learner's step with its real optimiser, around a problem small enough to repeat in float64."""
    import torch

    from kaldi_mpi.learner.flat import ComponentSlice, FlatParameters
    from kaldi_mpi.learner.optimiser import KaldiSgd

    flat = FlatParameters.__new__(FlatParameters)
    flat.values = torch.from_numpy(start().astype(np.float32))
    flat.gradients = torch.zeros(DIM)
    flat.components = [
        ComponentSlice(f"c{i}", where, limit if limits else 0.0, 1.0, 0.0)
        for i, (where, limit) in enumerate(MAX_CHANGE)
    ]
    optimiser = KaldiSgd(flat, momentum, 0.04 if limits else 0.0)
    w, g = flat.values.numpy(), flat.gradients.numpy()
    for index, rate in enumerate(RATES):
        own, frames = gradient(w.astype(np.float64), world.rank, index)
        total = sum(gradient(w.astype(np.float64), i, index)[1] for i in range(world.size))
        step = Step(index, frames, total)
        g[:] = own
        strategy.combine_gradients(g, step)
        if frames or strategy.moves_together:
            optimiser.step(world.size * rate, 1)
        after_step(strategy, w, step)
    strategy.finish(w)
    return w


SETTINGS = pytest.mark.parametrize(("momentum", "limits"), [(0.0, False), (0.5, False), (0.5, True)])


def expected(
    name: str, size: int, momentum: float, limits: bool, frames_per_average: int | None
) -> NDArray[np.float64]:
    settings = {"momentum": momentum, "max_change": MAX_CHANGE if limits else (), "max_param_change": 0.04 * limits}
    if name == "allreduce":
        return reference.allreduce(start(), gradient, size, RATES, **settings)
    return reference.periodic(start(), gradient, size, RATES, frames_per_average, **settings)


CASES = [("allreduce", None), ("periodic", 1), ("periodic", 10), ("periodic", 10**9)]


def check_all(world: World, momentum: float, limits: bool) -> None:
    for name, frames_per_average in CASES:
        strategy = make_strategy(name, world, frames_per_average=frames_per_average)
        ours = train(world, strategy, momentum, limits)
        want = expected(name, world.size, momentum, limits, frames_per_average)
        np.testing.assert_allclose(ours, want, rtol=3e-5, atol=3e-6, err_msg=f"{name} {frames_per_average}")
        assert len({w.tobytes() for w in world.gather(ours)}) == 1, "the learners end with different models"


@in_ranks(1, 2, 3, 4)
def test_strategies_equal_their_reference_over_mpi(num_ranks: int) -> None:
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    assert world.size == num_ranks
    for momentum, limits in ((0.0, False), (0.5, True)):
        check_all(world, momentum, limits)


@SETTINGS
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_strategies_equal_their_reference_over_threads(size: int, momentum: float, limits: bool) -> None:
    run_world(size, lambda world: check_all(world, momentum, limits))


def test_the_reference_tells_strategies_apart() -> None:
    """Were the settings without effect, the tests above would prove nothing."""
    results = [
        expected("allreduce", 3, 0.0, False, None),
        expected("allreduce", 3, 0.5, False, None),
        expected("allreduce", 3, 0.5, True, None),
        expected("periodic", 3, 0.0, False, 10),
        expected("periodic", 3, 0.0, False, 10**9),
    ]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert np.abs(one - other).max() > 1e-4


def test_frequent_averaging_without_momentum_is_allreduce() -> None:
    """Averaging after each step and averaging gradients are one rule where the optimiser is linear in g."""
    full = lambda w, i, t: gradient(w, i, 2 * t)  # noqa: E731 - steps in which weights are equal need equal sizes

    def equal_sizes(w: NDArray[np.float64], learner: int, step: int) -> tuple[NDArray[np.float64], int]:
        return full(w, learner, step)[0], 5

    one = reference.allreduce(start(), equal_sizes, 3, RATES)
    other = reference.periodic(start(), equal_sizes, 3, RATES, 1)
    np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize(("name", "frames_per_average"), CASES)
def test_one_learner_is_plain_sgd_bit_for_bit(name: str, frames_per_average: int | None) -> None:
    """The strategy of a learner alone leaves gradients and parameters untouched, to the last bit."""
    strategy = make_strategy(name, SoloWorld(), frames_per_average=frames_per_average)
    for index in range(NUM_STEPS):
        step = Step(index, 7, 7)
        values = np.random.default_rng(index).standard_normal(DIM).astype(np.float32)
        before = values.tobytes()
        strategy.combine_gradients(values, step)
        assert values.tobytes() == before
        after_step(strategy, values, step)
        assert values.tobytes() == before
    assert strategy.mean_model(values).tobytes() == values.tobytes()
    strategy.finish(values)
    assert values.tobytes() == before


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


@pytest.mark.parametrize("at", [1, 4])
def test_a_strategy_goes_on_from_its_state(at: int) -> None:
    def learner(world: World, stop: bool) -> NDArray[np.float32]:
        strategy = make_strategy("periodic", world, frames_per_average=25)
        w = np.full(4, float(world.rank), np.float32)
        for index in range(8):
            if stop and index == at:
                state = strategy.state_dict()
                strategy = make_strategy("periodic", world, frames_per_average=25)
                strategy.load_state_dict(state)
            w += np.float32(world.rank + index)
            after_step(strategy, w, Step(index, 3 + world.rank, 9))
        return w

    whole: Callable[[World], NDArray[np.float32]] = lambda world: learner(world, False)  # noqa: E731
    broken: Callable[[World], NDArray[np.float32]] = lambda world: learner(world, True)  # noqa: E731
    assert [w.tobytes() for w in run_world(2, whole)] == [w.tobytes() for w in run_world(2, broken)]


@pytest.mark.parametrize(
    ("name", "frames_per_average", "message"),
    [
        ("periodic", None, "--strategy periodic needs --frames-per-average"),
        ("periodic", 0, "a number of frames above 0"),
        ("allreduce", 100, "--frames-per-average: strategy allreduce has no use for it"),
        ("gossip", None, "--strategy gossip: unknown; there are allreduce, periodic, "),
    ],
)
def test_bad_settings_are_named(name: str, frames_per_average: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_strategy(name, SoloWorld(), frames_per_average=frames_per_average)
