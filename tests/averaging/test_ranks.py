"""Every strategy but gossip (test_exchange_ranks.py) over real ranks: one start of mpiexec for all of them."""

from __future__ import annotations

from tests.averaging import test_centre as centred
from tests.averaging import test_synchronous as synchronous
from tests.conftest import in_ranks


@in_ranks(1, 2, 3, 4, 5, timeout=180)
def test_strategies_equal_their_reference_over_mpi(num_ranks: int) -> None:
    """The synchronous ones directly, those with a centre by replay of their journals."""
    from kaldi_mpi.transport.mpi import MpiWorld

    world = MpiWorld()
    assert world.size == num_ranks
    for momentum, limits in ((0.0, False), (0.5, True)):
        synchronous.check_all(world, momentum, limits)
    synchronous.check_saving(world)
    for name in centred.CENTRED:
        centred.check(world, name)
    world.close()
