"""How much of the communication is hidden behind the computation, and what periodic averaging costs.

``python bench/averaging.py [--ranks 4] [--parameters 43000000] [--device-seconds 1.5] ...`` starts itself under
mpiexec. Computation is a sleep of fixed length: a stand-in for an accelerator, which leaves the cores free. The
strategies, the published model and the transport are those of a training.

For each strategy, blocks of steps with and without communication take turns. A step is: sleep; add the step's
change to the model (for asynchronous strategies, to the published model, and copy it back); in blocks with
communication also what the strategy does, by `synchronous_step` or `Participant.publish` as in a training. A block's
first step has little to hide and is left out of the times. Measured, as means over steps and ranks:

    step      seconds of a step, without and with communication
    exchange  seconds a step in which communication of this rank is under way: a sum, from its start to its end, or
              an exchange, from the snapshot of its first piece to the mixing of its last
    hidden    1 - (step with - step without) / exchange

``allreduce`` hides nothing: its row shows that the measure can say so. For ``periodic``, the cost is the share of
the time that goes into averaging after each 1, 2, 4, .. minibatches a learner (in frames over all learners).

Progress goes to standard error, a table to standard output; its last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kaldi_mpi.averaging import (
    Asynchronous,
    Participant,
    Settings,
    Synchronous,
    make_strategy,
    synchronous_step,
)
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published import Flat, HostPublishedModel
from kaldi_mpi.errors import KaldiMpiError
from kaldi_mpi.launch import launch
from kaldi_mpi.testing.array_learner import ArrayLearner
from kaldi_mpi.transport.guard import guarded
from kaldi_mpi.transport.status import NUM_LEARNERS_ENV
from kaldi_mpi.transport.world import Allocate, Handler, Messages, Pending, World

HIDING = ["adpsgd-delay1", "adpsgd-fixed", "adpsgd-random", "expair"]


@dataclasses.dataclass
class Seconds:
    """What was measured: seconds of each step, and of communication over all steps of the blocks with it."""

    without: list[float] = dataclasses.field(default_factory=list)
    with_: list[float] = dataclasses.field(default_factory=list)
    communication: float = 0.0
    steps: int = 0  # that `communication` belongs to
    megabytes: float = 0.0  # sent by this rank in these steps


class Busy:
    """Adds up the time in which a condition holds; told after each event that may change it."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition
        self._since: float | None = None
        self.seconds = 0.0

    def look(self) -> None:
        """Something has happened."""
        now, holds = time.perf_counter(), self._condition()
        if holds and self._since is None:
            self._since = now
        elif not holds and self._since is not None:
            self.seconds += now - self._since
            self._since = None


class TimedMessages:
    """Messages of an asynchronous strategy; `Busy` is told after each one sent and received.

    Args:
        messages: of the world.
        busy: whether an exchange is under way.
    """

    def __init__(self, messages: Messages, busy: Busy) -> None:
        self._messages, self._busy = messages, busy
        self.rank, self.size = messages.rank, messages.size
        self.post, self.wait = messages.post, messages.wait
        self.every = messages.every

    def send(self, channel: int, to: int, numbers: Sequence[int], payload: Any) -> None:
        """See `Messages.send`."""
        self._messages.send(channel, to, numbers, payload)
        self._busy.look()

    def on_message(self, channel: int, handler: Handler | None, allocate: Allocate | None = None) -> None:
        """See `Messages.on_message`."""

        def handle(source: int, numbers: tuple[int, ...], payload: NDArray[np.uint8]) -> None:
            assert handler is not None
            handler(source, numbers, payload)
            self._busy.look()

        self._messages.on_message(channel, None if handler is None else handle, allocate)


