"""Deltas and splicing: against plain NumPy, chunks against whole utterances, and against Kaldi's programs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.formats.cmvn_options import CmvnOptions, format_cmvn_opts, parse_cmvn_opts
from kaldi_mpi.loader import Chunking, ChunkShape, Corpus, MinibatchReader
from kaldi_mpi.loader.transforms import (
    DeltaOptions,
    SpliceOptions,
    delta_scales,
    parse_delta_opts,
    parse_splice_opts,
)
from tests.loader_data import KINDS, Written, full_matrix, random_matrix, write_archive, write_corpus
from tests.paths import kaldi_root

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DELTAS = st.builds(DeltaOptions, st.integers(0, 3), st.integers(1, 4), st.integers(0, 2))
SPLICES = st.builds(SpliceOptions, st.integers(0, 6), st.integers(0, 6))
TRANSFORMS = st.one_of(st.none(), DELTAS, SPLICES)
SHAPES = st.builds(ChunkShape, st.integers(1, 25), st.integers(0, 9), st.integers(0, 6), st.integers(0, 35))
EDGE = st.one_of(st.none(), st.integers(0, 9))
CHUNKINGS = st.builds(
    Chunking,
    st.lists(st.integers(1, 25), min_size=1, max_size=3, unique=True).map(tuple),
    *(st.integers(0, 9), st.integers(0, 6), EDGE, EDGE, st.integers(0, 35)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transforms")


def how(transform: DeltaOptions | SpliceOptions | None) -> dict[str, object]:
    """The arguments of `Corpus.open`."""
    if transform is None:
        return {}
    return {"deltas": transform} if isinstance(transform, DeltaOptions) else {"splice": transform}


def shifted(feats: np.ndarray, by: int) -> np.ndarray:
    """Row t is row t + by, the first and the last one repeated."""
    return feats[np.clip(np.arange(len(feats)) + by, 0, len(feats) - 1)]


def with_deltas(feats: np.ndarray, options: DeltaOptions) -> np.ndarray:
    """Deltas in double precision, by the definition: a regression line through 2 * window + 1 points.

    A derivative of higher order is a regression through those of the order below, as they would be if the
    utterance's first and last frames were repeated without end.
    """
    x = feats.astype(np.float64)[:, : options.truncate or None]
    margin = options.order * options.window
    padded = np.pad(x, ((margin, margin), (0, 0)), mode="edge")
    blocks = [x]
    for order in range(1, options.order + 1):
        squares = 2 * sum(j * j for j in range(1, options.window + 1))
        rows = len(padded) - 2 * options.window
        neighbours = range(-options.window, options.window + 1)
        weighted = [j * padded[options.window + j : options.window + j + rows] for j in neighbours]
        padded = np.sum(weighted, axis=0) / squares  # shorter by a window at both ends
        left = margin - order * options.window
        blocks.append(padded[left : left + len(x)])
    return np.concatenate(blocks, axis=1)


def transformed(feats: np.ndarray, transform: DeltaOptions | SpliceOptions | None) -> np.ndarray:
    if transform is None:
        return feats
    if isinstance(transform, DeltaOptions):
        return with_deltas(feats, transform)
    return np.concatenate([shifted(feats, by) for by in range(-transform.left, transform.right + 1)], axis=1)


@SETTINGS
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), transform=TRANSFORMS, seed=st.integers(0, 99))
def test_whole_utterances(
    folder: Path, lengths: list[int], transform: DeltaOptions | SpliceOptions | None, seed: int
) -> None:
    written = write_corpus(folder, lengths, dim=3, seed=seed)
    corpus = Corpus.open(written.scp, written.labels, **how(transform))  # type: ignore[arg-type]
    for key, feats in written.feats.items():
        expected = transformed(feats, transform)
        assert expected.shape[1] == corpus.feat_dim
        scale = np.abs(feats).max()
        np.testing.assert_allclose(corpus.features(key), expected, rtol=1e-5, atol=2e-6 * scale)


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), transform=TRANSFORMS,
    chunking=st.one_of(SHAPES, CHUNKINGS),
    kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_chunks_are_cut_from_the_transformed_utterance(
    folder: Path,
    lengths: list[int],
    transform: DeltaOptions | SpliceOptions | None,
    chunking: ChunkShape | Chunking,
    kind: str,
) -> None:
    written = write_corpus(folder, lengths, dim=3, kind=kind)
    corpus = Corpus.open(written.scp, written.labels, **how(transform))  # type: ignore[arg-type]
    whole = {key: corpus.features(key) for key in corpus.utterances}
    owner = [(key, t) for key, values in written.labels.items() for t in range(len(values))]
    seen = 0
    with MinibatchReader(corpus, chunking, 4, seed=1, num_epochs=1) as reader:
        for m in reader:
            shape = m.shape
            assert m.feats.shape[1:] == (shape.rows, corpus.feat_dim)
            for feats, labels in zip(m.feats, m.labels, strict=True):
                i = int(np.flatnonzero(labels >= 0)[0])
                key, t = owner[labels[i]]
                rows = np.arange(shape.rows) + t - i - shape.left + shape.label_delay
                np.testing.assert_array_equal(feats, whole[key][np.clip(rows, 0, len(whole[key]) - 1)])
                seen += int((labels >= 0).sum())
    assert seen == sum(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_the_edges_of_a_row_range_are_the_utterances(kind: str, tmp_path: Path) -> None:
    data, values = random_matrix(np.random.default_rng(5), kind, 40, 3)
    scp = write_archive(tmp_path, "feats", {"recording": data})
    scp.write_text(scp.read_text().replace("recording", "utt").rstrip() + "[11:25]\n")
    corpus = Corpus.open(scp, {"utt": np.arange(15)}, splice=(3, 2))
    np.testing.assert_array_equal(corpus.features("utt"), transformed(values[11:26], SpliceOptions(3, 2)))
    # and only these rows are read ahead, where they lie together
    row = {"FM": 12, "DM": 24, "CM2": 6, "CM3": 3}.get(kind)
    assert corpus.unit_bytes.tolist() == [3 * 8 + 3 * 40 if row is None else 15 * row]
    assert corpus.begin[0] + corpus.unit_bytes[0] == corpus.end[0] <= (tmp_path / "feats.ark").stat().st_size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranges", [[(0, 9), (0, 29)], [(0, 29), (0, 9), (0, 9)], [(5, 20), (2, 9), (2, 20), (39, 39)]])
def test_row_ranges_that_overlap(kind: str, ranges: list[tuple[int, int]], tmp_path: Path) -> None:
    data, values = random_matrix(np.random.default_rng(5), kind, 40, 3)
    write_archive(tmp_path, "feats", {"recording": data})
    feats = {f"u{i}": values[low : high + 1] for i, (low, high) in enumerate(ranges)}
    at = f"{tmp_path}/feats.ark:{len('recording ')}"
    scp = tmp_path / "segments.scp"
    scp.write_text("".join(f"u{i} {at}[{low}:{high}]\n" for i, (low, high) in enumerate(ranges)))
    corpus = Corpus.open(scp, {key: np.full(len(rows), i) for i, (key, rows) in enumerate(feats.items())})
    seen = 0
    with MinibatchReader(corpus, ChunkShape(30, 0, 0), 4, seed=1, num_epochs=1) as reader:
        for m in reader:
            for chunk, labels in zip(m.feats, m.labels, strict=True):
                rows = feats[f"u{labels[0]}"]
                np.testing.assert_array_equal(chunk[: len(rows)], rows)
                seen += 1
    assert seen == len(ranges)


def test_scales_of_the_usual_deltas() -> None:
    first, second = delta_scales(2, 2)[1:]
    np.testing.assert_allclose(first, [-0.2, -0.1, 0.0, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(second, np.array([4, 4, 1, -4, -10, -4, 1, 4, 4]) / 100, rtol=1e-6)


def write_stats(folder: Path, written: Written) -> Path:
    """Statistics of all utterances together, as of one speaker."""
    frames = np.concatenate(list(written.feats.values())).astype(np.float64)
    stats = np.stack([np.append(frames.sum(0), len(frames)), np.append((frames**2).sum(0), 0.0)])
    return write_archive(folder, "cmvn", {"s": full_matrix(stats, "DM")})


@pytest.mark.parametrize("norm_vars", [False, True])
def test_normalised_before_and_some_columns_left_alone(norm_vars: bool, tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [13, 8, 21], dim=4)
    options = CmvnOptions(norm_vars=norm_vars, skip_dims=(1, 3))
    normal = {"cmvn_scp": write_stats(tmp_path, written), "utt2spk": dict.fromkeys(written.feats, "s")}
    corpus = Corpus.open(written.scp, written.labels, splice=(1, 1), **normal, **options._asdict())  # type: ignore[arg-type]
    frames = np.concatenate(list(written.feats.values())).astype(np.float64)
    for key, feats in written.feats.items():
        expected = feats.astype(np.float64)
        for column in (0, 2):
            expected[:, column] -= frames[:, column].mean()
            expected[:, column] /= frames[:, column].std() if norm_vars else 1.0
        got = corpus.features(key)
        np.testing.assert_allclose(got, transformed(expected, SpliceOptions(1, 1)), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(got[:, [5, 7]], feats[:, [1, 3]])


def test_column_to_skip_that_does_not_exist(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [9])
    with pytest.raises(ConfigError, match="--skip-dims has 3, and the features have columns 0 to 2"):
        Corpus.open(
            written.scp, written.labels, cmvn_scp=write_stats(tmp_path, written), utt2spk={"u000": "s"},
            norm_means=True, skip_dims=[3],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deltas": DeltaOptions(), "splice": (1, 1)}, "both deltas and splicing"),
        ({"deltas": DeltaOptions(2, 0)}, "deltas of order 2 with a window of 0 frames cannot"),
        ({"deltas": DeltaOptions(-1, 2)}, "deltas of order -1 with"),
        ({"deltas": DeltaOptions(100, 100)}, "deltas of order 100 with"),
        ({"deltas": DeltaOptions(truncate=4)}, "cannot truncate features of dimension 3 to 4"),
        ({"splice": (-1, 0)}, "contexts of -1 and 0 frames cannot be spliced"),
        ({"splice": (0, 1000)}, "contexts of 0 and 1000 frames cannot be spliced"),
    ],
)
def test_transforms_that_cannot_be(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [5])
    with pytest.raises(ConfigError, match=message):
        Corpus.open(written.scp, written.labels, **arguments)  # type: ignore[arg-type]


def test_options_in_kaldis_files() -> None:
    assert parse_delta_opts("") == DeltaOptions(2, 2, 0)
    assert parse_delta_opts("--delta-order=1 --delta-window=3 --truncate=13\n") == DeltaOptions(1, 3, 13)
    assert parse_splice_opts("") == SpliceOptions(4, 4)
    assert parse_splice_opts("--left-context=3 --right-context=0\n") == SpliceOptions(3, 0)
    assert parse_cmvn_opts("\n") == CmvnOptions(True, False, ())
    text = "--norm-means=true --norm-vars --reverse=false --skip-dims=13:14:15\n"
    assert parse_cmvn_opts(text) == CmvnOptions(True, True, (13, 14, 15))
    assert parse_cmvn_opts("--norm-means=false --skip-dims=") == CmvnOptions(False, False, ())
    assert parse_cmvn_opts("--norm-means=false --norm-vars=false\n") == CmvnOptions(False, False, ())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (CmvnOptions(), "--norm-means=true --norm-vars=false"),
        (CmvnOptions(False, False, ()), "--norm-means=false --norm-vars=false"),
        (CmvnOptions(True, True, (13, 14)), "--norm-means=true --norm-vars=true --skip-dims=13:14"),
    ],
)
def test_cmvn_options_are_written_as_they_are_read(options: CmvnOptions, text: str) -> None:
    assert format_cmvn_opts(options) == text
    assert parse_cmvn_opts(text) == options


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_delta_opts, "--delta-order=two", "delta_opts: --delta-order is 'two', and must be a number"),
        (parse_delta_opts, "--delta-window", "delta_opts: --delta-window is 'true', and must be"),
        (parse_delta_opts, "--window=3", "delta_opts: '--window=3' is not one of --delta-order"),
        (parse_splice_opts, "--left-context=-1", "splice_opts: --left-context is '-1', and must be"),
        (parse_cmvn_opts, "--norm-vars=yes", "cmvn_opts: --norm-vars: expected true or false, got 'yes'"),
        (parse_cmvn_opts, "--reverse=true", "cmvn_opts: --reverse=true undoes normalisation"),
        (parse_cmvn_opts, "--skip-dims=1:x", "cmvn_opts: --skip-dims is '1:x', and must be like 13:14:15"),
        (parse_cmvn_opts, "norm-vars", "cmvn_opts: 'norm-vars' is not one of"),
    ],
)
def test_options_that_are_wrong(parse: object, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)  # type: ignore[operator]
    assert str(caught.value).startswith(message)


@pytest.mark.kaldi
@pytest.mark.parametrize(
    ("program", "options", "transform"),
    [
        ("add-deltas", "", parse_delta_opts("")),
        ("add-deltas", "--delta-order=3 --delta-window=3", parse_delta_opts("--delta-order=3 --delta-window=3")),
        ("add-deltas", "--delta-order=1 --truncate=2", parse_delta_opts("--delta-order=1 --truncate=2")),
        ("splice-feats", "", parse_splice_opts("")),
        ("splice-feats", "--left-context=7 --right-context=0", SpliceOptions(7, 0)),
    ],
)
def test_equal_to_kaldis_programs(
    program: str, options: str, transform: DeltaOptions | SpliceOptions, tmp_path: Path
) -> None:
    written = write_corpus(tmp_path, [13, 1, 21, 5, 60], dim=4)
    stats = write_stats(tmp_path, written)
    (tmp_path / "utt2spk").write_text("".join(f"{key} s\n" for key in written.feats))
    normalise = "--norm-vars=true --skip-dims=0:2"
    bins, out = kaldi_root() / "src/featbin", tmp_path / "out"
    subprocess.run(
        f"{bins}/apply-cmvn {normalise} --utt2spk=ark:{tmp_path}/utt2spk scp:{stats} scp:{written.scp} ark:- | "
        f"{bins}/{program} {options} ark:- ark,scp:{out}.ark,{out}.scp",
        shell=True,
        check=True,
        timeout=60,
    )
    kaldis = Corpus.open(f"{out}.scp", written.labels)
    ours = Corpus.open(
        written.scp, written.labels, cmvn_scp=stats, utt2spk=tmp_path / "utt2spk",
        **parse_cmvn_opts(normalise)._asdict(), **how(transform),  # type: ignore[arg-type]
    )  # fmt: skip
    assert ours.utterances == kaldis.utterances
    for key in ours.utterances:
        np.testing.assert_allclose(ours.features(key), kaldis.features(key), rtol=1e-5, atol=1e-5)
