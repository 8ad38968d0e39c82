"""A whole directory of examples in minibatches, beside what Kaldi's nnet3-merge-egs makes of the same archives."""

from __future__ import annotations

import dataclasses
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kaldi_mpi.loader import Examples, MinibatchReader, MinibatchRule, NumpyMinibatch
from kaldi_mpi.testing.examples import Example, SparseRows, read_examples
from tests.egs_data import chunk_example, merged_example, random_chunk, write_egs
from tests.paths import kaldi_root

WIDTHS = (4, 4, 6, 4, 3, 6)  # of the chunks, in turn
LEFT, RIGHT = 3, 2


@pytest.fixture
def archives(tmp_path: Path) -> list[Path]:
    """Two archives of examples of three structures, with i-vectors and weights."""
    rng = np.random.default_rng(0)
    chunks = [
        random_chunk(rng, width=WIDTHS[i % len(WIDTHS)], left=LEFT, right=RIGHT, ivector=5, pairs=2, weights=True)
        for i in range(47)
    ]
    keyed = {f"utt{i}-0": chunk_example(chunk) for i, chunk in enumerate(chunks)}
    keys = list(keyed)
    return [
        write_egs(tmp_path / f"egs.{number}.ark", {key: keyed[key] for key in part})
        for number, part in ((1, keys[:30]), (2, keys[30:]))
    ]


def merged_by_kaldi(archives: list[Path], rule: str) -> list[Example]:
    path = kaldi_root() / "src/nnet3bin/nnet3-merge-egs"
    out = archives[0].parent / "merged.ark"
    names = " ".join(map(str, archives))
    subprocess.run(
        [path, f"--minibatch-size={rule}", f"ark:cat {names} |", f"ark:{out}"], check=True, capture_output=True
    )
    return [example for _, example in read_examples(out)]


def ours(archives: list[Path], rule: str, **options: object) -> list[NumpyMinibatch]:
    source = Examples.open(archives)
    minibatches = []
    with MinibatchReader(source, None, MinibatchRule.parse(rule), seed=1, num_epochs=1, **options) as reader:  # type: ignore[arg-type]
        for m in reader:
            assert m.weights is not None and m.ivectors is not None
            copies = {name: getattr(m, name).copy() for name in ("feats", "labels", "weights", "ivectors")}
            minibatches.append(dataclasses.replace(m, **copies))
    return minibatches


def dense_rows(matrix: SparseRows) -> NDArray[np.float32]:
    dense = np.zeros((len(matrix.rows), matrix.dim), np.float32)
    for row, pairs in zip(dense, matrix.rows, strict=True):
        for pdf, weight in pairs:
            row[pdf] = weight
    return dense


def arrays(example: Example) -> dict[str, NDArray[np.float32]]:
    """A merged example's inputs and the posteriors of its outputs, (chunks, rows, columns)."""
    found = {}
    for io in example.ios:
        rows = dense_rows(io.matrix) if isinstance(io.matrix, SparseRows) else io.matrix
        chunks = int(io.indexes[:, 0].max()) + 1
        found[io.name] = np.asarray(rows, np.float32).reshape(chunks, -1, rows.shape[1])
    return found


def posteriors(m: NumpyMinibatch, num_pdfs: int) -> NDArray[np.float32]:
    dense = np.zeros((*m.labels.shape[:2], num_pdfs), np.float32)
    for (chunk, row, _), pdf, weight in zip(
        np.ndindex(m.labels.shape), m.labels.flat, m.weights.flat if m.weights is not None else [], strict=True
    ):
        if pdf >= 0:
            dense[chunk, row, pdf] += weight
    return dense


@pytest.mark.kaldi
@pytest.mark.parametrize("rule", ["4", "8=3,5/11=2:6", "9,20"])
def test_minibatches_of_a_directory_are_those_that_kaldi_merges(archives: list[Path], rule: str) -> None:
    """In the same order while they are full; what Kaldi discards of the rest, or makes smaller, is here as it is."""
    size = MinibatchRule.parse(rule)
    kaldis, mine = [arrays(example) for example in merged_by_kaldi(archives, rule)], ours(archives, rule, shuffle=False)
    full = [m for m in mine if len(m.feats) == size.largest(m.shape.rows)]
    assert full == mine[: len(full)]  # the rest comes at the end
    full_of_kaldi = [a for a in kaldis if len(a["input"]) == size.largest(a["input"].shape[1])]
    assert len(full) == len(full_of_kaldi)
    for m, merged in zip(full, full_of_kaldi, strict=True):
        np.testing.assert_allclose(m.feats, merged["input"], rtol=1e-6)
        assert m.ivectors is not None
        np.testing.assert_allclose(m.ivectors, merged["ivector"][:, 0], rtol=1e-6)
        np.testing.assert_allclose(posteriors(m, merged["output"].shape[2]), merged["output"], rtol=1e-6)
    # Kaldi's smaller minibatches: the first chunks of what is left of their structure.
    for merged in (a for a in kaldis if len(a["input"]) != size.largest(a["input"].shape[1])):
        rest = next(m for m in mine[len(full) :] if m.shape.rows == merged["input"].shape[1])
        np.testing.assert_allclose(rest.feats[: len(merged["input"])], merged["input"], rtol=1e-6)
    assert sum(len(m.feats) for m in mine) == 47


@pytest.mark.parametrize("size", [1, 3])
def test_examples_come_once_an_epoch_over_all_ranks(archives: list[Path], size: int) -> None:
    """Also shuffled, in pools, with several threads."""
    whole = Counter(row.tobytes() for m in ours(archives, "5") for row in m.feats)
    memory = int(Examples.open(archives).unit_bytes.sum()) // 3
    ranks = [ours(archives, "5", size=size, rank=rank, threads=2, memory=memory) for rank in range(size)]
    assert Counter(row.tobytes() for rank in ranks for m in rank for row in m.feats) == whole
    assert sum(whole.values()) == 47
    counts = [sum(len(m.feats) > 0 for m in rank) for rank in ranks]
    assert max(counts) - min(counts) <= 1


def test_merged_examples_are_read_once(tmp_path: Path) -> None:
    """Their chunks stay in one pool, so that memory does not have to hold them, or have them read, many times."""
    rng = np.random.default_rng(1)
    merged = [merged_example([random_chunk(rng, kind="FM", dim=20) for _ in range(8)]) for _ in range(12)]
    path = write_egs(tmp_path / "egs.1.ark", {f"merged-{i}-8": data for i, data in enumerate(merged)})
    source = Examples.open(path)
    assert int(source.unit_bytes.sum()) == sum(map(len, merged))
    with MinibatchReader(source, None, 5, seed=3, num_epochs=2, memory=2 * 3 * len(merged[0])) as reader:
        epochs: list[Counter[bytes]] = [Counter(), Counter()]
        for m in reader:
            epochs[m.epoch].update(row.tobytes() for row in m.feats)
        counters = reader.counters()
    assert epochs[0] == epochs[1] == Counter(source.chunk(unit).feats.tobytes() for unit in range(96))
    assert counters.bytes_read <= 4 * path.stat().st_size
