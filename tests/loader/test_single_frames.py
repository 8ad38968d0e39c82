"""Single frames, as train_dnn.py takes them: each labelled one once an epoch with its context, drawn over the pool."""

from __future__ import annotations

import dataclasses
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.loader import Chunking, ChunkPlan, ChunkShape, Corpus, Examples, MinibatchReader, NumpyMinibatch, Source
from kaldi_mpi.testing.examples import SparseRows, read_examples
from tests.egs_data import Chunk, chunk_example, merged_example, random_chunk, write_egs
from tests.loader_data import KINDS, write_corpus
from tests.paths import golden, kaldi_root

SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LEFT, RIGHT = 2, 1
FRAME = ChunkShape(1, LEFT, RIGHT)
MANY = 4000  # pdf-ids: each frame has one of its own, by which it is known


@dataclasses.dataclass
class Frame:
    """What a reader is to deliver for one frame, by plain indexing."""

    feats: np.ndarray
    weight: float = 1.0
    ivector: np.ndarray | None = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frames")


def make_chunks(widths: Sequence[int], *, ivector: int = 0, weights: bool = False, gaps: bool = False) -> list[Chunk]:
    """Chunks with contexts of at least LEFT and RIGHT, and a pdf-id of its own for each labelled frame."""
    rng, label, chunks = np.random.default_rng(len(widths)), 0, []
    for number, width in enumerate(widths):
        chunk = random_chunk(
            rng, kind=KINDS[number % len(KINDS)], width=width, left=LEFT + number % 3, right=RIGHT + number % 2,
            ivector=ivector, weights=weights, first=number % 4, num_pdfs=MANY,
        )  # fmt: skip
        for t, row in enumerate(chunk.posteriors):
            row[:] = [] if gaps and t > 0 and (t + number) % 3 == 0 else [(label, row[0][1])]
            label += len(row)
        chunks.append(chunk)
    return chunks


def frames_of(chunks: Sequence[Chunk]) -> dict[int, Frame]:
    """Each labelled frame of the chunks, by its pdf-id."""
    frames = {}
    for chunk in chunks:
        for t, row in enumerate(chunk.posteriors):
            for pdf, weight in row:
                rows = slice(chunk.left + t - LEFT, chunk.left + t + RIGHT + 1)
                frames[pdf] = Frame(chunk.feats[rows], weight, chunk.ivector)
    return frames


def open_examples(folder: Path, chunks: Sequence[Chunk], merged: int = 1) -> Examples:
    """Of two archives; the second one's examples are of `merged` chunks each."""
    half = len(chunks) // 2 if merged > 1 else len(chunks) - 1
    plain = {f"eg{i}": chunk_example(chunk, num_pdfs=MANY) for i, chunk in enumerate(chunks[:half])}
    rest = chunks[half:]
    groups = [rest[at : at + merged] for at in range(0, len(rest), merged)]
    together = {
        f"merged-{i}": merged_example(group, num_pdfs=MANY, interleaved=i % 2 == 1) for i, group in enumerate(groups)
    }
    return Examples.open([write_egs(folder / "egs.1.ark", plain), write_egs(folder / "egs.2.ark", together)])


def copies(reader: MinibatchReader) -> Iterator[NumpyMinibatch]:
    """Minibatches that stay valid."""
    with reader:
        for m in reader:
            yield m.map(lambda _, array: array.copy())


def check_epochs(source: Source, frames: dict[int, Frame], size: int, chunks: int, epochs: int = 2, **how: Any) -> None:
    """All ranks' readers together deliver each frame once an epoch, as it should be."""
    seen = [Counter[int]() for _ in range(epochs)]
    plan = ChunkPlan(source, FRAME, chunks, size=size, seed=how["seed"], memory=how["memory"])
    for rank in range(size):
        reader = MinibatchReader(source, FRAME, chunks, rank=rank, size=size, num_epochs=epochs, **how)
        for m in copies(reader):
            assert m.shape == FRAME and m.first == -LEFT
            assert m.feats.shape == (len(m.labels), LEFT + 1 + RIGHT, source.feat_dim)
            assert m.frames == len(m.labels) <= chunks
            assert m.global_frames == plan.frames_of_step(m.step)
            seen[m.epoch].update(m.labels[:, 0].tolist())
            for i, label in enumerate(m.labels[:, 0].tolist()):
                np.testing.assert_array_equal(m.feats[i], frames[label].feats)
                assert m.weights is None or m.weights[i, 0] == np.float32(frames[label].weight)
                if m.ivectors is not None:
                    np.testing.assert_array_equal(m.ivectors[i], frames[label].ivector)
    assert seen == [Counter(list(frames))] * epochs


