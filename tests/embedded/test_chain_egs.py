"""Chain examples made here beside those of Kaldi's nnet3-chain-get-egs, and the program that writes a directory."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import kaldi_native_io
import numpy as np
import pytest
from numpy.typing import NDArray

from kaldi_mpi.chain.supervision import phones_of_alignment, phones_of_lattice
from kaldi_mpi.embedded.chain_chunks import ChunkWidths, chunks_at
from kaldi_mpi.embedded.chain_egs import main
from kaldi_mpi.embedded.chain_example_maker import ExampleMaker, ExampleOptions, Ivectors
from kaldi_mpi.embedded.features import read_matrix
from kaldi_mpi.errors import ConfigError, DataError, KaldiMpiError
from kaldi_mpi.formats.chain_example import ChainExample, chain_example_bytes
from kaldi_mpi.formats.compressed_matrix import CompressedMatrix, compressed_matrix_bytes
from kaldi_mpi.formats.supervision import Supervision, parse_supervision
from kaldi_mpi.loader import ChainExamples
from tests.chain.graph_data import alignments, deviation, golden_fst, golden_hmms, phone_lattices, place
from tests.embedded.chain_egs_data import UTTERANCES, entries, make_dirs
from tests.paths import golden, kaldi_root

ROUNDING = 1 / 1024  # of costs in Kaldi's determinisation; ours has none
SMALL = [
    "--frames-per-eg=60,45", "--left-context=7", "--right-context=7", "--cmvn-opts=--norm-means=false",
    "--num-utts-subset=1", "--frames-per-iter=300",
]  # fmt: skip


def place_of_feats(key: str) -> tuple[Path, int]:
    path = golden("chain/sup/feats.ark")
    return path, path.read_bytes().index(f"{key} ".encode()) + len(key) + 1


def golden_feats(key: str) -> CompressedMatrix:
    path, offset = place_of_feats(key)
    found = CompressedMatrix.read(str(path), offset)
    assert found is not None
    return found


def values(key: str) -> NDArray[np.float32]:
    path, offset = place_of_feats(key)
    return read_matrix(f"{path}:{offset}")


def supervision_in(entry: tuple[bytes, bytes, bytes]) -> Supervision:
    return parse_supervision(entry[1], file="example")[0]


def same(ours: Supervision, theirs: Supervision, limit: float) -> float:
    """All but the FSTs is equal, these in size and in sums over strings; how far they are apart."""
    plain = [replace(one, fsts=(), alignment_pdfs=None).__dict__ for one in (ours, theirs)]
    assert plain[0] == plain[1]
    (one,), (other,) = ours.fsts, theirs.fsts
    assert (one.num_states, one.num_arcs) == (other.num_states, other.num_arcs)
    found = deviation(one, other, theirs.frames_per_sequence, theirs.label_dim)
    assert found <= limit
    return found


@pytest.mark.parametrize(
    "name, constrained, ends, limit",
    [("egs", True, -1, ROUNDING), ("egs_overlap", True, 0, ROUNDING), ("egs_unconstrained", False, -1, 1e-12)],
)
def test_examples_are_kaldis(name: str, constrained: bool, ends: int, limit: float) -> None:
    """At the places of Kaldi's chunks: inputs, index lists and derivative weights to the byte, supervision as sums."""
    options = ExampleOptions(ChunkWidths((60, 45), 3), 7, 7, ends, ends, constrained=constrained)
    maker = ExampleMaker(golden_hmms(), golden_fst("normalization.fst"), options)
    kaldis = entries(golden(f"chain/sup/{name}.ark"))
    for key in UTTERANCES:
        theirs = {place(at)[1]: entry for at, entry in kaldis.items() if place(at)[0] == key}
        feats, widths = golden_feats(key), [3 * supervision_in(entry).frames_per_sequence for entry in theirs.values()]
        chunks = chunks_at(list(theirs), widths, len(feats), 3)
        made = maker.make(key, feats, phones_of_lattice(phone_lattices()[key]), chunks=chunks)
        assert [found for found, _ in made] == [f"{key}-{first}" for first in theirs]
        for (found, data), (head, supervision, rest) in zip(made, theirs.values(), strict=True):
            at, after = data.index(b"<Supervision>"), data.index(b"<DW2>")
            assert data[:at] == found.encode() + b" " + head
            assert data[after:] == rest
            same(parse_supervision(data, at, file="ours")[0], supervision_in((b"", supervision, b"")), limit)
    assert not maker.dropped


