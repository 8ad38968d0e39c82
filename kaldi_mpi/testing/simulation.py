"""Asynchronous strategies in a simulated world: one process, no threads, every order of events at will.

A learner and its communication thread take part by three kinds of events, each of them atomic in a real run
too (a lock of one piece, or the one thread that runs all of a rank's messages):

    learn    the learner publishes one piece of its step; after the last piece the step is *posted*, and after
             its last step that it leaves
    post     the communication thread runs what was posted first
    deliver  it runs the first message that waits on the way from one certain rank

Messages of a pair arrive in order; nothing else is ordered. `Simulation` holds the state and carries out one
event at a time; who chooses the events decides what it is good for: `run_random` draws them, with weights
for slow learners and slow links; `explore` tries them all; `Timed` takes them as a clock tells. Everything,
the messages under way included, is in `Simulation.state_dict`.

Events of different ranks commute when both are possible, so `explore`, which stops at states that it has
seen, loses nothing by it and needs far fewer steps than there are orders.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.averaging.driver import Participant
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published import Flat, HostPublishedModel
from kaldi_mpi.averaging.strategy import Asynchronous, Hook
from kaldi_mpi.transport.world import Allocate, Handler

Change = Callable[[int, int, Flat], tuple[Flat, int]]


@dataclasses.dataclass(frozen=True)
class SimulatedRank:
    """A rank of a simulated world, for strategies. There are no collectives in it: means are taken from outside."""

    rank: int
    size: int

    def sum_(self, buffer: Flat, wire: str = "float32") -> NoReturn:
        raise RuntimeError("a simulated world has no collectives")

    def start_mean(self, source: Flat, into: Flat, wire: str = "float32") -> NoReturn:
        self.sum_(source)


class Event(NamedTuple):
    """`what` is ``learn``, ``post`` or ``deliver``; it happens at `rank`; a message comes from `source`."""

    what: str
    rank: int
    source: int = -1


class Deadlock(Exception):
    """No event is possible, and yet some rank has not finished."""


_Posted = tuple[str, tuple[Any, ...]]  # a method of the strategy, and its arguments


class _Messages:
    """`transport.world.Messages` of one rank, as far as `Participant` needs them: what is posted or sent waits."""

    def __init__(self, simulation: Simulation, rank: int) -> None:
        self._simulation, self.rank, self.size = simulation, rank, simulation.size

    def post(self, action: Callable[[], None]) -> None:
        """Keep the call by its name, so that states can be saved and compared."""
        whole = action if isinstance(action, functools.partial) else functools.partial(action)
        self._simulation.ranks[self.rank].posted.append((whole.func.__name__, whole.args))

    def send(self, channel: int, to: int, numbers: Sequence[int], payload: NDArray[Any] | None) -> None:
        self._simulation.put_on_the_way(self.rank, to, numbers, payload)

    def on_message(self, channel: int, handler: Handler | None, allocate: Allocate | None = None) -> None:
        """Messages are handed over by events."""

    def wait(self, ready: Callable[[], bool]) -> NoReturn:
        raise RuntimeError("nobody waits in a simulated world: the next event is chosen from outside")

    def every(self, seconds: float, action: Callable[[], None]) -> NoReturn:
        raise RuntimeError("there is no time in a simulated world but what is chosen from outside")


class _Rank:
    """One learner's progress and what waits at its communication thread."""

    def __init__(self, copy: Flat) -> None:
        self.copy = copy
        self.step = 0  # the step that is being taken
        self.piece = 0  # the piece to publish next
        self.change: tuple[Flat, int] | None = None
        self.posted: deque[_Posted] = deque()
        self.left = False

    def state(self) -> dict[str, Any]:
        change = None if self.change is None else (self.change[0].copy(), self.change[1])
        return vars(self) | {"copy": self.copy.copy(), "posted": tuple(self.posted), "change": change}

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.copy, self.posted = state["copy"].copy(), deque(state["posted"])
        if self.change is not None:
            self.change = (self.change[0].copy(), self.change[1])


