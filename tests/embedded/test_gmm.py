"""GMM-HMM training: the arithmetic against the wheel's, the files, alignments, and bad input."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import kaldi_native_io
import numpy as np
import pytest
from numpy.typing import NDArray

from kaldi_mpi.embedded import wheels
from kaldi_mpi.embedded.align import align_data
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.gmm import Gmms, GmmStatistics
from kaldi_mpi.embedded.gmm_model import read_gmm_model, read_hmm, write_gmm_model
from kaldi_mpi.embedded.hmm import Hmm, tid_to_pdf
from kaldi_mpi.embedded.jobs import WorkerPool, split_by_speaker
from kaldi_mpi.embedded.mono import MonoOptions, train_mono
from kaldi_mpi.errors import DataError, KaldiMpiError
from kaldi_mpi.formats.symbols import SymbolTable
from tests.paths import golden, kaldi_root
from tests.toy_hmm import LEXICON, OPTIONS, toy_system


def random_gmms(seed: int, counts: list[int], dim: int) -> Gmms:
    rng = np.random.default_rng(seed)
    first = np.concatenate([[0], np.cumsum(counts)])
    weights = np.concatenate([rng.dirichlet(np.ones(count)) for count in counts])
    inverse = rng.uniform(0.5, 2.0, size=(sum(counts), dim))
    means = rng.normal(size=(sum(counts), dim))
    return Gmms(first, weights.astype(np.float32), (means * inverse).astype(np.float32), inverse.astype(np.float32))


def wheel_model(gmms: Gmms) -> object:
    """The same as kaldi-hmm-gmm's AmDiagGmm."""
    khg = wheels.load().khg
    am = khg.AmDiagGmm()
    for pdf in range(gmms.num_pdfs):
        own = slice(gmms.first[pdf], gmms.first[pdf + 1])
        gmm = khg.DiagGmm(int(gmms.first[pdf + 1] - gmms.first[pdf]), gmms.dim)
        gmm.set_weights(gmms.weights[own])
        gmm.set_invvars_and_means(gmms.inv_vars[own], gmms.means_invvars[own] / gmms.inv_vars[own])
        gmm.compute_gconsts()
        am.add_pdf(gmm)
    return am


def frames_of(gmms: Gmms, count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(count, gmms.dim)).astype(np.float32),
        rng.integers(gmms.num_pdfs, size=count).astype(np.int32),
    )


def test_likelihoods_and_statistics_are_the_wheels() -> None:
    khg = wheels.load().khg
    gmms = random_gmms(0, [3, 1, 4], dim=5)
    am = wheel_model(gmms)
    feats, pdfs = frames_of(gmms, 200, seed=1)
    likelihoods = gmms.log_likelihoods(feats)
    assert likelihoods.shape == (200, 3)
    expected = [[am.log_likelihood(pdf, row) for pdf in range(3)] for row in feats]  # type: ignore[attr-defined]
    np.testing.assert_allclose(likelihoods, expected, rtol=2e-5, atol=2e-5)
    some = gmms.select(np.array([2, 0], dtype=np.int32)).log_likelihoods(feats)
    np.testing.assert_allclose(some, likelihoods[:, [2, 0]], rtol=1e-6)  # BLAS may take other sums for fewer columns

    statistics = gmms.accumulate(feats, pdfs)
    accumulators = khg.AccumAmDiagGmm()
    accumulators.init(am, khg.str_to_gmm_flags("mvw"))
    for row, pdf in zip(feats, pdfs, strict=True):
        accumulators.accumulate_for_gmm(am, row, int(pdf), 1.0)
    assert statistics.frames == 200
    assert statistics.log_like == pytest.approx(accumulators.tot_log_like, rel=1e-5)
    for pdf in range(3):
        own, theirs = slice(gmms.first[pdf], gmms.first[pdf + 1]), accumulators.get_acc(pdf)
        np.testing.assert_allclose(statistics.occupancy[own], theirs.occupancy, rtol=1e-3)
        np.testing.assert_allclose(statistics.sums[own, :5], theirs.mean_accumulator, atol=2e-3)
        np.testing.assert_allclose(statistics.sums[own, 5:], theirs.variance_accumulator, atol=5e-3)

    updated = gmms.estimate(statistics, min_occupancy=1.0)
    options = khg.MleDiagGmmOptions(min_gaussian_occupancy=1.0)
    khg.mle_am_diag_gmm_update(options, accumulators, khg.str_to_gmm_flags("mvw"), am)
    for pdf in range(3):
        own, theirs = slice(updated.first[pdf], updated.first[pdf + 1]), am.get_pdf(pdf)  # type: ignore[attr-defined]
        np.testing.assert_allclose(updated.weights[own], theirs.weights, atol=1e-4)
        np.testing.assert_allclose(updated.means_invvars[own], theirs.means_invvars, atol=5e-3)
        np.testing.assert_allclose(updated.inv_vars[own], theirs.inv_vars, rtol=5e-3)


