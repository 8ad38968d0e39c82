"""Golden trees, lattices and supervision, and sums over the paths of graphs, for the tests of chain's graphs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.chain.acceptor import Acceptor, determinise, minimise, remove_epsilons
from kaldi_mpi.chain.denominator_graph import initial_probabilities
from kaldi_mpi.chain.phone_hmm import PhoneHmms
from kaldi_mpi.formats.fst import Fst, read_fst
from kaldi_mpi.formats.lattice import CompactLattice, parse_compact_lattice
from kaldi_mpi.formats.supervision import Supervision, parse_supervision
from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.formats.tree import read_tree
from tests.paths import golden


def golden_hmms() -> PhoneHmms:
    return PhoneHmms(read_tree(golden("chain/model/tree")), read_transition_model(golden("chain/model/0.trans_mdl")))


@cache
def golden_fst(name: str) -> Fst:
    return read_fst(golden(f"chain/{name}"))


@cache
def phone_lattices() -> dict[str, CompactLattice]:
    data, found, at = golden("chain/sup/phone_lat.ark").read_bytes(), {}, 0
    while at < len(data):
        space = data.index(b" ", at)
        key = data[at:space].decode()
        found[key], at = parse_compact_lattice(data, space + 1, file="phone_lat.ark", key=key)
    return found


def alignments() -> dict[str, list[tuple[int, int]]]:
    """(phone, frames) pairs, as ali-to-phones --write-lengths writes them."""
    found = {}
    for line in golden("chain/sup/phones_durs.txt").read_text().splitlines():
        key, pairs = line.split(maxsplit=1)
        found[key] = [(int(pair.split()[0]), int(pair.split()[1])) for pair in pairs.split(";")]
    return found


def archive(path: Path) -> dict[str, Supervision]:
    """Of an archive of examples, or of chain-get-supervision."""
    data, found, begin, at = path.read_bytes(), {}, 0, 0
    while (at := data.find(b"<Supervision> ", at)) >= 0:
        key = data[begin : data.index(b" ", begin)].decode()
        found[key], at = parse_supervision(data, at, file=path.name, key=key)
        end = data.find(b"</Nnet3ChainEg> ", at)
        begin = at if end < 0 else end + 16
    return found


def place(key: str) -> tuple[str, int]:
    """The utterance and first input frame that an example's key names, short or long."""
    fields = key.split("-")
    return "-".join(fields[:2]), int(fields[2])


def log_sum(fst: Fst, scores: NDArray[np.float64]) -> float:
    """Log of the sum over all paths of len(scores) arcs; label n at frame t scores [t, n - 1]."""
    sources = fst.sources()
    alphas = np.full(fst.num_states, -np.inf)
    alphas[fst.start] = 0.0
    for frame in scores:
        following = np.full(fst.num_states, -np.inf)
        np.logaddexp.at(following, fst.nexts, alphas[sources] - fst.costs + frame[fst.ilabels - 1])
        alphas = following
    return float(np.logaddexp.reduce(alphas - fst.finals))


def strings(fst: Fst) -> Fst:
    """Each string once, with its least cost: what a sum over paths is then a sum over."""
    return minimise(determinise(remove_epsilons(Acceptor.from_fst(fst)))).to_fst()


def deviation(one: Fst, other: Fst, frames: int, labels: int, times: int = 5) -> float:
    """The largest difference of two acceptors' log sums over random scores."""
    rng = np.random.default_rng(3)
    differences = [0.0]
    for _ in range(times):
        scores = 2.0 * rng.normal(size=(frames, labels))
        differences.append(abs(log_sum(one, scores) - log_sum(other, scores)))
    return max(differences)


def leaky_log_prob(fst: Fst, scores: NDArray[np.float64], leaky: float = 0.1) -> float:
    """The denominator per frame, by the formula of Kaldi's chain-denominator in float64."""
    initial, sources = initial_probabilities(fst), fst.sources()
    probs = np.exp(-fst.costs.astype(np.float64))
    alphas, total = initial, 0.0
    for frame in np.exp(scores):
        mass = alphas.sum()
        leaked = alphas + leaky * mass * initial
        alphas = np.bincount(fst.nexts, leaked[sources] * probs * frame[fst.ilabels - 1], fst.num_states) / mass
        total += np.log(mass)
    return float(total + np.log((alphas + leaky * alphas.sum() * initial).sum())) / len(scores)
