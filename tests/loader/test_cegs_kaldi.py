"""Chain examples beside what Kaldi's own programs make of the same archives: copied, shifted, merged."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.loader.chain_examples import ChainExamples, ChainUnit, shifted
from kaldi_mpi.loader.chunks import MinibatchRule
from kaldi_mpi.loader.minibatch import NumpyMinibatch
from kaldi_mpi.loader.reader import MinibatchReader
from tests.cegs_data import canonical, loops, random_chain, weights_of, write_cegs
from tests.loader_data import KINDS
from tests.paths import kaldi_root

pytestmark = pytest.mark.kaldi


def kaldi(program: str, path: Path, *options: str) -> Path:
    """The archive that a program of src/chainbin makes of another one."""
    out = path.with_name(f"by-kaldi-{path.name}")
    done = subprocess.run(
        [str(kaldi_root() / "src/chainbin" / program), *options, f"ark:{path}", f"ark:{out}"],
        capture_output=True, text=True, check=False, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def units(path: Path, factor: int = 3) -> tuple[ChainExamples, list[ChainUnit]]:
    examples = ChainExamples.open(path, shifts=False, frame_subsampling_factor=factor)
    return examples, [examples.unit(number) for number in range(examples.num_units)]


def assert_same(one: ChainUnit, other: ChainUnit, frames: int) -> None:
    np.testing.assert_array_equal(one.feats, other.feats)
    if one.ivectors is not None and other.ivectors is not None:
        np.testing.assert_array_equal(one.ivectors, other.ivectors)
    assert (one.ivectors is None) == (other.ivectors is None)
    a, b = one.supervision, other.supervision
    assert (a.weight, a.frames_per_sequence, a.num_pdfs, a.end2end) == (
        b.weight, b.frames_per_sequence, b.num_pdfs, b.end2end,
    )  # fmt: skip
    for name in ("first_state", "first_sequence", "first_arc", "finals", "pdfs", "costs", "nexts"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(weights_of(a, frames), weights_of(b, frames), rtol=1e-6)


def test_kaldi_reads_these_examples_and_copies_them(tmp_path: Path) -> None:
    """So what the writer of these tests writes is Kaldi's format, old derivative weights and other outputs included."""
    rng = np.random.default_rng(0)
    cases = [random_chain(rng, kind=kind, frames=2 + i, ivector=2) for i, kind in enumerate(KINDS)]
    cases.append(random_chain(rng, sequences=3, ivector=2, weight=0.5, alignment=True))
    for i, case in enumerate(cases):
        case.deriv_weights = rng.integers(0, 256, (len(case.feats), case.frames)).astype(np.float32) / np.float32(255)
        case.old_weights = i % 2 == 0
    cases[1].more = [cases[1].output("output-other")]
    path = write_cegs(tmp_path / "cegs.1.ark", [(f"u{i}", case) for i, case in enumerate(cases)])
    copy = kaldi("nnet3-chain-copy-egs", path)
    assert b"<DW> " in path.read_bytes()
    assert b"<DW> " not in copy.read_bytes()
    (ours, expected), (kaldis, found) = units(path), units(copy)
    assert ours.shapes == kaldis.shapes
    assert len(expected) == len(found) == len(cases)
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert_same(one, other, ours.shapes[ours.shape_of[number]].width)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_frame_shifts(factor: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    cases = [random_chain(rng, frames=3 + i, subsampling=factor, left=5, right=6) for i in range(3)]
    path = write_cegs(tmp_path / "cegs.1.ark", [(f"u{i}", case) for i, case in enumerate(cases)])
    plain, expected = units(path, factor)
    for shift in range(factor):
        kaldis, found = units(kaldi("nnet3-chain-copy-egs", path, f"--frame-shift={shift}"), factor)
        assert kaldis.shapes == [shifted(shape, shift) for shape in plain.shapes]
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert_same(one, other, plain.shapes[plain.shape_of[number]].width)


def minibatches(path: Path, rule: str) -> list[NumpyMinibatch]:
    examples = ChainExamples.open(path, shifts=False)
    with MinibatchReader(examples, None, MinibatchRule.parse(rule), seed=0, shuffle=False, num_epochs=1) as reader:
        return [minibatch.map(lambda _, array: array.copy()) for minibatch in reader]


@pytest.mark.parametrize("kind", ["one FST", "End2End"])
@pytest.mark.parametrize("rule", ["4", "17=3,2/20=5"])
def test_minibatches_are_those_that_kaldi_merges(kind: str, rule: str, tmp_path: Path) -> None:
    """Full ones in the same order, with the same FSTs; of what is left Kaldi makes smaller ones, or nothing."""
    rng = np.random.default_rng(2)
    cases = []
    for i in range(23):
        make = loops if kind == "End2End" else random_chain
        case = make(rng, frames=4 + i % 3 % 2, ivector=2)
        case.deriv_weights = rng.uniform(0.1, 1, (1, case.frames)).astype(np.float32)
        cases.append(case)
    path = write_cegs(tmp_path / "cegs.1.ark", [(f"u{i}", case) for i, case in enumerate(cases)])
    largest, ours = MinibatchRule.parse(rule), minibatches(path, rule)
    full = [m for m in ours if len(m.feats) == largest.largest(m.shape.rows)]
    merged = [m for m in minibatches(kaldi("nnet3-chain-merge-egs", path, f"--minibatch-size={rule}"), rule)
              if len(m.feats) == largest.largest(m.shape.rows)]  # fmt: skip
    assert len(full) >= 4
    assert sum(len(m.feats) for m in ours) == 23
    order = {m.feats.tobytes(): i for i, m in enumerate(full)}
    for kaldis in merged:
        m = full[order.pop(kaldis.feats.tobytes())]
        np.testing.assert_array_equal(m.ivectors, kaldis.ivectors)
        a, b = m.supervision, kaldis.supervision
        assert a is not None and b is not None
        assert (m.shape, m.frames, a.weight) == (kaldis.shape, kaldis.frames, b.weight)
        np.testing.assert_array_equal(weights_of(a, 0), weights_of(b, 0))
        if kind == "End2End":
            for name in ("first_state", "first_sequence", "first_arc", "finals", "pdfs", "costs", "nexts"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        else:
            assert b.first_sequence.tolist() == [0, len(m.feats)]
            assert canonical(a) == canonical(b)
    assert not order
