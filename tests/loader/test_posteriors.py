"""Posteriors: equal to Kaldi's text, mapped to pdfs as Kaldi does, and refused where they are malformed."""

from __future__ import annotations

import gzip
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.posteriors import Posterior, read_posteriors, to_pdf_posteriors
from tests.loader.test_alignments import read_text_vectors, tid_to_pdf
from tests.paths import golden

Frames = list[list[tuple[int, float]]]


def frames_of(posterior: Posterior) -> Frames:
    bounds = posterior.row_offsets.tolist()
    pairs = list(zip(posterior.ids.tolist(), posterior.weights.tolist(), strict=True))
    return [pairs[begin:end] for begin, end in itertools.pairwise(bounds)]


def binary(frames: Frames, *, double: bool = False) -> bytes:
    """A posterior as a binary archive holds it."""
    data = b"\0B\x04" + struct.pack("<i", len(frames))
    for pairs in frames:
        data += b"\x04" + struct.pack("<i", len(pairs))
        for tid, weight in pairs:
            data += b"\x04" + struct.pack("<i", tid)
            data += b"\x08" + struct.pack("<d", weight) if double else b"\x04" + struct.pack("<f", weight)
    return data


def text(frames: Frames) -> bytes:
    """And as a text archive does."""
    return "".join("[ " + "".join(f"{i} {w!r} " for i, w in pairs) + "] " for pairs in frames).encode() + b"\n"


def read_kaldis_text(path: Path) -> dict[str, Frames]:
    """``key [ id weight id weight ] [ ... ]``, one line an utterance."""
    utterances: dict[str, Frames] = {}
    for line in path.read_text().splitlines():
        key, _, rest = line.partition(" ")
        fields = [part.split() for part in rest.replace("[", "").split("]")[:-1]]
        utterances[key] = [[(int(i), float(w)) for i, w in zip(f[::2], f[1::2], strict=True)] for f in fields]
    return utterances


@pytest.mark.parametrize("name", ["post.ark", "post.txt"])
def test_posteriors_equal_kaldis(name: str) -> None:
    expected = read_kaldis_text(golden("post.txt"))
    got = read_posteriors(golden(name))
    assert {key: frames_of(posterior) for key, posterior in got.items()} == expected
    # They were made of the alignments, so their pdfs are those of the alignments.
    pdfs = to_pdf_posteriors(got, tid_to_pdf())
    assert {key: p.ids.tolist() for key, p in pdfs.items()} == read_text_vectors(golden("ali_pdf.txt"))
    assert all((p.weights == 1.0).all() and (np.diff(p.row_offsets) == 1).all() for p in pdfs.values())


