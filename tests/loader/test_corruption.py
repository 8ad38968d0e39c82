"""Every header field of every format, with every value that it must not have."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader, read_alignments
from tests.loader_data import KINDS, int_vector, random_matrix, write_archive

ROWS, COLS = 4, 3
LABELS = {key: np.zeros(ROWS, np.int32) for key in ("good", "utt")}
OTHER_SIZES = [-(2**31), 1 - 2**31, -ROWS, -1, 0, 2**16, 2**24, 2**30, 2**31 - 2, 2**31 - 1]
NOT_FINITE = [np.inf, -np.inf, np.nan]


def objects(kind: str) -> dict[str, bytes]:
    """Two utterances; the second is to be corrupted, and nothing follows it."""
    rng = np.random.default_rng(1)
    return {key: random_matrix(rng, kind, ROWS, COLS)[0] for key in LABELS}


def read_all(directory: Path, kind: str, data: bytes) -> None:
    """Open the corpus and read all minibatches of it."""
    scp = write_archive(directory, "feats", {**objects(kind), "utt": data})
    with MinibatchReader(Corpus.open(scp, LABELS), ChunkShape(3, 1, 1), 2, seed=0, num_epochs=1) as reader:
        total = 0
        for minibatch in reader:
            assert np.isfinite(minibatch.feats).all()
            total += minibatch.frames
    assert total == 2 * ROWS


def refused(directory: Path, kind: str, data: bytes, at: int) -> None:
    """Require an error of the utterance, at a byte of its header; `at` is the byte that was changed."""
    with pytest.raises(DataError) as caught:
        read_all(directory, kind, data)
    error = caught.value
    start = len(b"good ") + len(objects(kind)["good"]) + len(b"utt ")
    if error.cause.startswith("the alignment has"):
        # The header is as good as any other: only the labels tell.
        assert (error.file, error.key) == (str(directory / "feats.scp"), "utt")
        return
    assert (error.file, error.key) == (str(directory / "feats.ark"), "utt")
    assert error.offset is not None
    assert start <= error.offset <= start + max(at, 5), error


def header(kind: str) -> tuple[int, dict[str, int]]:
    """Where the token ends, and byte offsets of the fields."""
    end = 2 + len(kind) + 1
    if kind in ("FM", "DM"):
        return end, {"rows": end + 1, "cols": end + 6}
    return end, {"min": end, "range": end + 4, "rows": end + 8, "cols": end + 12}


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_every_byte_of_a_token(kind: str, tmp_path: Path) -> None:
    data, (end, _) = objects(kind)["utt"], header(kind)
    accepted = []
    for at in range(end):
        for value in set(range(256)) - {data[at]}:
            changed = bytearray(data)
            changed[at] = value
            token = bytes(changed[2:end]).decode("latin-1")
            if at >= 2 and token in {f"{known} " for known in KINDS}:
                accepted.append(token)
            else:
                refused(tmp_path, kind, bytes(changed), end + 16)
    # These make another kind of matrix of it, which may be shorter and then is a good one.
    others = {"FM": ["CM ", "DM "], "DM": ["CM ", "FM "], "CM": ["DM ", "FM "], "CM2": ["CM3 "], "CM3": ["CM2 "]}
    assert sorted(accepted) == others[kind]
    for token in others[kind]:
        changed = bytearray(data)
        changed[2:end] = token.encode()
        if (kind, token) in {("DM", "FM "), ("CM2", "CM3 ")}:
            continue
        refused(tmp_path, kind, bytes(changed), end + 16)


@pytest.mark.parametrize("kind", ["FM", "DM"])
@pytest.mark.parametrize("field", ["rows", "cols"])
def test_every_size_byte(kind: str, field: str, tmp_path: Path) -> None:
    at = header(kind)[1][field] - 1
    for value in set(range(256)) - {4}:
        data = bytearray(objects(kind)["utt"])
        data[at] = value
        refused(tmp_path, kind, bytes(data), at)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_rows_and_columns(kind: str, tmp_path: Path) -> None:
    """Each by itself, and both, so that their product passes 32 and 64 bits."""
    fields = header(kind)[1]
    near = {"rows": [ROWS - 1, ROWS + 1], "cols": [COLS - 1, COLS + 1]}
    for field in ("rows", "cols"):
        for value in [*OTHER_SIZES, *near[field]]:
            data = bytearray(objects(kind)["utt"])
            struct.pack_into("<i", data, fields[field], value)
            refused(tmp_path, kind, bytes(data), fields["cols"])
    for rows in OTHER_SIZES:
        for cols in OTHER_SIZES:
            data = bytearray(objects(kind)["utt"])
            struct.pack_into("<i", data, fields["rows"], rows)
            struct.pack_into("<i", data, fields["cols"], cols)
            refused(tmp_path, kind, bytes(data), fields["cols"])


@pytest.mark.parametrize("kind", ["CM", "CM2", "CM3"])
def test_ranges_of_values(kind: str, tmp_path: Path) -> None:
    fields = header(kind)[1]
    for field in ("min", "range"):
        for value in NOT_FINITE:
            data = bytearray(objects(kind)["utt"])
            struct.pack_into("<f", data, fields[field], value)
            refused(tmp_path, kind, bytes(data), fields["min"])
    largest = float(np.finfo(np.float32).max)
    data = bytearray(objects(kind)["utt"])
    struct.pack_into("<ff", data, fields["min"], largest, largest)
    refused(tmp_path, kind, bytes(data), fields["min"])


@pytest.mark.parametrize("column", range(COLS))
def test_percentiles_out_of_order(column: int, tmp_path: Path) -> None:
    at = header("CM")[1]["cols"] + 4 + 8 * column
    for place in range(3):
        data = bytearray(objects("CM")["utt"])
        first, second = struct.unpack_from("<HH", data, at + 2 * place)
        struct.pack_into("<HH", data, at + 2 * place, second, first)
        refused(tmp_path, "CM", bytes(data), at)


@pytest.mark.parametrize(("kind", "code"), [("FM", "<f"), ("DM", "<d")])
def test_every_value_that_is_not_finite(kind: str, code: str, tmp_path: Path) -> None:
    size = struct.calcsize(code)
    first = header(kind)[1]["cols"] + 4
    for place in range(ROWS * COLS):
        for value in [*NOT_FINITE, *([1e39, -1e300] if kind == "DM" else [])]:
            data = bytearray(objects(kind)["utt"])
            struct.pack_into(code, data, first + size * place, value)
            refused(tmp_path, kind, bytes(data), first + size * place)


def test_fields_of_int_vectors(tmp_path: Path) -> None:
    """The second entry of an archive: its \\0B, size bytes and count."""
    path = tmp_path / "ali.ark"
    before = b"a " + int_vector(np.array([1, 2], np.int32))
    good = int_vector(np.array([7, 8, 9], np.int32))
    start = len(before) + 2

    def refused_entry(data: bytes, least: int) -> None:
        path.write_bytes(before + b"b " + data)
        with pytest.raises(DataError) as caught:
            read_alignments(path)
        assert caught.value.file == str(path)
        assert caught.value.offset is not None and least <= caught.value.offset <= start + len(data)

    for at in [1, 2, 7, 12, 17]:
        for value in set(range(256)) - {good[at]}:
            data = bytearray(good)
            data[at] = value
            refused_entry(bytes(data), start + at)
    for count in [-(2**31), -3, -1, 4, 2**24, 2**30, 2**31 - 1]:
        data = bytearray(good)
        struct.pack_into("<i", data, 3, count)
        refused_entry(bytes(data), start)
    for count in [0, 1, 2]:  # what is left of the vector is no key
        data = bytearray(good)
        struct.pack_into("<i", data, 3, count)
        refused_entry(bytes(data), start + 7)
