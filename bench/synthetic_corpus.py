"""Synthetic Kaldi data for the loader's benches: features, alignments, i-vectors and nnet3 egs.

``python bench/synthetic_corpus.py FOLDER --hours 100 [--ivectors] [--egs]`` writes

    feats.scp, feats.ark    compressed (CM, as copy-feats --compress=true does), 40 values a frame
    utt2spk                 speakers of 50 utterances
    ali/ali.*.gz            "transition-ids", which are pdf-id + 1; ali/num_jobs
    ivectors/               ivector_online.scp, ivector_period (with --ivectors): 100 values each 10 frames
    egs/                    egs.*.ark and info/ by Kaldi's own programs (with --egs, where KALDI_ROOT is set)

Utterances last 2 to 16 s. Values follow each other as those of speech do (each 0.9 times the last one plus noise):
what a decoder's branches cost depends on that. A few hundred utterances are drawn and compressed by
`kaldi_native_io`; a longer corpus repeats their bytes under other keys, which costs a reader as much as new ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import kaldi_native_io
import numpy as np
from numpy.typing import NDArray

DIM, IVECTOR_DIM, IVECTOR_PERIOD = 40, 100, 10
FRAMES_PER_HOUR = 360_000
NUM_PDFS = 8000
SHORTEST, LONGEST = 200, 1600  # frames
UTTERANCES_PER_SPEAKER = 50
ALIGNMENT_JOBS = 4


@dataclasses.dataclass(frozen=True)
class SyntheticCorpus:
    """A corpus on disk.

    Attributes:
        folder: where everything is.
        keys: the utterances, in the order of feats.scp.
        num_frames: (utterances,) int32.
    """

    folder: Path
    keys: list[str]
    num_frames: NDArray[np.int32]

    @property
    def feats_scp(self) -> Path:
        """The script file of the features."""
        return self.folder / "feats.scp"

    @property
    def total_frames(self) -> int:
        """Over all utterances."""
        return int(self.num_frames.sum(dtype=np.int64))

    def numbered_labels(self) -> dict[str, NDArray[np.int32]]:
        """Labels that are positions in the corpus: a chunk's labels tell which chunk it is. Views of one array."""
        every = np.arange(self.total_frames, dtype=np.int32)
        return dict(zip(self.keys, np.split(every, np.cumsum(self.num_frames[:-1], dtype=np.int64)), strict=True))


def smooth_noise(rng: np.random.Generator, lengths: NDArray[np.int32], dim: int) -> list[NDArray[np.float32]]:
    """Matrices of the given lengths whose rows follow each other smoothly."""
    values = rng.standard_normal((int(lengths.max()), len(lengths), dim)).astype(np.float32)
    for t in range(1, len(values)):
        values[t] += np.float32(0.9) * values[t - 1]
    values *= np.float32(10.0) / np.arange(1, dim + 1, dtype=np.float32) ** np.float32(0.3)
    return [np.ascontiguousarray(values[:length, i]) for i, length in enumerate(lengths)]


def objects_of(archive: Path, script: Path) -> list[bytes]:
    """The objects of an archive without their keys, as its script file finds them."""
    data = archive.read_bytes()
    lines = [line.split() for line in script.read_text(encoding="utf-8").splitlines()]
    offsets = [int(place.rpartition(":")[2]) for _, place in lines]
    # The next entry's key and a space lie between the end of an object and the offset of the next one.
    ends = [at - len(key) - 1 for (key, _), at in zip(lines[1:], offsets[1:], strict=True)] + [len(data)]
    return [data[begin:end] for begin, end in zip(offsets, ends, strict=True)]


def compressed_objects(folder: Path, matrices: Sequence[NDArray[np.float32]]) -> list[bytes]:
    """Each matrix as copy-feats --compress=true writes it."""
    archive, script = folder / "distinct.ark", folder / "distinct.scp"
    with kaldi_native_io.CompressedMatrixWriter(f"ark,scp:{archive},{script}") as writer:
        for i, matrix in enumerate(matrices):
            writer.write(f"m{i}", matrix, kaldi_native_io.CompressionMethod.kAutomaticMethod)
    objects = objects_of(archive, script)
    archive.unlink()
    script.unlink()
    return objects


