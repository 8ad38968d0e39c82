"""The drivers: which hooks of a strategy they call, in which order, and that strategies declare what they override."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kaldi_mpi.averaging import Asynchronous, Hook, Participant, Settings, Strategy, Synchronous, synchronous_step
from kaldi_mpi.averaging.exchange import Exchanging
from kaldi_mpi.averaging.journal import Journal, JournalEvent
from kaldi_mpi.averaging.published import Flat, HostPublishedModel
from kaldi_mpi.averaging.registry import STRATEGIES
from kaldi_mpi.testing.array_learner import ArrayLearner
from kaldi_mpi.testing.simulation import SimulatedRank
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import SoloMessages, World

SYNCHRONOUS = [Hook.START_STEP, Hook.COMBINE_GRADIENTS, Hook.BASE, Hook.MIX_PARAMETERS]
ASYNCHRONOUS = [Hook.FILTER_CHANGE, Hook.BLOCKED, Hook.SHARE]
SETTINGS = Settings(frames_per_average=10, elastic_momentum=0.5)


def method(hook: Hook) -> str:
    assert hook.name is not None
    return hook.name.lower()


def overridden(kind: type[Strategy]) -> Hook:
    """The hooks whose methods are not the family's own."""
    family, hooks = (Asynchronous, ASYNCHRONOUS) if kind.asynchronous else (Synchronous, SYNCHRONOUS)
    found = Hook.NONE
    for hook in hooks:
        if getattr(kind, method(hook)) is not getattr(family, method(hook)):
            found |= hook
    return found


def test_all_hooks_are_here() -> None:
    assert set(Hook) == {*SYNCHRONOUS, *ASYNCHRONOUS}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_declare_the_hooks_that_they_override(name: str) -> None:
    kind = STRATEGIES[name]
    assert kind.from_settings(SimulatedRank(0, 2), SETTINGS).hooks == overridden(kind)
    counts = getattr(kind, "count_step", None) is not Synchronous.count_step
    assert kind.asynchronous or counts == (Hook.MIX_PARAMETERS in overridden(kind))


def test_elastic_averaging_without_momentum_leaves_changes_alone() -> None:
    assert STRATEGIES["easgd"].from_settings(SimulatedRank(0, 2), Settings()).hooks == Hook.NONE


# Synchronous.


class Recorder(Synchronous):
    """Takes down which of its methods are called; `due` says whether to mix parameters."""

    def __init__(self, hooks: Hook, size: int = 2, due: bool = True) -> None:
        super().__init__(SimulatedRank(0, size))
        self.hooks, self.due = hooks, due
        self.calls: list[str] = []

    def start_step(self, parameters: Flat) -> None:
        self.calls.append("start_step")

    def combine_gradients(self, gradients: Flat) -> None:
        self.calls.append("combine_gradients")

    def base(self) -> Flat | None:
        self.calls.append("base")
        return np.full(2, 100, np.float32)

    def count_step(self, frames: int, global_frames: int) -> bool:
        self.calls.append(f"count_step {frames} of {global_frames}")
        return self.due

    def mix_parameters(self, parameters: Flat) -> bool:
        self.calls.append("mix_parameters")
        return True


def recorded(strategy: Recorder) -> list[str]:
    """A step's calls, of strategy and learner, in their order."""

    class Learner(ArrayLearner):
        def update(self, base: Flat | None, together: bool) -> None:
            super().update(base, together)
            strategy.calls.append("update" if base is None else f"update of {base[0]:g}")

        def forget_momentum(self) -> None:
            strategy.calls.append("forget_momentum")

    learner = Learner(np.zeros(2, np.float32))
    synchronous_step(strategy, learner, lambda: strategy.calls.append("compute_gradients"), 3, 7)
    return strategy.calls


def test_a_step_calls_all_hooks_in_their_order() -> None:
    everything = SYNCHRONOUS[0] | SYNCHRONOUS[1] | SYNCHRONOUS[2] | SYNCHRONOUS[3]
    calls = ["start_step", "compute_gradients", "combine_gradients", "base", "update of 100", "count_step 3 of 7"]
    assert recorded(Recorder(everything)) == [*calls, "mix_parameters", "forget_momentum"]
    assert recorded(Recorder(everything, due=False)) == calls
    alone = recorded(Recorder(everything, size=1))
    assert "combine_gradients" not in alone and len(alone) == 7


