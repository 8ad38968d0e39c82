"""Online i-vectors: each chunk has that of one of its frames, drawn anew in each epoch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from tests.loader_data import KINDS, Written, full_matrix, random_matrix, write_archive, write_corpus

SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHAPES = st.builds(ChunkShape, st.integers(1, 25), st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ivectors")


def write_ivectors(folder: Path, written: Written, period: int, objects: dict[str, bytes] | None = None) -> Path:
    """Unless `objects` are given, row r of an utterance's i-vectors is (its number, r)."""
    place = folder / "ivectors"
    place.mkdir(exist_ok=True)
    if objects is None:
        objects = {}
        for number, (key, feats) in enumerate(written.feats.items()):
            rows = -(-len(feats) // period)
            objects[key] = full_matrix(np.stack([np.full(rows, number), np.arange(rows)], axis=1), "FM")
    write_archive(place, "ivector_online", objects)
    (place / "ivector_period").write_text(f"{period}\n")
    return place


def drawn(corpus: Corpus, written: Written, shape: ChunkShape, **options: object) -> list[tuple[int, list[int], int]]:
    """Per chunk in order: its utterance's number, its labelled frames, the row of its i-vector."""
    owner = [(number, t) for number, values in enumerate(written.labels.values()) for t in range(len(values))]
    found = []
    with MinibatchReader(corpus, shape, 3, seed=7, **options) as reader:  # type: ignore[arg-type]
        for m in reader:
            assert m.ivectors is not None
            assert m.ivectors.shape == (len(m.labels), 2)
            for labels, (number, row) in zip(m.labels, m.ivectors, strict=True):
                frames = [owner[label] for label in labels if label >= 0]
                assert {n for n, _ in frames} == {number}
                found.append((int(number), [t for _, t in frames], int(row)))
    return found


@SETTINGS
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), shape=SHAPES, period=st.integers(1, 12))
def test_of_a_labelled_frame_of_the_chunk(folder: Path, lengths: list[int], shape: ChunkShape, period: int) -> None:
    written = write_corpus(folder, lengths, dim=2)
    corpus = Corpus.open(written.scp, written.labels, online_ivector_dir=write_ivectors(folder, written, period))
    assert corpus.ivector_dim == 2
    chunks = drawn(corpus, written, shape, num_epochs=1)
    assert sum(len(frames) for _, frames, _ in chunks) == sum(lengths)
    for _, frames, row in chunks:
        assert row in {t // period for t in frames}
    assert drawn(corpus, written, shape, num_epochs=1, threads=3, depth=3) == chunks


def test_every_frame_of_a_chunk_is_drawn_in_time(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [8], dim=2)
    corpus = Corpus.open(written.scp, written.labels, online_ivector_dir=write_ivectors(tmp_path, written, 1))
    rows = [row for _, _, row in drawn(corpus, written, ChunkShape(4, 1, 1), num_epochs=200, shuffle=False)]
    first, second = np.bincount(rows[0::2], minlength=8), np.bincount(rows[1::2], minlength=8)
    # 50 times each of 4 on average, with a standard deviation of 6: the seed is fixed
    assert first[:4].min() > 25
    assert second[4:].min() > 25
    assert not first[4:].any()
    assert not second[:4].any()


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_matrices_and_the_last_row_for_what_is_behind_it(kind: str, tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [35, 12], dim=2)
    rng = np.random.default_rng(3)
    made = {key: random_matrix(rng, kind, 3 if key == "u000" else 2, 5) for key in written.feats}
    place = write_ivectors(tmp_path, written, 10, {key: data for key, (data, _) in made.items()})
    # u001 is the second row of a longer matrix
    scp = place / "ivector_online.scp"
    scp.write_text(scp.read_text().rstrip() + "[1:1]\n")
    corpus = Corpus.open(written.scp, written.labels, online_ivector_dir=place)
    values = {"u000": made["u000"][1], "u001": made["u001"][1][1:]}
    owner = [key for key, labels in written.labels.items() for _ in labels]
    with MinibatchReader(corpus, ChunkShape(1, 0, 0), 47, seed=0, num_epochs=1, shuffle=False) as reader:
        m = next(reader)
        assert m.ivectors is not None
        for label, ivector in zip(m.labels[:, 0], m.ivectors, strict=True):
            key, t = owner[label], int(label - written.labels[owner[label]][0])
            np.testing.assert_array_equal(ivector, values[key][min(t // 10, len(values[key]) - 1)])


def test_read_ahead_and_only_once(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [40] * 30, dim=2)
    place = write_ivectors(tmp_path, written, 10)
    corpus = Corpus.open(written.scp, written.labels, online_ivector_dir=place)
    sizes = [path.stat().st_size for path in (tmp_path / "feats.ark", place / "ivector_online.ark")]
    assert sum(sizes) - 30 * 2 * 40 < corpus.unit_bytes.sum() < sum(sizes)  # all but keys and headers
    with MinibatchReader(corpus, ChunkShape(1, 0, 0), 9, seed=0, num_epochs=1) as reader:
        assert sum(m.frames for m in reader) == 30 * 40
        assert reader.counters().bytes_read <= sum(sizes)
    # in many pools, each of which is in memory with its i-vectors
    shape, memory = ChunkShape(7, 0, 0), int(corpus.unit_bytes.sum()) // 4
    for _, frames, row in drawn(corpus, written, shape, num_epochs=2, memory=memory):
        assert row in {t // 10 for t in frames}


def test_with_transforms_and_without_ivectors(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [35, 12], dim=2)
    place = write_ivectors(tmp_path, written, 10)
    corpus = Corpus.open(written.scp, written.labels, online_ivector_dir=place, splice=(1, 1))
    assert (corpus.feat_dim, corpus.ivector_dim) == (6, 2)
    drawn(corpus, written, ChunkShape(5, 1, 1), num_epochs=1)
    plain = Corpus.open(written.scp, written.labels)
    assert plain.ivector_dim == 0
    with MinibatchReader(plain, ChunkShape(5, 1, 1), 2, seed=0, num_epochs=1) as reader:
        assert next(reader).ivectors is None


def ivector(rows: int, dim: int = 2) -> bytes:
    return full_matrix(np.ones((rows, dim)), "FM")


@pytest.mark.parametrize(
    ("objects", "cause"),
    [
        ({"u000": ivector(2)}, "the utterance has no i-vectors"),
        ({"u000": ivector(2), "u001": ivector(2, 3)}, "the i-vectors have dimension 3, and those before have 2"),
        ({"u000": ivector(2), "u001": ivector(13)}, "13 i-vectors for 10 frames each, and the utterance has 12 frames"),
        ({"u000": ivector(2), "u001": b"\0BFM \x04\2\0\0\0"}, "truncated archive: the file ends in the matrix header"),
    ],
)
def test_ivectors_that_do_not_fit(objects: dict[str, bytes], cause: str, tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [20, 12], dim=2)
    place = write_ivectors(tmp_path, written, 10, objects)
    with pytest.raises(DataError) as caught:
        Corpus.open(written.scp, written.labels, online_ivector_dir=place)
    assert caught.value.cause.startswith(cause)
    assert caught.value.key == "u001"
    assert caught.value.file == str(place / ("ivector_online.scp" if "no i-v" in cause else "ivector_online.ark"))
    left = Corpus.open(written.scp, written.labels, online_ivector_dir=place, skip_bad=1)
    assert (left.utterances, left.num_bad, left.num_without_labels) == (["u000"], 1, 0)


def test_the_period_must_be_known(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [20, 12], dim=2)
    place = write_ivectors(tmp_path, written, 10)
    for text in ("", "0", "ten", "-3", "9" * 12):
        (place / "ivector_period").write_text(text)
        with pytest.raises(DataError, match="a number of frames is expected, not") as caught:
            Corpus.open(written.scp, written.labels, online_ivector_dir=place)
        assert caught.value.file == str(place / "ivector_period")
    (place / "ivector_period").unlink()
    with pytest.raises(DataError, match="cannot read: No such file"):
        Corpus.open(written.scp, written.labels, online_ivector_dir=place)


def test_an_error_while_reading_names_the_ivectors_archive(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [20, 12], dim=2)
    place = write_ivectors(tmp_path, written, 10)
    corpus = Corpus.open(written.scp, written.labels, online_ivector_dir=place)
    archive = place / "ivector_online.ark"
    os.truncate(archive, archive.stat().st_size - 20)
    with (
        MinibatchReader(corpus, ChunkShape(12, 0, 0), 1, seed=0, num_epochs=3, shuffle=False) as reader,
        pytest.raises(DataError) as caught,
    ):
        for _ in reader:
            pass
    assert (caught.value.file, caught.value.key) == (str(archive), "u001")
    with MinibatchReader(corpus, ChunkShape(12, 0, 0), 1, seed=0, num_epochs=3, shuffle=False, skip_bad=1) as reader:
        assert {int(label) for m in reader for label in m.labels[m.labels >= 0]} == set(range(20))
        assert reader.counters().bad == 1
