"""The denominator graph of chain training and the normalisation FST, as Kaldi's chain-make-den-fst makes them.

A phone language model is expanded to the frames of the HMMs of a tree (Povey et al. 2016, section 2.2), made smaller,
and written as den.fst; normalization.fst is the same graph with initial probabilities in place of its start.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.chain.acceptor import EPSILON, Acceptor, remove_epsilons
from kaldi_mpi.chain.context_graph import expand_phones
from kaldi_mpi.chain.graph_minimise import (
    arcs_sorted,
    by_falling_degree,
    connect,
    merge_equivalent,
    push_evenly,
    reverse,
)
from kaldi_mpi.chain.phone_hmm import PhoneHmms
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst

_ROUNDS = 3
_QUANTUM = 10 / 1024  # of costs while states are merged


def make_den_fst(phone_lm: Fst, hmms: PhoneHmms, *, minimise: bool = True, file: str | None = None) -> Fst:
    """Make den.fst.

    Args:
        phone_lm: of `estimate_phone_lm`, or read from phone_lm.fst.
        hmms: of the tree directory's tree and transition model.
        minimise: merge states that are nearly equivalent, as Kaldi does.
        file: where `phone_lm` comes from, for messages.

    Returns:
        An acceptor with labels pdf-id + 1, no epsilons, costs -log p; states by falling degree.

    Raises:
        DataError: the model has phones that tree or transition model does not know, epsilons, or no path.
    """
    expanded = expand_phones(phone_lm, hmms, transition_costs=True, file=file)
    graph = without_epsilons(expanded)
    if graph.start < 0:
        raise DataError("the phone language model has no path from its start to an end", file=file)
    if minimise:
        for _ in range(_ROUNDS):
            graph = merge_equivalent(push_evenly(reverse(graph)), _QUANTUM)
            graph = merge_equivalent(push_evenly(reverse(graph)), _QUANTUM)
        graph = without_epsilons(graph)
    return by_falling_degree(push_evenly(graph))


def without_epsilons(fst: Fst) -> Fst:
    """Epsilons removed (arcs that come out alike become one, with their sum), and states that are on no path."""
    if (fst.ilabels == EPSILON).any():
        return remove_epsilons(Acceptor.from_fst(fst), sums=True).to_fst()
    return connect(fst) if fst.num_states else fst


def make_normalization_fst(den_fst: Fst, initial: NDArray[np.floating]) -> Fst:
    """Make normalization.fst, of whose paths the numerators' are a part, from wherever the denominator may begin.

    Args:
        den_fst: of `make_den_fst`, or read from den.fst.
        initial: (S,) initial probabilities of its states.

    Returns:
        An acceptor in which a path starts in each state by its initial probability and ends anywhere at no cost; no
        epsilons, arcs sorted by label.

    Raises:
        DataError: no path starts anywhere.
        ValueError: the probabilities are of another graph.
    """
    if len(initial) != den_fst.num_states:
        raise ValueError(f"{len(initial)} initial probabilities of {den_fst.num_states} states")
    sources, new = den_fst.sources(), den_fst.num_states
    with np.errstate(divide="ignore"):
        beginning = -np.log(initial.astype(np.float64))
    costs = (den_fst.costs + beginning[sources]).astype(np.float32)
    # The new start has the arcs of all states; of those alike the cheapest, as where epsilons are removed.
    order = np.lexsort((costs, den_fst.nexts, den_fst.ilabels))
    order = order[costs[order] != np.inf]
    if not len(order):
        raise DataError("the denominator graph has no arc where its initial probabilities are above 0")
    labels, nexts = den_fst.ilabels[order], den_fst.nexts[order]
    chosen = order[np.append(True, (labels[1:] != labels[:-1]) | (nexts[1:] != nexts[:-1]))]
    graph = arcs_sorted(
        new,
        np.append(np.zeros(new), beginning.min()).astype(np.float32),
        np.concatenate([sources, np.full(len(chosen), new)]),
        np.concatenate([den_fst.ilabels, den_fst.ilabels[chosen]]),
        np.concatenate([den_fst.costs, costs[chosen]]),
        np.concatenate([den_fst.nexts, den_fst.nexts[chosen]]),
    )
    return connect(graph, by_label=True)
