"""Acceptors that are built and changed state by state, over the tropical semiring: costs add up, the least counts.

Meant for the graphs of utterances and chunks; denominator graphs, which are large, have functions over arrays of
their own (graph_minimise.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst, build_fst

EPSILON = 0
QUANTUM = 1.0 / 1024  # costs that differ by less are the same where states are compared, as OpenFst has it
_NOT_FINAL = 1 << 62  # no final cost in steps of QUANTUM
_MOST_STATES = 1_000_000  # of a determinised acceptor: an ambiguous cyclic one would never end

Arc = tuple[int, float, int]  # label, cost, next state


@dataclass
class Acceptor:
    """S states; state 0 is the start, and one without states accepts nothing.

    Attributes:
        arcs: by state.
        finals: final costs by state, inf where it is not final.
    """

    arcs: list[list[Arc]] = field(default_factory=list)
    finals: list[float] = field(default_factory=list)

    def add_state(self, final: float = math.inf) -> int:
        """The number of a new state."""
        self.arcs.append([])
        self.finals.append(final)
        return len(self.arcs) - 1

    @property
    def num_states(self) -> int:
        """S."""
        return len(self.arcs)

    @classmethod
    def from_fst(cls, fst: Fst) -> Acceptor:
        """By its input labels; start and state 0 change places."""
        number = list(range(fst.num_states))
        if fst.start > 0:
            number[0], number[fst.start] = fst.start, 0
        elif fst.start < 0:
            return cls()
        bounds = fst.first_arc.tolist()
        flat = list(
            zip(fst.ilabels.tolist(), fst.costs.tolist(), [number[to] for to in fst.nexts.tolist()], strict=True)
        )
        finals = fst.finals.tolist()
        return cls([flat[bounds[s] : bounds[s + 1]] for s in number], [finals[s] for s in number])

    def to_fst(self) -> Fst:
        """The same as arrays; input and output labels are equal."""
        arcs = [(source, label, label, cost, to) for source, out in enumerate(self.arcs) for label, cost, to in out]
        finals = {state: cost for state, cost in enumerate(self.finals) if cost != math.inf}
        return build_fst(0 if self.arcs else -1, self.num_states, arcs, finals)


def connect(acceptor: Acceptor) -> Acceptor:
    """Without the states that are on no path, the others in the order of a breadth-first search from the start."""
    into: list[list[int]] = [[] for _ in acceptor.arcs]
    for state, arcs in enumerate(acceptor.arcs):
        for _, _, to in arcs:
            into[to].append(state)
    useful = _reached((s for s, cost in enumerate(acceptor.finals) if cost != math.inf), into)
    if 0 not in useful:
        return Acceptor()
    order, number = [0], {0: 0}
    for state in order:
        for _, _, to in acceptor.arcs[state]:
            if to in useful and to not in number:
                number[to] = len(order)
                order.append(to)
    return Acceptor(
        [[(label, cost, number[to]) for label, cost, to in acceptor.arcs[s] if to in useful] for s in order],
        [acceptor.finals[s] for s in order],
    )


def _reached(starts: Iterable[int], following: list[list[int]]) -> set[int]:
    left = list(starts)
    found = set(left)
    while left:
        for state in following[left.pop()]:
            if state not in found:
                found.add(state)
                left.append(state)
    return found


def remove_epsilons(acceptor: Acceptor, *, sums: bool = False) -> Acceptor:
    """The same strings at the same costs, without empty labels.

    Args:
        sums: costs are -log p of paths whose probabilities add up, in place of costs of which the least counts. It
            is how arcs that come out alike, at a state that had epsilons, become one.

    Raises:
        DataError: epsilons form a cycle.
    """
    plus = _log_plus if sums else min
    result = Acceptor([[] for _ in acceptor.arcs], list(acceptor.finals))
    for state, arcs in enumerate(acceptor.arcs):
        if all(label != EPSILON for label, _, _ in arcs):
            result.arcs[state] = list(arcs)
            continue
        final = math.inf
        found: dict[tuple[int, int], float] = {}
        for inner, distance in _epsilon_distances(acceptor, state, plus):
            final = plus(final, distance + acceptor.finals[inner])
            for label, cost, to in acceptor.arcs[inner]:
                if label != EPSILON:
                    found[label, to] = plus(found.get((label, to), math.inf), distance + cost)
        result.finals[state] = final
        result.arcs[state] = [(label, cost, to) for (label, to), cost in found.items()]
    return connect(result)


def _log_plus(one: float, other: float) -> float:
    less, more = min(one, other), max(one, other)
    return less if more == math.inf else less - math.log1p(math.exp(less - more))


def _epsilon_distances(
    acceptor: Acceptor, state: int, plus: Callable[[float, float], float]
) -> list[tuple[int, float]]:
    """What the empty paths from a state to each other state cost."""
    order: list[int] = []
    open_states = {state: True}  # False once all that follows is in `order`
    stack = [(state, iter(acceptor.arcs[state]))]
    while stack:
        current, arcs = stack[-1]
        for label, _, to in arcs:
            if label != EPSILON:
                continue
            if open_states.get(to):
                raise DataError("an acceptor has a cycle of empty labels")
            if to not in open_states:
                open_states[to] = True
                stack.append((to, iter(acceptor.arcs[to])))
                break
        else:
            stack.pop()
            open_states[current] = False
            order.append(current)
    distances = {state: 0.0}
    for current in reversed(order):
        for label, cost, to in acceptor.arcs[current]:
            if label == EPSILON:
                distances[to] = plus(distances.get(to, math.inf), distances[current] + cost)
    return [(current, distances[current]) for current in reversed(order)]


def determinise(acceptor: Acceptor) -> Acceptor:
    """One path a string, with the least of its costs; the acceptor has no epsilons.

    A state of the result is a set of states with what each costs more than the cheapest; such remainders are compared
    in steps of QUANTUM and kept exactly.

    Raises:
        DataError: it grows without end (cycles on which the same string costs differently).
    """
    if not acceptor.arcs:
        return Acceptor()
    result = Acceptor()
    number_of: dict[frozenset[tuple[int, int]], int] = {}
    subsets: list[dict[int, float]] = []

    def number(subset: dict[int, float]) -> int:
        key = frozenset((state, math.floor(rest / QUANTUM + 0.5)) for state, rest in subset.items())
        found = number_of.setdefault(key, len(subsets))
        if found == len(subsets):
            subsets.append(subset)
            result.add_state(min(rest + acceptor.finals[state] for state, rest in subset.items()))
            if found >= _MOST_STATES:
                raise DataError(f"an acceptor has more than {_MOST_STATES} states when it is made deterministic")
        return found

    number({0: 0.0})
    current = 0
    while current < len(subsets):
        reached: dict[int, dict[int, float]] = {}
        for state, rest in subsets[current].items():
            for label, cost, to in acceptor.arcs[state]:
                of_label = reached.setdefault(label, {})
                of_label[to] = min(of_label.get(to, math.inf), rest + cost)
        for label, costs in sorted(reached.items()):
            least = min(costs.values())
            to = number({state: cost - least for state, cost in costs.items()})
            result.arcs[current].append((label, least, to))
        current += 1
    return result


def push(acceptor: Acceptor, *, remove_total: bool = False) -> Acceptor:
    """Costs as near to the start as they can be: from each state but the start, the cheapest rest costs 0.

    Args:
        remove_total: from the start, too: then the cheapest path costs 0.

    Raises:
        DataError: a cycle costs less than nothing.
    """
    acceptor = connect(acceptor)
    rest = _distances_to_end(acceptor)
    if not remove_total and rest and rest[0] and any(to == 0 for arcs in acceptor.arcs for _, _, to in arcs):
        # Paths that come back to the start have paid for its cheapest rest: they go to a copy of it.
        copy = acceptor.num_states
        arcs_of = [*acceptor.arcs, acceptor.arcs[0]]
        arcs_of = [[(label, cost, to or copy) for label, cost, to in arcs] for arcs in arcs_of]
        acceptor, rest = Acceptor(arcs_of, [*acceptor.finals, acceptor.finals[0]]), [*rest, rest[0]]
    before = rest if remove_total else [0.0, *rest[1:]]
    return Acceptor(
        [
            [(label, cost + rest[to] - before[state], to) for label, cost, to in arcs]
            for state, arcs in enumerate(acceptor.arcs)
        ],
        [cost - before[state] for state, cost in enumerate(acceptor.finals)],
    )


def _distances_to_end(acceptor: Acceptor) -> list[float]:
    """The least cost of each state's rests."""
    into: list[list[tuple[float, int]]] = [[] for _ in acceptor.arcs]
    for state, arcs in enumerate(acceptor.arcs):
        for _, cost, to in arcs:
            into[to].append((cost, state))
    distances = list(acceptor.finals)
    queue = deque(state for state, cost in enumerate(distances) if cost != math.inf)
    waiting, visits = set(queue), [0] * acceptor.num_states
    while queue:
        current = queue.popleft()
        waiting.discard(current)
        visits[current] += 1
        if visits[current] > acceptor.num_states:
            raise DataError("an acceptor has a cycle that costs less than nothing")
        for cost, state in into[current]:
            if distances[current] + cost < distances[state]:
                distances[state] = distances[current] + cost
                if state not in waiting:
                    waiting.add(state)
                    queue.append(state)
    return distances


