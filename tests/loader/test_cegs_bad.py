"""Chain examples that are damaged, or do not fit together: one line each, with archive, key and byte offset."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.loader.chain_examples import ChainExamples
from kaldi_mpi.loader.examples import Examples
from kaldi_mpi.loader.minibatch import new_buffers
from kaldi_mpi.loader.reader import MinibatchReader
from tests.cegs_data import LOOP, ChainData, FstData, loops, random_chain, write_cegs
from tests.egs_data import chunk_example, int32, random_chunk, write_egs
from tests.loader_data import KINDS
from tests.paths import golden


def opened(path: Path, **options: Any) -> ChainExamples:
    return ChainExamples.open(path, **{"shifts": False, **options})


def read_all(path: Path) -> int:
    """Open an archive and decode all of it; how many units it has."""
    examples = opened(path)
    for number in range(examples.num_units):
        examples.unit(number)
    return examples.num_units


def refused(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        opened(path, **options)
    error = caught.value
    assert error.file == str(path)
    assert error.offset is not None
    assert 0 <= error.offset <= path.stat().st_size
    assert "\n" not in error.cause
    return error


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(b"utt " + data)
    return path


SMALL = random_chain(np.random.default_rng(0), frames=2, left=1, right=1, dim=2, ivector=2)
SMALL.deriv_weights, SMALL.alignment = np.array([[0.5, 1.0]], np.float32), True
TINY = SMALL.encoded()
LOOPS = loops(np.random.default_rng(0), frames=2, left=1, right=1, dim=1, sequences=2).encoded()


@pytest.mark.parametrize("kind", ["one FST", "End2End"])
def test_truncated_at_every_byte(kind: str, tmp_path: Path) -> None:
    data = TINY if kind == "one FST" else LOOPS
    path = tmp_path / "cegs.1.ark"
    assert read_all(write(path, data)) == 1
    for before in (b"", b"first " + data):
        for length in range(len(data)):
            path.write_bytes(before + b"utt " + data[:length])
            error = refused(path)
            assert "truncated" in error.cause, (length, error)
            assert error.key == "utt"


@pytest.mark.parametrize("name", ["cegs/two", "sup/egs_unconstrained", "cegs/first_merged"])
def test_kaldis_archives_truncated(name: str, tmp_path: Path) -> None:
    data = golden(f"chain/{name}.ark").read_bytes()
    path, ends = tmp_path / "cegs.1.ark", [0, *(m.end() for m in re.finditer(b"</Nnet3ChainEg> ", data))]
    for length in [*range(1, len(data), 199), len(data) - 1]:
        path.write_bytes(data[:length])
        if length in ends:
            continue
        assert "truncated" in refused(path).cause


@pytest.mark.parametrize("name", ["cegs/two", "sup/egs_unconstrained", "cegs/first_merged"])
def test_flipped_bytes_are_refused_or_do_no_harm(name: str, tmp_path: Path) -> None:
    """Whatever is read is within its bounds; most damage outside of features and costs is seen."""
    whole = golden(f"chain/{name}.ark").read_bytes()
    whole = whole[: whole.index(b"</Nnet3ChainEg> ", 6000) + 16]  # an example or two
    path, rng, bad = tmp_path / "cegs.1.ark", np.random.default_rng(1), 0
    supervision = whole.index(b"<NumOutputs>")
    end = whole.index(b"</Supervision>", supervision)
    for at in [*rng.integers(0, len(whole), 150), *rng.integers(supervision, end, 300)]:
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bytes(data))
        try:
            examples = opened(path)
            with MinibatchReader(examples, None, 2, seed=0, num_epochs=1) as reader:
                for minibatch in reader:
                    found = minibatch.supervision
                    assert found is not None
                    assert found.pdfs.min() >= 0
                    assert found.pdfs.max() < found.num_pdfs
                    assert found.nexts.min() >= 0
                    assert found.nexts.max() < found.first_state[-1] == len(found.finals)
        except DataError as error:
            assert error.file == str(path)
            bad += 1
    assert bad > 150


def field(data: bytes, name: bytes, add: int = 0) -> int:
    return data.index(name) + add


def at(name: bytes, add: int = 0) -> int:
    """Where a word of TINY stands."""
    return field(TINY, name, add)


FST = at(b"compact_acceptor", -8)
OFFSETS = FST + 76  # of first[]
STATES = struct.unpack_from("<q", TINY, FST + 60)[0]
ELEMENTS = OFFSETS + 4 * (STATES + 1)


@pytest.mark.parametrize(
    ("where", "value", "cause"),
    [
        (0, b"\1", r"no binary example here \(\\0B is expected\)"),
        (at(b"<Nnet3ChainEg>"), b"x", "'<Nnet3ChainEg> ' is expected here, not 'xNnet3ChainEg>'"),
        (at(b"<Nnet3ChainEg>"), b"<Nnet3Eg> ", "an example with labels, where a chain example is expected"),
        (at(b"<NumInputs> ", 13), struct.pack("<i", 0), "the number of inputs is 0, and must be at least 1"),
        (at(b"<NumInputs> ", 13), struct.pack("<i", 10**6 + 1), "the number of inputs is 1000001, which is not"),
        (at(b"<NumInputs> ", 13), struct.pack("<i", 1), "'<NumOutputs> ' is expected here, not '<NnetIo>'"),
        (at(b"<NumInputs> ", 13), struct.pack("<i", 3), "'<NnetIo> ' is expected here, not '<NumOutputs>'"),
        (at(b"input "), b"xnput", "the example has no 'input'"),
        (at(b"output "), b"xutput", "the example has no 'output'"),
        (at(b"<NumOutputs> ", 14), struct.pack("<i", 2), "'<NnetChainSup> ' is expected here, not '</Nnet3ChainEg>'"),
        (at(b"<NnetChainSup>"), b"[", r"'<NnetChainSup> ' is expected here, not '\[NnetChainSup>'"),
        (at(b"output <I1V> ", 19), b"\4", "output frames are 4 input frames apart, and the frame subsampling factor"),
        (at(b"output <I1V> ", 19), b"\0", "output frames are 0 input frames apart"),
        (at(b"<Supervision>"), b"?", r"'<Supervision> ' is expected here, not '\?Supervision>'"),
        (at(b"<Weight> ", 9), b"\x08", "size byte of the weight is 8, not 4"),
        (at(b"<Weight> ", 10), struct.pack("<f", np.nan), "the weight is -?nan, which is not a finite number"),
        (at(b"<NumSequences> ", 16), struct.pack("<i", 0), "the number of sequences is 0, and must be at least 1"),
        (at(b"<NumSequences> ", 16), struct.pack("<i", 2), "a path of 2 arcs, where there are 4 frames"),
        (at(b"<FramesPerSeq> ", 16), struct.pack("<i", 1), "a path of more arcs than there are frames: 1"),
        (at(b"<FramesPerSeq> ", 16), struct.pack("<i", 2**31 - 1), "2147483647 frames in each of 1 sequences"),
        (at(b"<LabelDim> ", 12), struct.pack("<i", 0), "the number of labels is 0, and must be at least 1"),
        (at(b"<LabelDim> ", 12), struct.pack("<i", 1), "label [2-7] at state [0-9], where 1 to 1 are possible"),
        (at(b"<End2End> ", 10), b"Y", "T or F is expected here, not byte 89"),
        (at(b"<End2End> ", 10), b"T", "'<Fsts> ' is expected here"),
        (FST, b"\0", "no FST of OpenFst here"),
        (FST + 4, struct.pack("<i", 15), "the type of the FST is not 'compact_acceptor'"),
        (FST + 8, b"x", "the type of the FST is not 'compact_acceptor'"),
        (FST + 28, b"log", "the type of the FST's arcs is not 'standard'"),
        (FST + 36, struct.pack("<i", 1), "an FST of version 1, not 2"),
        (FST + 40, struct.pack("<i", 1), "the FST's flags are 1, not 0: it has tables of symbols"),
        (FST + 40, struct.pack("<i", 4), "the FST's flags are 4, not 0: it is aligned"),
        (FST + 52, struct.pack("<q", 1), "the FST starts in state 1, and must in state 0"),
        (FST + 60, struct.pack("<q", 0), "an FST of 0 states"),
        (FST + 60, struct.pack("<q", -1), "an FST of -1 states"),
        (FST + 60, struct.pack("<q", 2**40), "an FST of 1099511627776 states"),
        (FST + 60, struct.pack("<q", 10**6), "truncated: 4000004 bytes are needed here"),
        (FST + 68, struct.pack("<q", 1), r"the FST has \d arcs, and its header says 1"),
        (OFFSETS, struct.pack("<I", 1), "the elements of state 0 begin at 1, after 0"),
        (OFFSETS + 4, struct.pack("<I", 2**32 - 1), "the elements of state 2 begin at 2, after 4294967295"),
        (OFFSETS + 4 * STATES, struct.pack("<I", 10**8), "truncated: 1200000000 bytes are needed here"),
        (ELEMENTS, struct.pack("<i", 0), r"an arc without a label \(epsilon\) at state 0"),
        (ELEMENTS, struct.pack("<i", -1), "a final cost of state 0 among its arcs"),
        (ELEMENTS, struct.pack("<i", -7), "label -7 at state 0, where 1 to 7 are possible"),
        (ELEMENTS, struct.pack("<i", 8), "label 8 at state 0, where 1 to 7 are possible"),
        (ELEMENTS + 4, struct.pack("<f", np.inf), "a cost at state 0 is not a finite number"),
        (ELEMENTS + 8, struct.pack("<i", STATES), f"an arc of state 0 leads to state {STATES} of {STATES}"),
        (ELEMENTS + 8, struct.pack("<i", -1), f"an arc of state 0 leads to state -1 of {STATES}"),
        (ELEMENTS + 8, struct.pack("<i", 0), "an arc of state 0 leads back to 0"),
        (ELEMENTS + 8, struct.pack("<i", STATES - 1), "no arc leads to state 1 from the states before it"),
        (at(b"<AlignmentPdfs> ", 17), struct.pack("<i", 1), "1 aligned pdf-ids for 2 frames"),
        (at(b"<AlignmentPdfs> ", 21), struct.pack("<i", 7), "aligned pdf-id 7 of 7"),
        (at(b"<DW2>"), b"<DW3>", "'<DW2> ' is expected here, not '<DW3>'"),
        (at(b"FV ", 4), struct.pack("<i", 3), "3 derivative weights for 2 indexes"),
        (at(b"FV ", 8), struct.pack("<f", np.nan), "derivative weight 0 is not a finite number"),
        (at(b"</NnetChainSup>"), b"x", "'</NnetChainSup> ' is expected here"),
        (at(b"</Nnet3ChainEg>"), b" ", r"'</Nnet3ChainEg> ' is expected here, not '\\x20/Nnet3ChainEg>'"),
    ],
)  # fmt: skip
def test_damaged_fields(where: int, value: bytes, cause: str, tmp_path: Path) -> None:
    data = bytearray(TINY)
    data[where : where + len(value)] = value
    path = write(tmp_path / "cegs.1.ark", bytes(data))
    error = refused(path)
    assert error.key == "utt"
    assert re.match(cause, error.cause), error.cause


def test_inputs_and_outputs_that_are_not_known_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "cegs.1.ark", TINY.replace(b"ivector ", b"xvector "))
    assert (opened(path).ivector_dim, read_all(path)) == (0, 1)
    path = write(path, TINY.replace(b"<NnetChainSup> output ", b"<NnetChainSup> output-b "))
    assert opened(path, output="output-b").num_units == 1
    assert refused(path).cause == "the example has no 'output'"


def small(**more: Any) -> ChainData:
    return random_chain(np.random.default_rng(3), frames=2, **more)


@pytest.mark.parametrize(
    ("fst", "cause"),
    [
        (FstData(2, {1: 0.0}, [(0, 1, 0.0, 1)]), "a path of 1 arcs, where there are 2 frames"),
        (FstData(4, {3: 0.0}, [(0, 1, 0, 1), (1, 1, 0, 2), (2, 1, 0, 3)]), "a path of more arcs than there are frames"),
        (FstData(3, {2: 0.0}, [(0, 1, 0, 1), (0, 2, 0, 2), (1, 1, 0, 2)]), "paths of different numbers of arcs"),
        (FstData(4, {3: 0.0}, [(0, 1, 0, 1), (1, 1, 0, 3), (2, 1, 0, 3)]), "no arc leads to state 2 from the states"),
        (FstData(5, {3: 0.0}, [(0, 1, 0, 1), (0, 2, 0, 4), (1, 1, 0, 3), (0, 3, 0, 2), (2, 1, 0, 3), (4, 1, 0, 3)]),
         "state 4 is not in the order of time"),
        (FstData(4, {3: 0.0}, [(0, 1, 0, 1), (0, 2, 0, 2), (1, 1, 0, 3)]), "no path leads on from state 2"),
        (FstData(3, {}, [(0, 1, 0, 1), (1, 1, 0, 2)]), "no state of the FST is final"),
        (FstData(3, {2: np.inf}, [(0, 1, 0, 1), (1, 1, 0, 2)]), "a cost at state 2 is not a finite number"),
        (LOOP, "a path of 1 arcs, where there are 2 frames"),
    ],
)  # fmt: skip
def test_fsts_that_are_not_of_their_frames(fst: FstData, cause: str, tmp_path: Path) -> None:
    data = small()
    data.fsts = [fst]
    assert re.match(cause, refused(write(tmp_path / "cegs.1.ark", data.encoded())).cause)


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "cegs.1.ark"
    for data, cause in [
        (small(left=-1), "'input' has t 1 to .*, which does not cover the output's 0 to 3"),
        (small(right=-1), "'input' has t -3 to 2, which does not cover the output's 0 to 3"),
    ]:
        assert re.match(cause, refused(write(path, data.encoded())).cause)
    whole = small(sequences=2, ivector=2).encoded()
    for old, new, cause in [
        (int32(1) + int32(-3), int32(1) + int32(-2), r"index \d+ is \(n 1, t -2, x 0\), and \(n 1, t -3"),
        (int32(1) + int32(-3), int32(2) + int32(-3), r"index \d+ is \(n 2, t -3, x 0\), and \(n 1, t -3"),
        (b"ivector <I1V> " + int32(2) + b"\0\x7f" + int32(1), b"ivector <I1V> " + int32(2) + b"\0\x7f" + int32(0),
         r"index 1 is \(n 0, t 0, x 0\), and \(n 1, t 0, x 0\) is expected"),
        (b"output <I1V> " + int32(4) + b"\0\x7f" + int32(1), b"output <I1V> " + int32(4) + b"\0\x7f" + int32(0),
         r"index 1 is \(n 0, t 0, x 0\), and \(n 1, t 0, x 0\) is expected"),
    ]:  # fmt: skip
        assert old in whole
        error = refused(write(path, whole.replace(old, new)))
        assert re.match(cause, error.cause), error.cause
    twice = small()
    twice.more = [twice.output("output")]
    assert refused(write(path, twice.encoded())).cause == "'output' comes twice in an example"


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """All kinds of matrices; i-vectors, old derivative weights, other outputs, alignments, merged or not."""
    rng = np.random.default_rng(4)
    cases = [random_chain(rng, kind=kind, ivector=2, frames=1 + i) for i, kind in enumerate(KINDS)]
    cases += [random_chain(rng, sequences=3, ivector=2, alignment=True), random_chain(rng, ivector=2)]
    for case in cases[1:]:
        weights = rng.integers(0, 256, (len(case.feats), case.frames)).astype(np.float32)
        case.deriv_weights = weights / np.float32(255)
    cases[3].old_weights = cases[5].old_weights = True
    cases[2].more = [cases[1].output("output-other")]
    path = write_cegs(tmp_path / "cegs.1.ark", [(f"key-{i}", case) for i, case in enumerate(cases)])
    examples = opened(path)
    assert examples.has_weights
    for number, case in enumerate(cases):
        unit = examples.unit(number)
        np.testing.assert_array_equal(unit.feats, case.feats)
        assert case.ivectors is not None
        np.testing.assert_array_equal(unit.ivectors, case.ivectors)
        expected = np.ones((len(case.feats), case.frames)) if case.deriv_weights is None else case.deriv_weights
        (fst,) = case.fsts
        found = unit.supervision
        assert found.deriv_weights is not None
        np.testing.assert_allclose(found.deriv_weights, np.asarray(expected, np.float32), rtol=1e-6)
        sources = np.repeat(np.arange(fst.states), np.diff(found.first_arc))
        assert sorted(fst.arcs) == sorted(zip(
            sources.tolist(), (found.pdfs + 1).tolist(), found.costs.tolist(), found.nexts.tolist(), strict=True
        ))  # fmt: skip
        assert {state: cost for state, cost in enumerate(found.finals.tolist()) if cost < np.inf} == fst.finals
    end2end = opened(write_cegs(path, [("a", loops(rng, sequences=2)), ("b", loops(rng, sequences=1))]))
    assert end2end.end2end
    found = end2end.unit(0).supervision
    assert found.first_state.tolist() == [0, 3, 6]
    assert found.first_sequence.tolist() == [0, 1, 2]
    assert found.nexts.tolist() == [1, 1, 2, 0, 4, 4, 5, 3]
    assert found.finals.tolist() == [np.inf, 0.5, 0.0] * 2


def test_examples_that_do_not_go_together(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(5), tmp_path / "cegs.1.ark"
    for first, second, cause in [
        (small(), small(dim=4), "'input' has dimension 4, and 3 in the examples before"),
        (small(), small(ivector=2), "'ivector' has dimension 2, and 0 in the examples before"),
        (small(), small(labels=8), "'output' has dimension 8, and 7 in the examples before"),
        (small(), loops(rng), "the supervision is End2End, and of one FST in the examples before"),
        (loops(rng), small(), "the supervision is of one FST, and End2End in the examples before"),
    ]:
        error = refused(write_cegs(path, [("a", first), ("b", second)]))
        assert (error.key, error.cause) == ("b", cause)
        other = write_cegs(tmp_path / "cegs.2.ark", [("b", second)])
        write_cegs(path, [("a", first)])
        with pytest.raises(DataError, match=r"and .* in ") as caught:
            ChainExamples.open([path, other], shifts=False)
        assert caught.value.file == str(other)
    light = write_cegs(path, [("a", small(weight=0.5)), ("b", small(weight=0.5))])
    heavy = write_cegs(tmp_path / "cegs.2.ark", [("b", small(weight=2))])
    both = ChainExamples.open([light, heavy], shifts=False)
    with pytest.raises(DataError) as caught:
        MinibatchReader(both, None, 2, seed=0)
    assert (caught.value.file, caught.value.key, caught.value.offset) == (str(heavy), "b", 2)
    assert f"is 2, and 0.5 that of a of {light}: within a minibatch" in caught.value.cause
    # Archives that are shifted differently never share a minibatch.
    MinibatchReader(ChainExamples.open([light, heavy]), None, 2, seed=0).close()
    path = write_cegs(path, [("a", small()), ("b", small(left=5, right=5))])
    with pytest.raises(
        DataError, match="output frames are 3 input frames apart, and the frame subsampling factor is 4"
    ):
        opened(path, frame_subsampling_factor=4)
    with pytest.raises(ConfigError, match="frame subsampling factor is 0"):
        opened(path, frame_subsampling_factor=0)
    with pytest.raises(DataError, match="a text archive, which cannot be trained on: nnet3-chain-copy-egs ark,t"):
        opened(write_egs(tmp_path / "cegs.txt", {"a": b"<Nnet3ChainEg> <NumInputs> 1 "}))


def test_an_egs_directory(tmp_path: Path) -> None:
    rng, egs = np.random.default_rng(6), tmp_path / "egs"
    (egs / "info").mkdir(parents=True)
    says = {"feat_dim": 3, "ivector_dim": 0, "num_pdfs": 7, "left_context": 3, "right_context": 2, "num_archives": 3,
            "left_context_initial": -1, "right_context_final": -1}  # fmt: skip

    def message() -> str:
        with pytest.raises(DataError) as caught:
            ChainExamples.open(egs)
        return str(caught.value).replace(f"{tmp_path}/", "").replace(str(tmp_path), "")

    for name, value in says.items():
        (egs / "info" / name).write_text(f"{value}\n")
    assert message() == "egs: no cegs.*.ark in this directory"
    for number in (1, 2, 3):
        write_cegs(egs / f"cegs.{number}.ark", [(f"u{number}", random_chain(rng))])
    for name in ("combine", "train_diagnostic", "valid_diagnostic"):
        shutil.copy(egs / "cegs.1.ark", egs / f"{name}.cegs")
        assert ChainExamples.open(egs / f"{name}.cegs", shifts=False).num_units == 1
    assert ChainExamples.open(egs).paths == [f"{egs}/cegs.{number}.ark" for number in (1, 2, 3)]
    for name, value, cause in [
        ("feat_dim", 4, "says 4, and the examples have 3"),
        ("num_pdfs", 9, "says 9, and the examples have 7"),
        ("ivector_dim", 100, "says 100, and the examples have 0"),
        ("left_context", 4, "says 4, and there are examples with 3"),
        ("right_context", 4, "says 4, and there are examples with 2"),
    ]:
        (egs / "info" / name).write_text(f"{value}\n")
        assert message() == f"egs/info/{name}: {cause}"
        (egs / "info" / name).write_text(f"{says[name]}\n")
    (egs / "cegs.2.ark").rename(egs / "cegs.2.scp")
    assert message() == "egs/cegs.2.ark: missing: there must be 3 archives"
    (egs / "valid_diagnostic.cegs").rename(egs / "valid_diagnostic.scp")
    expected = "examples of several tasks: a table (.scp) in place of an archive cannot be trained on here"
    assert message() == f"egs/valid_diagnostic.scp: {expected}"
    for file in egs.glob("*.*"):
        file.unlink()
    write_egs(egs / "egs.1.ark", {"a": chunk_example(random_chunk(rng))})
    assert message() == "egs: it has examples with labels (egs.*.ark), and chain examples (cegs.*.ark) are expected"
    with pytest.raises(DataError, match="an example with labels, where a chain example is expected"):
        ChainExamples.open(egs / "egs.1.ark")
    path = write_cegs(egs / "cegs.1.ark", [("a", random_chain(rng))])
    with pytest.raises(DataError, match="a chain example, where one with labels is expected"):
        Examples.open(path)


def test_the_index_is_kept_and_is_of_its_kind(tmp_path: Path) -> None:
    rng, cache = np.random.default_rng(7), tmp_path / "index.npz"
    cases = [random_chain(rng, frames=2 + i % 3, weight=0.5 + i % 2) for i in range(9)]
    path = write_cegs(tmp_path / "cegs.1.ark", [(f"u{i}", case) for i, case in enumerate(cases)])
    first = opened(path, index_cache=cache)
    written = cache.stat().st_mtime_ns
    again = opened(path, index_cache=cache)
    assert cache.stat().st_mtime_ns == written
    for name in ("begin", "end", "states", "arcs", "weight", "num_frames", "shape_of"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert len(getattr(first, name)) == 9
    assert (first.shapes, first.num_pdfs, first.end2end) == (again.shapes, again.num_pdfs, again.end2end)
    with np.load(cache) as stored:
        arrays = dict(stored)
    for name, change in [
        ("states", lambda array: array * 0), ("states", lambda array: array + 10**6),
        ("arcs", lambda array: array - 10**6), ("arcs", lambda array: array[1:]),
        ("weight", lambda array: array * np.nan),
        ("shapes", lambda array: array * 0), ("frames", lambda array: array - 1), ("totals", lambda array: array + 1),
    ]:  # fmt: skip
        np.savez(cache, **{**arrays, name: change(arrays[name])})
        assert opened(path, index_cache=cache).states.tolist() == first.states.tolist()
        with np.load(cache) as stored:
            np.testing.assert_array_equal(stored[name], arrays[name])
    # An index that is possible, but not of these bytes: seen when the unit is decoded.
    np.savez(cache, **{**arrays, "states": arrays["states"][::-1].copy(), "arcs": arrays["arcs"] + 1})
    wrong = opened(path, index_cache=cache)
    with pytest.raises(DataError, match="the example is not the one that was there when the index was made"):
        wrong.unit(0)


def test_bad_examples_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is malformed is left out of the index; what shows only later, of its minibatch."""
    rng = np.random.default_rng(8)
    good = [random_chain(rng) for _ in range(4)]
    whole = [(f"u{i}", case.encoded()) for i, case in enumerate(good)]
    whole[1] = ("u1", whole[1][1].replace(b"<FramesPerSeq>", b"<FramesPerXXX>"))
    infinite = good[2].encoded()
    at_value = infinite.index(b"FM ") + 13
    whole[2] = ("u2", infinite[:at_value] + struct.pack("<f", np.inf) + infinite[at_value + 4 :])
    path = tmp_path / "cegs.1.ark"
    path.write_bytes(b"".join(key.encode() + b" " + data for key, data in whole))
    assert refused(path).key == "u1"
    examples = opened(path, skip_bad=1)
    assert (examples.num_units, examples.num_bad) == (3, 1)
    with pytest.raises(DataError, match="not a finite number"):
        examples.unit(1)
    with MinibatchReader(examples, None, 3, seed=0, shuffle=False, skip_bad=1, num_epochs=1) as reader:
        (minibatch,) = [batch.map(lambda _, array: array.copy()) for batch in reader]
        assert reader.counters().bad == 1
    assert "key u2" in caplog.text
    assert (minibatch.frames, minibatch.global_frames, minibatch.feats.shape[0]) == (8, 12, 2)
    np.testing.assert_array_equal(minibatch.feats, np.concatenate([good[0].feats, good[3].feats]))
    assert minibatch.supervision is not None
    assert minibatch.supervision.first_state.tolist() == [0, good[0].fsts[0].states, len(minibatch.supervision.finals)]
    with MinibatchReader(examples, None, 3, seed=0, num_epochs=1) as reader, pytest.raises(DataError) as caught:
        next(reader)
    assert caught.value.key == "u2"


