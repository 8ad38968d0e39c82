"""Alignments: equal to Kaldi's text, and what is said of the ones that cannot be read."""

from __future__ import annotations

import gzip
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader import PdfAlignments, read_alignments, to_pdfs
from kaldi_mpi.loader.alignments import INT_VECTORS
from kaldi_mpi.loader.entries import read_entries
from tests.loader_data import int_vector
from tests.paths import golden


def read_text_vectors(path: Path) -> dict[str, list[int]]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {key: [int(v) for v in values] for key, *values in lines}


def tid_to_pdf() -> np.ndarray:
    """The table of the golden transition model, from show-transitions."""
    table = {0: -1}
    pdf = -1
    for line in golden("show_transitions.txt").read_text().splitlines():
        if state := re.match(r"Transition-state .* pdf = (\d+)$", line):
            pdf = int(state.group(1))
        elif tid := re.match(r" Transition-id = (\d+) ", line):
            table[int(tid.group(1))] = pdf
    return np.array([table[tid] for tid in range(len(table))], dtype=np.int32)


@pytest.mark.parametrize("name", ["ali.ark", "ali.txt"])
def test_alignments_equal_kaldis_and_map_to_kaldis_pdfs(name: str) -> None:
    alignments = read_alignments(golden(name))
    assert {key: values.tolist() for key, values in alignments.items()} == read_text_vectors(golden("ali.txt"))
    pdfs = to_pdfs(alignments, tid_to_pdf())
    assert {key: values.tolist() for key, values in pdfs.items()} == read_text_vectors(golden("ali_pdf.txt"))


def test_directory_of_jobs(tmp_path: Path) -> None:
    """Numeric order, gzipped and plain, binary and text, and what else lies in the directory."""
    for job, text in ((1, False), (2, True), (10, False)):
        values = np.array([job, -job, 2**31 - 1], dtype=np.int32)
        body = b"%d %d 2147483647 \n" % (job, -job) if text else int_vector(values)
        (tmp_path / f"ali.{job}.gz").write_bytes(gzip.compress(b"utt%d " % job + body))
    (tmp_path / "ali.3").write_bytes(b"plain 7 8\nempty \nnone\n")
    (tmp_path / "ali.log.gz").write_bytes(b"not an archive")
    alignments = read_alignments(tmp_path)
    assert list(alignments) == ["utt1", "utt2", "plain", "empty", "none", "utt10"]
    assert alignments["utt2"].tolist() == [2, -2, 2**31 - 1]
    assert alignments["utt10"].tolist() == [10, -10, 2**31 - 1]
    assert alignments["plain"].tolist() == [7, 8]
    assert alignments["empty"].size == alignments["none"].size == 0
    assert all(values.dtype == np.int32 for values in alignments.values())


