"""nnet3 examples, whole: equal to Kaldi's text, and bit for bit to the format's description."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.examples import Examples
from kaldi_mpi.testing import examples as example_module
from kaldi_mpi.testing.examples import Example, NnetIo, SparseRows, read_examples
from tests.egs_data import (
    chunk_example,
    encode_indexes,
    example,
    float_matrix,
    int32,
    nnet_io,
    random_chunk,
    sparse_matrix,
    write_egs,
)
from tests.loader_data import KINDS, random_matrix
from tests.paths import golden


def words_of(key: str, eg: Example) -> list[str | float]:
    """The words that Kaldi writes for an example in text; values are numbers."""
    words: list[str | float] = [key, "<Nnet3Eg>", "<NumIo>", str(len(eg.ios))]
    for io in eg.ios:
        words += ["<NnetIo>", io.name, "<I1V>", str(len(io.indexes))]
        for index in io.indexes.tolist():
            words += ["<I1>", *map(str, index)]
        if isinstance(io.matrix, SparseRows):
            words.append(f"rows={len(io.matrix)}")
            for row in io.matrix.rows:
                words += [f"dim={io.matrix.dim}", "["]
                for column, value in row:
                    words += [str(column), value]
                words.append("]")
        else:
            words += ["[", *io.matrix.ravel().tolist(), "]"]
        words.append("</NnetIo>")
    return [*words, "</Nnet3Eg>"]


def assert_words_equal(ours: list[str | float], kaldis: list[str]) -> None:
    assert len(ours) == len(kaldis)
    for mine, theirs in zip(ours, kaldis, strict=True):
        if isinstance(mine, float):
            assert mine == pytest.approx(float(theirs), rel=1e-6, abs=1e-12)
        else:
            assert mine == theirs


def assert_equal(first: Example, second: Example) -> None:
    """Two examples are the same, bit for bit."""
    assert [io.name for io in first.ios] == [io.name for io in second.ios]
    for a, b in zip(first.ios, second.ios, strict=True):
        np.testing.assert_array_equal(a.indexes, b.indexes)
        if isinstance(a.matrix, SparseRows) and isinstance(b.matrix, SparseRows):
            assert a.matrix.dim == b.matrix.dim
            assert a.matrix.rows == b.matrix.rows
        else:
            np.testing.assert_array_equal(np.asarray(a.matrix), np.asarray(b.matrix))


@pytest.mark.parametrize("name", ["egs", "egs_merged"])
def test_examples_equal_kaldis_text(name: str) -> None:
    ours = [word for key, eg in read_examples(golden(f"{name}.ark")) for word in words_of(key, eg)]
    assert_words_equal(ours, golden(f"{name}.txt").read_text().split())


@pytest.mark.parametrize("name", ["egs", "egs_merged"])
def test_text_archives(name: str) -> None:
    kaldis = golden(f"{name}.txt").read_text().split()
    assert_words_equal([w for key, eg in read_examples(golden(f"{name}.txt")) for w in words_of(key, eg)], kaldis)


def only(path: Path) -> Example:
    examples = dict(read_examples(path))
    assert list(examples) == ["utt"]
    return examples["utt"]


def write_one(tmp_path: Path, data: bytes) -> Path:
    return write_egs(tmp_path / "egs.1.ark", {"utt": data})


def test_index_encodings(tmp_path: Path) -> None:
    cases: list[tuple[bytes, list[tuple[int, int, int]]]] = [
        (b"\x00", [(0, 0, 0)]),
        (b"\x7c", [(0, 124, 0)]),
        (b"\x84", [(0, -124, 0)]),
        (b"\xec\x01\x00\xff", [(0, -20, 0), (0, -19, 0), (0, -19, 0), (0, -20, 0)]),
        (b"\x7f" + int32(3) + int32(-7) + int32(5) + b"\x02", [(3, -7, 5), (3, -5, 5)]),
        (b"\x05\x7f" + int32(-1) + int32(2**31 - 1) + int32(-(2**31)) + b"\xff",
         [(0, 5, 0), (-1, 2**31 - 1, -(2**31)), (-1, 2**31 - 2, -(2**31))]),
        (b"\x7f" + int32(0) + int32(-(2**31)) + int32(0) + b"\x7c", [(0, -(2**31), 0), (0, -(2**31) + 124, 0)]),
    ]  # fmt: skip
    for encoded, indexes in cases:
        matrix = np.arange(len(indexes), dtype=np.float32)[:, None]
        io = b"<NnetIo> a <I1V> " + int32(len(indexes)) + encoded + float_matrix(matrix) + b"</NnetIo> "
        (found,) = only(write_one(tmp_path, example(io))).ios
        assert found.indexes.tolist() == [list(index) for index in indexes]
        np.testing.assert_array_equal(found.matrix, matrix)


@given(st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1) | st.integers(-300, 300)] * 3), min_size=1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_indexes(tmp_path_factory: pytest.TempPathFactory, indexes: list[tuple[int, int, int]], full: bool) -> None:
    data = example(nnet_io("x", indexes, float_matrix(np.zeros((len(indexes), 1), np.float32)), full=full))
    path = write_one(tmp_path_factory.getbasetemp(), data)
    assert only(path).ios[0].indexes.tolist() == [list(index) for index in indexes]


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_all_kinds(kind: str, tmp_path: Path) -> None:
    data, values = random_matrix(np.random.default_rng(0), kind, 5, 3)
    ios = [nnet_io("input", [(0, t, 0) for t in range(5)], data[2:]), nnet_io("input", [(0, 0, 0)] * 5, data[2:])]
    eg = only(write_one(tmp_path, example(*ios)))
    assert [io.name for io in eg.ios] == ["input", "input"]
    for io in eg.ios:
        np.testing.assert_array_equal(io.matrix, values)
    assert eg["input"] is eg.ios[0]
    with pytest.raises(KeyError):
        eg["output"]


@pytest.mark.parametrize("double", [False, True])
def test_sparse_rows(double: bool, tmp_path: Path) -> None:
    rows = [[(3, 0.5), (1, -2.0)], [], [(6, 1.0)]]
    data = nnet_io("output", [(0, t, 0) for t in range(3)], sparse_matrix(rows, 7, double=double))
    matrix = only(write_one(tmp_path, example(data)))["output"].matrix
    assert isinstance(matrix, SparseRows)
    assert (matrix.dim, len(matrix), matrix.rows) == (7, 3, rows)


def test_examples_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    examples = {f"key-{i}" * 3: chunk_example(random_chunk(rng, width=i % 7 + 1)) for i in range(40)}
    path = write_egs(tmp_path / "egs.1.ark", examples)
    whole = dict(read_examples(path))
    assert list(whole) == list(examples)
    for block in (1, 50, 333):
        monkeypatch.setattr(example_module, "_BLOCK", block)
        for key, eg in read_examples(path):
            assert_equal(eg, whole[key])


def test_an_empty_archive_and_one_that_is_missing(tmp_path: Path) -> None:
    assert list(read_examples(write_egs(tmp_path / "egs.1.ark", {}))) == []
    with pytest.raises(DataError, match=r"egs.2.ark: cannot open: No such file"):
        list(read_examples(tmp_path / "egs.2.ark"))


TINY = example(
    nnet_io("input", [(0, -1, 0), (0, 0, 0), (0, 1, 0)], random_matrix(np.random.default_rng(0), "CM", 3, 1)[0][2:]),
    nnet_io("ivector", [(0, 0, 0)], random_matrix(np.random.default_rng(0), "CM2", 1, 2)[0][2:], full=True),
    nnet_io("output", [(0, 0, 0), (0, 1, 0)], sparse_matrix([[(1, 1.0)], [(0, 0.5), (2, 0.5)]], 4)),
)


def refused(path: Path, key: str | None = "utt") -> str:
    """Both readers refuse an archive for the same cause; returns it with the offset."""
    causes = []
    for read in (lambda: list(read_examples(path)), lambda: Examples.open(path)):
        with pytest.raises(DataError) as caught:
            read()
        error = caught.value
        assert error.file == str(path)
        assert error.key == key
        assert error.offset is not None
        assert 0 <= error.offset <= path.stat().st_size
        causes.append(f"{error.offset}: {error.cause}")
    assert causes[0] == causes[1]
    return causes[0]


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    for first in ({}, {"before": TINY}):
        head = write_egs(tmp_path / "egs.1.ark", first).read_bytes()
        for length in range(len(TINY)):
            path = tmp_path / "egs.1.ark"
            path.write_bytes(head + b"utt " + TINY[:length])
            assert "truncated" in refused(path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_truncated_at_every_byte(kind: str, tmp_path: Path) -> None:
    data, _ = random_matrix(np.random.default_rng(0), kind, 2, 2)
    whole = example(nnet_io("input", [(0, 0, 0), (0, 1, 0)], data[2:]))
    for length in range(len(whole)):
        path = write_one(tmp_path, whole[:length])
        with pytest.raises(DataError, match="truncated"):
            list(read_examples(path))


def field(name: bytes, add: int = 0, nth: int = 0) -> int:
    """Where a word of TINY stands."""
    at = -1
    for _ in range(nth + 1):
        at = TINY.index(name, at + 1)
    return at + add


@pytest.mark.parametrize(
    ("at", "value", "cause"),
    [
        (0, b"\1", r"no binary example here \(\\0B is expected\)"),
        (1, b"C", r"no binary example here"),
        (field(b"<Nnet3Eg>"), b"x", "'<Nnet3Eg> ' is expected here, not 'xNnet3Eg>'"),
        (field(b"<Nnet3Eg> <", 5), b"3ChainEg>", "a chain example, where one with labels is expected"),
        (field(b"<NumIo>"), b"\0", r"'<NumIo> ' is expected here, not '\\x00NumIo>'"),
        (field(b"<NumIo> ", 8), b"\3", "size byte of the number of inputs and outputs is 3, not 4"),
        (field(b"<NumIo> ", 9), struct.pack("<i", 0), "the number of inputs and outputs is 0, and must be at least 1"),
        (field(b"<NumIo> ", 9), struct.pack("<i", 2), "'</Nnet3Eg> ' is expected here, not '<NnetIo>'"),
        (field(b"<NumIo> ", 9), struct.pack("<i", 4), "'<NnetIo> ' is expected here, not '</Nnet3Eg>'"),
        (field(b"<NumIo> ", 9), struct.pack("<i", 10**6 + 1), "1000001 inputs and outputs are not possible"),
        (field(b"<NnetIo> "), b"[", r"'<NnetIo> ' is expected here, not '\[NnetIo>'"),
        (field(b"input"), b" ", "the name of an input or output is expected here"),
        (field(b"input"), b"\n", "the name of an input or output is expected here"),
        (field(b"input ", 5), b"\t", "the name of an input or output is expected here"),
        (field(b"<I1V>"), b"?", r"'<I1V> ' is expected here, not '\?I1V>'"),
        (field(b"<I1V> ", 6), b"\xfc", "size byte of the number of indexes is 252, not 4"),
        (field(b"<I1V> ", 7), struct.pack("<i", -1), "the number of indexes is -1, and must be at least 1"),
        (field(b"<I1V> ", 7), struct.pack("<i", 2**31 - 1), "truncated: 2147483647 bytes are needed here, and"),
        (field(b"<I1V> ", 11), b"\x7d", "byte 125 cannot begin index 0"),
        (field(b"<I1V> ", 11), b"\x80", "byte -128 cannot begin index 0"),
        (field(b"<I1V> ", 12), b"\x83", "byte -125 cannot begin index 1"),
        (field(b"<I1V> ", 12, 1), b"\x08", "size byte of an index's n is 8, not 4"),
        (field(b"<I1V> ", 17, 1), b"\x08", "size byte of an index's t is 8, not 4"),
        (field(b"<I1V> ", 22, 1), b"\x08", "size byte of an index's x is 8, not 4"),
        (field(b"CM "), b"X", "unknown token 'XM': FM, DM, CM, CM2, CM3 or SM expected"),
        (field(b"CM2 ", 2), b"4", "unknown token 'CM4': FM"),
        (field(b"CM ", 3), struct.pack("<f", np.nan), "header of a compressed matrix is not finite: min -?nan"),
        (field(b"CM ", 7), struct.pack("<f", np.inf), "header of a compressed matrix is not finite: min"),
        (field(b"CM ", 11), struct.pack("<i", 4), "a matrix of 4 rows for 3 indexes"),
        (field(b"CM ", 11), struct.pack("<i", -3), "a matrix of -3 rows for 3 indexes"),
        (field(b"CM ", 15), struct.pack("<i", 0), "0 columns in a matrix"),
        (field(b"CM ", 15), struct.pack("<i", 2**31 - 1), "truncated archive or wrong size: the header says 3 rows x"),
        (field(b"</NnetIo>"), b"[", r"'</NnetIo> ' is expected here, not '\[/NnetIo>'"),
        (field(b"</NnetIo> ", 9), b"\n", "'</NnetIo> ' is expected here"),
        (field(b"SM ", 3), b"\x05", "size byte of the number of sparse rows is 5, not 4"),
        (field(b"SM ", 4), struct.pack("<i", 3), "3 rows for 2 indexes"),
        (field(b"SV "), b"F", r"'SV ' is expected here, not 'FV'"),
        (field(b"SV ", 4), struct.pack("<i", 0), "a sparse row's dimension is 0, and must be at least 1"),
        (field(b"SV ", 4, 1), struct.pack("<i", 5), "the sparse rows have dimensions 4 and 5"),
        (field(b"SV ", 9), struct.pack("<i", 5), "a sparse row of dimension 4 cannot have 5 pairs"),
        (field(b"SV ", 9), struct.pack("<i", -1), "the number of pairs of a sparse row is -1, and must be at least 0"),
        (field(b"SV ", 14), struct.pack("<i", 4), "column 4 of a sparse row of dimension 4"),
        (field(b"SV ", 14), struct.pack("<i", -1), "a sparse row's column is -1, and must be at least 0"),
        (field(b"SV ", 18), b"\x02", "size byte of a sparse row's value is 2, not 4"),
        (field(b"SV ", 19), struct.pack("<f", np.inf), "not a finite number: inf in column 1"),
        (field(b"</Nnet3Eg>"), b" ", r"'</Nnet3Eg> ' is expected here, not '\\x20/Nnet3Eg>'"),
    ],
)  # fmt: skip
def test_corrupted_fields(at: int, value: bytes, cause: str, tmp_path: Path) -> None:
    data = bytearray(TINY)
    data[at : at + len(value)] = value
    offset, _, found = refused(write_one(tmp_path, bytes(data))).partition(": ")
    assert int(offset) >= 4
    assert re.match(cause, found), found


def test_entries_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "egs.1.ark"
    for data, key, cause in [
        (b" " + TINY, None, "0: a key and a space are expected here"),
        (b"utt\n" + TINY, "utt", "0: a key and a space are expected here"),
        (b"utt " + TINY + b"\0", None, f"{4 + len(TINY)}: a key and a space are expected here"),
    ]:
        path.write_bytes(data)
        for read in (lambda: list(read_examples(path)), lambda: Examples.open(path)):
            with pytest.raises(DataError) as caught:
                read()
            assert f"{caught.value.offset}: {caught.value.cause}" == cause
            assert caught.value.key in (key, None)
    path.write_bytes(b"utt " + TINY + b"key")
    with pytest.raises(DataError, match=f"byte offset {4 + len(TINY)}: truncated: the archive ends in a key"):
        Examples.open(path)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(TINY)), noise=st.binary(min_size=1, max_size=8), tail=st.binary(max_size=20))
def test_any_bytes_are_decoded_or_refused(
    at: int, noise: bytes, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(TINY)
    data[at : at + len(noise)] = noise
    path = write_one(tmp_path_factory.getbasetemp(), bytes(data) + tail)
    try:
        assert dict(read_examples(path))
    except DataError as error:
        assert error.file == str(path)
        assert error.offset is not None
    try:
        examples = Examples.open(path)
        for unit in range(examples.num_units):
            examples.chunk(unit)
    except DataError as error:
        assert error.file is not None


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("<Nnet3Eg>", "<Nnet3Example>", "'<Nnet3Eg>' is expected here, not '<Nnet3Example>'"),
        ("<NumIo> 1", "<NumIo> 0", "the number of inputs and outputs is expected here, not '0'"),
        ("<NumIo> 1", "<NumIo> 2", "'<NnetIo>' is expected here, not '</Nnet3Eg>'"),
        ("<I1> 0 0 0", "<I1> 0 0", "an index's x is expected here, not 'rows=1'"),
        ("<I1> 0 0 0", "<I1> 0 0 9999999999", "an index's x is expected here, not '9999999999'"),
        ("rows=1", "rows=2", "a sparse matrix of another size for 1 indexes"),
        ("dim=3", "dim=x", "the dimension of a sparse row is expected here, not 'dim=x'"),
        ("2 1 ]", "3 1 ]", "column 3 of a sparse row of dimension 3"),
        ("2 1 ]", "2 nan ]", "not a finite number: nan"),
        ("2 1 ]", "2 one ]", "a number is expected here, not 'one'"),
        ("rows=1 dim=3 [ 2 1 ]", "[ ]", "0 values in a matrix for 1 indexes"),
        (" </Nnet3Eg>", "", "truncated: the archive ends where </Nnet3Eg> is expected"),
    ],
)
def test_text_that_is_none(old: str, new: str, cause: str, tmp_path: Path) -> None:
    text = "utt <Nnet3Eg> <NumIo> 1 <NnetIo> output <I1V> 1 <I1> 0 0 0 rows=1 dim=3 [ 2 1 ]\n</NnetIo> </Nnet3Eg>"
    path = tmp_path / "egs.txt"
    path.write_text(text)
    io = only(path)["output"]
    assert isinstance(io, NnetIo)
    assert isinstance(io.matrix, SparseRows)
    assert io.matrix.rows == [[(2, 1.0)]]
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError) as caught:
        list(read_examples(path))
    assert (caught.value.cause, caught.value.file, caught.value.key) == (cause, str(path), "utt")
    assert caught.value.offset is not None


def test_indexes_are_encoded_as_kaldi_does() -> None:
    """The writer of these tests, against bytes that Kaldi wrote."""
    assert golden("egs.ark").read_bytes().find(encode_indexes([(0, t, 0) for t in range(-20, 25)])) > 0