class AsynchronousLearner:
    """One rank's learner of an asynchronous strategy, without a gradient."""

    def __init__(self, world: World, strategy: Asynchronous, parameters: int, wire: str, device: float) -> None:
        self.world, self.strategy, self.device = world, strategy, device
        values = np.random.default_rng(world.rank).standard_normal(parameters, np.float32)
        self.model = HostPublishedModel(values, wire=wire)
        self.copy, self.change = values, np.full(parameters, 1e-6, np.float32)
        self.busy = Busy(lambda: not strategy.quiet())
        messages = TimedMessages(world.messages, self.busy)
        self.participant = Participant(strategy, self.model, messages, Journal())
        self.participant.connect()

    def step(self, communicate: bool) -> float:
        """One step; returns its seconds."""
        began = time.perf_counter()
        time.sleep(self.device)
        if communicate:
            self.participant.publish(self.change, self.copy, frames=0)
        else:
            for piece in range(self.model.num_pieces):
                self.participant.publish_piece(piece, self.change, self.copy)
        return time.perf_counter() - began

    def block(self, steps: int, communicate: bool, into: Seconds) -> None:
        """`steps` steps that count after one that does not, with or without communication."""
        self.world.barrier()
        if communicate:
            self.participant.rejoin()
        times = [self.step(communicate) for _ in range(steps + 1)][1:]
        if not communicate:
            into.without += times
            return
        into.with_ += times
        self.participant.leave()
        self.participant.settle()
        into.steps += steps + 1

    def measure(self, steps: int, rounds: int) -> Seconds:
        """Blocks without and with communication in turn."""
        self.block(1, True, Seconds())  # memory and connections are there from now on
        self.world.barrier()
        result, before, self.busy.seconds = Seconds(), self.strategy.bytes_sent, 0.0
        for _ in range(rounds):
            self.block(steps, False, result)
            self.block(steps, True, result)
        self.world.barrier()
        self.participant.disconnect()
        result.communication = self.busy.seconds
        result.megabytes = (self.strategy.bytes_sent - before) / 1e6
        return result


class TimedWorld:
    """A world for a synchronous strategy, which times its sums: from the call to the end of the sum."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.rank, self.size = world.rank, world.size
        self._seconds = 0.0
        self._watchers: list[threading.Thread] = []

    def sum_(self, buffer: Flat, wire: str = "float32") -> None:
        """A timed sum."""
        began = time.perf_counter()
        self._world.sum_(buffer, wire)
        self._seconds += time.perf_counter() - began

    def start_mean(self, source: Flat, into: Flat, wire: str = "float32") -> Pending:
        """A mean in the background, whose end a thread waits for."""
        began = time.perf_counter()
        pending: Pending = self._world.start_mean(source, into, wire)

        def wait() -> None:
            pending.wait()
            self._seconds += time.perf_counter() - began

        self._watchers.append(threading.Thread(target=wait))
        self._watchers[-1].start()
        return pending

    def seconds(self) -> float:
        """Of all sums so far, of which none may be under way."""
        for watcher in self._watchers:
            watcher.join()
        self._watchers.clear()
        return self._seconds


class SynchronousLearner(ArrayLearner):
    """One rank's learner of a synchronous strategy: a constant gradient, which takes `device_seconds`."""

    def __init__(self, world: World, name: str, settings: Settings, options: argparse.Namespace) -> None:
        super().__init__(np.zeros(options.parameters, np.float32))
        self.gradients += np.float32(1e-6)
        self.world, self.timed = world, TimedWorld(world)
        strategy = make_strategy(name, self.timed, settings)
        assert isinstance(strategy, Synchronous)
        self.strategy, self.alone = strategy, Synchronous(self.timed)
        self.device, self.frames = options.device_seconds, options.frames_per_minibatch
        self.mixing = 0.0  # seconds in which parameters were mixed between steps

    def update(self, base: Flat | None, together: bool) -> None:
        """The step in one pass over memory, as the optimiser takes it."""
        np.add(self.parameters if base is None else base, self.gradients, out=self.parameters)

    def mix_parameters(self, rule: Callable[[Flat], bool]) -> bool:
        """Timed."""
        began = time.perf_counter()
        forget = super().mix_parameters(rule)
        self.mixing += time.perf_counter() - began
        return forget

    def step(self, communicate: bool) -> float:
        """One step; returns its seconds."""
        began = time.perf_counter()
        strategy = self.strategy if communicate else self.alone
        synchronous_step(strategy, self, self.compute, self.frames, self.frames * self.world.size)
        return time.perf_counter() - began

    def compute(self) -> None:
        """The gradient is there already."""
        time.sleep(self.device)

    def block(self, steps: int, communicate: bool, into: Seconds) -> None:
        """`steps` steps that count after one that does not, with or without communication."""
        self.world.barrier()
        times = [self.step(communicate) for _ in range(steps + 1)]
        if communicate:
            into.with_ += times[1:]
            into.steps += steps + 1
        else:
            into.without += times[1:]

    def measure(self, steps: int, rounds: int) -> Seconds:
        """Blocks without and with communication in turn."""
        self.block(1, True, Seconds())  # memory and connections are there from now on
        result, seconds, sent = Seconds(), self.timed.seconds(), self.strategy.bytes_sent
        for _ in range(rounds):
            self.block(steps, False, result)
            self.block(steps, True, result)
        result.communication = self.timed.seconds() - seconds
        result.megabytes = (self.strategy.bytes_sent - sent) / 1e6
        return result


