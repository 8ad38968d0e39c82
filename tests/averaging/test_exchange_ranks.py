"""Gossip over real ranks and over threads: what the journals say, done again in float64, is what was trained."""

from __future__ import annotations

import numpy as np
import pytest

from kaldi_mpi.averaging.journal import JournalEvent
from kaldi_mpi.testing.replay import replay
from kaldi_mpi.testing.threads import run_world
from kaldi_mpi.transport.world import World
from tests.conftest import in_ranks
from tests.gossip import DIM, GOSSIP, NUM_STEPS, PIECE, num_steps, reference_change, start_model, train

KINDS = (JournalEvent.SNAPSHOT, JournalEvent.ANSWER, JournalEvent.MIX, JournalEvent.CROSS)


def check(world: World, name: str) -> None:
    """Train, gather the journals, replay, compare."""
    strategy = GOSSIP[name](world)
    own, final, journal = train(world, strategy)
    journals, models, finals = world.gather(journal), world.gather(own), world.gather(final)
    replayed = replay(
        journals,
        start_model(),
        reference_change(world.size),
        strategy.weight,
        strategy.busy_weight,
        PIECE,
    )
    assert replayed.steps == [num_steps(rank) for rank in range(world.size)]
    np.testing.assert_allclose(np.array(models), replayed.models, rtol=3e-5, atol=3e-6, err_msg=name)
    np.testing.assert_allclose(replayed.models.sum(0), replayed.total, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(final, replayed.models.mean(0), rtol=3e-5, atol=3e-6)
    assert len({model.tobytes() for model in finals}) == 1, "the learners end with different models"
    counts = {kind: sum(int((j["event"] == kind).sum()) for j in journals) for kind in KINDS}
    assert counts[JournalEvent.SNAPSHOT] == counts[JournalEvent.MIX] + counts[JournalEvent.CROSS]
    assert counts[JournalEvent.ANSWER] == counts[JournalEvent.MIX] and counts[JournalEvent.CROSS] % 2 == 0
    assert (counts[JournalEvent.SNAPSHOT] > 0) == (world.size > 1)
    if world.size == 1:
        w = start_model()
        change = reference_change(1)
        for step in range(NUM_STEPS):
            w = w + change(0, step, w)
        np.testing.assert_allclose(own, w, rtol=3e-5, atol=3e-6)
        assert own.tobytes() == final.tobytes()


@in_ranks(1, 2, 3, 4, 5, timeout=120)
def test_journals_over_mpi_replay_to_the_trained_models(num_ranks: int) -> None:
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    assert world.size == num_ranks
    for name in GOSSIP:
        check(world, name)
    world.close()


@pytest.mark.parametrize("name", GOSSIP)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_journals_over_threads_replay_to_the_trained_models(size: int, name: str) -> None:
    run_world(size, lambda world: check(world, name))


def test_the_replay_tells_gossip_from_no_gossip() -> None:
    """Were exchanges without effect on this problem, the tests above would prove nothing."""

    def learner(world: World) -> float:
        own, _, journal = train(world, GOSSIP["expair"](world))
        alone = replay(
            [j[j["event"] == JournalEvent.STEP] for j in world.gather(journal)],
            start_model(),
            reference_change(world.size),
            0.5,
            piece_size=PIECE,
        )
        assert alone.models.shape == (world.size, DIM)
        return float(np.abs(alone.models[world.rank] - own).max())

    assert min(run_world(3, learner)) > 1e-3