def minimise(acceptor: Acceptor) -> Acceptor:
    """The smallest deterministic acceptor of the same strings, pushed; costs are compared in steps of QUANTUM."""
    acceptor = push(acceptor)
    codes: dict[tuple[int, int], int] = {}

    def code(label: int, cost: float) -> int:
        return codes.setdefault((label, math.floor(cost / QUANTUM + 0.5)), len(codes))

    ends = [_NOT_FINAL if cost == math.inf else math.floor(cost / QUANTUM + 0.5) for cost in acceptor.finals]
    out = [[(code(label, cost), to) for label, cost, to in arcs] for arcs in acceptor.arcs]
    numbers: dict[object, int] = {}
    classes = ends
    if all(to > state for state, arcs in enumerate(acceptor.arcs) for _, _, to in arcs):
        # Without cycles, and in the order of time as supervision is, what follows a state is known before it.
        for s in reversed(range(acceptor.num_states)):
            key = ends[s], frozenset((code, classes[to]) for code, to in out[s])
            classes[s] = numbers.setdefault(key, len(numbers))
    else:
        count = -1
        while len(numbers) != count:
            count, numbers = len(numbers), {}
            classes = [
                numbers.setdefault((classes[s], frozenset((code, classes[to]) for code, to in out[s])), len(numbers))
                for s in range(acceptor.num_states)
            ]
    if not acceptor.num_states:
        return Acceptor()
    swapped = {classes[0]: 0, 0: classes[0]}  # the start is state 0
    classes = [swapped.get(number, number) for number in classes]
    merged = Acceptor([[] for _ in numbers], [math.inf] * len(numbers))
    done: set[int] = set()
    for state, of_state in enumerate(classes):
        if of_state not in done:
            done.add(of_state)
            merged.arcs[of_state] = [(label, cost, classes[to]) for label, cost, to in acceptor.arcs[state]]
            merged.finals[of_state] = acceptor.finals[state]
    return connect(merged)