class Simulation:
    """N learners and their strategies.

    Args:
        strategies: one a rank, made for `SimulatedRank`; they are connected here.
        published_models: their models.
        journals: their journals.
        change: ``change(rank, step, copy) -> (change, frames)``, a learner's own step: (P,) float32, and the
            frames it counts for.
        num_steps: steps of each learner.
    """

    def __init__(
        self,
        strategies: Sequence[Asynchronous],
        published_models: Sequence[HostPublishedModel],
        journals: Sequence[Journal],
        change: Change,
        num_steps: Sequence[int],
    ) -> None:
        self.strategies, self.published_models, self.journals = strategies, published_models, journals
        self.change, self.num_steps = change, list(num_steps)
        self.size = len(strategies)
        self.ranks = [_Rank(model.values.copy()) for model in published_models]
        self.channels: dict[tuple[int, int], deque[tuple[tuple[int, ...], NDArray[np.uint8]]]] = {}
        self.sent: Callable[[int, int, int], None] | None = None  # told of each message: from, to, bytes
        self.participants = [
            Participant(strategy, model, _Messages(self, rank), journal)
            for rank, (strategy, model, journal) in enumerate(zip(strategies, published_models, journals, strict=True))
        ]
        for participant in self.participants:
            participant.connect()

    def put_on_the_way(self, source: int, to: int, numbers: Sequence[int], payload: NDArray[Any] | None) -> None:
        """A message that waits to be delivered."""
        content = np.empty(0, np.uint8) if payload is None else payload.view(np.uint8).copy()
        self.channels.setdefault((source, to), deque()).append((tuple(numbers), content))
        if self.sent is not None:
            self.sent(source, to, content.nbytes)

    # Events.

    def may_learn(self, rank: int) -> bool:
        """Whether the learner can go on."""
        state, strategy = self.ranks[rank], self.strategies[rank]
        if state.step == self.num_steps[rank]:
            return not state.left
        if state.piece == 0 and Hook.BLOCKED in strategy.hooks:
            return not state.posted and not strategy.blocked()
        return True

    def possible(self) -> list[Event]:
        """All events that can be next, in an order that depends on the state alone."""
        events = [Event("learn", rank) for rank in range(self.size) if self.may_learn(rank)]
        events += [Event("post", rank) for rank in range(self.size) if self.ranks[rank].posted]
        return events + [Event("deliver", to, source) for (source, to), c in sorted(self.channels.items()) if c]

    def do(self, event: Event) -> None:
        """Carry out one event."""
        rank = event.rank
        if event.what == "learn":
            self._learn(rank)
        elif event.what == "post":
            name, arguments = self.ranks[rank].posted.popleft()
            getattr(self.strategies[rank], name)(*arguments)
        else:
            numbers, payload = self.channels[event.source, rank].popleft()
            self.strategies[rank].receive(event.source, numbers, payload)

    def _learn(self, rank: int) -> None:
        state, participant = self.ranks[rank], self.participants[rank]
        if state.step == self.num_steps[rank]:
            state.left = True
            participant.leave()
            return
        if state.change is None:
            own, frames = self.change(rank, state.step, state.copy)
            participant.filter_change(own)
            state.change = own, frames
        participant.publish_piece(state.piece, state.change[0], state.copy)
        state.piece += 1
        if state.piece == participant.model.num_pieces:
            participant.announce(state.change[1])
            state.step, state.piece, state.change = state.step + 1, 0, None

    def check_end(self) -> None:
        """Call when nothing is possible any more.

        Raises:
            Deadlock: a learner is stuck, or an exchange is never answered.
        """
        for rank, state in enumerate(self.ranks):
            if not state.left:
                raise Deadlock(f"learner {rank} waits for ever before its step {state.step}")
            if not self.strategies[rank].quiet():
                raise Deadlock(f"an exchange of rank {rank} is never answered")

    def models(self) -> NDArray[np.float64]:
        """(N, P): the published models."""
        return np.array([model.values for model in self.published_models], np.float64)

    def state_dict(self) -> dict[str, Any]:
        """Everything, the messages under way included; what is in it is not changed later."""
        return {
            "strategies": [strategy.state_dict() for strategy in self.strategies],
            "published_models": [(model.values.copy(), list(model.steps)) for model in self.published_models],
            "ranks": [rank.state() for rank in self.ranks],
            "channels": {pair: tuple(channel) for pair, channel in sorted(self.channels.items()) if channel},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the journals and the clock go on as they are."""
        for rank, saved in enumerate(state["ranks"]):
            self.ranks[rank].load(saved)
            self.participants[rank].step = saved["step"]
            values, steps = state["published_models"][rank]
            self.published_models[rank].values[:] = values
            self.published_models[rank].steps[:] = steps
            self.strategies[rank].load_state_dict(state["strategies"][rank])
        self.channels = {pair: deque(messages) for pair, messages in state["channels"].items()}


def run_random(
    simulation: Simulation,
    seed: int,
    weight: Callable[[Event], float] = lambda event: 1.0,
    most: int | None = None,
) -> int:
    """Draw events, each with a chance in proportion to its weight, until none is possible or `most` are done.

    Returns:
        How many events there were.
    """
    rng = np.random.default_rng(seed)
    for count in itertools.count():
        events = simulation.possible()
        if not events:
            simulation.check_end()
            return count
        if count == most:
            return count
        weights = np.cumsum([weight(event) for event in events])
        simulation.do(events[int(np.searchsorted(weights, rng.random() * weights[-1], "right"))])
    raise AssertionError("not reached")


def explore(simulation: Simulation, at_end: Callable[[Simulation], None], most: int = 10**6) -> tuple[int, int]:
    """Try every order of events, each state once.

    Args:
        simulation: where to start from; small, since all is tried.
        at_end: called in each state in which nothing is possible any more.
        most: states to visit before it is given up.

    Returns:
        The number of different states, and of different ends.

    Raises:
        Deadlock: some order leads to one.
        RuntimeError: there are more than `most` states.
    """
    seen: set[bytes] = set()
    ends = 0
    open_states = [simulation.state_dict()]
    while open_states:
        state = open_states.pop()
        simulation.load_state_dict(state)
        events = simulation.possible()
        if not events:
            simulation.check_end()
            at_end(simulation)
            ends += 1
        for event in events:
            simulation.load_state_dict(state)
            simulation.do(event)
            following = simulation.state_dict()
            key = fingerprint(following)
            if key not in seen:
                seen.add(key)
                open_states.append(following)
        if len(seen) > most:
            raise RuntimeError(f"more than {most} states")
    return len(seen), ends


def fingerprint(state: Any) -> bytes:
    """16 bytes that tell states apart, whatever objects they share."""
    return hashlib.blake2b(repr(_plain(state)).encode(), digest_size=16).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((str(key), _plain(value[key])) for key in value)
    if isinstance(value, (list, tuple, deque)):
        return tuple(_plain(item) for item in value)
    return value.tobytes().hex() if isinstance(value, np.ndarray) else repr(value)


class Timed:
    """A simulation with a clock: steps take time, and messages leave a rank one after the other.

    Args:
        simulation: what runs.
        step_seconds: ``step_seconds(rank, step)``, how long a step computes.
        latency: seconds on the way.
        bytes_per_second: of the way out of a rank; messages to itself are free.
        phase: when each learner begins its first step; None: all at 0.
    """

    def __init__(
        self,
        simulation: Simulation,
        step_seconds: Callable[[int, int], float],
        latency: float,
        bytes_per_second: float = float("inf"),
        phase: Sequence[float] | None = None,
    ) -> None:
        self.simulation, self.step_seconds = simulation, step_seconds
        self.latency, self.bytes_per_second = latency, bytes_per_second
        self.now = 0.0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Event]] = []
        self._free = [0.0] * simulation.size  # when a rank's way out is
        self._waiting: set[int] = set()  # learners whose step is computed and who may not go on yet
        simulation.sent = self._sent
        for rank in range(simulation.size):
            self._at((phase[rank] if phase else 0.0) + step_seconds(rank, 0), Event("learn", rank))

    def _at(self, when: float, event: Event) -> None:
        heapq.heappush(self._heap, (when, next(self._order), event))

    def _sent(self, source: int, to: int, size: int) -> None:
        if source == to:
            self._at(self.now, Event("deliver", to, source))
            return
        self._free[source] = max(self.now, self._free[source]) + size / self.bytes_per_second
        self._at(self._free[source] + self.latency, Event("deliver", to, source))

    def run(self) -> Iterator[tuple[float, Event]]:
        """Yield the time and the event, before each event, until nothing is left to happen."""
        simulation = self.simulation
        while self._heap:
            self.now, _, event = heapq.heappop(self._heap)
            yield self.now, event
            if event.what == "learn":
                self._step(event.rank)
            else:
                simulation.do(event)
            if event.rank in self._waiting and simulation.may_learn(event.rank):
                self._waiting.discard(event.rank)
                self._begin(event.rank)
        simulation.check_end()

    def _step(self, rank: int) -> None:
        """The end of a step: all of it is published and posted, and the next one begins."""
        state = self.simulation.ranks[rank]
        target = state.step + 1
        while state.step < target and not state.left:
            self.simulation.do(Event("learn", rank))
        while state.posted:
            self.simulation.do(Event("post", rank))
        if not state.left and self.simulation.may_learn(rank):
            self._begin(rank)
        elif not state.left:
            self._waiting.add(rank)

    def _begin(self, rank: int) -> None:
        state = self.simulation.ranks[rank]
        done = state.step == self.simulation.num_steps[rank]
        self._at(self.now + (0.0 if done else self.step_seconds(rank, state.step)), Event("learn", rank))
