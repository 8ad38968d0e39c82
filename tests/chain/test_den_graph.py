"""den.fst and normalization.fst: against Kaldi's, and sums over phones and durations where a graph is small."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.chain.context_graph import expand_phones
from kaldi_mpi.chain.den_graph import make_den_fst, make_normalization_fst, without_epsilons
from kaldi_mpi.chain.denominator_graph import initial_probabilities
from kaldi_mpi.chain.graph_minimise import connect, merge_equivalent, push_evenly, reverse
from kaldi_mpi.chain.phone_hmm import PhoneHmms
from kaldi_mpi.chain.phone_lm import PhoneLmOptions, estimate_phone_lm
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst, build_fst
from kaldi_mpi.formats.transition import HmmState, TransitionModel, parse_transition_model, read_transition_model
from kaldi_mpi.formats.tree import ContextTree, Leaf, Node, Table, read_tree
from tests.chain.graph_data import golden_fst, golden_hmms, leaky_log_prob, log_sum
from tests.paths import golden

LOG_HALF = float(np.log(0.5))


def toy_hmms(width: int, position: int, phones: int, stay: float = 0.5) -> PhoneHmms:
    """Each phone in each context has pdfs of its own."""
    contexts = list(itertools.product(range(phones + 1), repeat=width))
    pdf_of = {context: 2 * number for number, context in enumerate(contexts)}

    def node(context: tuple[int, ...]) -> Node:
        if len(context) < width:
            return Table(len(context), tuple(node((*context, phone)) for phone in range(phones + 1)))
        return Table(-1, (Leaf(pdf_of[context]), Leaf(pdf_of[context] + 1)))

    states = [HmmState(0, 1, ((0, stay), (1, 1 - stay))), HmmState(-1, -1, ())]
    tuples = sorted((c[position], 0, pdf, pdf + 1) for c, pdf in pdf_of.items() if c[position])
    probs = np.log(np.array([1.0] + [stay, 1 - stay] * len(tuples))).astype(np.float32)
    model = TransitionModel(list(range(1, phones + 1)), [-1] + [0] * phones, [states], tuples, probs)
    return PhoneHmms(ContextTree(width, position, node(()), "toy"), model)


def toy_lm(phones: int, seed: int = 2) -> Fst:
    rng = np.random.default_rng(seed)
    data = [(f"u{n}", rng.integers(1, phones + 1, size=int(rng.integers(1, 7))).tolist()) for n in range(12)]
    return estimate_phone_lm(data, PhoneLmOptions(3, 2, 5))


def sum_over_phones(lm: Fst, hmms: PhoneHmms, scores: np.ndarray, stay: float) -> float:
    """All phone sequences and durations of len(scores) frames, one by one."""
    frames, total = len(scores), [-np.inf]
    width, position = hmms.context_width, hmms.central_position

    def visit(state: int, phones: list[int], cost: float) -> None:
        if phones and np.isfinite(lm.finals[state]):
            padded = [0] * position + phones + [0] * (width - 1 - position)
            models = [hmms.of(tuple(padded[at : at + width])) for at in range(len(phones))]
            transitions = len(phones) * np.log(1 - stay) + (frames - len(phones)) * np.log(stay)
            for cuts in itertools.combinations(range(1, frames), len(phones) - 1):
                value = transitions - cost - float(lm.finals[state])
                for model, begin, end in zip(models, (0, *cuts), (*cuts, frames), strict=True):
                    value += scores[begin, model.forward_pdf] + scores[begin + 1 : end, model.loop_pdf].sum()
                total.append(value)
        if len(phones) < frames:
            for arc in range(*lm.first_arc[state : state + 2]):
                visit(int(lm.nexts[arc]), [*phones, int(lm.ilabels[arc])], cost + float(lm.costs[arc]))

    visit(lm.start, [], 0.0)
    return float(np.logaddexp.reduce(total))


@pytest.mark.parametrize("width, position", [(1, 0), (2, 1), (2, 0), (3, 1), (3, 2), (3, 0)])
@pytest.mark.parametrize("stay", [0.5, 0.3])
def test_paths_are_phone_sequences_and_durations(width: int, position: int, stay: float) -> None:
    lm, hmms = toy_lm(2), toy_hmms(width, position, 2, stay)
    expanded = without_epsilons(expand_phones(lm, hmms, transition_costs=True))
    rng = np.random.default_rng(5)
    for frames in (1, 2, 4, 6):
        scores = rng.normal(size=(frames, hmms.num_pdfs))
        assert log_sum(expanded, scores) == pytest.approx(sum_over_phones(lm, hmms, scores, stay), abs=1e-5)


def test_size_before_minimising_is_kaldis() -> None:
    """118 states, 365 arcs, as log/make_den_fst.log has them after epsilons were removed."""
    graph = make_den_fst(golden_fst("lm/lm.4.3.50.fst"), golden_hmms(), minimise=False)
    assert (graph.num_states, graph.num_arcs) == (118, 365)


def test_minimised_is_kaldis_made_smaller_still() -> None:
    """States of Kaldi's den.fst from which the same follows become one: then its size is ours, 70 states, 267 arcs."""
    ours, theirs = make_den_fst(golden_fst("lm/lm.4.3.50.fst"), golden_hmms()), golden_fst("den.fst")
    merged = merge_equivalent(push_evenly(theirs), 10 / 1024)
    assert (theirs.num_states, theirs.num_arcs) == (76, 279)
    assert (ours.num_states, ours.num_arcs) == (merged.num_states, merged.num_arcs) == (70, 267)
    sums = np.bincount(ours.sources(), np.exp(-ours.costs), ours.num_states) + np.exp(-ours.finals)
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)
    degrees = np.diff(ours.first_arc) + np.bincount(ours.nexts, minlength=ours.num_states)
    assert (np.diff(degrees) <= 0).all()
    # The pdfs that are missing are the same: that of a phone which never occurs.
    assert set(ours.ilabels.tolist()) == set(theirs.ilabels.tolist())


