"""Graphs and supervision beside a real Kaldi's programs: on other trees, options and data than the golden files'."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.chain.den_graph import make_den_fst, make_normalization_fst
from kaldi_mpi.chain.denominator_graph import initial_probabilities
from kaldi_mpi.chain.graph_minimise import merge_equivalent, push_evenly
from kaldi_mpi.chain.phone_hmm import PhoneHmms
from kaldi_mpi.chain.phone_lm import PhoneLmOptions, estimate_phone_lm
from kaldi_mpi.chain.supervision import SupervisionOptions, make_supervision, phones_of_alignment, phones_of_lattice
from kaldi_mpi.chain.supervision_chunks import ChunkCutter, Normaliser
from kaldi_mpi.formats.fst import read_fst, vector_bytes, write_fst
from kaldi_mpi.formats.supervision import supervision_bytes
from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.formats.tree import read_tree
from tests.chain.graph_data import (
    alignments,
    archive,
    deviation,
    golden_fst,
    golden_hmms,
    leaky_log_prob,
    phone_lattices,
    place,
    strings,
)
from tests.paths import golden, kaldi_root

pytestmark = pytest.mark.kaldi

ROUNDING = 1 / 1024  # of costs in Kaldi's determinisation


def run(folder: Path, command: str) -> str:
    """Run programs of Kaldi; what they log."""
    root = kaldi_root()
    folders = [root / "src" / name for name in ("bin", "gmmbin", "chainbin", "nnet3bin")]
    environment = os.environ | {"PATH": ":".join(map(str, folders)) + ":" + os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", "set -e -o pipefail; " + command],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def phone_set(first: int, last: int) -> str:
    return "[ " + " ".join(map(str, range(first, last + 1))) + " ]"


LOW, HIGH, NONE_OR_LOW = phone_set(1, 40), phone_set(30, 70), phone_set(0, 32)
TREES = {
    "triphone": "3 1 ToPdf TE -1 2 ( "
    f"SE 0 {NONE_OR_LOW} {{ SE 2 {NONE_OR_LOW} {{ CE 0 CE 1 }} SE 1 {LOW} {{ CE 2 CE 3 }} }} "
    f"SE 1 {HIGH} {{ SE 2 {LOW} {{ CE 4 CE 5 }} SE 0 {HIGH} {{ CE 6 CE 7 }} }} ) ",
    "monophone": f"1 0 ToPdf SE 0 {LOW} {{ TE -1 2 ( CE 0 CE 1 ) SE 0 {HIGH} {{ TE -1 2 ( CE 2 CE 3 ) CE 4 }} }} ",
    "two on the left": f"3 2 ToPdf SE 0 {NONE_OR_LOW} {{ TE -1 2 ( SE 1 {LOW} {{ CE 0 CE 1 }} CE 2 ) "
    f"SE 2 {HIGH} {{ TE -1 2 ( CE 3 CE 4 ) CE 5 }} }} ",
}


@pytest.mark.parametrize("name", TREES)
def test_denominators_of_other_trees(name: str, tmp_path: Path) -> None:
    """At most as many states as Kaldi's, which minimises less; with no right context, before minimising, as many."""
    (tmp_path / "tree").write_text(f"ContextDependency {TREES[name]}EndContextDependency \n")
    lm, topo = golden("chain/lm/lm.4.3.50.fst"), golden("chain/model/topo")
    log = run(
        tmp_path,
        f"gmm-init-model-flat --dim=2 tree {topo} flat.mdl; copy-transition-model flat.mdl trans.mdl; "
        f"chain-make-den-fst tree trans.mdl {lm} den.fst normalization.fst",
    )
    hmms = PhoneHmms(read_tree(tmp_path / "tree"), read_transition_model(tmp_path / "trans.mdl"))
    exact, ours = (make_den_fst(read_fst(lm), hmms, minimise=minimise) for minimise in (False, True))
    theirs = read_fst(tmp_path / "den.fst")
    sizes = re.search(r"after removing epsilons is (\d+) and (\d+)", log)
    assert sizes is not None
    if name != "triphone":
        assert (exact.num_states, exact.num_arcs) == (int(sizes[1]), int(sizes[2]))
    assert ours.num_states <= theirs.num_states and ours.num_arcs <= theirs.num_arcs
    assert ours.num_states <= merge_equivalent(push_evenly(theirs), 10 / 1024).num_states
    rng = np.random.default_rng(6)
    for _ in range(5):
        scores = 2.0 * rng.normal(size=(50, hmms.num_pdfs))
        found = [leaky_log_prob(graph, scores) for graph in (ours, theirs, exact)]
        assert found[0] == pytest.approx(found[1], abs=1e-3)
        assert found[0] == pytest.approx(found[2], abs=1e-3)


@pytest.mark.parametrize("options", [(4, 3, 300), (3, 2, 40), (5, 2, 100), (4, 1, 60), (2, 2, 0)])
def test_phone_lm_of_other_data(options: tuple[int, int, int], tmp_path: Path) -> None:
    """Random sentences with many ties of counts; equal to the bit."""
    rng = np.random.default_rng(sum(options))
    words = [rng.integers(1, 25, size=int(rng.integers(1, 6))).tolist() for _ in range(120)]
    data = [(f"u{n:04}", [p for w in rng.choice(120, int(rng.integers(1, 7))) for p in words[w]]) for n in range(700)]
    (tmp_path / "phones").write_text("".join(f"{key} {' '.join(map(str, phones))}\n" for key, phones in data))
    order, unpruned, extra = options
    run(
        tmp_path,
        f"chain-est-phone-lm --ngram-order={order} --no-prune-ngram-order={unpruned} --num-extra-lm-states={extra} "
        "ark:phones lm.fst",
    )
    theirs, ours = read_fst(tmp_path / "lm.fst"), estimate_phone_lm(data, PhoneLmOptions(*options))
    # Properties are hints; the rest of the file follows them.
    assert vector_bytes(ours)[62:] == vector_bytes(theirs)[62:]


