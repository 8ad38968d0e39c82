"""Normalisation by speaker: Kaldi's statistics, the arithmetic of apply-cmvn, and what cannot be used."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.scp import read_table
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from kaldi_mpi.loader.transforms import read_norms
from tests.loader.test_formats import read_text_matrices
from tests.loader_data import Written, compressed_matrix, full_matrix, write_archive, write_corpus
from tests.paths import golden, kaldi_root


def stats_of(feats: list[np.ndarray]) -> np.ndarray:
    frames = np.concatenate(feats).astype(np.float64)
    return np.stack([np.append(frames.sum(0), len(frames)), np.append((frames**2).sum(0), 0.0)])


def normalised(feats: np.ndarray, stats: np.ndarray, norm_vars: bool) -> np.ndarray:
    """apply-cmvn in NumPy, with its precisions."""
    count = stats[0, -1]
    if not norm_vars:
        return feats + (np.float64(np.float32(-1.0 / count)) * stats[0, :-1]).astype(np.float32)
    mean = stats[0, :-1] / count
    variance = np.maximum(stats[1, :-1] / count - mean * mean, 1e-20)
    scale = 1.0 / np.sqrt(variance)
    return feats * scale.astype(np.float32) + (-(mean * scale)).astype(np.float32)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_corpus(tmp_path, [13, 8, 21, 5])


SPEAKERS = {"u000": "s1", "u001": "s2", "u002": "s1", "u003": "s2"}


def write_stats(directory: Path, written: Written) -> tuple[Path, dict[str, np.ndarray]]:
    by_speaker = {
        speaker: stats_of([written.feats[u] for u, s in SPEAKERS.items() if s == speaker]) for speaker in ("s1", "s2")
    }
    scp = write_archive(directory, "cmvn", {s: full_matrix(m, "DM") for s, m in by_speaker.items()})
    return scp, by_speaker


@pytest.mark.parametrize("norm_vars", [False, True])
def test_as_apply_cmvn_does(norm_vars: bool, written: Written, tmp_path: Path) -> None:
    scp, stats = write_stats(tmp_path, written)
    utt2spk = tmp_path / "utt2spk"
    utt2spk.write_text("".join(f"{u} {s}\n" for u, s in SPEAKERS.items()))
    corpus = Corpus.open(
        written.scp, written.labels, cmvn_scp=scp, utt2spk=utt2spk, norm_means=True, norm_vars=norm_vars
    )
    expected = {u: normalised(f, stats[SPEAKERS[u]], norm_vars) for u, f in written.feats.items()}
    for key, feats in expected.items():
        np.testing.assert_array_equal(corpus.features(key), feats)
    speaker = np.concatenate([corpus.features("u000"), corpus.features("u002")])
    np.testing.assert_allclose(speaker.mean(0), 0.0, atol=1e-4)
    if norm_vars:
        np.testing.assert_allclose(speaker.std(0), 1.0, atol=1e-4)
    # and chunks are cut from the same values, the repeated edges included
    with MinibatchReader(corpus, ChunkShape(30, 3, 2), 4, seed=0, num_epochs=1, shuffle=False) as reader:
        minibatch = next(reader)
        for i, key in enumerate(corpus.utterances):
            feats = expected[key]
            rows = np.clip(np.arange(-3, 32), 0, len(feats) - 1)
            np.testing.assert_array_equal(minibatch.feats[i], feats[rows])


def test_kaldis_statistics(tmp_path: Path) -> None:
    expected = read_text_matrices(golden("cmvn.txt"))
    data, lines = golden("cmvn.ark").read_bytes(), []
    for key in expected:
        at = data.index(key.encode() + b" \0B") + len(key) + 1
        lines.append(f"{key} {golden('cmvn.ark')}:{at}\n")
    (tmp_path / "cmvn.scp").write_text("".join(lines))
    norms = read_norms(tmp_path / "cmvn.scp", list(expected), 40, norm_vars=True)
    for (offset, scale), stats in zip(norms, expected.values(), strict=True):
        count = stats[0, -1]
        mean = stats[0, :-1] / count
        variance = stats[1, :-1] / count - mean**2
        np.testing.assert_allclose(scale, variance**-0.5, rtol=1e-4)
        np.testing.assert_allclose(offset, -mean * variance**-0.5, rtol=1e-4)


def test_without_variance_in_a_dimension_the_variance_is_floored(written: Written, tmp_path: Path) -> None:
    stats = np.array([[2.0, 2.0], [2.0, 0.0]])  # two frames with the value 1
    scp = write_archive(tmp_path, "cmvn", {"s1": full_matrix(stats, "DM")})
    norms = read_norms(scp, ["s1"], 1, norm_vars=True)
    assert norms.tolist() == [[[-np.float32(1e10)], [np.float32(1e10)]]]


def test_without_utt2spk_statistics_are_by_utterance(written: Written, tmp_path: Path) -> None:
    stats = {u: stats_of([f]) for u, f in written.feats.items()}
    scp = write_archive(tmp_path, "cmvn", {u: full_matrix(m, "FM") for u, m in stats.items()})
    corpus = Corpus.open(written.scp, written.labels, cmvn_scp=scp, norm_means=True)
    for key, feats in written.feats.items():
        np.testing.assert_array_equal(
            corpus.features(key), normalised(feats, stats[key].astype(np.float32).astype(np.float64), False)
        )


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("s1", full_matrix(np.ones((2, 5)), "DM"), "normalisation statistics are 2 x 5, and features"),
        ("s1", full_matrix(np.ones((1, 4)), "DM"), "normalisation statistics are 1 x 4, and features"),
        ("s1", full_matrix(np.zeros((2, 4)), "DM"), "too little data for mean and variance normalisation"),
        ("s1", full_matrix(np.full((2, 4), np.nan), "DM"), "too little data for mean and variance"),
        ("s1", full_matrix(np.array([[np.inf] * 3 + [5.0]] * 2), "DM"), "statistics of dimension 0 are not"),
        ("s1", compressed_matrix(np.ones((2, 4), int), "CM2", 0.0, 1.0), "compressed matrix where a full"),
        ("other", full_matrix(np.ones((2, 4)), "DM"), "no normalisation statistics for this speaker"),
    ],
)
def test_statistics_that_do_not_fit(name: str, value: bytes, cause: str, written: Written, tmp_path: Path) -> None:
    scp = write_archive(tmp_path, "cmvn", {name: value})
    with pytest.raises(DataError) as caught:
        Corpus.open(written.scp, written.labels, cmvn_scp=scp, utt2spk=dict.fromkeys(SPEAKERS, "s1"), norm_means=True)
    assert caught.value.cause.startswith(cause)
    assert caught.value.key == "s1"
    assert caught.value.file == str(scp if name == "other" else tmp_path / "cmvn.ark")


def test_utterance_without_a_speaker(written: Written, tmp_path: Path) -> None:
    scp, _ = write_stats(tmp_path, written)
    (tmp_path / "utt2spk").write_text("u000 s1\n")
    with pytest.raises(DataError) as caught:
        Corpus.open(written.scp, written.labels, cmvn_scp=scp, utt2spk=tmp_path / "utt2spk", norm_means=True)
    assert str(caught.value) == f"{tmp_path}/utt2spk, key u001: the utterance has no speaker"


def test_tables_that_have_been_read_already(written: Written, tmp_path: Path) -> None:
    """They are as good as their files, and errors name these."""
    scp, _ = write_stats(tmp_path, written)
    (tmp_path / "utt2spk").write_text("".join(f"{u} {s}\n" for u, s in SPEAKERS.items()))
    files = (written.scp, scp, tmp_path / "utt2spk")
    feats, cmvn, utt2spk = map(read_table, files)
    expected = Corpus.open(files[0], written.labels, cmvn_scp=files[1], utt2spk=files[2], norm_means=True)
    for file in files:
        file.rename(file.with_suffix(".away"))
    corpus = Corpus.open(feats, written.labels, cmvn_scp=cmvn, utt2spk=utt2spk, norm_means=True)
    for key in written.feats:
        np.testing.assert_array_equal(corpus.features(key), expected.features(key))
    utt2spk.pop("u001")
    with pytest.raises(DataError, match=f"^{files[2]}, key u001: the utterance has no speaker$"):
        Corpus.open(feats, written.labels, cmvn_scp=cmvn, utt2spk=utt2spk, norm_means=True)
    with pytest.raises(DataError, match=f"^{files[0]}, key nobody: the utterance is not in this file$"):
        Corpus.open(feats, written.labels, utterances=["nobody"])
    feats["u001"] = "-"
    with pytest.raises(DataError, match=f"^{files[0]}, key u001: '-' is standard input"):
        Corpus.open(feats, written.labels)


def test_options_that_contradict_each_other(written: Written, tmp_path: Path) -> None:
    scp, _ = write_stats(tmp_path, written)
    with pytest.raises(ConfigError, match="--norm-vars=true needs --norm-means=true"):
        Corpus.open(written.scp, written.labels, cmvn_scp=scp, norm_vars=True)
    with pytest.raises(ConfigError, match="--norm-means=true needs a cmvn"):
        Corpus.open(written.scp, written.labels, norm_means=True)


@pytest.mark.kaldi
@pytest.mark.parametrize("norm_vars", [False, True])
def test_equal_to_kaldis_apply_cmvn(norm_vars: bool, written: Written, tmp_path: Path) -> None:
    program = kaldi_root() / "src/featbin/apply-cmvn"
    scp, _ = write_stats(tmp_path, written)
    utt2spk = tmp_path / "utt2spk"
    utt2spk.write_text("".join(f"{u} {s}\n" for u, s in SPEAKERS.items()))
    out = tmp_path / "out"
    subprocess.run(
        [
            *(program, f"--norm-vars={str(norm_vars).lower()}", f"--utt2spk=ark:{utt2spk}", f"scp:{scp}"),
            *(f"scp:{written.scp}", f"ark,scp:{out}.ark,{out}.scp"),
        ],
        check=True,
        timeout=60,
        env=os.environ,
    )
    kaldis = Corpus.open(f"{out}.scp", written.labels)
    ours = Corpus.open(written.scp, written.labels, cmvn_scp=scp, utt2spk=utt2spk, norm_means=True, norm_vars=norm_vars)
    for key in ours.utterances:
        np.testing.assert_array_equal(ours.features(key), kaldis.features(key))