def message(path: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        read_alignments(path)
    return str(caught.value)


def test_directories_that_are_not_complete(tmp_path: Path) -> None:
    assert message(tmp_path) == f"{tmp_path}: no ali.*.gz in this directory"
    (tmp_path / "ali.1.gz").write_bytes(gzip.compress(b"a 1 2\n"))
    (tmp_path / "num_jobs").write_text("2\n")
    assert message(tmp_path) == f"{tmp_path}/ali.2.gz: missing, and num_jobs says 2"
    (tmp_path / "ali.2.gz").write_bytes(gzip.compress(b"a 1 2\n"))
    assert message(tmp_path) == f"{tmp_path}/ali.2.gz, key a: the utterance is aligned twice"
    (tmp_path / "ali.2").write_bytes(b"b 1\n")
    assert message(tmp_path) == f"{tmp_path}/ali.2.gz: there is ali.2 beside it: which one is meant?"
    (tmp_path / "ali.2").unlink()
    (tmp_path / "num_jobs").write_text("two\n")
    assert message(tmp_path) == f"{tmp_path}/num_jobs: a number of jobs is expected, not 'two'"
    assert message(tmp_path / "nowhere") == f"{tmp_path}/nowhere: cannot read: No such file or directory"


BINARY = b"key " + int_vector(np.array([3, 4], np.int32))


@pytest.mark.parametrize(
    ("data", "where", "cause"),
    [
        (b"", "", "no alignment in it"),
        (b" 1 2\n", ", byte offset 0", "a key is expected here, not byte 32"),
        (b"key 1 2\n\n", ", byte offset 8", "a key is expected here, not byte 10"),
        (b"key 1 2", ", key key, byte offset 4", "truncated archive: the last line of text has no end"),
        (b"key 1 2x 3\n", ", key key, byte offset 6", "not an integer"),
        (b"key 1 - 3\n", ", key key, byte offset 6", "not an integer"),
        (b"key 1 2.5\n", ", key key, byte offset 6", "not an integer"),
        (b"key 2147483648\n", ", key key, byte offset 4", "integer beyond 32 bits"),
        (b"key 99999999999999999999\n", ", key key, byte offset 4", "integer beyond 32 bits"),
        (b"key \0C\x04\0\0\0\0", ", key key, byte offset 5", "\\0 without the B of a binary object"),
        (b"key \0B\x08\0\0\0\0", ", key key, byte offset 6", "size byte of the vector's length is 8, not 4"),
        (b"key \0B\x04\xff\xff\xff\xff", ", key key, byte offset 7", "negative vector length -1"),
        (
            b"key \0B\x04\xff\xff\xff\x7f\x04",
            ", key key, byte offset 7",
            "truncated archive: a vector of 2147483647 values, and 1 bytes follow",
        ),
        (BINARY[:-5] + b"\x05" + BINARY[-4:], ", key key, byte offset 16", "size byte of a value is 5, not 4"),
        (b"\x1f\x8b" + bytes(10), ", byte offset 0", "corrupt gzip data: unknown compression method"),
        (gzip.compress(BINARY)[:-1], ", key key, byte offset 21", "truncated: the gzip data ends early"),
        (
            gzip.compress(BINARY)[:-8] + b"12345678",
            ", byte offset 0",
            "corrupt gzip data: incorrect data check",
        ),
        (gzip.compress(BINARY) + b"more", ", key key, byte offset 21", "corrupt gzip data: incorrect header check"),
    ],
)
def test_malformed_archives(data: bytes, where: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "ali.1.gz"
    path.write_bytes(data)
    assert message(path) == f"{path}{where}: {cause}"


def write_jobs(folder: Path) -> dict[str, list[int]]:
    """Three gzipped jobs, larger in all than what is in memory at a time, with a vector as large itself."""
    rng, expected = np.random.default_rng(0), {}
    for job in (1, 2, 3):
        data = b""
        for i in range(40):
            values = rng.integers(-(2**31), 2**31, size=100_000 if (job, i) == (2, 7) else rng.integers(0, 900))
            key = f"utt{job}-{i}"
            expected[key] = values.tolist()
            text = b" ".join(b"%d" % v for v in expected[key]) + b" \n"
            data += key.encode() + b" " + (text if i % 3 == 0 else int_vector(values.astype(np.int32)))
        half = len(data) // 2  # in two members, as several appended files are
        (folder / f"ali.{job}.gz").write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]) + bytes(600))
    return expected


@pytest.mark.parametrize(
    "source", ["{dir}", "ark:gunzip -c {dir}/ali.*.gz|", "ark:cat {dir}/ali.?.gz |", "ark,s,cs:cat {dir}/ali.1.gz|"]
)
def test_sources_of_alignments(source: str, tmp_path: Path) -> None:
    expected = write_jobs(tmp_path)
    if source.startswith("ark,s"):  # ... 1-1 1-10 1-11 ...: these are not sorted
        assert "utt1-10: not in the order that option s promises" in message(source.format(dir=tmp_path))
        return
    if "cat" in source:  # zeros between the members are no gzip data
        for file in tmp_path.iterdir():
            file.write_bytes(file.read_bytes()[:-600])
    got = read_alignments(source.format(dir=tmp_path))
    assert {key: values.tolist() for key, values in got.items()} == expected
    some = read_alignments(source.format(dir=tmp_path), {"utt2-7", "utt3-0", "none"})
    assert {key: values.tolist() for key, values in some.items()} == {k: expected[k] for k in ("utt2-7", "utt3-0")}


