"""Chain examples of Kaldi's: read, shifted, cut and merged as Kaldi itself has them in its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.supervision import parse_supervision
from kaldi_mpi.loader.chain_examples import ChainExamples, ChainUnit, shifted
from kaldi_mpi.loader.chunks import ChunkShape, MinibatchRule
from kaldi_mpi.loader.reader import MinibatchReader
from tests.cegs_data import ReadFst, Supervision, canonical, read_cegs, weights_of
from tests.paths import golden

ARCHIVES = [
    *(f"cegs/{name}" for name in ("cegs", "two", "shift1", "shift2", "context", "merged", "first_merged", "weighted")),
    *(f"sup/{name}" for name in ("egs", "egs_scale05", "egs_overlap", "egs_unconstrained")),
]


def opened(name: str) -> ChainExamples:
    return ChainExamples.open(golden(f"chain/{name}.ark"), shifts=False)


def assert_fst(supervision: Supervision, number: int, fst: ReadFst) -> None:
    """An FST is that of the file, element by element."""
    first, end = supervision.first_state[number : number + 2]
    assert end - first == len(fst.first) - 1
    arcs = np.flatnonzero(fst.labels != -1)
    finals = np.full(end - first, np.inf, np.float32)
    for state in range(end - first):
        for element in range(fst.first[state], fst.first[state + 1]):
            if fst.labels[element] == -1:
                finals[state] = fst.costs[element]
    of_file = slice(supervision.first_arc[first], supervision.first_arc[end])
    np.testing.assert_array_equal(supervision.finals[first:end], finals)
    np.testing.assert_array_equal(supervision.pdfs[of_file], fst.labels[arcs] - 1)
    np.testing.assert_array_equal(supervision.costs[of_file], fst.costs[arcs])
    np.testing.assert_array_equal(supervision.nexts[of_file], fst.nexts[arcs] + first)
    if supervision.times is not None:
        times = [0] * int(end - first)
        sources = np.repeat(np.arange(end - first), np.diff(supervision.first_arc[first : end + 1]))
        for source, to in zip(sources.tolist(), (supervision.nexts[of_file] - first).tolist(), strict=True):
            times[to] = times[source] + 1
        np.testing.assert_array_equal(supervision.times[first:end], times)
    num_arcs = np.searchsorted(arcs, fst.first)
    np.testing.assert_array_equal(supervision.first_arc[first : end + 1] - of_file.start, num_arcs)


def assert_same(one: Supervision, other: Supervision) -> None:
    for name in ("first_state", "first_sequence", "first_arc", "finals", "pdfs", "costs", "nexts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("name", ARCHIVES)
def test_supervision_is_what_the_file_has(name: str) -> None:
    examples, expected = opened(name), list(read_cegs(golden(f"chain/{name}.ark")))
    assert examples.num_units == len(expected) > 0
    assert examples.num_pdfs == 56
    assert examples.end2end == (name == "sup/egs_unconstrained")
    assert examples.total_frames == sum(example.sequences * example.frames for example in expected)
    for number, example in enumerate(expected):
        unit = examples.unit(number)
        supervision = unit.supervision
        assert examples.location_of(number) == (str(golden(f"chain/{name}.ark")), example.key)
        assert len(unit.feats) == example.sequences
        assert (supervision.weight, supervision.num_pdfs) == (example.weight, example.label_dim)
        assert supervision.frames_per_sequence == example.frames
        counts = np.arange(len(example.fsts) + 1) * (1 if example.end2end else example.sequences)
        np.testing.assert_array_equal(supervision.first_sequence, counts)
        for i, fst in enumerate(example.fsts):
            assert_fst(supervision, i, fst)
        np.testing.assert_array_equal(weights_of(supervision, example.frames), example.deriv_weights)


@pytest.mark.parametrize("name", ARCHIVES)
def test_supervision_is_what_formats_read(name: str) -> None:
    """The reader in Python of the same bytes, which shares nothing with the one in C."""
    examples, data = opened(name), golden(f"chain/{name}.ark").read_bytes()
    for number in range(examples.num_units):
        found = examples.unit(number).supervision
        begin = data.index(b"<Supervision> ", int(examples.begin[number]))
        expected, end = parse_supervision(data, begin, file=name)
        assert end < examples.end[number]
        assert (found.weight, found.frames_per_sequence, found.num_pdfs, found.end2end) == (
            expected.weight, expected.frames_per_sequence, expected.label_dim, expected.end2end,
        )  # fmt: skip
        assert len(found.first_state) == len(expected.fsts) + 1
        assert found.first_sequence[-1] == expected.num_sequences
        for i, fst in enumerate(expected.fsts):
            first, stop = found.first_state[i : i + 2]
            arcs = slice(found.first_arc[first], found.first_arc[stop])
            assert fst.start == 0
            np.testing.assert_array_equal(found.finals[first:stop], fst.finals)
            np.testing.assert_array_equal(found.first_arc[first : stop + 1] - arcs.start, fst.first_arc)
            np.testing.assert_array_equal(found.pdfs[arcs] + 1, fst.ilabels)
            np.testing.assert_array_equal(found.costs[arcs], fst.costs)
            np.testing.assert_array_equal(found.nexts[arcs] - first, fst.nexts)


class Text:
    """The words of an example in Kaldi's text form."""

    def __init__(self, lines: list[str]) -> None:
        words = lines[0].split()
        start = next(i for i, line in enumerate(lines) if line.rstrip().endswith("["))
        at = next(i for i, line in enumerate(lines) if line.startswith("<NnetChainSup>"))
        self.times = [int(word) for word in lines[start].split("<I1>")[1].split()[:3]], words[0]
        rows = [line.replace("]", "").split() for line in lines[start + 1 : at]]
        self.feats = np.array([row for row in rows if row and "<" not in row[0]], dtype=np.float64)
        self.arcs: list[list[float]] = []
        self.finals: dict[int, float] = {}
        for line in lines[at + 1 :]:
            if not line.strip():
                break
            columns = [float(word) for word in line.split()]
            if len(columns) < 3:
                self.finals[int(columns[0])] = columns[1] if len(columns) == 2 else 0.0
            else:
                self.arcs.append([*columns, *([0.0] if len(columns) == 4 else [])])


