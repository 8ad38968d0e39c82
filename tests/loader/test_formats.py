"""Features decoded by the loader: equal to Kaldi's text, and bit for bit to the formats' description."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.scp import parse_location
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from tests.loader_data import KINDS, random_matrix, write_archive, write_corpus
from tests.paths import golden


def read_text_matrices(path: Path) -> dict[str, np.ndarray]:
    matrices: dict[str, np.ndarray] = {}
    for block in path.read_text().split("]"):
        head, bracket, body = block.partition("[")
        if bracket:
            rows = [line.split() for line in body.strip().splitlines()]
            matrices[head.strip()] = np.array(rows, dtype=np.float64)
    return matrices


@pytest.mark.parametrize("name", ["feats_fm", "feats_c2", "feats_c3", "feats_c5"])
def test_features_equal_kaldis_text(name: str, tmp_path: Path) -> None:
    expected = read_text_matrices(golden(f"{name}.txt"))
    assert len(expected) == 2
    scp = tmp_path / "feats.scp"
    scp.write_text(golden(f"{name}.scp").read_text().replace(f" {name}.ark", f" {golden(f'{name}.ark')}"))
    corpus = Corpus.open(scp, {key: np.zeros(len(m), np.int32) for key, m in expected.items()})
    assert corpus.utterances == list(expected)
    assert corpus.feat_dim == 40
    assert corpus.num_frames.tolist() == [len(m) for m in expected.values()]
    for key, matrix in expected.items():
        # Kaldi prints seven significant digits: values up to 1000 are exact to 5e-5.
        np.testing.assert_allclose(corpus.features(key), matrix, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 40),
    cols=st.integers(1, 7),
    seed=st.integers(0, 2**32 - 1),
)
def test_decoding_is_bit_exact(
    kind: str, rows: int, cols: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, expected = random_matrix(np.random.default_rng(seed), kind, rows, cols)
    scp = write_archive(tmp_path_factory.mktemp("one"), "feats", {"utt": data})
    decoded = Corpus.open(scp, {"utt": np.zeros(rows, np.int32)}).features("utt")
    np.testing.assert_array_equal(decoded, expected)


def test_long_matrix_is_read_by_columns(tmp_path: Path) -> None:
    """More than 8192 rows: the chunk's bytes of each column are fetched one by one."""
    rng = np.random.default_rng(3)
    data, expected = random_matrix(rng, "CM", 8200, 2)
    scp = write_archive(tmp_path, "feats", {"long": data, "short": random_matrix(rng, "CM", 10, 2)[0]})
    labels = {"long": np.arange(8200, dtype=np.int32), "short": np.zeros(10, np.int32)}
    corpus = Corpus.open(scp, labels, utterances=["long"])
    np.testing.assert_array_equal(corpus.features("long"), expected)
    with MinibatchReader(corpus, ChunkShape(100, 10, 5), 4, seed=0, num_epochs=1) as reader:
        for minibatch in reader:
            for feats, chunk_labels in zip(minibatch.feats, minibatch.labels, strict=True):
                seen = chunk_labels[chunk_labels >= 0]
                first = int(seen[-1]) - 99 - 10  # the last label of a chunk is at its end, here always
                rows = np.clip(np.arange(first, first + 115), 0, 8199)
                np.testing.assert_array_equal(feats, expected[rows])
        counters = reader.counters()
    assert counters.frames == 8200
    # 82 chunks of at most 115 rows and 2 columns, and 16 bytes of percentiles each
    assert counters.bytes_read <= 82 * (16 + 2 * 115)