def full_object(matrix: NDArray[np.float32]) -> bytes:
    """A matrix without compression."""
    rows, cols = matrix.shape
    return b"\0BFM \x04" + struct.pack("<i", rows) + b"\x04" + struct.pack("<i", cols) + matrix.tobytes()


def write_repeated(folder: Path, name: str, keys: Sequence[str], objects: Sequence[bytes]) -> None:
    """``name.ark`` and ``name.scp``: the objects in turn, once for each key."""
    archive, at = folder / f"{name}.ark", 0
    with archive.open("wb") as data, (folder / f"{name}.scp").open("w", encoding="utf-8") as script:
        for i, key in enumerate(keys):
            head, value = key.encode() + b" ", objects[i % len(objects)]
            data.write(head)
            data.write(value)
            script.write(f"{key} {archive}:{at + len(head)}\n")
            at += len(head) + len(value)


def pdf_runs(rng: np.random.Generator, frames: int) -> NDArray[np.int32]:
    """Pdf-ids as an alignment has them: each for 1 to 9 frames."""
    durations = rng.integers(1, 10, size=frames)
    return np.repeat(rng.integers(0, NUM_PDFS, size=frames, dtype=np.int32), durations)[:frames]


def int_vector(values: NDArray[np.int32]) -> bytes:
    """An int32 vector as a binary archive holds it: each value behind a byte that tells its size."""
    out = np.empty((len(values), 5), np.uint8)
    out[:, 0] = 4
    out[:, 1:] = values.astype("<i4").view(np.uint8).reshape(-1, 4)
    return b"\0B\x04" + struct.pack("<i", len(values)) + out.tobytes()