def test_memory_is_that_of_what_is_wanted(tmp_path: Path) -> None:
    """32 MB of alignments, of which one vector is kept."""
    values = int_vector(np.arange(4000, dtype=np.int32))
    (tmp_path / "ali.1.gz").write_bytes(gzip.compress(b"".join(b"u%d " % i + values for i in range(1600)), 1))
    tracemalloc.start()
    got = read_alignments(tmp_path, {"u1599"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got["u1599"].tolist() == list(range(4000))
    assert peak < 4e6


def test_alignments_by_script_file(tmp_path: Path) -> None:
    data = b"a " + int_vector(np.array([1, 2], np.int32)) + b"b 3 4\n"
    (tmp_path / "ali").write_bytes(data)
    second = data.index(b"b 3") + 2
    scp = tmp_path / "ali.scp"
    scp.write_text(f"x {tmp_path}/ali:2\ny {tmp_path}/ali:{second}\nz echo 5 6 7 |\n")
    got = read_alignments(f"scp:{scp}")
    assert {key: values.tolist() for key, values in got.items()} == {"x": [1, 2], "y": [3, 4], "z": [5, 6, 7]}
    assert list(read_alignments(f"scp:{scp}", {"y"})) == ["y"]
    for value, cause in (
        ("true |", "true |, key x: truncated archive: it ends after a key"),
        ("exit 4 |", "exit 4 |, key x: the command failed with exit status 4: truncated archive: it ends after a key"),
        ("echo 5; exit 4 |", "echo 5; exit 4 |, key x, byte offset 2: the command failed with exit status 4"),
        ("echo 5x |", "echo 5x |, key x, byte offset 0: not an integer"),
        (f"{tmp_path}/ali:2[0:1]", f"{scp}, key x: '{tmp_path}/ali:2[0:1]': no ranges of vectors can be read"),
    ):
        scp.write_text(f"x {value}\n")
        assert message(f"scp:{scp}") == cause


def test_a_command_that_fails_after_whole_entries(tmp_path: Path) -> None:
    source = "ark:echo a 1 2; exit 3 |"
    assert message(source) == "echo a 1 2; exit 3 |, byte offset 6: the command failed with exit status 3"
    assert list(read_alignments("ark,p:echo a 1 2; exit 3 |")) == ["a"]
    assert "standard input" in message("ark:-")


@pytest.mark.parametrize("text", [False, True])
def test_every_prefix_is_an_error_or_ends_between_entries(text: bool, tmp_path: Path) -> None:
    entries = [b"a 1 23 4 \n", b"bb 5\n"] if text else [b"a " + int_vector(np.array([1, 2], np.int32)), BINARY]
    data, path = b"".join(entries), tmp_path / "ali"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        if size in (0, len(entries[0])):
            assert [key for key, _ in read_entries(path, INT_VECTORS)] == ["a"][: size > 0]
        else:
            with pytest.raises(DataError, match="truncated archive"):
                for _ in read_entries(path, INT_VECTORS):
                    pass


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=40), byte=st.integers(0, 255), at=st.integers(0, 30))
def test_any_bytes_are_read_or_refused(
    noise: bytes, byte: int, at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the bytes, the parser answers with vectors inside of them or with a DataError."""
    flipped = bytearray(BINARY)
    flipped[at % len(flipped)] = byte
    path = tmp_path_factory.getbasetemp() / "noise"
    for data in (noise, BINARY + noise, bytes(flipped), b"k \0B\x04" + struct.pack("<i", byte) + noise):
        path.write_bytes(data)
        try:
            values = sum(v.size for _, v in read_entries(path, INT_VECTORS) if v is not None)
        except DataError as error:
            assert error.file == str(path)
        else:
            assert values <= len(data)


@pytest.mark.parametrize("tid", [0, 3, -5])
def test_transition_id_that_the_model_does_not_have(tid: int) -> None:
    alignments = {"good": np.array([1, 2], np.int32), "bad": np.array([1, tid, 2], np.int32)}
    with pytest.raises(DataError) as caught:
        to_pdfs(alignments, np.array([-1, 0, 1], np.int32), source="exp/mono_ali")
    assert str(caught.value) == f"exp/mono_ali, key bad: transition-id {tid} at frame 1: the model has 1 to 2"


def test_pdf_ids_one_utterance_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "ali.1").write_bytes(b"a 1 2 2\nb 3\n")
    (tmp_path / "ali.2").write_bytes(b"c 1\n")
    table = np.array([-1, 7, 8, 0], np.int32)
    alignments = PdfAlignments(tmp_path, table)
    assert [(key, pdfs.tolist()) for key, pdfs in alignments.pairs()] == [("a", [7, 8, 8]), ("b", [0]), ("c", [7])]
    assert [key for key, _ in alignments.pairs(wanted={"c", "b"})] == ["b", "c"]
    with pytest.raises(DataError, match=r"key b: transition-id 3 at frame 0: the model has 1 to 2"):
        list(PdfAlignments(tmp_path, table[:-1]).pairs())
    (tmp_path / "ali.2").write_bytes(b"a 1\n")
    with pytest.raises(DataError, match=r"ali\.2, key a: the utterance is aligned twice"):
        list(alignments.pairs())