def test_entries_are_written_as_kaldis(tmp_path: Path) -> None:
    """Each entry of golden archives, merged ones aside, read in parts and written again."""
    count = 0
    for name in ("egs", "egs_unconstrained", "egs_overlap"):
        for key, (head, supervision, rest) in entries(golden(f"chain/sup/{name}.ark")).items():
            (tmp_path / "matrix").write_bytes(b"\0B" + head[head.index(b"CM ") :])
            feats = CompressedMatrix.read(f"{tmp_path}/matrix")
            assert feats is not None
            left = 0 if "-0-0-" in key else 7
            found = parse_supervision(supervision, file=name)[0]
            weights = np.frombuffer(rest, "<f4", found.frames_per_sequence, len("<DW2> FV ") + 5)
            example = ChainExample(feats, left, found, weights)
            assert chain_example_bytes(key, example) == key.encode() + b" " + head + supervision + rest
            count += 1
    assert count == 42


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 164])
def test_matrices_are_compressed_as_kaldi_does(tmp_path: Path, rows: int) -> None:
    """Byte by byte what Kaldi's automatic method writes (here kaldi_native_io's copy of it)."""
    rng = np.random.default_rng(rows)
    for number in range(40):
        matrix = rng.normal(rng.normal(scale=10), rng.uniform(0.01, 50), size=(rows, 13)).astype(np.float32)
        matrix[:, :number] = matrix[0, :number]  # columns of one value; in the end all
        if number > 30:
            matrix[:] = number - 35
        with kaldi_native_io.CompressedMatrixWriter(f"ark:{tmp_path}/ark") as writer:
            writer.write("k", matrix, kaldi_native_io.CompressionMethod.kAutomaticMethod)
        assert (tmp_path / "ark").read_bytes() == b"k \0B" + compressed_matrix_bytes(matrix)
        found = CompressedMatrix.read(f"{tmp_path}/ark", 2)
        assert (found is None) == (rows <= 8)
        if found is not None:
            assert found.shape == matrix.shape and found.tobytes() == compressed_matrix_bytes(matrix)
            (tmp_path / "cut").write_bytes((tmp_path / "ark").read_bytes()[:-1])
            with pytest.raises(DataError, match="truncated in a compressed matrix"):
                CompressedMatrix.read(f"{tmp_path}/cut", 2)
    for bad in (np.zeros((0, 3), np.float32), np.full((9, 2), np.nan, np.float32)):
        with pytest.raises(ValueError, match="empty, or has elements that are not finite"):
            compressed_matrix_bytes(bad)


def test_long_contexts_and_ivectors(tmp_path: Path) -> None:
    """Times beyond a byte's range, the repeated first and last frame, the i-vector of a labelled frame: read back."""
    key = UTTERANCES[1]
    feats, phones = values(key), phones_of_alignment(alignments()[key])
    ivectors = Ivectors(np.arange(120, dtype=np.float32).reshape(40, 3), 10)
    options = ExampleOptions(ChunkWidths((60,), 3), 150, 130, compress=False)
    maker = ExampleMaker(golden_hmms(), golden_fst("normalization.fst"), options)
    made = maker.make(key, feats, phones, ivectors)
    (tmp_path / "cegs.ark").write_bytes(b"".join(entry for _, entry in made))
    examples = ChainExamples.open(tmp_path / "cegs.ark", shifts=False)
    assert (examples.feat_dim, examples.ivector_dim, examples.num_units) == (40, 3, len(made))
    for number in range(examples.num_units):
        unit, first = examples.unit(number), place(examples.location_of(number)[1])[1]
        times = np.clip(np.arange(first - 150, first + 60 + 130), 0, len(feats) - 1)
        np.testing.assert_array_equal(unit.feats[0], feats[times])
        assert unit.ivectors is not None
        period = int(unit.ivectors[0, 0]) // 3
        assert (
            first // 10 <= period <= (first + 59) // 10 and unit.ivectors[0].tolist() == ivectors.rows[period].tolist()
        )


