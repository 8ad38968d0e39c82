"""Every kind of value in a script file, and whole archives: the same matrices wherever they come from."""

from __future__ import annotations

import gzip
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.scp import (
    Location,
    Rspecifier,
    columns_in_range,
    parse_location,
    parse_rspecifier,
    rows_in_range,
)
from kaldi_mpi.loader import ChunkShape, Corpus, MinibatchReader
from kaldi_mpi.loader.native import Archives, ffi
from kaldi_mpi.loader.scratch import ScratchFile
from kaldi_mpi.loader.tables import Table, locate
from tests.loader_data import KINDS, full_matrix, random_matrix, write_archive

Matrices = dict[str, NDArray[np.float32]]


def read_all(source: str | Path, **options: object) -> Matrices:
    """Everything that `locate` finds, decoded as a corpus does it."""
    archives = Archives()
    return decoded(locate(source, archives, **options), archives)  # type: ignore[arg-type]


def decoded(table: Table, archives: Archives) -> Matrices:
    matrices, matrix = {}, ffi.new("km_matrix *")
    for key, location in table.locations.items():
        index = archives.open(location.path, named_in="the test", key=key)
        archives.open_matrix(index, location.offset, matrix, key=key)
        rows = rows_in_range(location, matrix.rows, file="the test", key=key)
        values = np.empty((rows, matrix.cols), dtype=np.float32)
        block = ffi.new("km_block *", (location.first_row, rows, 0, matrix.cols))
        archives.block(index, matrix, block, values, key=key)
        matrices[key] = values
    return matrices


def text_of(values: NDArray[np.floating]) -> bytes:
    """A matrix as Kaldi prints it, with digits enough to be exact."""
    rows = ["  " + " ".join(repr(float(v)) for v in row) + " " for row in values]
    return ("[\n" + "\n".join(rows) + "]\n").encode()