class LabelIndex:
    """An acceptor whose arcs are found by label; of a state that is asked for they are sorted once."""

    def __init__(self, acceptor: Acceptor) -> None:
        self.acceptor = acceptor
        self._of_state: dict[int, dict[int, list[tuple[float, int]]]] = {}

    def arcs(self, state: int) -> dict[int, list[tuple[float, int]]]:
        """(cost, next state) of a state's arcs, by label."""
        found = self._of_state.get(state)
        if found is None:
            found = self._of_state[state] = {}
            for label, cost, to in self.acceptor.arcs[state]:
                found.setdefault(label, []).append((cost, to))
        return found


def compose(left: Acceptor, right: LabelIndex) -> Acceptor:
    """The strings that both accept, with the sums of their costs; neither has epsilons."""
    if not left.arcs or not right.acceptor.arcs:
        return Acceptor()
    result = Acceptor()
    number_of: dict[tuple[int, int], int] = {}
    pairs: list[tuple[int, int]] = []

    def number(pair: tuple[int, int]) -> int:
        found = number_of.setdefault(pair, len(pairs))
        if found == len(pairs):
            pairs.append(pair)
            result.add_state(left.finals[pair[0]] + right.acceptor.finals[pair[1]])
        return found

    number((0, 0))
    for current, (first, second) in enumerate(pairs):
        out = right.arcs(second)
        for label, cost, to in left.arcs[first]:
            for right_cost, right_to in out.get(label, ()):
                result.arcs[current].append((label, cost + right_cost, number((to, right_to))))
    return connect(result)