def test_gaussians_with_few_frames_are_removed_but_never_the_last() -> None:
    gmms = random_gmms(3, [2, 3], dim=2)
    statistics = GmmStatistics.zeros(gmms)
    statistics.occupancy[:] = [50.0, 4.0, 2.0, 3.0, 1.0]
    statistics.sums[:, 2:] = statistics.occupancy[:, None] * 2.0
    updated = gmms.estimate(statistics)
    assert updated.first.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(updated.weights, [1.0, 1.0])
    np.testing.assert_allclose(updated.inv_vars[0], 0.5)  # mean 0, variance 2
    np.testing.assert_array_equal(updated.inv_vars[1], gmms.inv_vars[3])  # kept as it was


def test_splitting_goes_with_the_count_and_keeps_the_mixture() -> None:
    gmms = random_gmms(4, [1, 1, 1], dim=3)
    occupancy = np.array([16000.0, 1000.0, 30.0])
    split = gmms.split(occupancy, 30, power=0.5, rng=np.random.default_rng(5))
    # Counts to the power 1/2 are as 4 to 1; the last has frames for one Gaussian only.
    assert np.diff(split.first).tolist() == [23, 6, 1]
    np.testing.assert_allclose(np.add.reduceat(split.weights, split.first[:-1]), 1.0, rtol=1e-6)
    again = gmms.split(occupancy, 30, power=0.5, rng=np.random.default_rng(5))
    np.testing.assert_array_equal(split.means_invvars, again.means_invvars)
    feats, _ = frames_of(gmms, 50, seed=6)
    np.testing.assert_allclose(split.log_likelihoods(feats), gmms.log_likelihoods(feats), atol=0.05)
    assert gmms.split(occupancy, 2, power=0.5, rng=np.random.default_rng(5)).num_gauss == 3