FRAMES = st.lists(
    st.lists(
        st.tuples(st.integers(-(2**31), 2**31 - 1), st.floats(width=32, allow_nan=False, allow_infinity=False)),
        max_size=4,
    ),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(utterances=st.lists(st.tuples(FRAMES, st.sampled_from(["float", "double", "text"])), min_size=1, max_size=4))
def test_what_is_written_is_read(
    utterances: list[tuple[Frames, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, data = tmp_path_factory.getbasetemp() / "post", b""
    for i, (frames, how) in enumerate(utterances):
        data += b"utt%d " % i + (text(frames) if how == "text" else binary(frames, double=how == "double"))
    path.write_bytes(data)
    got = read_posteriors(path)
    assert [frames_of(posterior) for posterior in got.values()] == [frames for frames, _ in utterances]
    for posterior, (frames, _) in zip(got.values(), utterances, strict=True):
        assert posterior.num_frames == len(frames)
        assert [a.dtype.name for a in (posterior.row_offsets, posterior.ids)] == ["int64", "int32"]


def test_directories_commands_and_wanted_keys(tmp_path: Path) -> None:
    for job in (1, 2):
        (tmp_path / f"post.{job}.gz").write_bytes(gzip.compress(b"u%d " % job + binary([[(job, 0.5)], []])))
    expected = {f"u{job}": [[(job, 0.5)], []] for job in (1, 2)}
    for source in (tmp_path, f"ark:gunzip -c {tmp_path}/post.*.gz |"):
        got = read_posteriors(source)
        assert {key: frames_of(posterior) for key, posterior in got.items()} == expected
        assert list(read_posteriors(source, {"u2"})) == ["u2"]
    (tmp_path / "num_jobs").write_text("3\n")
    with pytest.raises(DataError, match=r"post\.3\.gz: missing, and num_jobs says 3"):
        read_posteriors(tmp_path)


@pytest.mark.parametrize("how", ["float", "double", "text"])
def test_every_prefix_is_refused(how: str, tmp_path: Path) -> None:
    frames: Frames = [[(3, 0.25), (70000, 0.75)], [], [(5, 1.0)]]
    entries = [b"a " + binary([[(1, 1.0)]])]
    entries.append(b"key " + (text(frames) if how == "text" else binary(frames, double=how == "double")))
    data, path, first = b"".join(entries), tmp_path / "post", len(entries[0])
    for size in range(len(data)):
        path.write_bytes(data[:size])
        if size == first:
            assert list(read_posteriors(path)) == ["a"]
            continue
        with pytest.raises(DataError) as caught:
            read_posteriors(path)
        error = caught.value
        assert error.file == str(path)
        if size == 0:
            assert error.cause == "no posteriors in it"
            continue
        start, key = (0, "a") if size < first else (first, "key")
        assert "truncated" in error.cause
        assert error.key == (key if size > start + len(key) else None)
        assert error.offset is not None
        assert start <= error.offset <= size


ENTRY = b"key " + binary([[(3, 0.25), (7, 0.75)], [(5, 1.0)]])


@pytest.mark.parametrize(
    ("at", "field", "offset", "cause"),
    [
        (0, b"\1", 0, "a key is expected here, not byte 1"),
        (3, b"\1", 3, "a space is expected after the key, not byte 1"),
        (4, b"\1", 4, "truncated archive: the last line of text has no end"),
        (5, b"C", 5, "\\0 without the B of a binary object"),
        (6, b"\x08", 6, "size byte of the number of frames is 8, not 4"),
        (7, struct.pack("<i", -1), 7, "number of frames -1 is not between 0 and 10000000"),
        (7, struct.pack("<i", 10000001), 7, "number of frames 10000001 is not between 0 and 10000000"),
        (7, struct.pack("<i", 3), len(ENTRY), "truncated archive: it ends in a posterior"),
        (7, struct.pack("<i", 1), 36, "a key is expected here, not byte 4"),
        (11, b"\0", 11, "size byte of a frame's number of ids is 0, not 4"),
        (12, struct.pack("<i", -2), 12, "frame with a negative number of ids, -2"),
        (12, struct.pack("<i", 2**31 - 1), len(ENTRY), "truncated archive: it ends in a posterior"),
        (12, struct.pack("<i", 1), len(ENTRY), "truncated archive: it ends in a posterior"),
        (16, b"\xfc", 16, "size byte of an id is 252, not 4"),
        (21, b"\x05", 21, "size byte of a weight is 5, not 4 or 8"),
        (21, b"\x08", 30, "size byte of an id is 0, not 4"),
        (22, struct.pack("<f", np.nan), 22, "a weight that is not a finite number"),
        (22, struct.pack("<f", np.inf), 22, "a weight that is not a finite number"),
    ],
)
def test_corrupted_fields(at: int, field: bytes, offset: int, cause: str, tmp_path: Path) -> None:
    data = bytearray(ENTRY)
    data[at : at + len(field)] = field
    path = tmp_path / "post"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_posteriors(path)
    error = caught.value
    assert (error.file, error.offset, error.cause) == (str(path), offset, cause)
    assert error.key == ("key" if at >= 4 and "key is expected" not in cause else error.key)


@pytest.mark.parametrize(
    ("line", "offset", "cause"),
    [
        (b"key 1 2 3\n", 4, "'[' is expected here: an archive of posteriors, not of alignments?"),
        (b"key [ 1 0.5 ] 2\n", 14, "'[' is expected here: an archive of posteriors, not of alignments?"),
        (b"key [ 1 0.5\n", 11, "the line ends before the frame's ']'"),
        (b"key [ 1 ]\n", 8, "not a finite number"),
        (b"key [ 1 nan ]\n", 8, "not a finite number"),
        (b"key [ 1 1e40 ]\n", 8, "a number beyond the range of its type"),
        (b"key [ 1 0.5x ]\n", 11, "a space is expected after a weight"),
        (b"key [ 1.5 2 ]\n", 7, "not an integer"),
        (b"key [ 2147483648 1 ]\n", 6, "integer beyond 32 bits"),
        (b"key [ 1 " + b"0" * 200 + b" ]\n", 8, "a number of more than 127 characters"),
    ],
)
def test_malformed_text(line: bytes, offset: int, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "post"
    path.write_bytes(line)
    with pytest.raises(DataError) as caught:
        read_posteriors(path)
    assert str(caught.value) == f"{path}, key key, byte offset {offset}: {cause}"


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 60), noise=st.binary(min_size=1, max_size=6), tail=st.binary(max_size=12))
def test_any_bytes_are_read_or_refused(
    at: int, noise: bytes, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(ENTRY)
    data[at : at + len(noise)] = noise
    path = tmp_path_factory.getbasetemp() / "noisy-post"
    path.write_bytes(bytes(data) + tail)
    try:
        got = read_posteriors(path)
    except DataError as error:
        assert error.file == str(path)
    else:
        assert sum(p.ids.size + p.num_frames for p in got.values()) <= len(data) + len(tail)


def test_pdfs_of_a_frame_are_added_up_in_float() -> None:
    table = np.array([-1, 4, 2, 4, 4, 0], np.int32)
    frames: Frames = [[(1, 1.0), (2, 0.5), (3, 1e-8), (4, -0.25)], [], [(5, 1.0), (5, -1.0), (2, 0.125)]]
    flat = [pair for pairs in frames for pair in pairs]
    posterior = Posterior(
        np.array([0, 4, 4, 7]),
        np.array([i for i, _ in flat], np.int32),
        np.array([w for _, w in flat], np.float32),
    )
    got = to_pdf_posteriors({"utt": posterior}, table)["utt"]
    # 1 + 1e-8 is 1 in float; pdf 0 has sum 0 in the last frame and is left out.
    assert frames_of(got) == [[(2, 0.5), (4, 0.75)], [], [(2, 0.125)]]
    assert [a.dtype.name for a in (got.row_offsets, got.ids, got.weights)] == ["int64", "int32", "float32"]
    empty = Posterior(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    assert to_pdf_posteriors({"none": empty}, table)["none"].num_frames == 0


@pytest.mark.parametrize("tid", [0, 6, -1])
def test_transition_id_that_the_model_does_not_have(tid: int) -> None:
    posterior = Posterior(np.array([0, 1, 2]), np.array([1, tid], np.int32), np.ones(2, np.float32))
    with pytest.raises(DataError) as caught:
        to_pdf_posteriors({"bad": posterior}, np.zeros(6, np.int32), source="exp/post")
    assert str(caught.value) == f"exp/post, key bad: transition-id {tid} at frame 1: the model has 1 to 5"