def test_what_gives_no_example() -> None:
    """Reasons are counted; features that are no numbers are told of."""
    key, maker = (
        UTTERANCES[0],
        ExampleMaker(golden_hmms(), golden_fst("normalization.fst"), ExampleOptions(ChunkWidths((60, 45), 3))),
    )
    feats = values(key)
    for segments, frames, reason in (
        ([(1, 1), (47, 1), (21, 1), (48, 1)], 4, "utterances with more phones than output frames"),
        ([(1, 90)], 80, "utterances whose labels and features differ in length"),
        ([(1, 44)], 44, "utterances shorter than all widths"),
        ([(1, 20), (48, 20), (27, 20)], 60, "chunks that normalization.fst does not know"),
    ):
        maker.dropped.clear()
        assert maker.make(key, feats[:frames], phones_of_alignment(segments)) == []
        assert set(maker.dropped) == {reason}
    with pytest.raises(DataError, match=f"key {key}: its features are not all finite"):
        maker.make(key, feats * np.float32(np.inf), phones_of_alignment([(1, 186)]))


def files_of(egs: Path) -> dict[str, bytes]:
    return {str(path.relative_to(egs)): path.read_bytes() for path in egs.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["ali", "lat"])
def test_directory(tmp_path: Path, kind: str) -> None:
    """From alignments and from lattices: read back with info, held-out utterances apart, the same for any --nj."""
    data, chain, ali, lat = make_dirs(tmp_path)
    words = [*SMALL, str(data), str(chain), str({"ali": ali, "lat": lat}[kind])]
    main(["--nj=2", *words, str(tmp_path / "egs")])
    egs = tmp_path / "egs"
    info = {path.name: path.read_text().strip() for path in (egs / "info").iterdir()}
    frames = sum(len(golden_feats(key)) for key in UTTERANCES)
    assert info == {
        "feat_dim": "40", "ivector_dim": "0", "left_context": "7", "right_context": "7", "left_context_initial": "-1",
        "right_context_final": "-1", "frames_per_eg": "60,45", "num_pdfs": "56", "num_frames": str(frames),
        "num_archives": str(frames // 300 + 1), "egs_per_archive": info["egs_per_archive"],
    }  # fmt: skip
    assert (egs / "cmvn_opts").read_text() == "--norm-means=false\n"
    archives = [entries(egs / f"cegs.{number + 1}.ark") for number in range(frames // 300 + 1)]
    train = [key for archive in archives for key in archive]
    assert len(train) == len(set(train)) and len(train) // len(archives) == int(info["egs_per_archive"])
    assert max(map(len, archives)) - min(map(len, archives)) <= 1
    (held_out,), (shown,) = ((egs / f"{name}_uttlist").read_text().split() for name in ("valid", "train_subset"))
    assert {place(key)[0] for key in train} == {*UTTERANCES} - {held_out} and shown != held_out
    for name, utterance in (("valid_diagnostic", held_out), ("train_diagnostic", shown), ("combine", shown)):
        assert {place(key)[0] for key in entries(egs / f"{name}.cegs")} == {utterance}
    examples = ChainExamples.open(egs, frame_subsampling_factor=3)
    assert (examples.num_units, examples.feat_dim, examples.num_pdfs) == (len(train), 40, 56)
    for number in range(examples.num_units):
        key, first = place(examples.location_of(number)[1])
        found = examples.unit(number).feats[0]
        times = np.clip(np.arange(first - 7, first - 7 + len(found)), 0, len(golden_feats(key)) - 1)
        np.testing.assert_array_equal(found, values(key)[times])
    main(["--nj=1", *words, str(tmp_path / "again")])
    assert files_of(tmp_path / "again") == files_of(egs)
    main(["--srand=1", *words, str(tmp_path / "seed")])
    assert files_of(tmp_path / "seed")["cegs.1.ark"] != files_of(egs)["cegs.1.ark"]
    assert not list(tmp_path.glob(".*"))


def test_options_have_their_effect(tmp_path: Path) -> None:
    """Each of those that test_directory does not show."""
    data, chain, _, lat = make_dirs(tmp_path)
    egs = tmp_path / "egs"

    def make(*more: str) -> dict[str, tuple[bytes, bytes, bytes]]:
        main([*SMALL, *more, str(data), str(chain), str(lat), str(egs)])
        archives = sorted(egs.glob("cegs.*.ark"))
        return {key: entry for path in archives for key, entry in entries(path).items()}

    plain = make()
    loose = make("--left-tolerance=9")
    assert loose.keys() == plain.keys() and any(loose[key][1] != plain[key][1] for key in plain)
    assert all(loose[key][::2] == plain[key][::2] for key in plain)
    assert all(make("--right-tolerance=9")[key][1] != loose[key][1] for key in plain)
    free = make("--constrained=false")
    assert {supervision_in(entry).end2end for entry in free.values()} == {True}
    assert len(make("--compress=false")[next(iter(plain))][0]) > 3 * len(plain[next(iter(plain))][0])
    assert (egs / "info" / "num_archives").read_text() != "1\n"
    make("--frames-per-iter=100000")
    assert (egs / "info" / "num_archives").read_text() == "1\n" and not (egs / "cegs.2.ark").exists()
    scaled = make("--lattice-lm-scale=0.5")
    assert any(scaled[key][1] != plain[key][1] for key in plain)
    ends = make("--left-context-initial=0", "--right-context-final=2")
    shapes = {(unit.left, unit.right - 2) for unit in ChainExamples.open(egs, shifts=False).shapes}
    assert shapes == {(0, 7), (7, 7), (7, 2)} and ends.keys() == plain.keys()
    make("--num-egs-diagnostic=1", "--num-train-egs-combine=2", "--num-valid-egs-combine=1")
    counts = [len(entries(egs / f"{name}.cegs")) for name in ("valid_diagnostic", "train_diagnostic", "combine")]
    assert counts == [1, 1, 3]
    whole = make("--frames-per-eg=-1", "--frames-per-iter=100000")
    assert {key.rsplit("-", 1)[1] for key in whole} == {"0"} and len(whole) == 2
    assert [unit.width for unit in ChainExamples.open(egs, shifts=False).shapes] == [
        len(golden_feats(place(key)[0])) // 3 for key in whole
    ]
    (egs / ".nodelete").touch()
    make("--cmd=run.pl", "--stage=3")
    assert (egs / ".nodelete").exists()


def test_ivectors_and_versions(tmp_path: Path) -> None:
    """i-vectors are in the examples; versions of an utterance are held out together."""
    data, chain, _, lat = make_dirs(tmp_path)
    (data / "utt2uniq").write_text("".join(f"{key} {number // 2}\n" for number, key in enumerate(UTTERANCES)))
    extractor = tmp_path / "ivectors"
    extractor.mkdir()
    with kaldi_native_io.FloatMatrixWriter(f"ark,scp:{extractor}/ark,{extractor}/ivector_online.scp") as writer:
        for number, key in enumerate(UTTERANCES):
            writer.write(key, np.full((40, 5), number, np.float32))
    (extractor / "ivector_period").write_text("10\n")
    (extractor / "final.ie.id").write_text("abc\n")
    held_out = set()
    for seed in range(8):
        words = [f"--srand={seed}", f"--online-ivector-dir={extractor}", *SMALL, str(data), str(chain), str(lat)]
        main([*words, str(tmp_path / "egs")])
        held_out.add(tuple((tmp_path / "egs" / "valid_uttlist").read_text().split()))
    assert held_out == {UTTERANCES[:2], UTTERANCES[2:]}
    assert (tmp_path / "egs" / "info" / "final.ie.id").read_text() == "abc\n"
    examples = ChainExamples.open(tmp_path / "egs", shifts=False)
    assert examples.ivector_dim == 5
    for number in range(examples.num_units):
        ivectors = examples.unit(number).ivectors
        assert ivectors is not None
        np.testing.assert_allclose(ivectors, UTTERANCES.index(place(examples.location_of(number)[1])[0]), atol=1e-4)


def test_what_was_there_stays_until_the_new_is_complete(tmp_path: Path) -> None:
    data, chain, ali, lat = make_dirs(tmp_path)
    words, egs = [*SMALL, str(data), str(chain)], tmp_path / "egs"
    main([*words, str(ali), str(egs)])
    before = files_of(egs)
    shutil.copy(lat / "lat.1.gz", lat / "lat.2.gz")
    with pytest.raises(KaldiMpiError, match=f"key {UTTERANCES[0]}: .*in more than one file"):
        main([*words, str(lat), str(egs)])
    assert files_of(egs) == before and not list(tmp_path.glob(".*"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "final.mdl").touch()
    with pytest.raises(ConfigError, match="model is there and is no directory of examples: it is not replaced"):
        main([*words, str(ali), str(tmp_path / "model")])


def test_what_is_refused(tmp_path: Path) -> None:
    data, chain, ali, lat = make_dirs(tmp_path)
    dirs = [str(data), str(chain), str(ali), str(tmp_path / "egs")]
    for word in ("--frames-overlap-per-eg=5", "--online-cmvn=true", "--deriv-weights-scp=w.scp"):
        with pytest.raises(ConfigError, match=f"{word.split('=')[0]} .*: this is not done here"):
            main([*SMALL, word, *dirs])
    for word, message in (
        ("--left-tolerance=x", "expected a number"),
        ("--num-utts-subset=0", "expected a number from 1"),
        ("--alignment-subsampling-factor=20", "at most one more than their sum"),
        ("--lattice-lm-scale=0.5", "is for lattices"),
        ("--constrained=no", "expected true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([*SMALL, word, *dirs])
    with pytest.raises(DataError, match="3 utterances are too few for two subsets of 2"):
        main([*SMALL, "--num-utts-subset=2", *dirs])
    with pytest.raises(DataError, match=r"examples for [0-9]+ archives: use a larger --frames-per-iter"):
        main([*SMALL, "--frames-per-iter=1", *dirs])
    with pytest.raises(DataError, match=r"data: no ali\.\*\.gz and no lat\.\*\.gz in this directory"):
        main([*SMALL, *dirs[:2], str(data), dirs[3]])
    data_of = gzip.decompress((lat / "lat.1.gz").read_bytes())
    (lat / "lat.1.gz").write_bytes(gzip.compress(golden("chain/decode/lat.ark").read_bytes()))
    with pytest.raises(KaldiMpiError, match=r"lat\.1\.gz, key \S+: .*lattice-align-phones"):
        main([*SMALL, *dirs[:2], str(lat), dirs[3]])
    (lat / "lat.1.gz").write_bytes(gzip.compress(data_of)[:-30])
    with pytest.raises(KaldiMpiError, match=r"lat\.1\.gz: cannot read"):
        main([*SMALL, *dirs[:2], str(lat), dirs[3]])
    assert not (tmp_path / "egs").exists()


def run(folder: Path, command: str) -> str:
    """Run programs of Kaldi; what they log."""
    folders = [kaldi_root() / "src" / name for name in ("bin", "chainbin", "nnet3bin")]
    environment = os.environ | {"PATH": ":".join(map(str, folders)) + ":" + os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", "set -e -o pipefail; " + command],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.kaldi
def test_kaldi_takes_the_directory(tmp_path: Path) -> None:
    """Its programs read each archive, and whole utterances have the objective of those that it makes itself."""
    data, chain, ali, _ = make_dirs(tmp_path)
    main([*SMALL, str(data), str(chain), str(ali), str(tmp_path / "egs")])
    for path in sorted((tmp_path / "egs").glob("*cegs*")):
        said = run(tmp_path, f"nnet3-chain-copy-egs ark:{path} ark:copied")
        count = len(entries(path))
        assert f"Read {count} neural-network training examples, wrote {count}" in said
        assert (tmp_path / "copied").read_bytes().count(b"<Nnet3ChainEg>") == count

    def objective(egs: str) -> tuple[float, float]:
        merged = f"ark:nnet3-chain-merge-egs --minibatch-size=1 ark:{egs} ark:- |"
        words = f"--leaky-hmm-coefficient=0.1 {golden('chain/net/start.raw')} {golden('chain/den.fst')} '{merged}'"
        said = run(tmp_path, f"nnet3-chain-compute-prob {words}")
        (found,) = re.findall(r"for 'output' is (\S+) per frame, over (\S+) frames", said)
        return float(found[0]), float(found[1])

    main([*SMALL, "--frames-per-eg=-1", "--frames-per-iter=100000", str(data), str(chain), str(ali),
          str(tmp_path / "whole")])  # fmt: skip
    (held_out,) = (tmp_path / "whole" / "valid_uttlist").read_text().split()
    segments = " ; ".join(f"{phone} {frames}" for phone, frames in alignments()[held_out])
    (tmp_path / "phones").write_text(f"{held_out} {segments}\n")
    path, offset = place_of_feats(held_out)
    (tmp_path / "feats.scp").write_text(f"{held_out} {path}:{offset}\n")
    run(
        tmp_path,
        f"chain-get-supervision --lattice-input=false --frame-subsampling-factor=3 {chain}/tree {chain}/0.trans_mdl "
        "ark:phones ark:- | "
        f"nnet3-chain-get-egs --num-frames=-1 --left-context=7 --right-context=7 --frame-subsampling-factor=3 "
        f"{chain}/normalization.fst scp:feats.scp ark:- ark:kaldis",
    )
    ours, theirs = objective("whole/valid_diagnostic.cegs"), objective("kaldis")
    assert ours[1] == theirs[1] == len(golden_feats(held_out)) // 3
    assert ours[0] == pytest.approx(theirs[0], abs=2e-5)
