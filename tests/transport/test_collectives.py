"""Worlds: the same promises over MPI, over threads and alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import SoloWorld, World, split_evenly, sum_in_rank_order
from tests.conftest import in_ranks


def check_world(world: World) -> None:
    """What every world must do, whatever its size."""
    for length in (0, 1, 5, 1000):
        mine = np.random.default_rng(world.rank).standard_normal(length).astype(np.float32)
        all_of_them = [np.random.default_rng(r).standard_normal(length).astype(np.float32) for r in range(world.size)]
        expected = sum_in_rank_order(all_of_them)
        total = mine.copy()
        world.sum_(total)
        assert total.tobytes() == expected.tobytes()
        apart, source = np.full(length, np.nan, np.float32), mine.copy()
        world.start_mean(source, apart).wait()
        np.testing.assert_allclose(apart, expected / world.size, rtol=2e-7)
        assert source.tobytes() == mine.tobytes()
        exact = world.sum_float64(mine.astype(np.float64).reshape(1, -1))
        reference = all_of_them[0].astype(np.float64)
        for other in all_of_them[1:]:
            reference = reference + other
        assert exact.shape == (1, length) and exact[0].tobytes() == reference.tobytes()
    assert world.gather(f"rank {world.rank}") == [f"rank {r}" for r in range(world.size)]
    assert world.broadcast({"from": world.rank}) == {"from": 0}
    world.barrier()


@in_ranks(1, 2, 3, 4)
def test_mpi_world(num_ranks: int) -> None:
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    assert world.size == num_ranks
    check_world(world)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_thread_world(size: int) -> None:
    run_world(size, check_world)


def test_solo_world() -> None:
    check_world(SoloWorld())


def test_a_failing_learner_of_a_fake_world_ends_the_others() -> None:
    def learner(world: World) -> None:
        if world.rank == 1:
            raise ValueError("rank 1 is out of luck")
        world.barrier()

    with pytest.raises(ValueError, match="out of luck"):
        run_world(3, learner)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("learner-")]


@pytest.mark.parametrize(("length", "parts"), [(0, 3), (2, 3), (10, 4), (12, 4)])
def test_split_evenly(length: int, parts: int) -> None:
    sizes, starts = split_evenly(length, parts)
    assert sizes.sum() == length and sizes.max() - sizes.min() <= 1
    assert list(starts) == [int(sizes[:i].sum()) for i in range(parts)]


@pytest.mark.ranks(2)
def test_a_library_without_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    from kaldi_mpi.errors import ConfigError
    from kaldi_mpi.transport import mpi

    class Funneled:
        def __getattr__(self, name: str) -> object:
            return (lambda: MPI.THREAD_FUNNELED) if name == "Query_thread" else getattr(MPI, name)

    monkeypatch.setattr(mpi, "MPI", Funneled())
    with pytest.raises(ConfigError, match="does not let another thread communicate"):
        mpi.MpiWorld()


@pytest.mark.ranks(2)
def test_two_worlds_after_and_beside_each_other() -> None:
    from kaldi_mpi.transport.mpi import MpiWorld

    first = MpiWorld()
    check_world(first)
    first.close()
    second, third = MpiWorld(), MpiWorld()
    check_world(second)
    check_world(third)
    third.close()
    second.close()


@pytest.mark.ranks(2)
def test_mismatched_mpiexec_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from kaldi_mpi.errors import ConfigError
    from kaldi_mpi.transport.mpi import MpiWorld

    monkeypatch.setenv("KALDI_MPI_NUM_LEARNERS", "7")
    with pytest.raises(ConfigError, match="asked for 7 learners but MPI counts 2"):
        MpiWorld()
