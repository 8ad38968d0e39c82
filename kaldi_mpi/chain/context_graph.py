"""Phone acceptors expanded to the frames of HMMs in context: Kaldi's context FST and H, composed at once."""

from __future__ import annotations

import math
from typing import NamedTuple

from kaldi_mpi.chain.phone_hmm import PhoneHmm, PhoneHmms
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst, build_fst


class _Node(NamedTuple):
    """A state of the expanded graph.

    Attributes:
        state: of the phone acceptor.
        recent: the last phones read, as many as the next one's context needs.
        after: the last phone that was emitted, its self-loop's label, and what staying and leaving cost; None before
            the first one.
        ends: how many places of the right context beyond the end have been read.
    """

    state: int
    recent: tuple[int, ...]
    after: tuple[int, int, float, float] | None
    ends: int


def expand_phones(
    phones: Fst, hmms: PhoneHmms, *, transition_costs: bool, transition_ids: bool = False, file: str | None = None
) -> Fst:
    """Expand an acceptor of phones without epsilons to one of frames.

    Args:
        phones: its labels are > 0. A path through it is a whole utterance: beyond its ends the context is 0.
        hmms: of a tree of any context width.
        transition_costs: add the costs of transitions, as the denominator has them and supervision has not.
        transition_ids: labels are transition-ids in place of pdf-ids + 1.
        file: where `phones` comes from, for messages.

    Returns:
        A transducer: each frame's label is the input label, its phone the output label. With a right context the
        phones before the first emission, and only they, are epsilons. States are in the order of a breadth-first
        search, the start is 0.

    Raises:
        DataError: an epsilon in `phones`, or a phone that tree or transition model does not know.
    """
    if phones.start < 0:
        return build_fst(-1, 0, [], {})
    if phones.num_arcs and int(phones.ilabels.min()) <= 0:
        raise DataError("an acceptor of phones with an empty label", file=file)
    width, position = hmms.context_width, hmms.central_position
    right = width - 1 - position
    bounds, finals = phones.first_arc.tolist(), phones.finals.tolist()
    labels, costs, nexts = phones.ilabels.tolist(), phones.costs.tolist(), phones.nexts.tolist()

    number_of: dict[_Node, int] = {}
    nodes: list[_Node] = []
    arcs: list[tuple[int, int, int, float, int]] = []
    final_costs: dict[int, float] = {}

    def number(node: _Node) -> int:
        found = number_of.setdefault(node, len(nodes))
        if found == len(nodes):
            nodes.append(node)
        return found

    def after(hmm: PhoneHmm) -> tuple[int, int, float, float]:
        loop = hmm.labels(transition_ids)[1]
        return hmm.phone, loop, *((hmm.loop_cost, hmm.forward_cost) if transition_costs else (0.0, 0.0))

    def advance(source: int, node: _Node, phone: int, cost: float, state: int, ends: int) -> None:
        if cost == math.inf:
            return
        window = (*node.recent, phone)
        central = window[position]
        if central == 0:  # the right context is still being read
            arcs.append((source, 0, 0, cost, number(_Node(state, window[1:], node.after, ends))))
            return
        hmm = hmms.of(window)
        target = number(_Node(state, window[1:], after(hmm), ends))
        arcs.append((source, hmm.labels(transition_ids)[0], central, cost, target))

    number(_Node(phones.start, (0,) * (width - 1), None, 0))
    current = 0
    while current < len(nodes):
        node = nodes[current]
        leaving = 0.0
        if node.after is not None:
            phone, loop, loop_cost, leaving = node.after
            arcs.append((current, loop, phone, loop_cost, current))
        final = finals[node.state] + leaving
        if node.ends == 0:
            for arc in range(bounds[node.state], bounds[node.state + 1]):
                advance(current, node, labels[arc], costs[arc] + leaving, nexts[arc], 0)
        if final != math.inf:
            if node.ends == right:
                final_costs[current] = leaving if right else final
            else:
                advance(current, node, 0, leaving if node.ends else final, node.state, node.ends + 1)
        current += 1
    return build_fst(0, len(nodes), arcs, final_costs)