def texts(path: Path) -> list[Text]:
    lines = path.read_text().replace("</Nnet3ChainEg> ", "\0").split("\0")
    return [Text(part.splitlines()) for part in lines if part.strip()]


@pytest.mark.parametrize("name", ["two", "two_merged"])
def test_two_examples_equal_kaldis_text(name: str) -> None:
    """Alone they are merged with nothing, as Kaldi says too: their sizes differ."""
    expected = texts(golden(f"chain/cegs/{name}.txt"))
    assert len(expected) == 2
    with MinibatchReader(opened("cegs/two"), None, 8, seed=0, shuffle=False, num_epochs=1) as reader:
        found = [minibatch.map(lambda _, array: array.copy()) for minibatch in reader]
    assert [minibatch.shape for minibatch in found] == [
        ChunkShape(20, 7, 9, subsampling=3),
        ChunkShape(15, 7, 9, subsampling=3),
    ]
    by_rows = {text.feats.shape[0]: text for text in expected}
    for minibatch in found:
        text, supervision = by_rows[minibatch.shape.rows], minibatch.supervision
        assert supervision is not None
        assert text.times[0] == [0, minibatch.first, 0]
        np.testing.assert_allclose(minibatch.feats[0], text.feats, rtol=1e-5, atol=1e-6)
        sources = np.repeat(np.arange(len(supervision.finals)), np.diff(supervision.first_arc))
        columns = sources, supervision.nexts, supervision.pdfs + 1, supervision.pdfs + 1, supervision.costs
        np.testing.assert_allclose(np.stack(columns, axis=1), text.arcs, rtol=1e-6)
        finals = {state: cost for state, cost in enumerate(supervision.finals.tolist()) if cost < np.inf}
        assert finals == text.finals


@pytest.mark.parametrize("shift", [1, 2])
def test_shifted_shapes_are_those_of_kaldis_shifted_examples(shift: int) -> None:
    plain, kaldis = opened("cegs/two"), opened(f"cegs/shift{shift}")
    assert [shifted(shape, shift) for shape in plain.shapes] == kaldis.shapes
    assert [shifted(shape, 0) for shape in plain.shapes] == plain.shapes
    for number in range(2):
        one, other = plain.unit(number), kaldis.unit(number)
        np.testing.assert_array_equal(one.feats, other.feats)
        assert_same(one.supervision, other.supervision)


def test_less_context() -> None:
    plain, kaldis = opened("cegs/two"), opened("cegs/context")
    for number in range(2):
        one, other = plain.unit(number), kaldis.unit(number)
        shape, cut = plain.shapes[plain.shape_of[number]], kaldis.shapes[kaldis.shape_of[number]]
        assert (cut.left, cut.right) == (3, 2)
        rows = slice(shape.left - cut.left, len(one.feats[0]) - (shape.right - cut.right))
        np.testing.assert_array_equal(one.feats[:, rows], other.feats)
        assert_same(one.supervision, other.supervision)


def units_by_key(examples: ChainExamples) -> dict[str, ChainUnit]:
    return {examples.location_of(number)[1]: examples.unit(number) for number in range(examples.num_units)}