def message(act: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        act()
    return str(caught.value)


def write_kinds(folder: Path) -> tuple[Path, Matrices]:
    """A script file with every kind of value, for the same matrix of each binary kind."""
    lines, expected = [], {}
    for kind in KINDS:
        data, values = random_matrix(np.random.default_rng(3), kind, 12, 5)
        write_archive(folder, kind, {"other": full_matrix(np.zeros((2, 2)), "FM"), "utt": data})
        alone, zipped, text = folder / f"{kind}.mat", folder / f"{kind}.gz", folder / f"{kind}.txt"
        alone.write_bytes(data)
        zipped.write_bytes(gzip.compress(data))
        text.write_bytes(b"utt  " + text_of(values))
        archive = folder / f"{kind}.ark"
        sources = {
            "path": str(alone),
            "offset": f"{archive}:{archive.read_bytes().index(b'utt ') + 4}",
            "gunzip": f"gunzip -c {zipped} |",
            "cat": f"cat {alone}|",
            "pipe": f"cat {zipped} | gunzip -c | cat |",
            "text": f"{text}:4",
            "printed": f"tail -c +4 {text} |",
        }
        ranges = {
            "": np.s_[:, :],
            "[2:7]": np.s_[2:8, :],
            "[:]": np.s_[:, :],
            "[3:13]": np.s_[3:, :],
            "[0:4,1:3]": np.s_[:5, 1:4],
            "[:,4:4]": np.s_[:, 4:],
            "[5:5,:]": np.s_[5:6, :],
        }
        for source, value in sources.items():
            for text_range, cut in ranges.items():
                key = f"{kind}-{source}{text_range}"
                lines.append(f"{key} {value}{text_range}\n")
                expected[key] = values[cut]
    scp = folder / "feats.scp"
    scp.write_text("".join(lines))
    return scp, expected


def test_every_kind_of_value_gives_the_same_matrix(tmp_path: Path) -> None:
    scp, expected = write_kinds(tmp_path)
    got = read_all(scp, scratch_dir=tmp_path)
    assert list(got) == list(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(got[key], values, err_msg=key)


@pytest.mark.parametrize("shuffle", [False, True])
def test_minibatches_do_not_depend_on_where_features_come_from(shuffle: bool, tmp_path: Path) -> None:
    """In place, copied and cut, in one corpus; the scratch file outlives what opened it."""
    scp, expected = write_kinds(tmp_path)
    narrow = {key: m for key, m in expected.items() if m.shape[1] == 5}
    plain = write_archive(
        tmp_path, "plain", {key: full_matrix(m.astype(np.float64), "FM") for key, m in narrow.items()}
    )
    labels = {key: np.arange(len(m), dtype=np.int32) for key, m in narrow.items()}
    seen = []
    for source in (scp, plain, f"ark:cat {tmp_path}/plain.ark |"):
        corpus = Corpus.open(source, labels)
        assert corpus.utterances == list(narrow)
        with MinibatchReader(
            corpus, ChunkShape(4, 2, 1), 8, seed=7, num_epochs=1, shuffle=shuffle, threads=2
        ) as reader:
            seen.append([(f.tobytes(), y.tobytes()) for m in reader for f, y in zip(m.feats, m.labels, strict=True)])
    if shuffle:  # the order goes by the matrices' bytes, and these differ with the kind: the same, in some order
        seen = [sorted(chunks) for chunks in seen]
    assert seen[0] == seen[1] == seen[2]


def test_a_command_is_run_once_for_all_its_ranges_and_not_for_keys_that_nobody_wants(tmp_path: Path) -> None:
    values = np.arange(12.0).reshape(6, 2)
    (tmp_path / "m").write_bytes(full_matrix(values, "FM"))
    command = f"echo run >> {tmp_path}/log; cat {tmp_path}/m |"
    lines = [f"a {command}[0:1]", f"b {command}[2:5]", f"c {command}", "d exit 3 |"]
    (tmp_path / "feats.scp").write_text("\n".join(lines) + "\n")
    archives = Archives()
    table = locate(tmp_path / "feats.scp", archives, wanted={"a", "b", "c"}, threads=3)
    assert table.keys == ["a", "b", "c", "d"]
    got = decoded(table, archives)
    assert list(got) == ["a", "b", "c"]
    np.testing.assert_array_equal(got["b"], values[2:])
    assert (tmp_path / "log").read_text() == "run\n"


def test_copied_bytes_are_those_that_came(tmp_path: Path) -> None:
    """Compressed matrices stay compressed."""
    data, _ = random_matrix(np.random.default_rng(0), "CM", 50, 40)
    (tmp_path / "m").write_bytes(data)
    (tmp_path / "feats.scp").write_text(f"a cat {tmp_path}/m |\n")
    archives = Archives()
    location = locate(tmp_path / "feats.scp", archives).locations["a"]
    index = archives.open(location.path, named_in="", key="a")
    assert archives.peek(index, location.offset, len(data) + 1) == data


def test_statistics_in_text_keep_double_precision(tmp_path: Path) -> None:
    values = np.array([[1 / 3, 1e300], [2.0, -0.0]])
    (tmp_path / "cmvn.txt").write_bytes(b"spk " + text_of(values))
    archives = Archives()
    location = locate(f"ark,t:{tmp_path}/cmvn.txt", archives, doubles=True).locations["spk"]
    matrix = ffi.new("km_matrix *")
    index = archives.open(location.path, named_in="", key="spk")
    archives.open_matrix(index, location.offset, matrix, key="spk")
    np.testing.assert_array_equal(archives.doubles(index, matrix, key="spk"), values)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 6)),
    rows=st.one_of(st.none(), st.tuples(st.integers(0, 16), st.integers(0, 16))),
    cols=st.one_of(st.none(), st.tuples(st.integers(0, 7), st.integers(0, 7))),
    kind=st.sampled_from(KINDS),
)
def test_ranges_are_slices_by_kaldis_rule(
    shape: tuple[int, int],
    rows: tuple[int, int] | None,
    cols: tuple[int, int] | None,
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    data, values = random_matrix(np.random.default_rng(1), kind, *shape)
    (folder / "one.mat").write_bytes(data)
    first, last = (0, shape[0] - 1) if rows is None else rows
    left, right = (0, shape[1] - 1) if cols is None else cols
    row_text = ":" if rows is None else f"{first}:{last}"
    text = row_text if cols is None else f"{row_text},{left}:{right}"
    (folder / "one.scp").write_text(f"utt {folder}/one.mat[{text}]\n")
    # Rows may end up to two frames too late, and are clipped; nothing else may exceed the matrix.
    allowed = first <= last < shape[0] + 3 and first < shape[0] and left <= right < shape[1]
    if allowed:
        np.testing.assert_array_equal(read_all(folder / "one.scp")["utt"], values[first : last + 1, left : right + 1])
    else:
        with pytest.raises(DataError, match=r"key utt: (invalid )?(row|column) range \["):
            read_all(folder / "one.scp")


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("exit 3", "the command failed with exit status 3: no matrix here: nothing follows"),
        ("kill -9 $$", "the command was killed by SIGKILL: no matrix here: nothing follows"),
        ("true", "no matrix here: nothing follows"),
        ("cat {dir}/m; exit 7", "the command failed with exit status 7"),
        ("head -c 30 {dir}/m", "truncated: the matrix has 47 bytes, and 30 of them are there"),
        ("head -c 30 {dir}/m; exit 2", "the command failed with exit status 2: truncated: the matrix has 47 bytes"),
        ("head -c 9 {dir}/m", "truncated: it ends in the header of a matrix"),
        ("echo no features here", "no matrix here: neither \\0B nor '[', but 'no features here\\n'"),
        ("gzip -c {dir}/m", "gzip data where a matrix is expected; Kaldi reads it by a command: gunzip -c "),
        ("printf '\\000BFV 1234'", "unknown token 'FV': FM, DM, CM, CM2 or CM3 expected"),
        ("printf '[ 1 2 ; 3 x ]'", "not a finite number"),
        ("printf '[ 1 2 \\n 3 ]'", "row 1 of the matrix has 1 values, and row 0 has 2"),
        ("printf '[ 1 nan ]'", "not a finite number"),
        ("printf '[ 1 1e39 ]'", "a number beyond the range of its type"),
        ("printf '[ 1 2'", "truncated: a matrix in text without its ']'"),
        ("printf '[ ]'", "empty matrix"),
    ],
)
def test_commands_that_do_not_print_a_matrix(command: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(full_matrix(np.zeros((4, 2)), "FM"))
    value = command.format(dir=tmp_path) + " |"
    (tmp_path / "feats.scp").write_text(f"a {tmp_path}/m\nutt {value}\n")
    said = message(lambda: read_all(tmp_path / "feats.scp"))
    assert said.startswith(f"{value}, key utt, byte offset "), said
    assert f": {cause}" in said
    assert said.endswith(f" (named in {tmp_path}/feats.scp)")


def test_offset_of_what_is_wrong_in_text(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("key [ 1 2 \n 3 bad ]\n")
    (tmp_path / "feats.scp").write_text(f"key {tmp_path}/m.txt:4\n")
    at = 14
    assert (
        message(lambda: read_all(tmp_path / "feats.scp")) == f"{tmp_path}/m.txt, key key, byte offset {at}: "
        f"not a finite number (named in {tmp_path}/feats.scp)"
    )


def test_a_command_that_goes_on_is_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.ones((3, 2))
    (tmp_path / "m").write_bytes(full_matrix(values, "FM"))
    (tmp_path / "feats.scp").write_text(f"a cat {tmp_path}/m; yes |\n")
    np.testing.assert_array_equal(read_all(tmp_path / "feats.scp")["a"], values)
    assert "the command prints more than a matrix; the rest is not read" in caplog.text


def test_an_error_ends_the_commands_that_still_run(tmp_path: Path) -> None:
    (tmp_path / "feats.scp").write_text(f"a exit 1 |\nb echo $$ > {tmp_path}/pid; sleep 600 |\n")

    def with_b_running() -> None:
        def bad(key: str, error: DataError) -> None:
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.01)
            raise error

        read_all(tmp_path / "feats.scp", threads=2, on_bad=bad)

    assert "key a" in message(with_b_running)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_bad_keys_can_be_left_out(tmp_path: Path) -> None:
    values = np.ones((3, 2))
    (tmp_path / "m").write_bytes(full_matrix(values, "FM"))
    same = "cat /nowhere/m |"
    lines = [f"a {same}", "b -", f"c {tmp_path}/m", f"d {same}[0:1]", f"e {tmp_path}/m[0:1,5:6]"]
    (tmp_path / "feats.scp").write_text("\n".join(lines) + "\n")
    said: dict[str, str] = {}
    got = read_all(tmp_path / "feats.scp", on_bad=lambda key, error: said.update({key: error.cause}))
    assert list(got) == ["c"]
    assert sorted(said) == ["a", "b", "d", "e"]
    assert list(read_all(f"scp,p:{tmp_path}/feats.scp")) == ["c"]


def test_no_space_for_the_scratch_file(tmp_path: Path) -> None:
    """A device that is always full, and a directory that is none."""
    scratch = ScratchFile(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, scratch._fd)
    os.close(full)
    said = message(lambda: scratch.add([b"12345"], 5, file="cmd |", key="utt", offset=0))
    scratch.close()
    assert said.startswith(f"cmd |, key utt: cannot write to the temporary file in {tmp_path}, which is for 5 bytes")
    assert "No space left on device" in said
    (tmp_path / "feats.scp").write_text("a true |\n")
    said = message(lambda: read_all(tmp_path / "feats.scp", scratch_dir=tmp_path / "nowhere"))
    assert said.startswith(f"{tmp_path}/nowhere: cannot make the temporary file")


def test_the_scratch_file_leaves_nothing_behind(tmp_path: Path) -> None:
    scp, _ = write_kinds(tmp_path)
    scratch_dir = tmp_path / "scratch"
    scratch_dir.mkdir()
    archives = Archives()
    table = locate(scp, archives, scratch_dir=scratch_dir)
    assert list(scratch_dir.iterdir()) == []
    assert decoded(table, archives)
    before = len(os.listdir("/proc/self/fd"))
    del archives
    assert len(os.listdir("/proc/self/fd")) < before


def write_whole_archives(folder: Path) -> Matrices:
    rng = np.random.default_rng(5)
    objects, expected = {}, {}
    for i, kind in enumerate([*KINDS, *KINDS]):
        objects[f"u{i}"], expected[f"u{i}"] = random_matrix(rng, kind, 3 + i, 4)
    write_archive(folder, "all", objects)
    for name, keys in (("first", ["u0", "u1", "u2"]), ("second", [f"u{i}" for i in range(3, 10)])):
        write_archive(folder, name, {key: objects[key] for key in keys})
        (folder / f"{name}.ark.gz").write_bytes(gzip.compress((folder / f"{name}.ark").read_bytes()))
    (folder / "all.txt").write_bytes(b"".join(key.encode() + b"  " + text_of(m) for key, m in expected.items()))
    mixed = [
        key.encode() + b" " + (objects[key] if i % 2 else text_of(m)) for i, (key, m) in enumerate(expected.items())
    ]
    (folder / "mixed.ark").write_bytes(b"".join(mixed))
    return expected


@pytest.mark.parametrize(
    "source",
    [
        "ark:{dir}/all.ark",
        "ark,s,cs:{dir}/all.ark",
        "ark,t:{dir}/all.txt",
        "ark:{dir}/mixed.ark",
        "ark:gunzip -c {dir}/*.ark.gz|",
        "ark:cat {dir}/all.txt |",
        "scp:{dir}/all.scp",
        "{dir}/all.scp",
        "scp:cat {dir}/first.scp {dir}/second.scp |",
    ],
)
def test_whole_archives(source: str, tmp_path: Path) -> None:
    expected = write_whole_archives(tmp_path)
    got = read_all(source.format(dir=tmp_path))
    assert list(got) == list(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(got[key], values, err_msg=key)
    some = read_all(source.format(dir=tmp_path), wanted={"u2", "u7"})
    assert list(some) == ["u2", "u7"]
    np.testing.assert_array_equal(some["u7"], expected["u7"])


@pytest.mark.parametrize("name", ["all.ark", "all.txt"])
@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize("wanted", [None, frozenset({"u0"})])
def test_every_prefix_of_an_archive(name: str, piped: bool, wanted: frozenset[str] | None, tmp_path: Path) -> None:
    """An archive that ends inside of an entry is an error; between two it cannot be known."""
    objects = {key: random_matrix(np.random.default_rng(2), kind, 2, 2) for key, kind in (("u0", "CM"), ("u1", "FM"))}
    if name == "all.ark":
        entries = [key.encode() + b" " + data for key, (data, _) in objects.items()]
    else:
        entries = [key.encode() + b" " + text_of(values)[:-1] for key, (_, values) in objects.items()]
    whole, path = b"".join(entries), tmp_path / name
    sizes = range(len(whole)) if not piped else range(0, len(whole), 7)
    for size in sizes:
        path.write_bytes(whole[:size])
        source = f"ark:cat {path}|" if piped else f"ark:{path}"
        if size in (0, len(entries[0])):
            assert len(read_all(source, wanted=wanted)) == (size > 0)
            continue
        with pytest.raises(DataError) as caught:
            read_all(source, wanted=wanted)
        error = caught.value
        assert error.file in (source, source[4:], str(path))
        start = 0 if size < len(entries[0]) else len(entries[0])
        assert error.key == (None if size <= start + 2 else "u0" if start == 0 else "u1")
        assert error.offset is None or start <= error.offset <= size


def test_archives_that_are_none(tmp_path: Path) -> None:
    data = full_matrix(np.ones((2, 2)), "FM")
    path = tmp_path / "a.ark"

    def said(content: bytes, options: str = "") -> str:
        path.write_bytes(content)
        return message(lambda: read_all(f"ark{options}:{path}"))

    name = f"ark:{path}"
    assert said(b"a " + data + b"a " + data) == f"{name}, key a, byte offset {len(data) + 2}: the key comes twice"
    assert "not an archive" in said(data)
    assert "not an archive" in said(b"x" * 10000)
    assert "neither \\0B nor '['" in said(b"key 1 2 3\n")
    unsorted = b"b " + data + b"a " + data
    assert "not in the order that option s promises: it comes after b" in said(unsorted, ",s")
    wrong = data[:6] + struct.pack("<i", -1) + data[10:]
    assert "empty matrix or wrong size: -1 rows, 2 columns" in said(b"a " + wrong)
    huge = data[:6] + struct.pack("<ibi", 2**31 - 1, 4, 2**31 - 1) + data[15:]
    assert "wrong size: 2147483647 rows x 2147483647 columns are more than any matrix has" in said(b"a " + huge)
    large = data[:6] + struct.pack("<ibi", 2**31 - 1, 4, 1) + data[15:]
    assert "truncated: a matrix of 2147483647 rows x 1 columns takes 8589934603 bytes, and 31 are" in said(
        b"a " + large
    )
    path.write_bytes(b"a " + large)
    assert "the matrix has 8589934603 bytes, and 31 of" in message(lambda: read_all(f"ark:cat {path}|"))
    path.write_bytes(b"a " + data + b"b bad")
    assert list(read_all(f"ark,p:{path}")) == ["a"]
    assert "the command failed with exit status 1" in message(lambda: read_all(f"ark:cat {path}.none|"))
    assert "the command failed with exit status 1" in message(lambda: read_all(f"scp:cat {path}.none|"))
    assert "cannot read: No such file or directory" in message(lambda: read_all(f"ark:{path}.none"))
    assert "standard input" in message(lambda: read_all("ark:-"))
    assert "standard input" in message(lambda: read_all("scp:-"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ark:a.ark", Rspecifier("ark", "a.ark")),
        ("ark,s,cs:gunzip -c a.gz|", Rspecifier("ark", "gunzip -c a.gz|", sorted=True)),
        ("scp,p:a:b.scp", Rspecifier("scp", "a:b.scp", permissive=True)),
        ("t, p,np, ark:-", None),
        ("t p np ark:-", Rspecifier("ark", "-")),
        ("o,bg,b,ark:x", Rspecifier("ark", "x")),
        ("ark:", Rspecifier("ark", "")),
        ("ark,scp:a,b", None),
        ("ark,x:a", None),
        ("ark:a ", None),
        ("feats.scp", None),
        ("dir:with/feats.scp", None),
    ],
)
def test_rspecifiers(text: str, expected: Rspecifier | None) -> None:
    assert parse_rspecifier(text) == expected


@pytest.mark.parametrize(
    ("value", "location"),
    [
        ("a:b.ark", Location("a:b.ark", 0)),
        ("a:b.ark:12[1:2]", Location("a:b.ark", 12, 1, 2)),
        ("a.ark:1[0:3,1:2]", Location("a.ark", 1, 0, 3, 1, 2)),
        ("a.ark:1[:,1:2]", Location("a.ark", 1, 0, None, 1, 2)),
        ("a.ark:1[1:2,:]", Location("a.ark", 1, 1, 2)),
        ("gunzip -c a.gz |", Location("gunzip -c a.gz |", 0)),
        ("sort a:1 | uniq |[3:4]", Location("sort a:1 | uniq |", 0, 3, 4)),
        ("[ -f a ] && cat a |[3:4]", Location("[ -f a ] && cat a |", 0, 3, 4)),
    ],
)
def test_values_of_script_files(value: str, location: Location) -> None:
    parsed = parse_location(value, file="feats.scp", key="utt")
    assert parsed == location
    assert parsed.is_command == ("|" in value)


def test_columns_are_never_clipped() -> None:
    location = Location("a", 0, 0, None, 1, 3)
    assert columns_in_range(location, 4, file="f", key="k") == 3
    assert (
        message(lambda: columns_in_range(location, 3, file="f", key="k"))
        == "f, key k: column range [1:3] of a matrix with 3 columns"
    )
