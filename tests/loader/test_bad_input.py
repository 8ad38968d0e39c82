"""Malformed features: an exception with file, key and byte offset; never a crash, a hang or silence."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from tests.loader_data import KINDS, full_matrix, random_matrix, write_archive, write_corpus

ROWS, COLS = 4, 2
LABELS = {"utt": np.zeros(ROWS, np.int32)}
SIZES = 2 + 3 + 10  # bytes of a full matrix before its values


def small(kind: str) -> bytes:
    return random_matrix(np.random.default_rng(1), kind, ROWS, COLS)[0]


def read_all(directory: Path, data: bytes) -> None:
    """Open and decode one utterance, by the whole and by chunks."""
    corpus = Corpus.open(write_archive(directory, "feats", {"utt": data}), LABELS)
    assert np.isfinite(corpus.features("utt")).all()
    with MinibatchReader(corpus, ChunkShape(3, 1, 1), 1, seed=0, num_epochs=1) as reader:
        assert sum(m.frames for m in reader) == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_of_an_archive(kind: str, tmp_path: Path) -> None:
    data = small(kind)
    for size in range(len(data)):
        with pytest.raises(DataError) as caught:
            read_all(tmp_path, data[:size])
        error = caught.value
        assert (error.file, error.key) == (str(tmp_path / "feats.ark"), "utt")
        assert error.offset is not None
        assert 4 <= error.offset <= 4 + SIZES  # of the object after "utt "
        expected = "beyond the end" if size == 0 else "the header says" if size > 21 else "trunc|the header says"
        assert any(part in error.cause for part in expected.split("|")), error.cause
    read_all(tmp_path, data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [0, 1, 30])
def test_archive_cut_while_it_is_read(kind: str, left: int, tmp_path: Path) -> None:
    """After the corpus has been opened, so that only the reader's threads can see it."""
    scp = write_archive(tmp_path, "feats", {"utt": small(kind)})
    corpus = Corpus.open(scp, LABELS)
    os.truncate(tmp_path / "feats.ark", left)
    with MinibatchReader(corpus, ChunkShape(ROWS, 0, 0), 1, seed=0) as reader:
        for _ in range(2):  # and it stays an error
            with pytest.raises(DataError) as caught:
                next(reader)
            assert (caught.value.file, caught.value.key) == (str(tmp_path / "feats.ark"), "utt")
            assert caught.value.cause.startswith("truncated: ")
            assert caught.value.offset is not None
    with pytest.raises(DataError, match="truncated: "):
        corpus.features("utt")


def test_minibatches_before_the_bad_one_are_delivered(tmp_path: Path) -> None:
    """Whatever the number of threads, the error belongs to its step."""
    written = write_corpus(tmp_path, [10] * 12, kind="FM", dim=1)
    data = bytearray((tmp_path / "feats.ark").read_bytes())
    at = data.index(b"u007 ") + 5 + SIZES + 4 * 9  # the last value of u007
    data[at : at + 4] = struct.pack("<f", np.nan)
    (tmp_path / "feats.ark").write_bytes(data)
    corpus = Corpus.open(written.scp, written.labels)
    for threads in (1, 4):
        with MinibatchReader(corpus, ChunkShape(10, 0, 0), 2, seed=0, shuffle=False, threads=threads) as reader:
            assert [next(reader).labels[0, 0] for _ in range(3)] == [0, 20, 40]
            with pytest.raises(DataError) as caught:
                next(reader)
        assert (
            str(caught.value)
            == f"{tmp_path}/feats.ark, key u007, byte offset {at}: not a finite number: nan in column 0"
        )