@SETTINGS
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=9), merged=st.integers(1, 3),
    ivector=st.sampled_from([0, 2]), weights=st.booleans(), gaps=st.booleans(), size=st.integers(1, 4),
    chunks=st.integers(1, 7), threads=st.integers(1, 3), memory=st.sampled_from([1, 900, 10**6]),
    seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_each_labelled_frame_of_examples_once_an_epoch(
    folder: Path, widths: list[int], merged: int, ivector: int, weights: bool, gaps: bool, size: int, chunks: int,
    threads: int, memory: int, seed: int,
) -> None:  # fmt: skip
    made = make_chunks(widths, ivector=ivector, weights=weights, gaps=gaps)
    examples = open_examples(folder, made, merged)
    frames = frames_of(made)
    assert examples.total_frames == len(frames)
    check_epochs(examples, frames, size, chunks, seed=seed, memory=memory, threads=threads)


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), size=st.integers(1, 4), chunks=st.integers(1, 7),
    memory=st.sampled_from([1, 300, 10**6]), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_each_frame_of_utterances_once_an_epoch(
    folder: Path, lengths: list[int], size: int, chunks: int, memory: int, seed: int
) -> None:
    written = write_corpus(folder, lengths)
    frames = {}
    for key, labels in written.labels.items():
        for t, label in enumerate(labels.tolist()):
            rows = np.clip(np.arange(t - LEFT, t + RIGHT + 1), 0, len(labels) - 1)
            frames[label] = Frame(written.feats[key][rows])
    corpus = Corpus.open(written.scp, written.labels)
    assert ChunkPlan(corpus, FRAME, chunks, size=1, seed=seed).num_chunks == corpus.total_frames
    check_epochs(corpus, frames, size, chunks, seed=seed, memory=memory)


