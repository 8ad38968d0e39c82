"""Supervision, chunks and normalisation against Kaldi's, as sums over strings."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from kaldi_mpi.chain.acceptor import Acceptor
from kaldi_mpi.chain.supervision import (
    PhoneLattice,
    SupervisionOptions,
    make_supervision,
    phones_of_alignment,
    phones_of_lattice,
)
from kaldi_mpi.chain.supervision_chunks import ChunkCutter, Normaliser
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.fst import Fst, build_fst, parse_fst_text
from kaldi_mpi.formats.lattice import CompactLattice
from kaldi_mpi.formats.supervision import Supervision
from tests.chain.graph_data import (
    alignments,
    archive,
    deviation,
    golden_fst,
    golden_hmms,
    phone_lattices,
    place,
    strings,
)
from tests.paths import golden

ROUNDING = 1 / 1024  # of costs in Kaldi's determinisation; ours has none


@cache
def made(transition_ids: bool = False, lm_scale: float = 0.0) -> dict[str, Supervision]:
    hmms, options, found = golden_hmms(), SupervisionOptions(lm_scale=lm_scale), {}
    for key, lattice in phone_lattices().items():
        phones = phones_of_lattice(lattice, key=key)
        supervision = make_supervision(phones, hmms, options, transition_ids=transition_ids)
        assert supervision is not None
        found[key] = supervision
    return found


def of_text(name: str) -> dict[str, Fst]:
    """The FSTs of supervision in text form."""
    found = {}
    for part in golden(f"chain/sup/{name}").read_text().split("</Supervision>")[:-1]:
        head, _, body = part.lstrip().partition("\n")
        found[head.split()[0]] = parse_fst_text(body, file=name)
    return found


def same(ours: Supervision, theirs: Supervision, limit: float) -> None:
    (one,), (other,) = ours.fsts, theirs.fsts
    assert (
        replace(ours, fsts=(), alignment_pdfs=None).__dict__ == replace(theirs, fsts=(), alignment_pdfs=None).__dict__
    )
    assert deviation(one, other, theirs.frames_per_sequence, theirs.label_dim) <= limit


@pytest.mark.parametrize("name, transition_ids", [("sup_lat", False), ("sup_tid", True)])
def test_from_lattices_is_kaldis(name: str, transition_ids: bool) -> None:
    """The same strings, by as many states and arcs."""
    theirs = archive(golden(f"chain/sup/{name}.ark"))
    assert theirs.keys() == made(transition_ids).keys()
    for key, ours in made(transition_ids).items():
        (one,), (other,) = ours.fsts, theirs[key].fsts
        assert (one.num_states, one.num_arcs) == (other.num_states, other.num_arcs)
        same(replace(ours, fsts=(strings(one),)), replace(theirs[key], fsts=(strings(other),)), 1e-9)


def test_with_the_lattices_costs_is_kaldis() -> None:
    """lm-scale 0.5: only what a path costs more than the cheapest is kept, where they part."""
    theirs = of_text("sup_lat_lm05.txt")
    for key, ours in made(lm_scale=0.5).items():
        one, other = strings(ours.fsts[0]), strings(theirs[key])
        assert one.num_arcs == other.num_arcs
        assert deviation(one, other, ours.frames_per_sequence, ours.label_dim) <= 1e-5
        assert ours.fsts[0].costs.max() > 0.1 or key.startswith("lucas")


def test_from_alignments_is_kaldis() -> None:
    theirs, hmms = of_text("sup_ali.txt"), golden_hmms()
    for key, segments in alignments().items():
        ours = make_supervision(phones_of_alignment(segments), hmms, SupervisionOptions())
        assert ours is not None
        assert ours.fsts[0].num_arcs == theirs[key].num_arcs
        one, other = strings(ours.fsts[0]), strings(theirs[key])
        assert deviation(one, other, ours.frames_per_sequence, ours.label_dim) <= 1e-9


def kaldis_chunks(name: str) -> list[tuple[Supervision, str, int]]:
    """Examples with the utterance and the output frame that each begins at."""
    found = archive(golden(f"chain/sup/{name}.ark"))
    return [(theirs, place(key)[0], place(key)[1] // 3) for key, theirs in found.items()]


@pytest.mark.parametrize("whose", ["ours", "kaldis"])
def test_chunks_are_kaldis(whose: str) -> None:
    """Cut out of our supervision, and out of Kaldi's."""
    whole = made() if whose == "ours" else archive(golden("chain/sup/sup_lat.ark"))
    cutters = {key: ChunkCutter(supervision) for key, supervision in whole.items()}
    for theirs, utterance, first in kaldis_chunks("egs_unnormalised"):
        ours = cutters[utterance].cut(first, theirs.frames_per_sequence)
        ours = replace(ours, fsts=(strings(ours.fsts[0]),))
        same(ours, replace(theirs, fsts=(strings(theirs.fsts[0]),)), 1e-9)


