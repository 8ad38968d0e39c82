"""Labels in memory: hard ones and posteriors, streamed, wide and narrow; and bad utterances that are left out."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader import ChunkShape, Corpus, Labels, MinibatchReader
from kaldi_mpi.loader.posteriors import Posterior
from tests.loader_data import full_matrix, write_archive, write_corpus

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHAPES = st.builds(ChunkShape, st.integers(1, 25), st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))
WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, -2.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labels")


def posterior(frames: list[list[tuple[int, float]]]) -> Posterior:
    pairs = [pair for frame in frames for pair in frame]
    return Posterior(
        np.cumsum([0, *map(len, frames)]),
        np.array([pdf for pdf, _ in pairs], dtype=np.int32),
        np.array([weight for _, weight in pairs], dtype=np.float32),
    )


@st.composite
def posteriors(draw: st.DrawFn) -> list[list[list[tuple[int, float]]]]:
    """Per utterance, frame and pair. Weights may be all ones, and frames without pairs are among them."""
    top = draw(st.sampled_from([9, 65535, 65536, 10**9]))
    weight = draw(st.sampled_from([st.just(1.0), WEIGHTS]))
    least = draw(st.integers(0, 1))
    frame = st.lists(st.tuples(st.integers(0, top), weight), min_size=least, max_size=draw(st.integers(least, 4)))
    return draw(st.lists(st.lists(frame, min_size=1, max_size=30), min_size=1, max_size=4))


@SETTINGS
@given(post=posteriors(), shape=SHAPES, streamed=st.booleans())
def test_posteriors(folder: Path, post: list[list[list[tuple[int, float]]]], shape: ChunkShape, streamed: bool) -> None:
    written = write_corpus(folder, [len(frames) for frames in post], dim=2)
    given_labels = {key: posterior(frames) for key, frames in zip(written.feats, post, strict=True)}
    corpus = Corpus.open(written.scp, reversed(given_labels.items()) if streamed else given_labels)
    most = max(1, max(len(frame) for frames in post for frame in frames))
    weighted = any(weight != 1.0 for frames in post for frame in frames for _, weight in frame)
    assert (corpus.num_targets, corpus.has_weights) == (most, weighted)

    position = np.concatenate([np.arange(len(frames)) for frames in post])
    utterance = np.concatenate([np.full(len(frames), u) for u, frames in enumerate(post)])
    # Features in another corpus say which frames a chunk is about.
    names = {key: values.astype(np.int64) for key, values in written.labels.items()}
    where = Corpus.open(written.scp, names)
    options = {"seed": 3, "num_epochs": 1}
    with (
        MinibatchReader(corpus, shape, 3, **options) as reader,  # type: ignore[arg-type]
        MinibatchReader(where, shape, 3, **options) as frames_reader,  # type: ignore[arg-type]
    ):
        for m, which in zip(reader, frames_reader, strict=True):
            np.testing.assert_array_equal(m.feats, which.feats)
            assert m.frames == which.frames
            assert (m.weights is not None) == weighted
            labels = m.labels.reshape(*which.labels.shape, most)
            weights = np.ones(labels.shape) if m.weights is None else m.weights.reshape(labels.shape)
            for at, name in np.ndenumerate(which.labels):
                pairs = post[utterance[name]][position[name]] if name >= 0 else []
                assert labels[at].tolist() == [pdf for pdf, _ in pairs] + [-1] * (most - len(pairs))
                if weighted:
                    assert weights[at].tolist() == [weight for _, weight in pairs] + [0.0] * (most - len(pairs))
    for key, frames in zip(written.feats, post, strict=True):
        rows = corpus.labels(key).reshape(len(frames), most)
        assert [[label for label in row if label >= 0] for row in rows.tolist()] == [[p for p, _ in f] for f in frames]
        values = corpus.weights(key)
        assert (values is not None) == weighted
        if values is not None:
            sums = [sum(weight for _, weight in frame) for frame in frames]
            np.testing.assert_allclose(values.reshape(len(frames), most).sum(axis=1), sums)


@pytest.mark.parametrize("top", [65535, 65536, 2**31 - 1])
def test_ids_of_two_and_four_bytes(top: int, tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [5, 4, 6], dim=2)
    labels = {key: values.copy() for key, values in written.labels.items()}
    labels["u001"][2] = top
    corpus = Corpus.open(written.scp, labels)
    for key, values in labels.items():
        np.testing.assert_array_equal(corpus.labels(key), values)
        assert corpus.labels(key).dtype == np.int32
    with MinibatchReader(corpus, ChunkShape(4, 0, 0), 9, seed=0, num_epochs=1) as reader:
        got = next(reader).labels
    assert sorted(got[got >= 0]) == sorted(np.concatenate(list(labels.values())))


def test_streamed_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = write_corpus(tmp_path, [5, 4, 6, 3], dim=2)
    pairs = [("u002", written.labels["u002"]), ("nobody", np.zeros(3, int)), ("u000", written.labels["u000"])]
    with caplog.at_level(logging.WARNING):
        corpus = Corpus.open(written.scp, iter(pairs))
    assert f"2 of 4 utterances of {written.scp} have no labels" in caplog.text
    assert (corpus.utterances, corpus.num_without_labels, corpus.total_frames) == (["u000", "u002"], 2, 11)
    for key in corpus.utterances:
        np.testing.assert_array_equal(corpus.labels(key), written.labels[key])
        np.testing.assert_array_equal(corpus.features(key), written.feats[key])
    with pytest.raises(DataError, match="key u002: labels of this utterance come twice"):
        Corpus.open(written.scp, iter([*pairs, pairs[0]]))
    with pytest.raises(DataError, match="no utterance is left: 4 have no labels and 0 are bad"):
        Corpus.open(written.scp, iter([]))


@pytest.mark.parametrize("soft", [False, True])
def test_corpora_share_labels_that_are_read_once(soft: bool, tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [5, 4, 6, 3], dim=2)
    own = {key: posterior([[(int(v), 0.5), (9, 0.5)] for v in y]) if soft else y for key, y in written.labels.items()}
    pairs = [*reversed(own.items()), ("nobody", np.zeros(0, int))]
    labels = Labels.read(iter(pairs), wanted=own)
    assert (list(labels), len(labels), "nobody" in labels) == (list(reversed(own)), 4, False)
    alone = Corpus.open(written.scp, own)
    for utterances in (["u002", "u000"], ["u001"], ["u000", "u001", "u002", "u003"]):
        corpus = Corpus.open(written.scp, labels, utterances=utterances)
        assert (corpus.utterances, corpus.has_weights, corpus.num_targets) == (utterances, soft, 1 + soft)
        for key in utterances:
            np.testing.assert_array_equal(corpus.labels(key), alone.labels(key))
            np.testing.assert_array_equal(corpus.weights(key), alone.weights(key))
    with pytest.raises(DataError, match="key u003: labels of this utterance come twice"):
        Labels.read([*pairs[:4], pairs[0]])


def test_shared_labels_are_not_copied(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [5, 4], dim=2)
    labels = Labels.read(written.labels.items())
    one, two = labels.of(["u000"]).ids, labels.of(["u001", "u000"]).ids
    assert np.shares_memory(one, two) and one.dtype == np.uint16 and len(one) == 9


def test_shared_labels_that_do_not_fit_the_features(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [5, 4, 3], dim=2)
    labels = Labels.read((key, np.zeros(4, int)) for key in ("u000", "u001"))
    with pytest.raises(DataError, match="key u000: the alignment has 4 frames and the features have 5"):
        Corpus.open(written.scp, labels)
    corpus = Corpus.open(written.scp, labels, skip_bad=1)
    assert (corpus.utterances, corpus.num_bad, corpus.num_without_labels) == (["u001"], 1, 1)


@pytest.mark.parametrize(
    ("labels", "cause"),
    [
        (posterior([[(1, 1.0)]] * 4), "the posterior has 4 frames and the features have 5"),
        (posterior([[(1, float("nan"))]] * 5), "a weight is not a finite number"),
        (posterior([[(-1, 1.0)]] * 5), "label -1 is not a pdf-id"),
        (Posterior(np.array([0, 1, 2, 1, 4, 5]), np.ones(5, np.int32), np.ones(5, np.float32)), "the posterior's arr"),
        (Posterior(np.arange(6), np.ones(5, np.int32), np.ones(4, np.float32)), "the posterior's arrays do not fit"),
        (np.ones(5, np.int32), "one label a frame, and other utterances have posteriors"),
    ],
)
def test_posteriors_that_do_not_fit(labels: object, cause: str, tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [3, 5], dim=2)
    both = {"u000": posterior([[(1, 0.5), (2, 0.5)]] * 3), "u001": labels}
    with pytest.raises(DataError) as caught:
        Corpus.open(written.scp, both)  # type: ignore[arg-type]
    assert caught.value.cause.startswith(cause)
    assert caught.value.key == "u001"


def test_bad_utterances_are_left_out_up_to_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One with a malformed header, one that is too long for its labels, one of another dimension, one not there."""
    good = np.random.default_rng(0).normal(size=(6, 2))
    objects = {
        "a-head": b"\0BXM " + bytes(30),
        "b": full_matrix(good, "FM"),
        "c-long": full_matrix(np.ones((9, 2)), "FM"),
        "d-wide": full_matrix(np.ones((6, 3)), "FM"),
        "e-lost": b"",
        "f": full_matrix(good + 1, "DM"),
    }
    scp = write_archive(tmp_path, "feats", objects)
    lines = [line if "e-lost" not in line else f"e-lost {tmp_path}/lost.ark:5" for line in scp.read_text().split("\n")]
    scp.write_text("\n".join(lines))
    labels = {key: np.arange(6) for key in objects}
    with caplog.at_level(logging.WARNING):
        corpus = Corpus.open(scp, labels, skip_bad=4)
    assert (corpus.utterances, corpus.num_bad, corpus.num_without_labels) == (["b", "f"], 4, 0)
    np.testing.assert_array_equal(corpus.features("f"), (good + 1).astype(np.float32))
    np.testing.assert_array_equal(corpus.labels("f"), np.arange(6))
    warnings = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(warnings) == 4
    causes = {"a-head": "unknown token", "c-long": "has 6 frames and", "d-wide": "dimension 3", "e-lost": "cannot open"}
    for key, cause in causes.items():
        (line,) = [line for line in warnings if f"key {key}" in line]
        assert cause in line
        assert str(tmp_path) in line  # the file
    with pytest.raises(DataError, match="3 bad utterances, which is the limit, have been left out before"):
        Corpus.open(scp, labels, skip_bad=3)
    with pytest.raises(DataError, match=r"unknown token|cannot open"):
        Corpus.open(scp, labels)
    with pytest.raises(ConfigError, match="number of bad utterances to skip is -1"):
        Corpus.open(scp, labels, skip_bad=-1)