def test_model_files(tmp_path: Path) -> None:
    mono = toy_system() / "mono"
    model = read_gmm_model(mono / "tree", mono / "final.mdl")
    assert model.gmms.num_pdfs == 2 * 5 + 4 * 3
    assert model.gmms.dim == 18
    write_gmm_model(tmp_path / "copy.mdl", model.hmm, model.gmms)
    assert (tmp_path / "copy.mdl").read_bytes() == (mono / "final.mdl").read_bytes()
    (tmp_path / "cut.mdl").write_bytes((mono / "final.mdl").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut\.mdl, byte offset \d+"):
        read_gmm_model(mono / "tree", tmp_path / "cut.mdl")


def test_kaldis_tree_and_transitions() -> None:
    hmm = read_hmm(golden("tree"), golden("trans.mdl"))
    tree, transitions = hmm.build()
    assert (tree.context_width, tree.central_position, tree.num_pdfs) == (3, 1, 112)
    # "Transition-state 1: phone = SIL hmm-state = 0 pdf = 0", "Transition-id = 1 p = 0.876201 [self-loop]" ...
    pdf, expected, shown = None, [-1], []
    for line in golden("show_transitions.txt").read_text().splitlines():
        fields = line.split()
        if fields[0] == "Transition-state":
            pdf = int(fields[-1])
        elif fields[0] == "Transition-id":
            assert pdf is not None
            expected.append(pdf)
            shown.append(float(fields[5]))
    np.testing.assert_array_equal(tid_to_pdf(transitions), expected)
    np.testing.assert_allclose(np.exp(hmm.log_probs[1:]), shown, rtol=1e-4)


def test_trees_that_do_not_fit(tmp_path: Path) -> None:
    hmm = read_hmm(golden("tree"), golden("trans.mdl"))
    with pytest.raises(DataError, match="thetree: damaged or truncated tree"):
        Hmm(hmm.tree[:200], hmm.topology, hmm.log_probs).build("thetree")
    with pytest.raises(DataError, match="thetree: not a binary tree file"):
        Hmm(b"ContextDependency 1 0", hmm.topology, hmm.log_probs).build("thetree")
    with pytest.raises(DataError, match="1036 transition-ids but the model has 500"):
        Hmm(hmm.tree, hmm.topology, hmm.log_probs[:501]).build()


def test_training_does_not_depend_on_the_number_of_jobs(tmp_path: Path) -> None:
    system = toy_system()
    train_mono(system / "train", system / "lang", tmp_path / "mono", MonoOptions(**vars(OPTIONS) | {"nj": 3}))
    for name in ("final.mdl", "tree", "final.occs"):
        assert (tmp_path / "mono" / name).read_bytes() == (system / "mono" / name).read_bytes()
    assert (tmp_path / "mono" / "num_jobs").read_text() == "3\n"
    assert (system / "mono" / "cmvn_opts").read_text() == "\n"


def read_alignments(folder: Path) -> dict[str, NDArray[np.int32]]:
    result = {}
    for job in range(1, int((folder / "num_jobs").read_text()) + 1):
        with kaldi_native_io.SequentialInt32VectorReader(f"ark:gunzip -c {folder}/ali.{job}.gz|") as reader:
            for key, value in reader:
                result[key] = np.array(value, dtype=np.int32)
    return result


def test_alignments_spell_the_transcripts() -> None:
    system = toy_system()
    alignments = read_alignments(system / "mono_ali")
    data = DataDir(system / "train")
    lengths = {
        key: matrix.shape[0]
        for key, matrix in kaldi_native_io.SequentialFloatMatrixReader(f"scp:{data.file('feats.scp')}")
    }
    assert {key: len(tids) for key, tids in alignments.items()} == lengths
    _, transitions = read_hmm(system / "mono" / "tree", system / "mono" / "final.mdl").build()
    phones = SymbolTable.read(system / "lang" / "phones.txt")
    spellings: dict[str, set[str]] = {}
    for line in LEXICON.splitlines():
        word, *pronunciation = line.split()
        spellings.setdefault(word, set()).add(" ".join(pronunciation))
    for key, tids in alignments.items():
        ends = [tid for tid in tids if transitions.is_final(int(tid))]
        # With reordered transitions a phone's last state leaves before its self-loops: count phone entries.
        heard = [
            phones.symbol(transitions.transition_id_to_phone(int(tid)))
            for tid in ends
            if not transitions.is_self_loop(int(tid))
        ]
        spoken = " ".join(phone for phone in heard if phone != "SIL")
        possible = {" ".join(c) for c in itertools.product(*(spellings[w] for w in data.text[key]))}
        assert spoken in possible


def test_alignment_archives_follow_the_split() -> None:
    system = toy_system()
    parts = split_by_speaker(DataDir(system / "train").utt2spk, 2)
    for job, part in enumerate(parts, 1):
        reader = kaldi_native_io.SequentialInt32VectorReader(f"ark:gunzip -c {system}/mono_ali/ali.{job}.gz|")
        assert [key for key, _ in reader] == part


def copy_of_train(tmp_path: Path) -> Path:
    shutil.copytree(toy_system() / "train", tmp_path / "data")
    return tmp_path / "data"


def test_transcripts_that_do_not_fit_are_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, system = copy_of_train(tmp_path), toy_system()
    lines = (data / "text").read_text().splitlines()
    key = lines[0].split()[0]
    lines[0] = key + " LABEL" * 200  # longer than the audio
    lines[1] += " NOVEL"
    (data / "text").write_text("\n".join(lines) + "\n")
    summary = align_data(data, system / "lang", system / "mono", tmp_path / "ali", nj=2)
    assert (summary.done, summary.failed) == (39, 1)
    assert key not in read_alignments(tmp_path / "ali")
    errors = capfd.readouterr().err
    assert f"Did not successfully align utterance {key}, len = " in errors
    assert "1 words are not in the lexicon (taken as unknown words): NOVEL" in errors


def test_bad_input(tmp_path: Path) -> None:
    system = toy_system()
    data = copy_of_train(tmp_path)
    (data / "cmvn.scp").unlink()
    with pytest.raises(KaldiMpiError, match=r"cmvn\.scp"):
        align_data(data, system / "lang", system / "mono", tmp_path / "ali")
    with pytest.raises(DataError, match="40 utterances cannot be split into 41 jobs"):
        align_data(system / "train", system / "lang", system / "mono", tmp_path / "ali", nj=41)
    with pytest.raises(DataError, match=r"final\.mdl: cannot read"):
        align_data(system / "train", system / "lang", tmp_path, tmp_path / "ali")
    other = tmp_path / "lang"
    shutil.copytree(system / "lang", other)
    (other / "phones.txt").write_text("<eps> 0\nSIL 1\n")
    with pytest.raises(DataError, match=r"phones\.txt: its phones are not those of"):
        align_data(system / "train", other, system / "mono", tmp_path / "ali")


def test_nothing_can_be_aligned(tmp_path: Path) -> None:
    system = toy_system()
    data = copy_of_train(tmp_path)
    keys = [line.split()[0] for line in (data / "text").read_text().splitlines()]
    (data / "text").write_text("".join(f"{key}{' LABEL' * 200}\n" for key in keys))
    with pytest.raises(DataError, match="no utterance could be aligned; do the transcripts belong"):
        train_mono(data, system / "lang", tmp_path / "mono", OPTIONS)


class Worker:
    """For `WorkerPool`: divides, or dies."""

    def __init__(self, number: int) -> None:
        self.number = number

    def divide(self, by: int) -> float:
        return self.number / by

    def die(self) -> None:
        os._exit(7)


def test_workers_answer_in_order_and_their_failures_are_reported() -> None:
    with WorkerPool(Worker, [6, 9]) as pool:
        assert pool.call("divide", 3) == [2, 3]
        assert pool.call("divide", each=[2, 9]) == [3, 1]
        with pytest.raises(KaldiMpiError, match="ZeroDivisionError"):
            pool.call("divide", each=[1, 0])
        with pytest.raises(KaldiMpiError, match=r"worker 1 ended while running die \(exit status 7\)"):
            pool.call("die")


@pytest.mark.parametrize("jobs", [1, 2, 3, 4, 7])
def test_split_keeps_speakers_whole_and_order(jobs: int) -> None:
    utt2spk = {f"s{s}-{u}": f"s{s}" for s, count in enumerate([5, 1, 3, 9]) for u in range(count)}
    parts = split_by_speaker(utt2spk, jobs)
    assert [key for part in parts for key in part] == list(utt2spk)
    assert len(parts) == jobs and all(parts)
    if jobs <= 4:
        homes = [{utt2spk[key] for key in part} for part in parts]
        assert sum(map(len, homes)) == 4


def kaldi(tmp_path: Path, command: str) -> str:
    root = kaldi_root()
    folders = [root / "src" / name for name in ("bin", "gmmbin", "featbin", "fstbin")]
    folders += [root / "egs" / "wsj" / "s5" / "utils"]
    environment = os.environ | {"PATH": ":".join(map(str, folders)) + ":" + os.environ["PATH"], "LC_ALL": "C"}
    done = subprocess.run(
        ["bash", "-c", f"set -e -o pipefail; {command}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.kaldi
def test_kaldi_reads_the_system(tmp_path: Path) -> None:
    system = toy_system()
    info = kaldi(tmp_path, f"gmm-info --print-args=false {system}/mono/final.mdl")
    assert "number of pdfs 22" in info and "feature dimension 18" in info
    assert "num-pdfs 22" in kaldi(tmp_path, f"tree-info --print-args=false {system}/mono/tree")
    phones = kaldi(
        tmp_path,
        f"gunzip -c {system}/mono_ali/ali.*.gz | ali-to-phones {system}/mono/final.mdl ark:- ark,t:- "
        f"| int2sym.pl -f 2- {system}/lang/phones.txt",
    )
    assert len(phones.splitlines()) == 40
    _, *heard = phones.splitlines()[0].split()
    assert set(heard) <= {"SIL", *"ABGL"}


@pytest.mark.kaldi
def test_kaldi_aligns_the_same(tmp_path: Path) -> None:
    """gmm-align-compiled with our model gives our alignment, and the same likelihood."""
    system = toy_system()
    data = system / "train"
    output = kaldi(
        tmp_path,
        f"sym2int.pl --map-oov 2 -f 2- {system}/lang/words.txt < {data}/text > text.int; "
        f"compile-train-graphs --read-disambig-syms={system}/lang/phones/disambig.int {system}/mono/tree "
        f"{system}/mono/final.mdl {system}/lang/L.fst ark:text.int ark:graphs; "
        f"apply-cmvn --utt2spk=ark:{data}/utt2spk scp:{data}/cmvn.scp scp:{data}/feats.scp ark:- "
        "| add-deltas ark:- ark:feats; "
        "gmm-align-compiled --transition-scale=1.0 --acoustic-scale=0.1 --self-loop-scale=0.1 --beam=10 "
        f"--retry-beam=40 {system}/mono/final.mdl ark:graphs ark:feats ark,t:- ",
    )
    theirs = {line.split()[0]: [int(tid) for tid in line.split()[1:]] for line in output.splitlines()}
    ours = read_alignments(system / "mono_ali")
    assert theirs.keys() == ours.keys()
    same = sum(int((np.array(theirs[key]) == ours[key]).sum()) for key in ours)
    assert same >= 0.999 * sum(map(len, ours.values()))  # float32 sums in another order decide ties


@pytest.mark.kaldi
def test_same_split_as_kaldi(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    for trial in range(20):
        sizes = rng.choice([1, 2, 3, 5, 20], size=rng.integers(2, 12))
        utt2spk = {f"s{s:02}-{u:03}": f"s{s:02}" for s, size in enumerate(sizes) for u in range(size)}
        jobs = int(rng.integers(1, min(5, len(sizes)) + 1))
        (tmp_path / "utt2spk").write_text("".join(f"{u} {s}\n" for u, s in utt2spk.items()))
        outputs = " ".join(f"part.{job}" for job in range(jobs))
        kaldi(tmp_path, f"split_scp.pl --utt2spk=utt2spk utt2spk {outputs}")
        theirs = [
            [line.split()[0] for line in (tmp_path / f"part.{job}").read_text().splitlines()] for job in range(jobs)
        ]
        assert split_by_speaker(utt2spk, jobs) == theirs, trial