@pytest.mark.parametrize("name, scale", [("egs", 1.0), ("egs_scale05", 0.5), ("egs_overlap", 1.0)])
def test_constrained_chunks_are_kaldis(name: str, scale: float) -> None:
    """The same sums over strings, each with its best path, and as many states and arcs."""
    cutters = {key: ChunkCutter(supervision) for key, supervision in made().items()}
    normaliser = Normaliser(golden_fst("normalization.fst"), scale)
    for theirs, utterance, first in kaldis_chunks(name):
        ours = normaliser.constrained(cutters[utterance].cut(first, theirs.frames_per_sequence))
        assert ours is not None
        assert (ours.fsts[0].num_states, ours.fsts[0].num_arcs) == (
            theirs.fsts[0].num_states,
            theirs.fsts[0].num_arcs,
        )
        same(ours, theirs, ROUNDING)


def best_cost(fst: Fst, labels: list[int]) -> float:
    """Of the paths with these labels."""
    arcs = Acceptor.from_fst(fst)
    costs = {0: 0.0}
    for label in labels:
        following: dict[int, float] = {}
        for state, before in costs.items():
            for known, cost, to in arcs.arcs[state]:
                if known == label:
                    following[to] = min(following.get(to, np.inf), before + cost)
        costs = following
    return min((cost + arcs.finals[state] for state, cost in costs.items()), default=np.inf)


def test_strings_cost_what_their_best_path_does() -> None:
    """Strings drawn from Kaldi's examples: ours costs as normalization.fst says; Kaldi's nearly so."""
    cutters, normalization = {key: ChunkCutter(whole) for key, whole in made().items()}, golden_fst("normalization.fst")
    normaliser, rng = Normaliser(normalization), np.random.default_rng(4)
    furthest = 0.0
    for theirs, utterance, first in kaldis_chunks("egs_overlap"):
        ours = normaliser.constrained(cutters[utterance].cut(first, theirs.frames_per_sequence))
        assert ours is not None
        paths = Acceptor.from_fst(theirs.fsts[0])
        for _ in range(5):
            labels, state = [], 0
            while paths.arcs[state]:
                label, _, state = paths.arcs[state][int(rng.integers(len(paths.arcs[state])))]
                labels.append(label)
            exact = best_cost(normalization, labels)
            assert best_cost(ours.fsts[0], labels) == pytest.approx(exact, abs=2e-5)
            furthest = max(furthest, abs(best_cost(theirs.fsts[0], labels) - exact))
    assert 1e-4 < furthest < ROUNDING


def test_unconstrained_chunks_are_kaldis() -> None:
    cutters = {key: ChunkCutter(supervision) for key, supervision in made(transition_ids=True).items()}
    normaliser, hmms, rng = Normaliser(golden_fst("normalization.fst")), golden_hmms(), np.random.default_rng(1)
    for theirs, utterance, first in kaldis_chunks("egs_unconstrained"):
        chunk = cutters[utterance].cut(first, theirs.frames_per_sequence)
        ours = normaliser.unconstrained(chunk, hmms, rng)
        assert ours is not None and ours.end2end and ours.alignment_pdfs is not None
        assert (ours.fsts[0].num_states, ours.fsts[0].num_arcs) == (
            theirs.fsts[0].num_states,
            theirs.fsts[0].num_arcs,
        )
        same(ours, theirs, 1e-12)
        # The path is one that the utterance has at these frames.
        assert theirs.alignment_pdfs is not None and len(ours.alignment_pdfs) == len(theirs.alignment_pdfs)
        timed = made()[utterance]
        reachable = Acceptor.from_fst(ChunkCutter(timed).cut(first, theirs.frames_per_sequence).fsts[0])
        states = {0}
        for pdf in ours.alignment_pdfs.tolist():
            states = {to for s in states for label, _, to in reachable.arcs[s] if label == pdf + 1}
        assert states


def test_unconstrained_wants_transition_ids() -> None:
    supervision = next(iter(made().values()))
    chunk = ChunkCutter(supervision).cut(0, 20)
    with pytest.raises(DataError, match="labels are not the transition-ids of this model"):
        Normaliser(golden_fst("normalization.fst")).unconstrained(chunk, golden_hmms())