@pytest.mark.parametrize(
    ("kind", "at", "field", "cause"),
    [
        ("FM", 0, b"\1", "no matrix here: neither \\0B nor '[', but '\\x01BFM "),
        ("FM", 2, b"XM ", "unknown token 'XM': FM, DM, CM, CM2 or CM3 expected"),
        ("FM", 2, b"FV ", "unknown token 'FV': "),
        ("CM", 2, b"CM4 ", "unknown token 'CM4': "),
        ("CM", 2, b"\xffM\n", "unknown token '\\xffM\\x0aS"),
        ("FM", 5, b"\x08", "size byte of the number of rows is 8, not 4"),
        ("DM", 10, b"\x00", "size byte of the number of columns is 0, not 4"),
        (
            "FM",
            6,
            struct.pack("<i", 5),
            "truncated archive or wrong size: the header says 5 rows x 2 columns, and 32 bytes",
        ),
        ("FM", 6, struct.pack("<i", -1), "matrix header with a negative size: -1 rows, 2 columns"),
        ("FM", 6, struct.pack("<i", 0), "empty matrix: 0 rows, 2 columns"),
        (
            "DM",
            11,
            struct.pack("<i", 2**31 - 1),
            "truncated archive or wrong size: the header says 4 rows x 2147483647",
        ),
        ("CM", 5, struct.pack("<f", np.inf), "header of a compressed matrix is not finite: min inf"),
        ("CM", 9, struct.pack("<f", np.nan), "header of a compressed matrix is not finite: min"),
        ("CM", 13, struct.pack("<i", 2**31 - 1), "truncated archive or wrong size: the header says 2147483647 rows"),
        ("CM", 17, struct.pack("<i", 3), "truncated archive or wrong size: the header says 4 rows x 3 columns"),
        ("CM2", 14, struct.pack("<i", -4), "matrix header with a negative size: -4 rows, 2 columns"),
        ("CM3", 18, struct.pack("<i", 0), "empty matrix: 4 rows, 0 columns"),
        ("CM", 23, b"\0\0", "corrupt compressed matrix: the percentiles of column 0 are not in order"),
        ("DM", SIZES + 8, struct.pack("<d", 1e300), "not a finite number: inf in column 1"),
        ("FM", SIZES, struct.pack("<f", -np.inf), "not a finite number: -inf in column 0"),
        ("FM", 6, struct.pack("<i", 3), "the alignment has 4 frames and the features have 3"),
    ],
)
def test_corrupted_fields(kind: str, at: int, field: bytes, cause: str, tmp_path: Path) -> None:
    data = bytearray(random_matrix(np.random.default_rng(1), kind, ROWS, COLS)[0])
    if kind == "CM" and at == 2 and field.startswith(b"\xff"):
        data[5] = ord("S")
    if kind == "CM" and at == 23:
        data[21:23] = b"\1\0"
    data[at : at + len(field)] = field
    with pytest.raises(DataError) as caught:
        read_all(tmp_path, bytes(data))
    assert caught.value.cause.startswith(cause)
    assert caught.value.key == "utt"
    assert caught.value.file in (str(tmp_path / "feats.ark"), str(tmp_path / "feats.scp"))


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    at=st.integers(0, 40),
    noise=st.binary(min_size=1, max_size=8),
    tail=st.binary(max_size=20),
)
def test_any_bytes_are_decoded_or_refused(
    kind: str, at: int, noise: bytes, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(small(kind))
    data[at : at + len(noise)] = noise
    folder = tmp_path_factory.getbasetemp()
    try:
        read_all(folder, bytes(data) + tail)
    except DataError as error:
        assert error.key == "utt"


@pytest.mark.parametrize(("have", "need"), [(5, 4), (3, 4), (0, 4)])
def test_alignment_longer_or_shorter_than_its_features(have: int, need: int, tmp_path: Path) -> None:
    scp = write_archive(tmp_path, "feats", {"utt": small("CM")})
    with pytest.raises(DataError) as caught:
        Corpus.open(scp, {"utt": np.zeros(have, np.int32)})
    assert str(caught.value) == f"{scp}, key utt: the alignment has {have} frames and the features have {need}"


@pytest.mark.parametrize(
    ("labels", "cause"),
    [
        (np.array([0, -1, 2, 3]), "label -1 is not a pdf-id"),
        (np.array([0, 2**31, 2, 3]), "label 2147483648 is not a pdf-id"),
        (np.zeros(4, np.float32), "labels are float32 (4,), not a vector of integers"),
        (np.zeros((4, 1), np.int32), "labels are int32 (4, 1), not a vector of integers"),
    ],
)
def test_labels_that_are_none(labels: np.ndarray, cause: str, tmp_path: Path) -> None:
    scp = write_archive(tmp_path, "feats", {"utt": small("CM")})
    with pytest.raises(DataError) as caught:
        Corpus.open(scp, {"utt": labels})
    assert str(caught.value) == f"key utt: {cause}"


def test_keys_that_are_missing(tmp_path: Path) -> None:
    scp = write_archive(tmp_path, "feats", {"utt": small("CM")})
    with pytest.raises(DataError) as caught:
        Corpus.open(scp, LABELS, utterances=["utt", "other"])
    assert str(caught.value) == f"{scp}, key other: the utterance is not in this file"
    with pytest.raises(DataError) as caught:
        Corpus.open(scp, LABELS, utterances=["utt", "utt"])
    assert str(caught.value) == f"{scp}, key utt: the utterance is asked for twice"
    with pytest.raises(DataError) as caught:
        Corpus.open(scp, {"someone": LABELS["utt"]})
    assert str(caught.value) == f"{scp}: none of its 1 utterances has labels"


def test_dimensions_that_differ(tmp_path: Path) -> None:
    objects = {"a": full_matrix(np.zeros((4, 2)), "FM"), "b": full_matrix(np.zeros((4, 3)), "FM")}
    scp = write_archive(tmp_path, "feats", objects)
    with pytest.raises(DataError) as caught:
        Corpus.open(scp, dict.fromkeys(objects, LABELS["utt"]))
    at = 2 + len(objects["a"]) + 2
    assert (
        str(caught.value)
        == f"{tmp_path}/feats.ark, key b, byte offset {at}: the features have dimension 3, and those of a have 2"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("utt\n", "{scp}, key utt: line 1 has no value after the key"),
        ("utt a:1\n\n", "{scp}: line 2 is blank: a key and a value are expected"),
        ("utt a:1\nutt b:2\n", "{scp}, key utt: the key is there twice (again in line 2)"),
        ("utt \xff.ark:1\n", "{scp}, byte offset 4: line 1 is not text in UTF-8"),
        ("utt missing.ark:4\n", "missing.ark, key utt: cannot open: No such file or directory (named in {scp})"),
        ("utt /:4\n", "/, key utt: not a regular file (named in {scp})"),
        ("utt {scp}:3\n", "{scp}, key utt, byte offset 4: no matrix here: neither \\0B nor '[', but "),
        ("utt {scp}:99999\n", "{scp}, key utt, byte offset 99999: offset is beyond the end of the file ("),
    ],
)
def test_script_files_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    scp = tmp_path / "feats.scp"
    scp.write_bytes(text.format(scp=scp).encode("latin-1"))
    with pytest.raises(DataError) as caught:
        Corpus.open(scp, LABELS)
    assert str(caught.value).startswith(message.format(scp=scp))


def test_no_script_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Corpus.open(tmp_path / "feats.scp", LABELS)
    assert str(caught.value) == f"{tmp_path}/feats.scp: cannot read: No such file or directory"