def test_several_labels_of_a_frame(folder: Path) -> None:
    rng = np.random.default_rng(3)
    chunks = [random_chunk(rng, width=5, pairs=1 + i % 3, weights=True) for i in range(6)]
    egs = {f"eg{i}": chunk_example(chunk) for i, chunk in enumerate(chunks)}
    examples = Examples.open(write_egs(folder / "several.egs", egs))
    with MinibatchReader(examples, ChunkShape(1, 0, 0), 30, seed=0, num_epochs=1, shuffle=False) as reader:
        m = next(reader)
        assert m.weights is not None and m.labels.shape == (30, 1, 3)
        for i in range(30):
            wanted = chunks[i // 5].posteriors[i % 5]
            there = m.labels[i, 0] >= 0
            assert list(zip(m.labels[i, 0][there].tolist(), m.weights[i, 0][there].tolist(), strict=True)) == wanted


def test_a_minibatch_is_drawn_over_the_whole_pool(folder: Path) -> None:
    """Of 200 examples or utterances with 8 frames each, 100 frames drawn without return meet 79.5 on average."""
    chunks = make_chunks([8] * 200)
    examples = open_examples(folder, chunks)
    written = write_corpus(folder, [8] * 200)
    for source in (examples, Corpus.open(written.scp, written.labels)):
        minibatches = list(copies(MinibatchReader(source, FRAME, 100, seed=1, num_epochs=1)))
        distinct = [len(set((m.labels[:, 0] // 8).tolist())) for m in minibatches]
        assert len(distinct) == 16
        # By counting pairs, the expectation is 200 * (1 - C(1592, 100) / C(1600, 100)); the deviation is about 3.
        assert 76 < np.mean(distinct) < 83
        assert min(distinct) > 66
        gaps = [
            np.ptp(np.flatnonzero(np.concatenate([m.labels[:, 0] for m in minibatches]) // 8 == i)) for i in range(200)
        ]
        assert np.median(gaps) > 1000  # of 1600: 8 places drawn at random span 7/9 of them


def test_orders_depend_on_seed_and_epoch_alone(folder: Path) -> None:
    examples = open_examples(folder, make_chunks([8] * 40))

    def order(**how: Any) -> list[int]:
        options = {"seed": 0, "num_epochs": 2, "memory": 5000, **how}
        return [
            label for m in copies(MinibatchReader(examples, FRAME, 30, **options)) for label in m.labels[:, 0].tolist()
        ]

    first = order()
    assert first == order(threads=3, depth=7)
    assert len({tuple(first[:320]), tuple(first[320:]), tuple(order(seed=1)[:320])}) == 3
    assert order(shuffle=False) == [*range(320), *range(320)]


def test_positions_and_requests(folder: Path) -> None:
    """What holds for chunks holds for single frames: a reader goes on anywhere, and reads what it is asked for."""
    examples = open_examples(folder, make_chunks([8] * 20))
    whole = list(copies(MinibatchReader(examples, FRAME, 30, seed=4, num_epochs=2, memory=4000)))
    position = ChunkPlan(examples, FRAME, 30, size=1, seed=4, memory=4000).position(7)
    rest = list(copies(MinibatchReader(examples, FRAME, 30, seed=4, num_epochs=2, memory=4000, start=position)))
    asked = MinibatchReader(examples, FRAME, 30, seed=4, memory=4000, on_request=True)
    for step in (9, 2):
        asked.request(step)
    asked.finish()
    pairs = [*zip(whole[7:], rest, strict=True), *zip([whole[9], whole[2]], copies(asked), strict=True)]
    assert len(pairs) == len(whole) - 7 + 2
    for a, b in pairs:
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.feats, b.feats)
    with pytest.raises(ConfigError, match="another order of the data"):
        ChunkPlan(examples, None, 30, size=1, seed=4, memory=4000, start=position)


def test_frames_of_a_bad_example_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    chunks = make_chunks([8] * 6)
    bad = random_chunk(np.random.default_rng(0), kind="FM", width=8, left=LEFT, right=RIGHT)
    bad.feats[4:7] = np.nan
    egs = {f"eg{i}": chunk_example(chunk, num_pdfs=MANY) for i, chunk in enumerate(chunks)}
    head, values = chunk_example(bad, num_pdfs=MANY), bad.matrices["input"]
    spoiled = values[: -bad.feats.nbytes] + bad.feats.astype("<f4").tobytes()
    examples = Examples.open(write_egs(folder / "bad.egs", {**egs, "spoiled": head.replace(values, spoiled)}))
    assert examples.num_units == 7
    minibatches = list(copies(MinibatchReader(examples, FRAME, 7, seed=0, num_epochs=1, skip_bad=1)))
    assert sum(m.frames for m in minibatches) == 48 + sum(
        not np.isnan(bad.feats[t : t + LEFT + 1 + RIGHT]).any() for t in range(8)
    )
    assert sum(m.global_frames for m in minibatches) == 56
    assert all((m.feats[m.labels[:, 0] < 0] == 0).all() for m in minibatches)
    assert caplog.text.count("left out") == 1 and "spoiled" in caplog.text


def test_what_examples_cannot_be_cut_into(folder: Path) -> None:
    examples = open_examples(folder, make_chunks([8] * 6))
    for chunking in (ChunkShape(2, 0, 0), ChunkShape(1, 0, 0, 1), Chunking((1,), 0, 0)):
        with pytest.raises(ConfigError, match="take no chunking but one of single frames"):
            ChunkPlan(examples, chunking, 3, size=1, seed=0)
    with pytest.raises(ConfigError, match="examples with 2 context rows on the left, and 3 are needed"):
        ChunkPlan(examples, ChunkShape(1, 3, 0), 3, size=1, seed=0)
    with pytest.raises(ConfigError, match="examples with 1 context rows on the right, and 2 are needed"):
        ChunkPlan(examples, ChunkShape(1, 0, 2), 3, size=1, seed=0)


@pytest.mark.kaldi
def test_equal_to_kaldis_frames(tmp_path: Path) -> None:
    """`nnet3-copy-egs --frame=k` and a merge of all that it gives, against the reader in the archive's order."""
    examples = Examples.open(golden("egs.ark"))
    shape = ChunkShape(1, 5, 4)
    with MinibatchReader(examples, shape, examples.total_frames, seed=0, num_epochs=1, shuffle=False) as reader:
        ours = next(reader)
    number = np.concatenate([np.arange(frames) for frames in examples.num_frames])
    programs, compared = kaldi_root() / "src" / "nnet3bin", 0
    for k in range(int(examples.num_frames.max())):
        copy = [str(programs / "nnet3-copy-egs"), f"--frame={k}", "--left-context=5", "--right-context=4"]
        subprocess.run(
            [*copy, f"ark:{golden('egs.ark')}", f"ark:{tmp_path}/frame.ark"], check=True, capture_output=True
        )
        merge = [str(programs / "nnet3-merge-egs"), f"--minibatch-size=1:{examples.num_units}"]
        subprocess.run(
            [*merge, f"ark:{tmp_path}/frame.ark", f"ark:{tmp_path}/merged.ark"], check=True, capture_output=True
        )
        mine = np.flatnonzero(number == k)
        at = 0
        for _, merged in read_examples(tmp_path / "merged.ark"):
            feats, target = merged["input"], merged["output"].matrix
            assert isinstance(target, SparseRows)
            rows = np.asarray(feats.matrix).reshape(-1, shape.rows, examples.feat_dim)
            for n, pairs in enumerate(target.rows):
                i = mine[at]
                np.testing.assert_array_equal(ours.feats[i], rows[n])
                assert [pdf for pdf, _ in pairs] == ours.labels[i].ravel().tolist()
                if ours.ivectors is not None:
                    np.testing.assert_array_equal(ours.ivectors[i], np.asarray(merged["ivector"].matrix)[n])
                at += 1
        assert at == len(mine)
        compared += at
    assert compared == examples.total_frames
