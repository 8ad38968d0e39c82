"""One exchange between learners that are threads of this process: no MPI, no data, no network.

Each learner publishes a model and starts one exchange with its partner on the exponential graph of ``expair``; its
communication thread answers those that others start. The models come closer and their mean stays where it is.
Under mpiexec the same lines run over `kaldi_mpi.transport.mpi.MpiWorld`. Run: python examples/exchange_over_threads.py
"""

from __future__ import annotations

import sys

import numpy as np

from kaldi_mpi.averaging import Asynchronous, Participant, make_strategy
from kaldi_mpi.averaging.published import Flat, HostPublishedModel
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import World


def learner(world: World) -> tuple[Flat, Flat]:
    """What each thread does; returns its model before and after."""
    strategy = make_strategy("expair", world)
    assert isinstance(strategy, Asynchronous)
    model = HostPublishedModel(np.full(3, 10.0 * world.rank, np.float32))
    before = model.to_numpy()
    participant = Participant(strategy, model, world.messages)
    participant.connect()  # from now on others are answered
    world.barrier()
    change, copy = np.zeros(3, np.float32), before.copy()  # a training's change is its optimiser's
    participant.publish(change, copy, frames=100)  # an exchange begins; nobody waits for it
    participant.leave()
    participant.settle()  # the exchange that was started here has ended
    world.barrier()  # and all others
    participant.disconnect()
    return before, model.to_numpy()


def main() -> None:
    """Print the models before and after."""
    num_learners = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    models = run_world(num_learners, learner)
    for rank, (before, after) in enumerate(models):
        print(f"learner {rank}: {before} -> {after}")
    before, after = np.mean(models, axis=0)
    print(f"mean:      {before} -> {after}")


if __name__ == "__main__":
    main()