def periodic_cost(world: World, options: argparse.Namespace, period: int) -> float:
    """The share of a training's time that ``periodic`` loses with an averaging each `period` minibatches."""
    frames = period * options.frames_per_minibatch * world.size
    learner = SynchronousLearner(world, "periodic", Settings(frames_per_average=frames), options)
    world.barrier()
    began = time.perf_counter()
    for _ in range(period * -(-options.steps // period)):
        learner.step(True)
    return learner.mixing / (time.perf_counter() - began)


def summary(world: World, mine: Seconds) -> dict[str, float]:
    """The means over steps and ranks."""
    rows = [
        (float(np.mean(s.without)), float(np.mean(s.with_)), s.communication / s.steps, s.megabytes / s.steps)
        for s in world.gather(mine)
    ]
    without, with_, communication, megabytes = (float(mean) for mean in np.mean(rows, axis=0))
    return {
        "step_without": without,
        "step_with": with_,
        "exchange_seconds": communication,
        "megabytes_per_step": megabytes,
        "hidden_share": 1 - (with_ - without) / communication,
    }


def learner_of(name: str, world: World, options: argparse.Namespace) -> AsynchronousLearner | SynchronousLearner:
    """A learner of the strategy called `name`."""
    settings = Settings(transfer_dtype=options.transfer_dtype)
    strategy = make_strategy(name, world, settings)
    if isinstance(strategy, Asynchronous):
        return AsynchronousLearner(world, strategy, options.parameters, options.transfer_dtype, options.device_seconds)
    return SynchronousLearner(world, name, settings, options)


def run(world: World, options: argparse.Namespace) -> None:
    """All measurements, on all ranks; rank 0 prints."""

    def say(line: str, stream: Any = sys.stderr) -> None:
        if world.rank == 0:
            print(line, file=stream, flush=True)

    rows: dict[str, dict[str, float]] = {}
    for name in options.strategies:
        rows[name] = summary(world, learner_of(name, world, options).measure(options.steps, options.rounds))
        say(f"{name}: {rows[name]['hidden_share']:.3f} hidden")
    costs: dict[str, float] = {}
    for period in options.periods:
        cost = float(np.mean(world.gather(periodic_cost(world, options, period))))
        costs[str(period * options.frames_per_minibatch * world.size)] = cost
        say(f"periodic, each {period} minibatches: {cost:.3f} of the time")

    say(f"{'strategy':16}{'step without':>14}{'with':>9}{'exchange':>10}{'MB/step':>9}{'hidden':>8}", sys.stdout)
    for name, row in rows.items():
        say(
            f"{name:16}{row['step_without']:13.3f}s{row['step_with']:8.3f}s{row['exchange_seconds']:9.3f}s"
            f"{row['megabytes_per_step']:9.0f}{row['hidden_share']:8.3f}",
            sys.stdout,
        )
    for frames, cost in costs.items():
        say(f"periodic, averaging each {frames:>8} frames: {100 * cost:5.1f} % of the time", sys.stdout)
    result = {
        "hidden_share": {name: round(row["hidden_share"], 4) for name, row in rows.items()},
        "periodic_cost": {frames: round(cost, 4) for frames, cost in costs.items()},
        "ranks": world.size,
        "parameters": options.parameters,
        "device_seconds": options.device_seconds,
        "cores": os.cpu_count(),
        "transfer_dtype": options.transfer_dtype,
        "seconds": {name: {key: round(value, 5) for key, value in row.items()} for name, row in rows.items()},
    }
    say(json.dumps(result), sys.stdout)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Overlap of communication with computation, by strategy.")
    add = parser.add_argument
    add("--ranks", type=int, default=4, help="learners")
    add("--parameters", type=int, default=43_000_000, help="of the model, float32")
    add("--device-seconds", type=float, default=1.5, help="computation of a step")
    add("--steps", type=int, default=4, help="steps of a block that count")
    add("--rounds", type=int, default=3, help="blocks without and with communication")
    add("--strategies", nargs="*", default=[*HIDING, "allreduce"], help="to measure")
    add("--transfer-dtype", default="float32", help="of what travels: float32, float16 or bfloat16")
    add("--periods", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="of periodic, in minibatches")
    add("--frames-per-minibatch", type=int, default=2560, help="of one learner, for periodic")
    return parser.parse_args(arguments)


def main() -> int:
    """Start the ranks, or be one of them."""
    options = parse(sys.argv[1:])
    if NUM_LEARNERS_ENV not in os.environ:
        return launch([sys.executable, "-m", "mpi4py", __file__, *sys.argv[1:]], options.ranks)
    from kaldi_mpi.processes import die_with_parent
    from kaldi_mpi.transport.mpi import MpiWorld

    die_with_parent()
    world = MpiWorld()
    with guarded(world):
        run(world, options)
        world.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KaldiMpiError as error:
        sys.exit(f"bench/averaging.py: {error}")
