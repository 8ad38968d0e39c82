"""Operations on small acceptors against what they must leave: each string's least cost."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kaldi_mpi.chain.acceptor import (
    Acceptor,
    LabelIndex,
    compose,
    connect,
    determinise,
    minimise,
    push,
    remove_epsilons,
)
from kaldi_mpi.errors import DataError

SEEDS = range(40)


def random_acceptor(seed: int, epsilons: bool = False, cyclic: bool = True) -> Acceptor:
    """Epsilons form no cycle, and no cycle costs less than nothing. Costs are eighths, which add up exactly."""
    rng = np.random.default_rng(seed)
    states = int(rng.integers(1, 7))
    made = Acceptor()
    for _ in range(states):
        made.add_state(float(rng.integers(-8, 9)) / 8 if rng.random() < 0.4 else math.inf)
    for state in range(states):
        for _ in range(int(rng.integers(0, 4))):
            label = int(rng.integers(0 if epsilons else 1, 4))
            low = 0 if label and cyclic else state + 1
            if low < states:
                to = int(rng.integers(low, states))
                made.arcs[state].append((label, float(rng.integers(-8 if not cyclic else 0, 17)) / 8, to))
    return made


def following(acceptor: Acceptor, costs: dict[int, float], label: int) -> dict[int, float]:
    reached: dict[int, float] = {}
    for state, before in costs.items():
        for found, cost, to in acceptor.arcs[state]:
            if found == label:
                reached[to] = min(reached.get(to, math.inf), before + cost)
    return reached


def with_epsilons(acceptor: Acceptor, costs: dict[int, float]) -> dict[int, float]:
    reached = step = dict(costs)
    for _ in range(acceptor.num_states):
        step = following(acceptor, step, 0)
        reached = {s: min(reached.get(s, math.inf), step.get(s, math.inf)) for s in {*reached, *step}}
    return reached


def cost_of(acceptor: Acceptor, string: tuple[int, ...]) -> float:
    """The least cost of the paths with these labels, all of which are followed."""
    costs = with_epsilons(acceptor, {0: 0.0} if acceptor.arcs else {})
    for label in string:
        costs = with_epsilons(acceptor, following(acceptor, costs, label))
    return min((cost + acceptor.finals[state] for state, cost in costs.items()), default=math.inf)


def table(acceptor: Acceptor, longest: int = 4) -> list[float]:
    """Costs of all strings of labels 1, 2, 3 up to this long."""
    every = (itertools.product((1, 2, 3), repeat=size) for size in range(longest + 1))
    return [cost_of(acceptor, string) for strings in every for string in strings]


def is_deterministic(acceptor: Acceptor) -> bool:
    return all(len({label for label, _, _ in arcs}) == len(arcs) for arcs in acceptor.arcs)


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_strings_keep_their_costs(seed: int, cyclic: bool) -> None:
    source = random_acceptor(seed, epsilons=True, cyclic=cyclic)
    expected = table(source)
    without = remove_epsilons(source)
    assert all(label for arcs in without.arcs for label, _, _ in arcs)
    for same in (connect(source), without, push(without), Acceptor.from_fst(source.to_fst())):
        assert table(same) == expected
    # From each other state, the cheapest rest costs nothing.
    pushed = push(without)
    for state in range(1, pushed.num_states):
        least = min(table(_from(pushed, state), 6))
        assert least == 0.0 if not cyclic else least >= 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_cheapest_path_costs_nothing_once_the_total_is_removed(seed: int) -> None:
    source = random_acceptor(seed, cyclic=False)
    before, after = table(source, 6), table(push(source, remove_total=True), 6)
    least = min(before)
    if least == math.inf:
        assert not push(source, remove_total=True).arcs
    else:
        assert after == [cost - least for cost in before]


@pytest.mark.parametrize("seed", SEEDS)
def test_determinised_and_minimised(seed: int) -> None:
    """Without cycles: the same costs, one path a string, no more states than before, and no two alike."""
    source = random_acceptor(seed, cyclic=False)
    expected = table(source, 6)
    single = determinise(source)
    least = minimise(single)
    for same in (single, least):
        assert is_deterministic(same)
        assert table(same, 6) == expected
    assert least.num_states <= max(single.num_states, 0)
    assert minimise(least).num_states == least.num_states
    # States of the smallest acceptor differ in what follows them.
    rests = {tuple(table(_from(least, state), 6)) for state in range(1, least.num_states)}
    assert len(rests) == max(0, least.num_states - 1)


def _from(acceptor: Acceptor, state: int) -> Acceptor:
    """The acceptor started in another state."""
    swapped = acceptor.to_fst()
    return Acceptor.from_fst(type(swapped)(state, *list(vars(swapped).values())[1:]))


@pytest.mark.parametrize("seed", SEEDS)
def test_unweighted_cycles_are_minimised(seed: int) -> None:
    source = random_acceptor(seed)
    source = Acceptor(
        [[(label, 0.0, to) for label, _, to in arcs] for arcs in source.arcs],
        [cost if cost == math.inf else 0.0 for cost in source.finals],
    )
    least = minimise(determinise(source))
    assert is_deterministic(least)
    assert table(least, 6) == table(source, 6)
    rests = {tuple(table(_from(least, state), 6)) for state in range(least.num_states)}
    assert len(rests) == least.num_states


@pytest.mark.parametrize("seed", SEEDS)
def test_a_product_has_the_sums_of_costs(seed: int) -> None:
    one, other = random_acceptor(seed), random_acceptor(seed + 1000)
    sums = [a + b for a, b in zip(table(one), table(other), strict=True)]
    assert table(compose(one, LabelIndex(other))) == sums


def test_probabilities_add_up_where_they_are_to() -> None:
    """Two empty ways to the same arc and end."""
    source = Acceptor([[(0, 1.0, 1), (0, 2.0, 2)], [(5, 0.5, 3)], [(5, 0.25, 3)], []], [math.inf, 1.0, 3.0, 0.0])
    summed, least = remove_epsilons(source, sums=True), remove_epsilons(source)
    ((label, cost, to),) = summed.arcs[0]
    assert (label, to) == (5, 1)
    assert cost == pytest.approx(-math.log(math.exp(-1.5) + math.exp(-2.25)))
    assert summed.finals[0] == pytest.approx(-math.log(math.exp(-2.0) + math.exp(-5.0)))
    assert (least.arcs[0], least.finals[0]) == ([(5, 1.5, 1)], 2.0)


def test_what_would_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="a cycle of empty labels"):
        remove_epsilons(Acceptor([[(0, 1.0, 1)], [(0, 1.0, 0)]], [math.inf, 0.0]))
    with pytest.raises(DataError, match="a cycle that costs less than nothing"):
        push(Acceptor([[(1, -1.0, 0)]], [0.0]))
    # On the cycles, the same string costs more and more differently.
    twins = Acceptor([[(1, 0.0, 1), (1, 0.0, 2)], [(1, 0.0, 1)], [(1, 1.0, 2)]], [math.inf, 0.0, 0.0])
    monkeypatch.setattr("kaldi_mpi.chain.acceptor._MOST_STATES", 1000)
    with pytest.raises(DataError, match="more than 1000 states when it is made deterministic"):
        determinise(twins)


def test_nothing_stays_nothing() -> None:
    nothing = Acceptor()
    for operation in (connect, remove_epsilons, determinise, push, minimise):
        assert not operation(nothing).arcs
    assert not compose(nothing, LabelIndex(nothing)).arcs
    assert Acceptor.from_fst(nothing.to_fst()).num_states == 0