def test_minibatches_are_kaldis_merged_examples() -> None:
    """The first four, and the two short ones, are those that nnet3-chain-merge-egs --minibatch-size=4,2 makes; of the
    three that are left over it makes a pair, and here they stay together."""
    expected = units_by_key(opened("cegs/merged"))
    seen = 0
    reader = MinibatchReader(opened("cegs/cegs"), None, MinibatchRule.parse("4,2"), seed=0, shuffle=False, num_epochs=1)
    with reader:
        for minibatch in reader:
            found, rows = minibatch.supervision, minibatch.shape.rows
            assert found is not None
            assert minibatch.frames == minibatch.weight == len(minibatch.feats) * minibatch.shape.width
            key = {(4, 74): "merged-0-4", (3, 74): "merged-1-2", (2, 59): "merged-2-2"}[len(minibatch.feats), rows]
            kaldis, count = expected[key].supervision, len(expected[key].feats)
            np.testing.assert_array_equal(minibatch.feats[:count], expected[key].feats)
            width = minibatch.shape.width
            np.testing.assert_array_equal(weights_of(found, width)[:count], weights_of(kaldis, width))
            if count == len(minibatch.feats):
                assert canonical(found) == canonical(kaldis)
                assert len(canonical(found)) == len(kaldis.finals)
                seen += 1
    assert seen == 2


def test_a_merged_example_is_a_minibatch_as_it_stands() -> None:
    examples = opened("cegs/merged")
    with MinibatchReader(examples, None, 64, seed=0, shuffle=False, num_epochs=1) as reader:
        assert reader.steps_per_epoch == 3
        for minibatch in reader:
            supervision = minibatch.supervision
            assert supervision is not None
            number = [4, 2].index(len(minibatch.feats)) if minibatch.shape.width == 20 else 2
            unit = examples.unit(number)
            np.testing.assert_array_equal(minibatch.feats, unit.feats)
            assert supervision.first_sequence.tolist() == [0, len(unit.feats)]
            assert_same(supervision, unit.supervision)
            assert minibatch.shape.sequences == 1


def test_weights_are_told_apart() -> None:
    examples = opened("cegs/weighted")
    words = [line.split() for line in golden("chain/cegs/weights.txt").read_text().splitlines()]
    found = {examples.location_of(number)[1]: examples.unit(number).supervision.weight for number in range(9)}
    assert found == {key: float(weight) for key, weight in words}
    with MinibatchReader(examples, None, 1, seed=3, num_epochs=1) as reader:
        weights = [
            (minibatch.supervision.weight, minibatch.weight / minibatch.frames)
            for minibatch in reader
            if minibatch.supervision is not None
        ]
    assert sorted(weights) == sorted((weight, weight) for weight in found.values())
    with pytest.raises(DataError) as caught:
        MinibatchReader(examples, None, MinibatchRule.parse("2"), seed=0)
    assert caught.value.key == "jackson-train00361-234"
    assert caught.value.cause.startswith(
        "the weight of its supervision is 0.75, and 0.25 that of jackson-train00043-87: within a minibatch all must"
    )


def test_derivative_weights_of_overlapping_chunks() -> None:
    examples = opened("sup/egs_overlap")
    assert examples.has_weights
    by_key = {example.key: example.deriv_weights[0] for example in read_cegs(golden("chain/sup/egs_overlap.ark"))}
    assert {0.5, 1.0} <= set(np.concatenate(list(by_key.values())).tolist())
    expected = sorted((weights.shape, weights.sum().item()) for weights in by_key.values())
    with MinibatchReader(examples, None, 3, seed=0, threads=2, num_epochs=1) as reader:
        rows = [row.copy() for batch in reader if batch.supervision for row in weights_of(batch.supervision, 0)]
    assert sorted((row.shape, row.sum().item()) for row in rows) == expected


def test_arrays_of_supervision_can_be_others() -> None:
    """`map` reaches each of them, once and by its own name."""
    for name, without in (("cegs/cegs", set()), ("sup/egs_unconstrained", {"times"})):
        with MinibatchReader(opened(name), None, 3, seed=0, num_epochs=1) as reader:
            minibatch = next(reader)
        names: list[str] = []

        def convert(of: str, array: NDArray[Any], names: list[str] = names) -> tuple[str, int]:
            names.append(of)
            return of, array.size

        found = minibatch.map(convert).supervision
        assert found is not None and minibatch.supervision is not None
        of_fsts = {"first_state", "first_sequence", "first_arc", "finals", "times", "pdfs", "costs", "nexts"}
        assert sorted(names) == sorted({"feats", "labels", "deriv_weights"} | of_fsts - without)
        for of in (of_fsts | {"deriv_weights"}) - without:
            assert getattr(found, of) == (of, getattr(minibatch.supervision, of).size)
        assert found.times is None or "times" not in without


def test_examples_that_are_not_normalised_are_refused() -> None:
    with pytest.raises(DataError, match="an arc without a label \\(epsilon\\) at state 0") as caught:
        opened("sup/egs_unnormalised")
    assert caught.value.key == "george-train00066-0"
    assert caught.value.offset is not None