def test_file_without_offset_is_one_matrix(tmp_path: Path) -> None:
    data, expected = random_matrix(np.random.default_rng(0), "DM", 4, 2)
    (tmp_path / "one.mat").write_bytes(data)
    (tmp_path / "feats.scp").write_text(f"utt {tmp_path}/one.mat\n")
    corpus = Corpus.open(tmp_path / "feats.scp", {"utt": np.zeros(4, np.int32)})
    np.testing.assert_array_equal(corpus.features("utt"), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "first", "last"), [("[2:5]", 2, 5), ("[:]", 0, 9), ("[4:11]", 4, 9), ("[3:3,:]", 3, 3)]
)
def test_row_ranges(kind: str, text: str, first: int, last: int, tmp_path: Path) -> None:
    data, expected = random_matrix(np.random.default_rng(0), kind, 10, 3)
    scp = write_archive(tmp_path, "feats", {"utt": data})
    scp.write_text(scp.read_text().replace("\n", f"{text}\n"))
    corpus = Corpus.open(scp, {"utt": np.zeros(last - first + 1, np.int32)})
    np.testing.assert_array_equal(corpus.features("utt"), expected[first : last + 1])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a.ark:4[3:13]", "row range [3:13] of a matrix with 10 rows"),
        ("a.ark:4[10:11]", "row range [10:11] of a matrix with 10 rows"),
    ],
)
def test_row_range_beyond_the_matrix(value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths in a script file are relative to the working directory
    write_archive(Path("."), "a", {"utt": random_matrix(np.random.default_rng(0), "FM", 10, 3)[0]})
    Path("feats.scp").write_text(f"utt {value}\n")
    with pytest.raises(DataError) as caught:
        Corpus.open("feats.scp", {"utt": np.zeros(10, np.int32)})
    assert str(caught.value) == f"feats.scp, key utt: {message}"


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("| gzip -c > a.gz", "'| gzip -c > a.gz': a command to read from ends in '|'"),
        ("a.gz | gunzip", "'a.gz | gunzip': a command to read from ends in '|'"),
        ("|", "'|': a command to read from ends in '|'"),
        (" |", "' |' is a pipe from no command"),
        ("cat a | [0:1]", "'cat a | [0:1]': a command to read from ends in '|'"),
        ("a.ark [0:1]", "'a.ark [0:1]': a blank beside the file's name"),
        (
            "-",
            "'-' is standard input, which cannot be read again in every epoch and which the ranks of a parallel run "
            "do not share; write it to a file",
        ),
        ("a.ark:1[0:3,2:1]", "invalid column range [0:3,2:1]"),
        ("a.ark:1[0:3,1]", "invalid column range [0:3,1]"),
        ("a.ark:1[0:3,]", "invalid column range [0:3,]"),
        ("a.ark:1[,1:2]", "invalid row range [,1:2]"),
        ("a.ark:1[0:3,1:2,3:4]", "invalid column range [0:3,1:2,3:4]"),
        ("a.ark:1[3:1]", "invalid row range [3:1]"),
        ("a.ark:1[-1:2]", "invalid row range [-1:2]"),
        ("a.ark:1[]", "invalid row range []"),
        ("a.ark:1]", "'a.ark:1]' ends in ']' without '['"),
        ("a.ark:9999999999999999999", "offset 9999999999999999999 is beyond any file"),
    ],
)
def test_script_values_that_cannot_be_read(value: str, cause: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_location(value, file="feats.scp", key="utt")
    assert str(caught.value) == f"feats.scp, key utt: {cause}"


def test_a_subset_in_the_order_asked_for(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [3, 4, 5, 6])
    corpus = Corpus.open(written.scp, written.labels, utterances=["u003", "u001"])
    assert corpus.utterances == ["u003", "u001"]
    assert corpus.num_frames.tolist() == [6, 4]
    assert corpus.total_frames == 10
    for key in corpus.utterances:
        np.testing.assert_array_equal(corpus.labels(key), written.labels[key])
        np.testing.assert_array_equal(corpus.features(key), written.feats[key])


def test_utterances_without_labels_are_left_out_and_counted(tmp_path: Path) -> None:
    written = write_corpus(tmp_path, [3, 4, 5])
    del written.labels["u001"]
    corpus = Corpus.open(written.scp, written.labels)
    assert corpus.utterances == ["u000", "u002"]
    assert corpus.num_without_labels == 1
