"""How far apart the learners' models are under each strategy, by simulation of the strategies' own code.

    python bench/consensus.py [--quick]

Each learner adds unit noise to each parameter at each of its steps (a step lasts 1 +- 5 %, the learners' phases
are random). Reported, over the parameters and learners and over time after a warm-up, relative to that noise:

    spread   E |x_i - mean|^2 of the published models, at times that have nothing to do with the steps
    copies   the same of the copies at which the learners take their gradients

Links: each rank sends one message after the other and needs 1/c of a step for a whole model, so that it can
take part in c exchanges a step. Delay-by-one, for which the same loop is written down here, has 1 - 1/N for
both, whatever the links. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kaldi_mpi.averaging import Asynchronous, topology
from kaldi_mpi.averaging.expair import Expair
from kaldi_mpi.averaging.fixed_ring import FixedRing
from kaldi_mpi.averaging.journal import Journal
from kaldi_mpi.averaging.published import HostPublishedModel
from kaldi_mpi.averaging.random_ring import RandomRing
from kaldi_mpi.testing.simulation import SimulatedRank, Simulation, Timed
from kaldi_mpi.transport.world import Collective

Make = Callable[[Collective], Asynchronous]
NUM_PARAMETERS, PIECES = 64, 8


# Other partners than (1) of `kaldi_mpi.averaging.expair`: functions of rank, size and the number of the exchange.


def num_hops(size: int) -> int:
    """Distances 1, 2, 4 .. of the exponential graph."""
    return max(1, (size - 1).bit_length())


def in_step(rank: int, size: int, number: int) -> int:
    """All learners take the hops in the same order, as in the one-peer exponential graph itself."""
    return (rank + 2 ** (number % num_hops(size))) % size


def random_hop(rank: int, size: int, number: int) -> int:
    """The hop is drawn."""
    hop = int(np.random.default_rng([rank, number]).integers(num_hops(size)))
    return (rank + 2**hop) % size


def random_partner(rank: int, size: int, number: int) -> int:
    """Any partner."""
    other = int(np.random.default_rng([rank, number]).integers(size - 1))
    return other + (other >= rank)


def hypercube(rank: int, size: int, number: int) -> int:
    """The partner differs in one bit (N a power of two), so that learners in step are paired off."""
    return rank ^ 2 ** (number % num_hops(size))


def ring(rank: int, size: int, number: int) -> int:
    """The right neighbour always."""
    return topology.fixed_ring(rank, size)


def variant(
    partner: Callable[[int, int, int], int] = topology.exponential, weight: float = 1 / 2, busy: float | None = 1 / 3
) -> Make:
    """`Expair` with other partners, or other weights (`busy` None: no other for busy partners)."""

    class Variant(Expair):
        busy_weight = busy

        def __init__(self, world: Collective) -> None:
            super().__init__(world)
            self.weight = weight

        def partners(self, round_number: int) -> Sequence[int]:
            return [partner(self.world.rank, self.world.size, self._number)]

    return Variant


STRATEGIES: dict[str, Make] = {
    "adpsgd-fixed": FixedRing,
    "adpsgd-random": lambda world: RandomRing(world, seed=1),
    "expair": Expair,
}
RING = variant(ring)
VARIANTS: dict[str, Make] = {
    "expair": Expair,
    "hops in step": variant(in_step),
    "random hop": variant(random_hop),
    "random partner": variant(random_partner),
    "hypercube": variant(hypercube),
    "ring": RING,
    "1/2 always": variant(busy=None),
    "1/3 always": variant(weight=1 / 3),
}


def measure(
    make: Make,
    size: int,
    capacity: float = 4.0,
    slow: float = 1.0,
    pieces: int = PIECES,
    steps: int = 120,
    warm_up: int = 40,
    latency: float = 0.01,
    seed: int = 0,
) -> dict[str, float]:
    """One simulation.

    Args:
        make: the strategy.
        size: learners.
        capacity: c, exchanges a step that a rank's link can carry.
        slow: how many times as long rank 0 takes for a step.
        pieces: in which the model travels.
        steps: of the other learners.
        warm_up: steps before measuring.
        latency: of a message, in steps.
        seed: of noise, phases and step times.
    """
    rng = np.random.default_rng(seed)
    start = np.zeros(NUM_PARAMETERS, np.float32)

    def noise(rank: int, step: int, copy: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        return rng.standard_normal(NUM_PARAMETERS).astype(np.float32), 1

    def seconds(rank: int, step: int) -> float:
        return (slow if rank == 0 else 1.0) * (1 + 0.05 * (2 * rng.random() - 1))

    simulation = Simulation(
        [make(SimulatedRank(rank, size)) for rank in range(size)],
        [HostPublishedModel(start, NUM_PARAMETERS // pieces) for _ in range(size)],
        [Journal(wanted=False)] * size,
        noise,
        [10**9] * size,
    )
    timed = Timed(simulation, seconds, latency, 4 * NUM_PARAMETERS * capacity, [float(p) for p in rng.random(size)])
    spreads: list[NDArray[np.float64]] = []
    copies: list[NDArray[np.float64]] = []
    exchanges = 0.0
    sample_at = float(warm_up)
    for now, _ in timed.run():
        if now < sample_at:
            continue
        models = simulation.models()
        mean = models.mean(0)
        if not spreads:
            exchanges = _exchanges(simulation)
        spreads.append(((models - mean) ** 2).mean(1))
        taken = np.array([rank.copy for rank in simulation.ranks], np.float64)
        copies.append(((taken - mean) ** 2).mean(1))
        sample_at = now + 0.137
        if now > steps:
            break
    spread = np.array(spreads).mean(0)
    return {
        "spread": float(spread.mean()),
        "others": float(spread[1:].mean()),
        "copies": float(np.array(copies).mean()),
        # Each is counted by the one who started it, or by both where requests crossed; a learner takes part
        # in those it starts and in as many that others start.
        "started": (_exchanges(simulation) - exchanges) / size / (timed.now - warm_up),
    }


def _exchanges(simulation: Simulation) -> float:
    return float(sum(strategy.num_averages for strategy in simulation.strategies))


def delay_by_one(size: int, steps: int = 4000, seed: int = 0) -> float:
    """The spread of: h <- mean of all models, while each computes its change; x_i <- h + change."""
    rng = np.random.default_rng(seed)
    models = np.zeros((size, NUM_PARAMETERS))
    total = 0.0
    for _ in range(steps):
        models = models.mean(0) + rng.standard_normal(models.shape)
        total += float(((models - models.mean(0)) ** 2).mean())
    return total / steps


def average(make: Make, size: int, seeds: int, **settings: Any) -> dict[str, float]:
    """The mean of `measure` over seeds."""
    found = [measure(make, size, seed=seed, **settings) for seed in range(seeds)]
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def contraction(size: int) -> dict[str, float]:
    """E |W x|^2 / |x|^2 a step for the x of mean zero that shrinks slowest.

    Of the fixed ring: its second eigenvalue, squared. Of the random ring: (trace(C'C) - 1)/(N - 1), C the fixed one's
    matrix. Of ours: N exchanges of weight 1/2, one after the other, each by a learner and over a hop drawn at random.
    """
    fixed = np.sum([np.roll(np.eye(size), shift, 1) for shift in (-1, 0, 1)], axis=0) / 3
    eigenvalues = np.sort(np.abs(np.linalg.eigvalsh(fixed)))
    hops = [2**h for h in range(max(1, (size - 1).bit_length()))]
    gap = min(np.mean([1 - np.cos(2 * np.pi * k * hop / size) for hop in hops]) for k in range(1, size))
    return {
        "adpsgd-fixed": float(eigenvalues[-2] ** 2),
        "adpsgd-random": float((np.trace(fixed.T @ fixed) - 1) / (size - 1)),
        "expair": float((1 - gap / size) ** size),
    }


def noise_bound(size: int, rho: float) -> float:
    """Bound on the spread of copies for noise that is independent of the models: (1 - 1/N)/(1 - rho)."""
    return (1 - 1 / size) / (1 - rho)


def dependent_bound(size: int, rho: float) -> float:
    """The same for noise that may depend on the models: (1 - 1/N)/(1 - sqrt(rho))^2."""
    return (1 - 1 / size) / (1 - np.sqrt(rho)) ** 2


def fixed_ring_exact(size: int) -> float:
    """Of the fixed ring in lock step, exactly: the mean over all waves k > 0 of 1/(1 - lambda_k^2), by (N - 1)/N."""
    eigenvalues = 1 / 3 + 2 / 3 * np.cos(2 * np.pi * np.arange(1, size) / size)
    return float((1 / (1 - eigenvalues**2)).sum() / size)


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | str]]) -> None:
    print(f"\n{title}\n")
    print("| |" + "|".join(columns) + "|\n|" + "---|" * (len(columns) + 1))
    for name, values in rows.items():
        print(f"|{name}|" + "|".join(v if isinstance(v, str) else f"{v:.3g}" for v in values) + "|", flush=True)


def main() -> None:
    """Print all tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N = 4 and 8 alone, short runs")
    quick = parser.parse_args().quick
    sizes = (4, 8) if quick else (4, 8, 16, 64)
    result: dict[str, Any] = {"bench": "consensus", "quick": quick, "spread": {}, "copies": {}, "slow": {}}

    def run(make: Make, size: int, **settings: Any) -> dict[str, float]:
        long = size == 64 and make in (FixedRing, RING)
        if long:  # a ring of 64 takes hundreds of steps to come to its spread
            settings |= {"steps": 700, "warm_up": 300, "pieces": 1}
        elif size == 64:
            settings |= {"steps": 80}
        elif quick:
            settings |= {"steps": 60, "warm_up": 20}
        return average(make, size, 1 if size == 64 or quick else 3, **settings)

    columns = [f"N={size}" for size in sizes]
    all_sizes = (2, 4, 8, 16, 64)
    gaps: dict[str, dict[str, list[float]]] = {"rho": {}, "bound": {}, "dependent": {}}
    for name in STRATEGIES:
        rhos = [contraction(size)[name] for size in all_sizes]
        gaps["rho"][name] = rhos
        gaps["bound"][name] = [noise_bound(n, rho) for n, rho in zip(all_sizes, rhos, strict=True)]
        gaps["dependent"][name] = [dependent_bound(n, rho) for n, rho in zip(all_sizes, rhos, strict=True)]
    gaps["bound"]["adpsgd-fixed, exact"] = [fixed_ring_exact(n) for n in all_sizes]
    titles = {
        "rho": "rho, by what the mean square is multiplied in a step",
        "bound": "(1 - 1/N)/(1 - rho): bound on copies, noise that is independent of the models",
        "dependent": "(1 - 1/N)/(1 - sqrt(rho))^2: the same for any noise",
    }
    for key, title in titles.items():
        _table(title, [f"N={size}" for size in all_sizes], gaps[key])
    result["gaps"] = gaps
    delayed = [delay_by_one(size, 400 if quick else 4000) for size in sizes]
    result["delay_by_one"] = dict(zip(columns, delayed, strict=True))
    for capacity in (8.0, 4.0, 3.0, 2.0, 1.0):
        spreads: dict[str, list[float]] = {"adpsgd-delay1": delayed}
        copies: dict[str, list[float]] = {"adpsgd-delay1": delayed}
        for name, make in STRATEGIES.items():
            if capacity != 4.0 and name == "adpsgd-fixed" and 64 in sizes:
                some = [run(make, size, capacity=capacity) for size in sizes if size < 64]
            else:
                some = [run(make, size, capacity=capacity) for size in sizes]
            spreads[name] = [one["spread"] for one in some]
            copies[name] = [one["copies"] for one in some]
        _table(f"spread, links that carry {capacity:g} exchanges a step", columns, spreads)
        _table(f"copies, links that carry {capacity:g} exchanges a step", columns, copies)
        result["spread"][f"{capacity:g}"] = spreads
        result["copies"][f"{capacity:g}"] = copies
    result["slow"] = {
        name: [run(make, size, slow=100.0)["others"] for size in sizes if size < 64 or make is not FixedRing]
        for name, make in STRATEGIES.items()
    }
    _table("spread of the others, rank 0 100 times slower, links that carry 4", columns, result["slow"])
    result["variants"] = {}
    for capacity in (8.0, 2.0):
        rows = {
            name: [run(make, size, capacity=capacity)["spread"] for size in sizes if size < 64 or make is not RING]
            for name, make in VARIANTS.items()
        }
        _table(f"spread, variants of ours, links that carry {capacity:g}", columns, rows)
        result["variants"][f"{capacity:g}"] = rows
    two = [run(lambda world: Expair(world, exchanges_per_step=2), size, capacity=8.0) for size in sizes]
    result["two_a_step"] = {"spread": [one["spread"] for one in two], "copies": [one["copies"] for one in two]}
    _table("expair, two exchanges started a step, links that carry 8", columns, result["two_a_step"])
    whole = {name: [run(make, size, capacity=2.0, pieces=1)["spread"] for size in sizes if size < 64]
             for name, make in STRATEGIES.items()}  # fmt: skip
    _table("spread, the model in one piece, links that carry 2", columns, whole)
    result["one_piece"] = whole
    print(json.dumps(result))


if __name__ == "__main__":
    main()