def write_alignments(folder: Path, keys: Sequence[str], distinct: Sequence[NDArray[np.int32]]) -> None:
    """``ali.*.gz`` and ``num_jobs``, with pdf-id + 1 where an alignment has transition-ids."""
    folder.mkdir()
    objects = [int_vector(values + 1) for values in distinct]
    for job in range(ALIGNMENT_JOBS):
        mine = range(len(keys) * job // ALIGNMENT_JOBS, len(keys) * (job + 1) // ALIGNMENT_JOBS)
        with gzip.open(folder / f"ali.{job + 1}.gz", "wb", compresslevel=1) as stream:
            for i in mine:
                stream.write(keys[i].encode() + b" " + objects[i % len(objects)])
    (folder / "num_jobs").write_text(f"{ALIGNMENT_JOBS}\n", encoding="utf-8")


def write_corpus(
    folder: Path,
    hours: float,
    *,
    compress: bool = True,
    alignments: bool = True,
    ivectors: bool = False,
    distinct: int = 400,
    seed: int = 0,
) -> SyntheticCorpus:
    """Write a corpus of at least so many hours.

    Args:
        folder: made if it is not there.
        hours: of speech, at 100 frames a second.
        compress: CM; otherwise the same values as FM.
        alignments: write ali/ as well.
        ivectors: write ivectors/ as well.
        distinct: utterances that are drawn; more have the same bytes under other keys.
        seed: of everything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    wanted = max(1, int(hours * FRAMES_PER_HOUR))
    distinct = min(distinct, -(-wanted // SHORTEST))
    lengths = rng.integers(SHORTEST, LONGEST + 1, size=distinct, dtype=np.int32)
    repeated = np.tile(lengths, wanted // int(lengths.sum()) + 1)
    count = int(np.searchsorted(np.cumsum(repeated, dtype=np.int64), wanted)) + 1
    keys = [f"spk{i // UTTERANCES_PER_SPEAKER:05d}-utt{i:07d}" for i in range(count)]

    matrices = smooth_noise(rng, lengths, DIM)
    objects = compressed_objects(folder, matrices)
    if not compress:  # what is decoded from the compressed ones
        objects = [full_object(matrix) for matrix in decoded(folder, objects)]
    write_repeated(folder, "feats", keys, objects)
    (folder / "utt2spk").write_text("".join(f"{key} {key[:8]}\n" for key in keys), encoding="utf-8")
    if alignments:
        write_alignments(folder / "ali", keys, [pdf_runs(rng, int(n)) for n in lengths])
    if ivectors:
        (folder / "ivectors").mkdir()
        online = smooth_noise(rng, -(-lengths // IVECTOR_PERIOD), IVECTOR_DIM)
        write_repeated(folder / "ivectors", "ivector_online", keys, compressed_objects(folder, online))
        (folder / "ivectors" / "ivector_period").write_text(f"{IVECTOR_PERIOD}\n", encoding="utf-8")
    return SyntheticCorpus(folder, keys, repeated[:count].astype(np.int32))


def decoded(folder: Path, objects: Sequence[bytes]) -> Iterator[NDArray[np.float32]]:
    """What Kaldi's own code reads from compressed matrices."""
    write_repeated(folder, "distinct", [f"m{i}" for i in range(len(objects))], objects)
    with kaldi_native_io.SequentialFloatMatrixReader(f"ark:{folder / 'distinct.ark'}") as reader:
        for _, matrix in reader:
            yield np.array(matrix)
    (folder / "distinct.ark").unlink()
    (folder / "distinct.scp").unlink()


def kaldi_tool(name: str) -> Path | None:
    """A program of the Kaldi that KALDI_ROOT names, or None."""
    root = os.environ.get("KALDI_ROOT")
    if not root:
        return None
    found = sorted(Path(root).glob(f"src/*bin/{name}"))
    return found[0] if found else None


def write_egs(corpus: SyntheticCorpus, *, width: int, left: int, right: int, archives: int = 4) -> Path | None:
    """An egs directory of the corpus, by nnet3-get-egs and nnet3-shuffle-egs; None without a Kaldi.

    The script steps/nnet3/get_egs.sh runs the same programs, on more jobs.
    """
    tools = {name: kaldi_tool(name) for name in ("ali-to-post", "nnet3-get-egs", "nnet3-copy-egs", "nnet3-shuffle-egs")}
    if None in tools.values():
        return None
    folder = corpus.folder / "egs"
    (folder / "info").mkdir(parents=True)
    # Pdf-id + 1 as "transition-ids": pdf 0 has no frames, which nobody minds.
    posteriors = f"ark:gunzip -c {corpus.folder}/ali/ali.*.gz | {tools['ali-to-post']} ark:- ark:- |"
    get = [
        str(tools["nnet3-get-egs"]),
        f"--num-pdfs={NUM_PDFS + 1}",
        f"--left-context={left}",
        f"--right-context={right}",
        f"--num-frames={width}",
        f"scp:{corpus.feats_scp}",
        posteriors,
    ]
    parts = [f"ark:{folder}/egs_orig.{i + 1}.ark" for i in range(archives)]
    run([*get, f"ark:| {tools['nnet3-copy-egs']} --random=true ark:- {' '.join(parts)}"])
    for i, part in enumerate(parts):
        run([str(tools["nnet3-shuffle-egs"]), part, f"ark:{folder}/egs.{i + 1}.ark"])
        Path(part.removeprefix("ark:")).unlink()
    info = {
        "num_archives": archives,
        "num_frames": corpus.total_frames,
        "frames_per_eg": width,
        "egs_per_archive": corpus.total_frames // (width * archives),
        "feat_dim": DIM,
        "ivector_dim": 0,
        "left_context": left,
        "right_context": right,
        "left_context_initial": -1,
        "right_context_final": -1,
    }
    for name, value in info.items():
        (folder / "info" / name).write_text(f"{value}\n", encoding="utf-8")
    return folder


def run(command: list[str]) -> None:
    """Run a program of Kaldi, and show what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")


def main() -> int:
    """Write a corpus."""
    parser = argparse.ArgumentParser(description="Writes a synthetic corpus in Kaldi's formats.")
    parser.add_argument("folder", type=Path, help="to write into; must be empty or not there")
    parser.add_argument("--hours", type=float, default=1.0, help="of speech; 14 MB an hour")
    parser.add_argument("--ivectors", action="store_true", help="online i-vectors as well")
    parser.add_argument("--egs", action="store_true", help="nnet3 egs as well (KALDI_ROOT)")
    parser.add_argument("--full", action="store_true", help="features without compression")
    options = parser.parse_args()
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    corpus = write_corpus(options.folder, options.hours, compress=not options.full, ivectors=options.ivectors)
    if options.egs and write_egs(corpus, width=20, left=40, right=7) is None:
        print("no egs: KALDI_ROOT is not set, or has no nnet3 programs", file=sys.stderr)
    print(f"{len(corpus.keys)} utterances, {corpus.total_frames} frames in {corpus.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
