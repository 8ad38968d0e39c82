"""With whom a learner exchanges: permutations without fixed points, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kaldi_mpi.averaging import topology

TOPOLOGIES: dict[str, Callable[[int, int, int], int]] = {
    "fixed ring": lambda rank, size, number: topology.fixed_ring(rank, size),
    "random ring": lambda rank, size, number: topology.random_ring(rank, size, number, seed=3),
    "exponential": topology.exponential,
}


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 13])
def test_nobody_is_its_own_partner(name: str, size: int) -> None:
    for number in range(20):
        partners = [TOPOLOGIES[name](rank, size, number) for rank in range(size)]
        assert all(partner in range(size) and partner != rank for rank, partner in enumerate(partners))
        if name != "exponential":  # its learners take their hops in different orders
            assert sorted(partners) == list(range(size)), "somebody is asked twice on a ring"


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_rings_come_back_after_all_learners(size: int) -> None:
    for name in ("fixed ring", "random ring"):
        rank, met = 0, []
        for _ in range(size):
            rank = TOPOLOGIES[name](rank, size, 4)
            met.append(rank)
        assert met[-1] == 0 and sorted(met) == list(range(size))


def test_the_random_ring_is_drawn_anew_from_number_and_seed() -> None:
    rings = [tuple(topology.shuffled_ring(8, number, seed)) for seed in (0, 1) for number in range(10)]
    assert len(set(rings)) == len(rings)
    assert rings[3] == tuple(topology.shuffled_ring(8, 3, 0))


def test_the_exponential_graph_takes_all_hops_in_turn_each_learner_at_its_own_place() -> None:
    """Eight learners: hops 1, 2, 4; learner i begins with the i-th of them."""
    hops = [[(topology.exponential(rank, 8, number) - rank) % 8 for number in range(6)] for rank in range(8)]
    assert hops[0] == [1, 2, 4, 1, 2, 4] and hops[1] == [2, 4, 1, 2, 4, 1] and hops[2] == [4, 1, 2, 4, 1, 2]
    assert hops[3] == hops[0]
