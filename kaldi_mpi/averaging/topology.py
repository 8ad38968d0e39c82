"""With whom a learner exchanges: pure functions of its rank, the number of learners and the number of the exchange."""

from __future__ import annotations

import numpy as np


def fixed_ring(rank: int, size: int) -> int:
    """The right neighbour on the ring 0, 1, .. N - 1."""
    return (rank + 1) % size


def shuffled_ring(size: int, number: int, seed: int) -> list[int]:
    """The ranks in the order in which they stand on the ring `number` (from 0), the same on all ranks."""
    return [int(rank) for rank in np.random.default_rng([seed, number]).permutation(size)]


def random_ring(rank: int, size: int, number: int, seed: int) -> int:
    """The right neighbour on the shuffled ring `number`."""
    ring = shuffled_ring(size, number, seed)
    return ring[(ring.index(rank) + 1) % size]


def exponential(rank: int, size: int, number: int) -> int:
    """The learner at distance 2^((number + rank) mod ceil(log2 N)): (1) of `kaldi_mpi.averaging.expair`."""
    hops = max(1, (size - 1).bit_length())
    return (rank + 2 ** ((number + rank) % hops)) % size