@pytest.mark.parametrize(
    "left, right, factor, lm_scale", [(5, 5, 3, 0.5), (1, 1, 3, 0.0), (2, 7, 2, 0.3), (0, 0, 1, 0.9)]
)
def test_supervision_and_chunks_with_other_options(
    left: int, right: int, factor: int, lm_scale: float, tmp_path: Path
) -> None:
    """From lattices with their costs: whole utterances, constrained and unconstrained chunks."""
    model, sup, hmms = golden("chain/model/tree").parent, golden("chain/sup/feats.ark").parent, golden_hmms()
    common = (
        f"--lattice-input=true --left-tolerance={left} --right-tolerance={right} --lm-scale={lm_scale} "
        f"--frame-subsampling-factor={factor} {model}/tree {model}/0.trans_mdl ark:{sup}/phone_lat.ark"
    )
    egs = f"nnet3-chain-get-egs --num-frames=30,24 --frame-subsampling-factor={factor}"
    normalization = golden("chain/normalization.fst")
    run(
        tmp_path,
        f"chain-get-supervision {common} ark:sup.ark; "
        f"chain-get-supervision --convert-to-pdfs=false {common} ark:tid.ark; "
        f"{egs} {normalization} ark:{sup}/feats.ark ark:sup.ark ark:egs.ark; "
        f"{egs} --transition-model={model}/0.trans_mdl {normalization} ark:{sup}/feats.ark ark:tid.ark ark:free.ark",
    )
    options, normaliser = SupervisionOptions(left, right, factor, lm_scale), Normaliser(golden_fst("normalization.fst"))
    whole, cutters, free = archive(tmp_path / "sup.ark"), {}, {}
    for key, lattice in phone_lattices().items():
        phones = phones_of_lattice(lattice)
        ours, timed = (make_supervision(phones, hmms, options, transition_ids=ids) for ids in (False, True))
        assert ours is not None and timed is not None
        one, other = strings(ours.fsts[0]), strings(whole[key].fsts[0])
        assert deviation(one, other, ours.frames_per_sequence, ours.label_dim) < 1e-4
        cutters[key], free[key] = ChunkCutter(ours), ChunkCutter(timed)
    for name in ("egs", "free"):
        for key, theirs in archive(tmp_path / f"{name}.ark").items():
            utterance, first = place(key)
            if name == "egs":
                found = normaliser.constrained(cutters[utterance].cut(first // factor, theirs.frames_per_sequence))
            else:
                found = normaliser.unconstrained(free[utterance].cut(first // factor, theirs.frames_per_sequence), hmms)
            assert found is not None
            one, other = found.fsts[0], theirs.fsts[0]
            limit = ROUNDING if name == "egs" else 1e-5
            assert deviation(one, other, theirs.frames_per_sequence, theirs.label_dim) < limit


def test_kaldi_reads_ours(tmp_path: Path) -> None:
    """Supervision, den.fst and normalization.fst that we wrote, by Kaldi's programs, against theirs."""
    hmms, model, sup = golden_hmms(), golden("chain/model/final.mdl"), golden("chain/sup/feats.ark")
    den = make_den_fst(golden_fst("lm/lm.4.3.50.fst"), hmms)
    write_fst(tmp_path / "den.fst", den)
    write_fst(tmp_path / "normalization.fst", make_normalization_fst(den, initial_probabilities(den)))
    made = {k: make_supervision(phones_of_alignment(v), hmms, SupervisionOptions()) for k, v in alignments().items()}
    with open(tmp_path / "sup.ark", "wb") as stream:
        for key, supervision in made.items():
            assert supervision is not None
            stream.write(key.encode() + b" \0B" + supervision_bytes(supervision))
    run(
        tmp_path,
        "nnet3-chain-get-egs --num-frames=60 --frame-subsampling-factor=3 normalization.fst "
        f"ark:{sup} ark:sup.ark ark:egs.ark",
    )
    normaliser = Normaliser(read_fst(tmp_path / "normalization.fst"))
    for key, theirs in archive(tmp_path / "egs.ark").items():
        utterance, first = place(key)
        supervision = made[utterance]
        assert supervision is not None
        ours = normaliser.constrained(ChunkCutter(supervision).cut(first // 3, theirs.frames_per_sequence))
        assert ours is not None
        limit = ROUNDING
        assert deviation(ours.fsts[0], theirs.fsts[0], theirs.frames_per_sequence, theirs.label_dim) < limit
    log_probs = []
    for graph in (tmp_path / "den.fst", golden("chain/den.fst")):
        log = run(
            tmp_path,
            f"nnet3-chain-compute-prob --leaky-hmm-coefficient=0.1 'nnet3-am-copy --raw=true {model} - |' {graph} "
            f"ark:{golden('chain/cegs/cegs.ark')}",
        )
        found = re.search(r"log-probability for 'output' is (\S+) per frame", log)
        assert found is not None
        log_probs.append(float(found[1]))
    assert log_probs[0] == pytest.approx(log_probs[1], abs=1e-3)
