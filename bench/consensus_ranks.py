"""How far apart the models of real learners are, each adding unit noise at its steps: beside bench/consensus.py.

    python bench/consensus_ranks.py [--num-learners N] [--slow F]

Starts itself under mpiexec. A step is a sleep of 100 ms +- 5 % (cores stay free for communication), then unit
noise on each of 2^18 parameters, in 4 pieces. All ranks look at a part of their published models at the same
times of the machine's clock; the spread is the mean of |x_i - mean|^2 over learners, parameters and times, `others` the
same without rank 0, which with --slow is F times slower. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kaldi_mpi import launch
from kaldi_mpi.averaging import Asynchronous, Participant
from kaldi_mpi.averaging.expair import Expair
from kaldi_mpi.averaging.fixed_ring import FixedRing
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published import HostPublishedModel
from kaldi_mpi.averaging.random_ring import RandomRing
from kaldi_mpi.transport.world import World

NUM_PARAMETERS, PIECE, SEEN = 2**18, 2**16, 4096
STEP, SECONDS, WARM_UP, BETWEEN = 0.1, 12.0, 4.0, 0.0137


def learn(world: World, strategy: Asynchronous, slow: float) -> dict[str, float]:
    """One strategy's run; returns what was found, the same on all ranks."""
    rng = np.random.default_rng(world.rank)
    model = HostPublishedModel(np.zeros(NUM_PARAMETERS, np.float32), PIECE)
    participant = Participant(strategy, model, world.messages, Journal())
    participant.connect()
    begin = world.broadcast(time.monotonic() + 0.2)
    seen: list[NDArray[np.float32]] = []
    looks = iter(np.arange(begin + WARM_UP, begin + SECONDS, BETWEEN))
    look = next(looks, None)
    copy = model.to_numpy()
    # Phases are spread, as they are after a while in a real run.
    step_ends = begin + STEP * (world.rank * 0.618 % 1)
    change = np.empty(NUM_PARAMETERS, np.float32)
    while look is not None:
        rng.standard_normal(NUM_PARAMETERS, np.float32, out=change)
        while look is not None and look < step_ends:
            time.sleep(max(0.0, look - time.monotonic()))
            with model.lock(0):
                seen.append(model.values[:SEEN].copy())
            look = next(looks, None)
        time.sleep(max(0.0, step_ends - time.monotonic()))
        participant.publish(change, copy, frames=1)
        step_ends += STEP * (slow if world.rank == 0 else 1.0) * rng.uniform(0.95, 1.05)
    participant.leave()
    participant.settle()
    world.barrier()
    participant.disconnect()
    own = np.array(seen, np.float64)
    mean = np.array([world.sum_float64(row) for row in own]) / world.size
    spreads = np.array(world.gather(float(((own - mean) ** 2).mean())))
    started = sum(world.gather(strategy.num_averages))
    steps = sum(world.gather(participant.step))
    return {"spread": spreads.mean(), "others": spreads[1:].mean(), "started_per_step": started / steps}


def rank(output: str, slow: float) -> None:
    """What each rank does."""
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    strategies: list[Asynchronous] = [FixedRing(world), RandomRing(world, 1), Expair(world)]
    found = {strategy.name: learn(world, strategy, slow) for strategy in strategies}
    if world.rank == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")
    world.close()


def main() -> None:
    """Start the ranks, print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-learners", type=int, default=4)
    parser.add_argument("--slow", type=float, default=1.0)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.output:
        rank(options.output, options.slow)
        return
    mpiexec = launch.find_mpiexec()
    vendor = launch.mpi_vendor(mpiexec)
    with tempfile.TemporaryDirectory(prefix="consensus.") as folder:
        output = Path(folder) / "found"
        command = [*launch.mpiexec_command(mpiexec, vendor, options.num_learners), sys.executable, "-m", "mpi4py"]
        command += [__file__, "--output", str(output), "--slow", str(options.slow)]
        environment = launch.learner_environment(vendor, options.num_learners, Path(folder))
        subprocess.run(command, env=environment, check=True, timeout=600)
        found = json.loads(output.read_text(encoding="utf-8"))
    print(f"delay-by-one: {1 - 1 / options.num_learners:.2f}")
    for name, values in found.items():
        print(name, {key: round(value, 2) for key, value in values.items()})
    print(json.dumps({"bench": "consensus_ranks", "num_learners": options.num_learners, "slow": options.slow, **found}))


if __name__ == "__main__":
    main()