@pytest.mark.parametrize(
    ("hook", "calls"),
    [
        (Hook.NONE, ["compute_gradients", "update"]),
        (Hook.START_STEP, ["start_step", "compute_gradients", "update"]),
        (Hook.COMBINE_GRADIENTS, ["compute_gradients", "combine_gradients", "update"]),
        (Hook.BASE, ["compute_gradients", "base", "update of 100"]),
        (
            Hook.MIX_PARAMETERS,
            ["compute_gradients", "update", "count_step 3 of 7", "mix_parameters", "forget_momentum"],
        ),
    ],
)
def test_a_step_calls_no_hook_that_is_not_declared(hook: Hook, calls: list[str]) -> None:
    assert recorded(Recorder(hook)) == calls


# Asynchronous.


class Listener(Asynchronous):
    """Takes down which of its methods are called."""

    def __init__(self, hooks: Hook, calls: list[str]) -> None:
        super().__init__(SimulatedRank(0, 1))
        self.hooks, self.calls = hooks, calls

    def filter_change(self, change: Flat) -> None:
        self.calls.append("filter_change")
        change *= 2

    def step_taken(self, frames: int) -> None:
        self.calls.append(f"step_taken {frames}")

    def blocked(self) -> bool:
        self.calls.append("blocked")
        return False

    def leave(self) -> None:
        self.calls.append("leave")

    def quiet(self) -> bool:
        self.calls.append("quiet")
        return True

    def rejoin(self) -> None:
        self.calls.append("rejoin")


class PiecesSeen(HostPublishedModel):
    """Takes down which pieces are published."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__(np.zeros(5, np.float32), piece_size=3)
        self.calls = calls

    def push_pull(self, piece: int, change: Any, copy: Any) -> None:
        self.calls.append(f"piece {piece}")
        super().push_pull(piece, change, copy)


@pytest.mark.parametrize(
    ("hooks", "calls", "moved"),
    [
        (Hook.NONE, ["piece 0", "piece 1", "step_taken 8"], 1),
        (Hook.FILTER_CHANGE, ["filter_change", "piece 0", "piece 1", "step_taken 8"], 2),
        (Hook.BLOCKED, ["piece 0", "piece 1", "step_taken 8", "blocked"], 1),
    ],
)
def test_publishing_calls_no_hook_that_is_not_declared(hooks: Hook, calls: list[str], moved: float) -> None:
    seen: list[str] = []
    journal, copy = Journal(), np.zeros(5, np.float32)
    participant = Participant(Listener(hooks, seen), PiecesSeen(seen), SoloMessages(), journal)
    participant.connect()
    participant.publish(np.ones(5, np.float32), copy, frames=8)
    assert seen == calls and participant.step == 1
    assert copy.tolist() == [moved] * 5
    records = journal.records()
    assert [int(e) for e in records["event"]] == [JournalEvent.STEP] * 2 and list(records["own_steps"]) == [1, 1]
    seen.clear()
    participant.leave()
    participant.settle()
    participant.rejoin()
    participant.disconnect()
    assert seen == ["leave", "quiet", "rejoin"]


def test_participants_exchange_what_they_publish_until_all_have_settled() -> None:
    """Each of two learners exchanges once by a half, one after the other: both end with the mean, whoever is first."""

    class Halves(Exchanging):
        merges = True
        weight = 0.5

        def partners(self, round_number: int) -> list[int]:
            return [1 - self.world.rank]

    def learner(world: World) -> list[float]:
        model, copy = HostPublishedModel(np.zeros(3, np.float32), 2), np.zeros(3, np.float32)
        participant = Participant(Halves(world), model, world.messages)
        participant.connect()
        for turn in range(world.size):
            if turn == world.rank:
                participant.publish(np.full(3, 4.0 * (1 + world.rank), np.float32), copy, frames=1)
            participant.settle()
            world.barrier()
        participant.leave()
        participant.settle()
        world.barrier()
        participant.disconnect()
        return [float(value) for value in model.to_numpy()]

    # 4 and 0 become 2 and 2; then 2 and 10 become 6 and 6.
    assert run_world(2, learner) == [[6.0] * 3] * 2


def test_a_device_is_asked_to_show_a_change_only_to_a_strategy_that_filters_it() -> None:
    shown: list[int] = []

    def mix(buffer: Any, rule: Callable[[Flat], None]) -> None:
        shown.append(buffer.size)
        rule(buffer)

    for hooks in (Hook.NONE, Hook.FILTER_CHANGE):
        Participant(Listener(hooks, []), PiecesSeen([]), SoloMessages(), mix=mix).filter_change(np.ones(5, np.float32))
    assert shown == [5]
