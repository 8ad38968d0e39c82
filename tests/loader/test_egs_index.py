"""A directory of examples as a source: every chunk found once, in its shape, with its labels and weights."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader.chunks import ChunkShape
from kaldi_mpi.loader.egs_index import make_index
from kaldi_mpi.loader.examples import ExampleChunk, Examples
from kaldi_mpi.loader.plan import Source
from kaldi_mpi.testing.examples import SparseRows, read_examples
from tests.egs_data import (
    Chunk,
    chunk_example,
    example,
    float_matrix,
    merged_example,
    nnet_io,
    random_chunk,
    sparse_matrix,
    write_egs,
)
from tests.loader_data import KINDS, compressed_matrix, full_matrix, write_archive
from tests.paths import golden, kaldi_root


def write_dir(directory: Path, archives: list[dict[str, bytes]], **info: object) -> Path:
    """An egs directory with ``egs.1.ark`` and so on, and the given files of ``info``."""
    directory.mkdir(exist_ok=True)
    for number, examples in enumerate(archives, 1):
        write_egs(directory / f"egs.{number}.ark", examples)
    for name, value in info.items():
        (directory / "info").mkdir(exist_ok=True)
        (directory / "info" / name).write_text(f"{value}\n")
    return directory


def assert_chunk(found: ExampleChunk, chunk: Chunk, targets: int = 1) -> None:
    np.testing.assert_array_equal(found.feats, chunk.feats)
    rows = [row + [(-1, 0.0)] * (targets - len(row)) for row in chunk.posteriors]
    np.testing.assert_array_equal(found.labels, [[pdf for pdf, _ in row] for row in rows])
    weights = np.array([[weight for _, weight in row] for row in rows], dtype=np.float32)
    if found.weights is None:
        assert set(weights[found.labels >= 0].tolist()) <= {1.0}
    else:
        np.testing.assert_array_equal(found.weights, weights)
    if chunk.ivector is None:
        assert found.ivector is None
    else:
        np.testing.assert_array_equal(found.ivector, chunk.ivector)


@pytest.mark.parametrize("name", ["egs", "egs_merged"])
def test_golden_egs(name: str) -> None:
    examples = Examples.open(golden(f"{name}.ark"))
    source: Source = examples
    assert (source.num_units, source.total_frames, source.feat_dim, source.ivector_dim) == (6, 120, 40, 0)
    assert (source.num_targets, source.has_weights, examples.num_pdfs, source.num_without_labels) == (1, True, 112, 0)
    assert examples.shapes == [ChunkShape(20, 20, 5)]
    if name == "egs":
        originals = list(read_examples(golden("egs.ark")))
        assert [source.location_of(unit) for unit in range(6)] == [
            (str(golden("egs.ark")), key) for key, _ in originals
        ]
    else:
        assert source.location_of(5) == (str(golden("egs_merged.ark")), "merged-0-6")
        assert examples.n.tolist() == [0, 1, 2, 3, 4, 5]
        assert len(set(examples.begin.tolist())) == 1
    pieces = Examples.open(golden("egs.ark"))
    for unit in range(6):
        chunk, single = examples.chunk(unit), pieces.chunk(unit)
        np.testing.assert_array_equal(chunk.feats, single.feats)
        np.testing.assert_array_equal(chunk.labels, single.labels)
        np.testing.assert_array_equal(chunk.weights, single.weights)


def test_shapes_kinds_and_archives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    archives, chunks = [], []
    for number in range(11):  # egs.10.ark comes after egs.9.ark
        examples = {}
        for i in range(3):
            width, first = [(4, 0), (6, -3), (1, 250)][(number + i) % 3]
            chunk = random_chunk(rng, kind=KINDS[(number + i) % 5], width=width, ivector=2, first=first)
            examples[f"a{number}-{i}"] = chunk_example(chunk)
            chunks.append(chunk)
        archives.append(examples)
    egs = write_dir(tmp_path / "egs", archives, feat_dim=3, ivector_dim=2, left_context=3, right_context=2,
                    left_context_initial=-1, right_context_final=-1, num_archives=11)  # fmt: skip
    (egs / "valid_diagnostic.egs").write_bytes(b"not looked at")
    found = Examples.open(egs)
    assert found.paths == [f"{egs}/egs.{number}.ark" for number in range(1, 12)]
    assert found.num_units == 33
    assert found.num_frames.tolist() == [len(chunk.posteriors) for chunk in chunks]
    assert found.total_frames == sum(len(chunk.posteriors) for chunk in chunks)
    assert set(found.shapes) == {ChunkShape(4, 3, 2), ChunkShape(6, 3, 2), ChunkShape(1, 3, 2)}
    assert found.file_of.tolist() == [unit // 3 for unit in range(33)]
    for unit, chunk in enumerate(chunks):
        assert found.shapes[found.shape_of[unit]].width == len(chunk.posteriors)
        assert_chunk(found.chunk(unit), chunk)
        assert found.location_of(unit) == (f"{egs}/egs.{unit // 3 + 1}.ark", f"a{unit // 3}-{unit % 3}")
        with open(found.paths[found.file_of[unit]], "rb") as stream:
            stream.seek(int(found.begin[unit]))
            data = stream.read(int(found.unit_bytes[unit]))
        assert data == archives[unit // 3][f"a{unit // 3}-{unit % 3}"]
    with pytest.raises(IndexError):
        found.chunk(33)
    listed = Examples.open([egs / "egs.2.ark", egs / "egs.1.ark"])
    assert_chunk(listed.chunk(0), chunks[3])
    assert_chunk(listed.chunk(3), chunks[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_merged_examples(interleaved: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    chunks = [random_chunk(rng, kind="FM", ivector=3, first=i % 2) for i in range(5)]
    chunks[2].posteriors[1] = []
    data = {"merged-0-4": merged_example(chunks[:4], interleaved=interleaved), "single": chunk_example(chunks[4])}
    found = Examples.open(write_egs(tmp_path / "combine.egs", data))
    assert found.n.tolist() == [0, 1, 2, 3, 0]
    assert found.num_frames.tolist() == [4, 4, 3, 4, 4]
    for unit, chunk in enumerate(chunks):
        assert_chunk(found.chunk(unit), chunk)


def test_soft_posteriors_and_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    chunks = [random_chunk(rng, pairs=1 + i % 3, weights=True) for i in range(4)]
    chunks[1].posteriors[0] = []
    data = {f"c{i}": chunk_example(chunk) for i, chunk in enumerate(chunks)}
    found = Examples.open(write_egs(tmp_path / "egs.1.ark", data))
    assert (found.num_targets, found.has_weights) == (3, True)
    for unit, chunk in enumerate(chunks):
        assert_chunk(found.chunk(unit), chunk, targets=3)
    hard = Examples.open(write_egs(tmp_path / "egs.1.ark", {"a": chunk_example(random_chunk(rng))}))
    assert (hard.num_targets, hard.has_weights, hard.chunk(0).weights) == (1, False, None)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_full_matrices(kind: str, tmp_path: Path) -> None:
    codes = np.zeros((3, 600), dtype=np.int64)
    codes[0, 599], codes[1, [3, 17]], codes[2, 0] = 64, (64, 192), 255
    if kind in ("FM", "DM"):
        matrix, values = full_matrix(codes / 64.0, kind)[2:], codes / 64.0
    else:
        spread = {"CM": 1.0, "CM2": 65535.0, "CM3": 255.0}[kind]
        matrix = compressed_matrix(codes, kind, 0.0, spread)[2:]
        values = codes.astype(np.float64)
        if kind == "CM":  # the percentiles are 0, 1, 2, 3 of 65535 in every column, so that a byte 0 is exactly 0
            matrix = matrix[:19] + struct.pack("<4H", 0, 1, 2, 3) * 600 + matrix[19 + 8 * 600 :]
            values = np.select([codes == 64, codes == 192, codes == 255], [1.0, 2.0, 3.0]) * 1.52590218966964e-05
    feats = float_matrix(np.ones((3, 1), np.float32))
    times = [(0, t, 0) for t in range(3)]
    data = example(nnet_io("input", times, feats), nnet_io("output", times, matrix))
    found = Examples.open(write_egs(tmp_path / "egs.1.ark", {"a": data}))
    assert (found.num_pdfs, found.num_targets) == (600, 2)
    chunk = found.chunk(0)
    assert chunk.labels.tolist() == [[599, -1], [3, 17], [0, -1]]
    assert chunk.weights is not None
    expected = [[values[0, 599], 0], [values[1, 3], values[1, 17]], [values[2, 0], 0]]
    np.testing.assert_allclose(chunk.weights, expected, rtol=1e-6)
    dense = float_matrix(np.ones((3, 600), np.float32))
    write_egs(tmp_path / "egs.1.ark", {"a": example(nnet_io("input", times, feats), nnet_io("output", times, dense))})
    with pytest.raises(DataError, match=r"key a, .*: row 0 of the output has more than 256 values other than 0: post"):
        Examples.open(tmp_path / "egs.1.ark")


def test_other_outputs_and_chunks_without_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    chunks = [random_chunk(rng) for _ in range(3)]
    other = [nnet_io("output-2", [(0, t, 0) for t in range(4)], sparse_matrix([[(40, 1.0)]] * 4, 50))]
    silent = random_chunk(rng)
    silent.posteriors = [[], [(2, 0.0)], [], []]
    data = {f"c{i}": chunk_example(chunk, more=other) for i, chunk in enumerate(chunks)}
    path = write_egs(tmp_path / "egs.1.ark", {"silent": chunk_example(silent, more=other), **data})
    found = Examples.open(path)
    assert (found.num_units, found.num_pdfs, found.num_without_labels) == (3, 9, 1)
    for unit, chunk in enumerate(chunks):
        assert_chunk(found.chunk(unit), chunk)
    second = Examples.open(path, output="output-2")
    assert (second.num_units, second.num_pdfs, second.num_without_labels) == (4, 50, 0)
    assert second.chunk(0).labels.tolist() == [[40]] * 4
    with pytest.raises(DataError, match="key silent, byte offset 7: the example has no 'output-3'"):
        Examples.open(path, output="output-3")
    write_egs(path, {"silent": chunk_example(silent)})
    with pytest.raises(DataError, match="no row of 'output' has a label"):
        Examples.open(path)
    for name in ("", "input", "ivector", "a b"):
        with pytest.raises(ConfigError):
            Examples.open(path, output=name)


def test_examples_larger_than_a_block(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    chunks = [random_chunk(rng, kind="FM", width=width, dim=700) for width in (2, 1900, 1, 900, 900, 3)]
    path = write_egs(tmp_path / "egs.1.ark", {f"c{i}": chunk_example(chunk) for i, chunk in enumerate(chunks)})
    assert path.stat().st_size > 10 << 20
    found = Examples.open(path)
    for unit, chunk in enumerate(chunks):
        assert_chunk(found.chunk(unit), chunk)
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    with pytest.raises(DataError, match=f"key c5, byte offset {path.stat().st_size - 10}: truncated: 11 bytes"):
        Examples.open(path)


INPUT = nnet_io("input", [(0, t, 0) for t in range(-1, 3)], float_matrix(np.ones((4, 2), np.float32)))
OUTPUT = nnet_io("output", [(0, 0, 0), (0, 1, 0)], sparse_matrix([[(1, 1.0)]] * 2, 4))


def inputs(*indexes: tuple[int, int, int]) -> bytes:
    return nnet_io("input", indexes, float_matrix(np.ones((len(indexes), 2), np.float32)))


def outputs(*indexes: tuple[int, int, int]) -> bytes:
    return nnet_io("output", indexes, sparse_matrix([[(1, 1.0)]] * len(indexes), 4))


def ivectors(*indexes: tuple[int, int, int]) -> bytes:
    return nnet_io("ivector", indexes, float_matrix(np.ones((len(indexes), 2), np.float32)))


@pytest.mark.parametrize(
    ("ios", "cause"),
    [
        ([OUTPUT], "the example has no 'input'"),
        ([INPUT], "the example has no 'output'"),
        ([INPUT, INPUT, OUTPUT], "'input' comes twice in an example"),
        ([INPUT, OUTPUT, OUTPUT], "'output' comes twice in an example"),
        ([nnet_io("input", [(0, 0, 0)], sparse_matrix([[]], 2)), outputs((0, 0, 0))], "'input' is a sparse matrix"),
        ([inputs((0, 0, 0), (0, 2, 0)), outputs((0, 0, 0))],
         "rows of 'input' are 2 frames apart: frame subsampling is not supported"),
        ([INPUT, outputs((0, -1, 0), (0, 2, 0))], "rows of 'output' are 3 frames apart: frame subsampling is not"),
        ([inputs((0, 1, 0), (0, 0, 0)), outputs((0, 0, 0))], "rows of 'input' are not in order of time: t 0 after 1"),
        ([inputs((0, 0, 0), (0, 1, 0), (0, 3, 0)), outputs((0, 0, 0))],
         "rows of 'input' are not in order of time: t 3 after 1"),
        ([INPUT, outputs((0, 0, 0), (0, 0, 0))], "rows of 'output' are not in order of time: t 0 after 0"),
        ([inputs((0, 0, 1)), outputs((0, 0, 0))], "an Index of 'input' has x 1"),
        ([INPUT, outputs((0, -2, 0))], "'input' has t -1 to 2, which does not cover the output's -2 to -2"),
        ([INPUT, outputs((0, 2, 0), (0, 3, 0))], "'input' has t -1 to 2, which does not cover the output's 2 to 3"),
        ([INPUT, outputs((7, 0, 0))], "an Index of 'output' with 1 rows has n 7"),
        ([INPUT, outputs((-1, 0, 0))], "an Index of 'output' with 1 rows has n -1"),
        ([inputs((0, 0, 0), (1, 0, 0)), outputs((0, 0, 0))], "'input' has rows with n 1, and the output has none"),
        ([inputs((0, 0, 0), (1, 0, 0), (2, 0, 0)), outputs((0, 0, 0), (0, 1, 0), (2, 0, 0))],
         "'input' has t 0 to 0, which does not cover"),
        ([inputs((0, 0, 0), (1, 0, 0), (2, 0, 0)), outputs((0, 0, 0), (2, 0, 0), (2, 1, 0))],
         "'output' has no row with n 1"),
        ([inputs((0, 0, 0)), outputs((0, 0, 0), (1, 0, 0))], "'input' has no row with n 1"),
        ([INPUT, ivectors((0, 0, 0), (0, 1, 0)), OUTPUT], "'ivector' has 2 rows with n 0, and must have one"),
        ([INPUT, ivectors((3, 0, 0)), OUTPUT], "'ivector' has rows with n 3, and the output has none"),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_trained_on(ios: list[bytes], cause: str, tmp_path: Path) -> None:
    good = example(INPUT, OUTPUT, *([ivectors((0, 0, 0))] if len(ios) == 3 and b" ivector " in ios[1] else []))
    path = write_egs(tmp_path / "egs.1.ark", {"good": good, "bad": example(*ios)})
    with pytest.raises(DataError) as caught:
        Examples.open(path)
    assert caught.value.cause.startswith(cause)
    assert (caught.value.file, caught.value.key) == (str(path), "bad")
    assert (caught.value.offset or 0) > len(good)


def test_dimensions_that_differ(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    good = {"good": chunk_example(random_chunk(rng))}
    for name, dims, bad in [
        ("input", (4, 3), chunk_example(random_chunk(rng, dim=4))),
        ("ivector", (2, 0), chunk_example(random_chunk(rng, ivector=2))),
        ("output", (10, 9), chunk_example(random_chunk(rng), num_pdfs=10)),
    ]:
        path = write_egs(tmp_path / "egs.1.ark", {**good, "bad": bad})
        with pytest.raises(DataError, match=f"key bad, .*'{name}' has dimension {dims[0]}, and {dims[1]} in the ex"):
            Examples.open(path)
        egs = write_dir(tmp_path / "egs", [good, {"bad": bad}])
        message = f"{egs}/egs.2.ark: '{name}' has dimension {dims[0]}, and {dims[1]} in {egs}/egs.1.ark"
        with pytest.raises(DataError, match=re.escape(message)):
            Examples.open(egs)


def test_directories_that_are_not_complete(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    egs = write_dir(tmp_path / "egs", [{f"c{i}": chunk_example(random_chunk(rng))} for i in range(4)], num_archives=4)

    def message() -> str:
        with pytest.raises(DataError) as caught:
            Examples.open(egs)
        return str(caught.value).replace(str(egs), "egs")

    (egs / "egs.3.ark").rename(egs / "other")
    assert message() == "egs/egs.3.ark: missing: there must be 4 archives"
    (egs / "other").rename(egs / "egs.3.ark")
    (egs / "egs.4.ark").rename(egs / "other")
    assert message() == "egs/egs.4.ark: missing: there must be 4 archives"
    (egs / "other").rename(egs / "egs.4.ark")
    (egs / "info/num_archives").write_text("3\n")
    assert message() == "egs/egs.4.ark: info/num_archives says 3"
    (egs / "info/num_archives").write_text("four\n")
    assert message() == "egs/info/num_archives: a number is expected, not 'four'"
    (egs / "info/num_archives").write_text("4\n")
    for name, says, cause in [
        ("feat_dim", 40, "says 40, and the examples have 3"),
        ("ivector_dim", 100, "says 100, and the examples have 0"),
        ("left_context", 40, "says 40, and there are examples with 3"),
        ("right_context", 0, "says 0, and there are examples with 2"),
    ]:
        (egs / "info" / name).write_text(f"{says}\n")
        assert message() == f"egs/info/{name}: {cause}"
        (egs / "info" / name).unlink()
    (egs / "info/left_context").write_text("40\n")
    (egs / "info/left_context_initial").write_text("3\n")
    assert Examples.open(egs).num_units == 4
    (egs / "egs.2.ark").write_bytes(b"")
    assert message() == "egs/egs.2.ark: no example in it"
    (egs / "egs.2.ark").unlink()
    (egs / "egs.2.ark").symlink_to(egs / "nowhere")
    assert "cannot open: No such file or directory" in message()
    for file in egs.glob("egs.*.ark"):
        file.unlink()
    assert message() == "egs: no egs.*.ark in this directory"
    (egs / "cegs.1.ark").write_bytes(b"")
    assert message() == "egs: it has chain examples (cegs.*.ark), and examples with labels (egs.*.ark) are expected"
    with pytest.raises(DataError, match="no archive of examples is named"):
        Examples.open([])
    with pytest.raises(DataError, match="a text archive, which cannot be trained on"):
        Examples.open(write_egs(egs / "egs.txt", {"a": b"<Nnet3Eg> <NumIo> 1 "}))


def snapshot(examples: Examples) -> list[object]:
    columns = ("file_of", "begin", "end", "n", "num_frames", "shape_of")
    totals = ("feat_dim", "ivector_dim", "num_pdfs", "num_targets", "has_weights", "num_without_labels", "shapes")
    return [getattr(examples, name).tolist() for name in columns] + [getattr(examples, name) for name in totals]


def test_the_index_is_kept_and_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    chunks = [random_chunk(rng, width=1 + i, ivector=2, weights=True, pairs=2) for i in range(4)]
    egs = write_dir(tmp_path / "egs", [{f"c{i}": chunk_example(chunk)} for i, chunk in enumerate(chunks)])
    cache = tmp_path / "index.npz"
    made: list[str] = []
    original: Callable[..., object] = make_index

    def counting(*args: object) -> object:
        made.append("made")
        return original(*args)

    monkeypatch.setattr("kaldi_mpi.loader.examples.make_index", counting)
    first = Examples.open(egs, index_cache=cache)
    again = Examples.open(egs, index_cache=cache)
    assert made == ["made"]
    assert snapshot(again) == snapshot(first)
    for unit, chunk in enumerate(chunks):
        assert_chunk(again.chunk(unit), chunk, targets=2)

    def remade() -> Examples:
        made.clear()
        found = Examples.open(egs, index_cache=cache)
        assert made == ["made"]
        assert Examples.open(egs, index_cache=cache).num_units == found.num_units
        assert made == ["made"]
        return found

    status = (egs / "egs.2.ark").stat()
    os.utime(egs / "egs.2.ark", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert snapshot(remade()) == snapshot(first)
    whole = cache.read_bytes()
    for damaged in (b"", b"PK\x03\x04", whole[: len(whole) // 2], whole[:-30], b"x" * 100):
        cache.write_bytes(damaged)
        assert snapshot(remade()) == snapshot(first)
    changes: list[tuple[str, Callable[[Any], Any]]] = [
        ("end", lambda array: array + 1000),
        ("begin", lambda array: array * 0 - 1),
        ("file_of", lambda array: array + 1),
        ("shape_of", lambda array: array - 1),
        ("frames", lambda array: array * 0),
        ("n", lambda array: array[:-1]),
        ("shapes", lambda array: array.astype(np.int64)),
        ("totals", lambda array: array + 1),
    ]
    for name, change in changes:
        with np.load(cache) as stored:
            arrays = dict(stored)
        np.savez(cache, **{**arrays, name: change(arrays[name])})
        assert snapshot(remade()) == snapshot(first)
    write_egs(egs / "egs.5.ark", {"more": chunk_example(chunks[0])})
    assert remade().num_units == 5


def test_archives_that_change_under_the_index(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    path = tmp_path / "egs.1.ark"
    chunks = [random_chunk(rng, kind="FM") for _ in range(2)]
    write_egs(path, {f"c{i}": chunk_example(chunk) for i, chunk in enumerate(chunks)})
    found = Examples.open(path)
    whole = path.read_bytes()
    other = random_chunk(rng, kind="FM", left=4, right=1)
    with open(path, "r+b") as stream:
        stream.write(b"c0 " + chunk_example(other))
    with pytest.raises(DataError, match=r"key c0, .*not the one that was there when the index was made"):
        found.chunk(0)
    assert_chunk(found.chunk(1), chunks[1])
    heavy = random_chunk(rng, kind="FM", weights=True)
    with open(path, "r+b") as stream:
        stream.write(b"c0 " + chunk_example(heavy))
    with pytest.raises(DataError, match=r"key c0, .*not the one that was there when the index was made"):
        found.chunk(0)
    with open(path, "r+b") as stream:
        stream.truncate(len(whole) - 1)
    with pytest.raises(DataError, match=r"key c1, byte offset \d+: truncated"):
        found.chunk(1)
    path.write_bytes(whole)
    assert_chunk(found.chunk(0), chunks[0])


def test_bad_examples_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(10)
    chunks = [random_chunk(rng, kind="CM", left=1 + i % 2) for i in range(8)]
    data = {f"c{i}": chunk_example(chunk) for i, chunk in enumerate(chunks)}
    shifted = random_chunk(rng, dim=5)  # sound in itself, but of another dimension
    archives: list[dict[str, bytes]] = [{}, {}]
    for i, (key, value) in enumerate(data.items()):
        archives[i // 4][key] = value
    archives[0] = {"c0": data["c0"], "dim": chunk_example(shifted), **archives[0]}
    archives[1]["c5"] = data["c5"].replace(b"<I1V> ", b"<I1V>_", 1)
    archives[1]["c7"] = data["c7"][:-20]
    egs, cache = write_dir(tmp_path / "egs", archives), tmp_path / "index.npz"
    causes = [
        "egs.1.ark, key dim, byte offset {}: 'input' has dimension 5, and 3 in the examples before",
        "egs.2.ark, key c7, byte offset {}: truncated: ",  # that archive alone has one too many
        "egs.2.ark, key c7, byte offset {}: truncated: ",
    ]
    for limit in (0, 1, 2):
        with pytest.raises(DataError) as caught:
            Examples.open(egs, skip_bad=limit, index_cache=cache)
        assert str(caught.value).startswith(f"{egs}/{causes[limit].format(caught.value.offset)}")
        assert (f"{limit} bad examples, which is the limit, have been left out" in str(caught.value)) == (limit > 0)
        assert not cache.exists()
    good = [chunks[i] for i in (0, 1, 2, 3, 4, 6)]
    for attempt in range(2):  # made, then read from the file
        caplog.clear()
        with caplog.at_level("WARNING", logger="kaldi_mpi"):
            found = Examples.open(egs, skip_bad=3, index_cache=cache)
        assert (found.num_bad, found.num_units, found.feat_dim) == (3, 6, 3)
        assert len(caplog.messages) == (3 if attempt == 0 else 1)
        for unit, chunk in enumerate(good):
            assert_chunk(found.chunk(unit), chunk)
    with pytest.raises(DataError, match="key dim"):
        Examples.open(egs, index_cache=cache)
    with pytest.raises(ConfigError, match="number of bad examples to skip is -1"):
        Examples.open(egs, skip_bad=-1)


def test_no_byte_of_a_bad_example_harms_the_next_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    chunks = [random_chunk(rng, width=1, left=0, right=0, dim=1, num_pdfs=2) for _ in range(3)]
    first, bad, last = (f"key{i} ".encode() + chunk_example(chunk, num_pdfs=2) for i, chunk in enumerate(chunks))
    path = tmp_path / "egs.1.ark"
    for at in range(len(bad)):
        for damaged in (bad[:at], bad[:at] + b"\xf0\xf0" + bad[at + 2 :], bad[:at] + b" " + bad[at:]):
            path.write_bytes(first + damaged + last)
            found = Examples.open(path, skip_bad=1)
            assert found.num_units in (2, 3)
            assert found.num_bad <= 1
            assert_chunk(found.chunk(0), chunks[0])
            # Without its end, or with a key broken in two, the damaged one cannot be told from the last.
            if found.num_units + found.num_bad == 3 and damaged:
                assert_chunk(found.chunk(found.num_units - 1), chunks[2])


def test_skipping_to_an_example_that_is_far_away(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    good = [f"key{i} ".encode() + chunk_example(random_chunk(rng)) for i in range(2)]
    path = tmp_path / "egs.1.ark"
    for length in ((4 << 20) - 4130, (4 << 20) - 30, (4 << 20) - 7, (8 << 20) - 4118, (8 << 20) + 50):
        path.write_bytes(good[0] + b"bad " + bytes(length - 4 - len(good[0])) + b"\n" + good[1])
        found = Examples.open(path, skip_bad=1)
        assert [found.location_of(unit)[1] for unit in range(found.num_units)] == ["key0", "key1"]


def program(name: str) -> str:
    path = kaldi_root() / "src/nnet3bin" / name
    if not os.access(path, os.X_OK):
        pytest.skip(f"this Kaldi has no {name}")
    return str(path)


def run(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


def kaldis_egs(tmp_path: Path) -> None:
    """``egs.1.ark`` with two chunk widths, three left contexts and i-vectors, and ``merged.ark`` of the same."""
    rng = np.random.default_rng(9)
    lengths = {"a": 90, "b": 33, "c": 61, "d": 20}
    feats = {key: full_matrix(rng.normal(size=(length, 5)), "FM") for key, length in lengths.items()}
    write_archive(tmp_path, "feats", feats)
    vectors = {key: full_matrix(rng.normal(size=((length + 9) // 10, 3)), "FM") for key, length in lengths.items()}
    write_archive(tmp_path, "ivectors", vectors)
    lines = []
    for key, length in lengths.items():
        rows = []
        for _ in range(length):
            pdfs = rng.choice(30, size=rng.integers(1, 3), replace=False)
            rows.append("[ " + " ".join(f"{pdf} {1 / len(pdfs)}" for pdf in sorted(pdfs)) + " ]")
        lines.append(f"{key} {' '.join(rows)}\n")
    (tmp_path / "post.txt").write_text("".join(lines))
    run(program("nnet3-get-egs"), "--num-pdfs=30", "--num-frames=20,12", "--left-context=7", "--right-context=4",
        "--left-context-initial=2", "--online-ivectors=scp:ivectors.scp", "--online-ivector-period=10",
        "scp:feats.scp", "ark,t:post.txt", "ark:egs.1.ark", cwd=tmp_path)  # fmt: skip
    run(program("nnet3-copy-egs"), "ark:egs.1.ark", "ark,t:egs.txt", cwd=tmp_path)
    for compress in ("true", "false"):
        run(program("nnet3-merge-egs"), "--minibatch-size=3,2,1", f"--compress={compress}", "ark:egs.1.ark",
            f"ark:merged.{compress}.ark", cwd=tmp_path)  # fmt: skip


@pytest.mark.kaldi
def test_kaldis_egs(tmp_path: Path) -> None:
    kaldis_egs(tmp_path)
    texts = dict(read_examples(tmp_path / "egs.txt"))
    found = Examples.open(tmp_path / "egs.1.ark")
    assert found.num_units == len(texts) > 5
    assert (found.feat_dim, found.ivector_dim, found.num_pdfs, found.num_targets) == (5, 3, 30, 2)
    widths = {(20, 7), (20, 2), (12, 7), (12, 2)}
    assert {(shape.width, shape.left) for shape in found.shapes} <= widths
    assert len(found.shapes) > 2
    for unit, (key, eg) in enumerate(texts.items()):
        assert found.location_of(unit)[1] == key
        shape, chunk = found.shapes[found.shape_of[unit]], found.chunk(unit)
        assert eg["input"].indexes[:, 1].tolist() == list(range(-shape.left, shape.width + shape.right))
        assert eg["output"].indexes[:, 1].tolist() == list(range(shape.width))
        np.testing.assert_allclose(chunk.feats, np.asarray(eg["input"].matrix), rtol=1e-6, atol=1e-7)
        assert chunk.ivector is not None
        np.testing.assert_allclose(chunk.ivector, np.asarray(eg["ivector"].matrix)[0], rtol=1e-6, atol=1e-7)
        output = eg["output"].matrix
        assert isinstance(output, SparseRows)
        assert chunk.weights is not None
        for labels, weights, row in zip(chunk.labels.tolist(), chunk.weights.tolist(), output.rows, strict=True):
            pairs = [(pdf, weight) for pdf, weight in zip(labels, weights, strict=True) if pdf >= 0]
            assert [pdf for pdf, _ in pairs] == [pdf for pdf, _ in row]
            np.testing.assert_allclose([weight for _, weight in pairs], [weight for _, weight in row], rtol=1e-6)


@pytest.mark.kaldi
@pytest.mark.parametrize("compress", ["true", "false"])
def test_kaldis_merged_egs_are_the_same_units(compress: str, tmp_path: Path) -> None:
    kaldis_egs(tmp_path)
    single, merged = Examples.open(tmp_path / "egs.1.ark"), Examples.open(tmp_path / f"merged.{compress}.ark")
    assert merged.num_units == single.num_units
    assert int(merged.n.max()) == 2
    assert sorted(merged.num_frames.tolist()) == sorted(single.num_frames.tolist())
    wanted = [single.chunk(unit) for unit in range(single.num_units)]
    for unit in range(merged.num_units):
        chunk = merged.chunk(unit)
        for i, other in enumerate(wanted):
            same = chunk.feats.shape == other.feats.shape and np.array_equal(chunk.labels, other.labels)
            # A compressed merged matrix has been compressed once more: to within 1/64 of what lies between
            # two percentiles.
            if same and np.allclose(chunk.feats, other.feats, atol=0.1 if compress == "true" else 0):
                np.testing.assert_array_equal(chunk.weights, other.weights)
                assert chunk.ivector is not None and other.ivector is not None
                np.testing.assert_allclose(chunk.ivector, other.ivector, atol=0.1 if compress == "true" else 0)
                del wanted[i]
                break
        else:
            raise AssertionError(f"unit {unit} of the merged examples is none of the others")
    assert not wanted