@pytest.mark.parametrize("leaky", [0.1, 1e-5])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_denominators_are_kaldis(leaky: float, spread: float) -> None:
    """Random outputs through Kaldi's den.fst, ours, and ours as it was before minimising; per frame."""
    lm, hmms, theirs = golden_fst("lm/lm.4.3.50.fst"), golden_hmms(), golden_fst("den.fst")
    ours, exact = make_den_fst(lm, hmms), make_den_fst(lm, hmms, minimise=False)
    rng = np.random.default_rng(0)
    for _ in range(10):
        scores = spread * rng.normal(size=(50, hmms.num_pdfs))
        log_probs = [leaky_log_prob(graph, scores, leaky) for graph in (ours, theirs, exact)]
        assert log_probs[0] == pytest.approx(log_probs[1], abs=1e-3)
        assert log_probs[0] == pytest.approx(log_probs[2], abs=2e-3)


def test_normalization_fst_is_kaldis() -> None:
    """From Kaldi's den.fst: the same states and arcs; costs to the rounding of 10."""
    den, theirs = golden_fst("den.fst"), golden_fst("normalization.fst")
    ours = make_normalization_fst(den, initial_probabilities(den))
    assert ours.start == theirs.start
    np.testing.assert_allclose(ours.finals, theirs.finals, atol=2e-6)
    np.testing.assert_array_equal(ours.first_arc, theirs.first_arc)
    np.testing.assert_array_equal(ours.ilabels, theirs.ilabels)

    def arcs(fst: Fst) -> list[tuple[int, int, int, float]]:
        columns = (fst.sources(), fst.ilabels, fst.nexts, fst.costs)
        return sorted(zip(*(column.tolist() for column in columns), strict=True))

    for one, other in zip(arcs(ours), arcs(theirs), strict=True):
        assert one[:3] == other[:3]
        assert one[3] == pytest.approx(other[3], abs=2e-6)


def test_arcs_alike_out_of_a_new_start_are_one() -> None:
    """Two states go on alike; the start takes the likelier; a state of probability 0 is not begun in."""
    den = build_fst(0, 3, [(0, 1, 1, 0.5, 2), (1, 1, 1, 0.25, 2), (2, 2, 2, 0.1, 2), (2, 3, 3, 0.2, 1)], {2: 4.0})
    made = make_normalization_fst(den, np.array([0.5, 0.5, 0.0]))
    begin, end = made.first_arc[made.start : made.start + 2]
    assert made.ilabels[begin:end].tolist() == [1]
    assert made.costs[begin] == pytest.approx(0.25 + np.log(2.0))
    with pytest.raises(ValueError, match="2 initial probabilities of 3 states"):
        make_normalization_fst(den, np.array([0.5, 0.5]))


def random_graph(seed: int) -> Fst:
    rng = np.random.default_rng(seed)
    states = int(rng.integers(2, 9))
    arcs = [
        (source, label, label, float(rng.exponential()), int(rng.integers(states)))
        for source in range(states)
        for label in rng.integers(1, 4, size=int(rng.integers(1, 5))).tolist()
    ]
    return connect(build_fst(0, states, arcs, {states - 1: 0.5, int(rng.integers(states)): 1.0}))