def lattice(segments: list[tuple[int, int]]) -> PhoneLattice:
    return phones_of_alignment(segments)


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("left, right", [(1, 1), (2, 0), (5, 5)])
def test_phones_stay_in_their_tolerance(factor: int, left: int, right: int) -> None:
    """Each division of a short utterance's output frames among its phones, and whether it is a string."""
    segments, hmms = [(1, 4), (47, 3), (21, 5), (48, 6)], golden_hmms()
    options = SupervisionOptions(left, right, factor)
    supervision = make_supervision(lattice(segments), hmms, options)
    total = sum(duration for _, duration in segments)
    frames = -(-total // factor)
    accepted = Acceptor.from_fst(supervision.fsts[0]) if supervision else Acceptor([[]], [np.inf])
    ends = list(itertools.accumulate(duration for _, duration in segments))
    phones = [phone for phone, _ in segments]
    spans = {
        phone: range(-(-max(0, end - duration - left) // factor), -(-min(total, end + right) // factor))
        for (phone, duration), end in zip(segments, ends, strict=True)
    }
    found = 0
    for cuts in itertools.combinations(range(1, frames), len(phones) - 1):
        states, fits = {0}, True
        for at, (begin, end) in enumerate(zip((0, *cuts), (*cuts, frames), strict=True)):
            hmm = hmms.of((phones[at - 1] if at else 0, phones[at]))
            for frame in range(begin, end):
                label = 1 + (hmm.forward_pdf if frame == begin else hmm.loop_pdf)
                states = {to for s in states for known, _, to in accepted.arcs[s] if known == label}
                fits &= frame in spans[phones[at]]
        assert fits == any(accepted.finals[state] == 0.0 for state in states)
        found += fits
    assert bool(found) == (supervision is not None)


def test_more_phones_than_frames_are_dropped() -> None:
    assert make_supervision(lattice([(1, 1), (47, 1), (21, 1), (48, 1)]), golden_hmms(), SupervisionOptions()) is None


def test_a_chunk_that_normalization_does_not_know_is_dropped() -> None:
    hmms, normaliser = golden_hmms(), Normaliser(golden_fst("normalization.fst"))
    segments = [(1, 30), (48, 30), (27, 30)]  # never seen after one another
    for transition_ids in (False, True):
        supervision = make_supervision(lattice(segments), hmms, SupervisionOptions(), transition_ids=transition_ids)
        assert supervision is not None
        chunk = ChunkCutter(supervision).cut(0, supervision.frames_per_sequence)
        if transition_ids:
            assert normaliser.unconstrained(chunk, hmms) is None
        else:
            assert normaliser.constrained(chunk) is None


def compact(arcs: list[tuple[int, int, int, int]], states: int, start: int = 0) -> CompactLattice:
    """(from, to, phone, frames) each; arcs to `states` are final."""
    columns = (
        [np.array(column, np.int32) for column in zip(*arcs, strict=True)] if arcs else [np.zeros(0, np.int32)] * 4
    )
    costs = np.zeros(len(arcs), np.float32)
    return CompactLattice(start, states, columns[0], columns[1], columns[2], costs, costs, columns[3])


@pytest.mark.parametrize(
    "found, message",
    [
        (compact([], 0, -1), "the lattice is empty"),
        (compact([(0, 1, 1, 3), (0, 1, 2, 4), (1, 2, 0, 0)], 2), "paths have different lengths"),
        (compact([(0, 1, 1, 3), (1, 0, 2, 4), (1, 2, 0, 0)], 2), "paths have different lengths"),
        (compact([(0, 1, 0, 3), (1, 2, 0, 0)], 2), "not aligned by phones"),
        (compact([(0, 1, 1, 0), (1, 2, 0, 0)], 2), "not aligned by phones"),
        (compact([(0, 1, 1, 3)], 2), "no path to an end"),
    ],
)
def test_lattices_of_no_use(found: CompactLattice, message: str) -> None:
    with pytest.raises(DataError, match=rf"lat\.1\.gz, key utt: .*{message}"):
        phones_of_lattice(found, file="lat.1.gz", key="utt")


def test_empty_arcs_of_a_lattice_are_passed_over() -> None:
    found = phones_of_lattice(compact([(1, 0, 1, 3), (0, 2, 0, 0), (2, 3, 2, 4), (3, 4, 0, 0)], 4, start=1))
    assert (found.num_frames, found.intervals.tolist()) == (7, [[1, 0, 3], [2, 3, 7]])
    assert found.phones.ilabels.tolist() == [1, 2]


def test_what_cannot_be_done() -> None:
    for numbers in ((5, 5, 0), (-1, 5, 3), (1, 0, 3)):
        with pytest.raises(
            ConfigError, match=rf"--frame-subsampling-factor={numbers[2]} at least 1 and at most one more"
        ):
            SupervisionOptions(*numbers)
    for scale in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="must be at least 0 and below 1"):
            SupervisionOptions(lm_scale=scale)
    with pytest.raises(DataError, match="phones and durations must be 1 or more"):
        phones_of_alignment([(1, 3), (2, 0)], key="utt")
    with pytest.raises(DataError, match="key utt: phone 99 is not in the transition model"):
        make_supervision(lattice([(99, 30)]), golden_hmms(), SupervisionOptions(), key="utt")
    whole = next(iter(made().values()))
    with pytest.raises(ValueError, match=r"frames 60 \.\. 69 of 62"):
        ChunkCutter(whole).cut(60, 10)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"num_sequences": 2}, "only the supervision of one utterance"),
        ({"frames_per_sequence": 61}, "a path of another length"),
        ({"fsts": (build_fst(0, 2, [(0, 0, 0, 0.0, 1)], {1: 0.0}),), "frames_per_sequence": 1}, "without a time"),
        (
            {
                "fsts": (build_fst(0, 3, [(0, 1, 1, 0.0, 1), (0, 2, 2, 0.0, 2), (1, 1, 1, 0.0, 2)], {2: 0.0}),),
                "frames_per_sequence": 2,
            },
            "path of another length|without a time",
        ),
    ]
    for change, message in bad:
        with pytest.raises(DataError, match=rf"sup\.ark, key utt: .*{message}"):
            ChunkCutter(replace(whole, **change), file="sup.ark", key="utt")