def test_buffers_hold_the_largest_minibatch(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    path = write_cegs(tmp_path / "cegs.1.ark", [(f"u{i}", random_chain(rng, frames=2 + i % 2)) for i in range(12)])
    examples = opened(path)
    (buffer,) = new_buffers(examples, None, 4, 1)
    assert buffer.finals is not None
    states = [sorted(examples.states[examples.shape_of == group].tolist())[-4:] for group in (0, 1)]
    assert len(buffer.finals) == max(map(sum, states))
    with MinibatchReader(examples, None, 4, seed=0, num_epochs=20, buffers=[buffer]) as reader:
        assert sum(batch.frames for batch in reader) == 20 * examples.total_frames
    with pytest.raises(ConfigError, match="a minibatch buffer has no nexts, and the data have"):
        MinibatchReader(examples, None, 4, seed=0, buffers=[buffer._replace(nexts=None)])
    short = buffer._replace(finals=buffer.finals[1:])
    with pytest.raises(ConfigError, match="a minibatch buffer's finals are float32 with"):
        MinibatchReader(examples, None, 4, seed=0, buffers=[short])
    with pytest.raises(ConfigError, match="a minibatch buffer's feats are float32 with"):
        MinibatchReader(examples, None, 5, seed=0, buffers=[buffer])