@pytest.mark.parametrize("seed", range(20))
def test_reversing_pushing_and_merging_keep_sums(seed: int) -> None:
    """On random graphs; with a small quantum, merging changes next to nothing."""
    graph = random_graph(seed)
    if graph.start < 0:
        graph = random_graph(seed + 1000)
    scores = np.random.default_rng(seed).normal(size=(5, 3))
    expected = log_sum(graph, scores)
    pushed = push_evenly(graph)
    assert log_sum(pushed, scores) == pytest.approx(expected, abs=1e-4)
    sums = np.bincount(pushed.sources(), np.exp(-pushed.costs), pushed.num_states) + np.exp(-pushed.finals)
    np.testing.assert_allclose(sums, sums[0], rtol=1e-4)
    twice = without_epsilons(reverse(merge_equivalent(reverse(graph), 1e-6)))
    assert log_sum(twice, scores) == pytest.approx(expected, abs=1e-4)
    double = build_fst(
        0,
        2 * graph.num_states,
        [
            (source + half, label, label, cost, to + graph.num_states - half)
            for half in (0, graph.num_states)
            for source, label, cost, to in zip(
                graph.sources().tolist(),
                graph.ilabels.tolist(),
                graph.costs.tolist(),
                graph.nexts.tolist(),
                strict=True,
            )
        ],
        {s + half: float(graph.finals[s]) for s in range(graph.num_states) for half in (0, graph.num_states)},
    )
    merged = merge_equivalent(double, 1e-6)
    assert merged.num_states <= graph.num_states
    assert log_sum(merged, scores) == pytest.approx(expected, abs=1e-4)


def test_parallel_arcs_that_become_one_keep_their_sum() -> None:
    """Two arcs alike lead to two states from which the same follows: one arc has both their probabilities."""
    graph = build_fst(0, 3, [(0, 1, 1, 1.0, 1), (0, 1, 1, 1.0, 2), (1, 2, 2, 0.5, 0), (2, 2, 2, 0.5, 0)], {0: 1.0})
    merged = merge_equivalent(graph, 1e-3)
    assert (merged.num_states, merged.num_arcs) == (2, 2)
    assert merged.costs[0] == pytest.approx(1.0 - np.log(2.0), abs=1e-3)


def test_a_large_graph_takes_seconds() -> None:
    """A model of some thousand states over forty phones, as the librispeech recipe has."""
    rng = np.random.default_rng(1)
    words = [rng.integers(2, 42, size=int(rng.integers(2, 8))).tolist() for _ in range(3000)]
    chances = 1.0 / np.arange(1, len(words) + 1)
    data = [
        (str(n), [1, *(p for w in rng.choice(len(words), 12, p=chances / chances.sum()) for p in words[w]), 1])
        for n in range(3000)
    ]
    model = estimate_phone_lm(data, PhoneLmOptions(num_extra_lm_states=2000))
    assert model.num_states > 3000
    hmms = toy_hmms(2, 1, 41)
    begin = time.process_time()
    graph = make_den_fst(model, hmms)
    assert time.process_time() - begin < 30.0
    assert 0.5 * model.num_states < graph.num_states < 1.1 * model.num_states


def test_arcs_that_cost_too_much() -> None:
    """An infinite cost is no arc; one so large that exp(-cost) is 0 cannot be balanced."""
    hmms = toy_hmms(1, 0, 2)
    arcs = [(0, 1, 1, 1.0, 0), (0, 2, 2, np.inf, 0)]
    assert set(make_den_fst(build_fst(0, 1, arcs, {0: 0.5}), hmms).ilabels.tolist()) == {3, 4}
    with pytest.raises(DataError, match="costs so large that its probabilities vanish"):
        make_den_fst(build_fst(0, 2, [(0, 1, 1, 2000.0, 1)], {1: 2000.0}), hmms)


def test_systems_that_do_not_fit(tmp_path: Path) -> None:
    lm, tree = golden_fst("lm/lm.4.3.50.fst"), read_tree(golden("chain/model/tree"))
    with pytest.raises(DataError, match="phone 1 has not the topology of chain models"):
        PhoneHmms(tree, read_transition_model(golden("trans.mdl")))
    with pytest.raises(DataError, match="an acceptor of phones with an empty label"):
        make_den_fst(build_fst(0, 2, [(0, 0, 0, 0.0, 1)], {1: 0.0}), golden_hmms(), file="lm.fst")
    with pytest.raises(DataError, match="phone 99 is not in the transition model"):
        make_den_fst(build_fst(0, 2, [(0, 99, 99, 0.0, 1)], {1: 0.0}), golden_hmms())
    with pytest.raises(DataError, match=r"lm\.fst: the phone language model has no path"):
        make_den_fst(build_fst(0, 2, [(0, 1, 1, 0.0, 1)], {}), golden_hmms(), file="lm.fst")
    other = ContextTree(2, 1, Table(-1, (Leaf(3), Leaf(40))), "other.tree")
    text = golden("chain/model/trans.txt").read_text()
    with pytest.raises(DataError, match=r"other\.tree: phone 1 with pdfs 3, 40 is not in the transition model"):
        make_den_fst(lm, PhoneHmms(other, parse_transition_model(text)))
