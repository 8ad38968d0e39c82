"""A tiny experiment in Kaldi's formats, made in a second: features, alignments, network; and how to train on it."""

from __future__ import annotations

import dataclasses
import gzip
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import kaldi_native_io
import numpy as np

from tests.paths import REPO

NUM_PDFS, FEAT_DIM = 5, 6

XCONFIG = f"""\
input dim={FEAT_DIM} name=input
fixed-affine-layer name=lda delay=2 input=Append(-1,0,1) affine-transform-file={{lda}}
fast-lstm-layer name=lstm1 cell-dim=8 delay=-1 decay-time=20
fast-lstm-layer name=lstm2 cell-dim=8 delay=-2
output-layer name=output output-delay=2 dim={NUM_PDFS} max-change=1.5
"""


@dataclasses.dataclass(frozen=True)
class Toy:
    """Where the toy's parts lie."""

    feat_dir: Path
    ali_dir: Path
    work: Path

    def experiment(self, name: str) -> Path:
        """A new model directory with the network's xconfig in it."""
        folder = self.work / name
        (folder / "configs").mkdir(parents=True)
        (folder / "configs" / "network.xconfig").write_text(XCONFIG.format(lda=folder / "configs" / "lda.mat"))
        return folder

    def options(self, folder: Path, *more: str) -> list[str]:
        """Options of `kaldi-mpi train` for a short training into `folder`; later ones win."""
        return [
            f"--feat-dir={self.feat_dir}",
            f"--ali-dir={self.ali_dir}",
            f"--dir={folder}",
            "--feat.cmvn-opts=--norm-means=true --norm-vars=false",
            "--egs.chunk-width=10",
            "--egs.chunk-left-context=6",
            "--trainer.num-epochs=2",
            "--trainer.rnn.num-chunk-per-minibatch=12",
            "--trainer.samples-per-iter=60",
            "--trainer.optimization.initial-effective-lrate=0.03",
            "--trainer.optimization.final-effective-lrate=0.01",
            # What comes out is then what the steps have made.
            "--trainer.optimization.do-final-combination=false",
            "--trainer.optimization.shrink-value=1.0",
            *more,
        ]


def transition_model() -> str:
    """One emitting state for each phone, which is its pdf; transition-ids 2p-1 (stay) and 2p (leave) of phone p."""
    phones = range(1, NUM_PDFS + 1)
    tuples = "\n".join(f"{phone} 0 {phone - 1}" for phone in phones)
    log_probs = " ".join(["0"] + ["-0.6931472"] * (2 * NUM_PDFS))
    return (
        "<TransitionModel> \n<Topology> \n<TopologyEntry> \n<ForPhones> \n"
        f"{' '.join(map(str, phones))} \n</ForPhones> \n"
        "<State> 0 <PdfClass> 0 <Transition> 0 0.5 <Transition> 1 0.5 </State> \n<State> 1 </State> \n"
        f"</TopologyEntry> \n</Topology> \n<Triples> {NUM_PDFS}\n{tuples} \n</Triples> \n"
        f"<LogProbs> \n [ {log_probs} ]\n</LogProbs> \n</TransitionModel> \n"
    )


def make_toy(work: Path, num_utterances: int = 60, seed: int = 0) -> Toy:
    """Write features of sticky random classes (each class a mean, plus noise), and their alignments."""
    rng = np.random.default_rng(seed)
    feat_dir, ali_dir = work / "data", work / "ali"
    feat_dir.mkdir(parents=True)
    ali_dir.mkdir()
    means = 2.0 * rng.standard_normal((NUM_PDFS, FEAT_DIM))
    feats = kaldi_native_io.CompressedMatrixWriter(f"ark,scp:{feat_dir}/feats.ark,{feat_dir}/feats.scp")
    ali = kaldi_native_io.Int32VectorWriter(f"ark:{ali_dir}/ali.1")
    stats: dict[str, np.ndarray] = {}
    utt2spk = []
    with feats, ali:
        for number in range(num_utterances):
            length = int(rng.integers(8, 70))
            speaker = f"spk{number % 4}"
            key = f"{speaker}-utt{number:03d}"
            stay = rng.random(length) < 0.8
            classes = np.zeros(length, np.int64)
            for t in range(length):
                classes[t] = classes[t - 1] if t and stay[t] else rng.integers(NUM_PDFS)
            x = (means[classes] + rng.standard_normal((length, FEAT_DIM)) + number % 4).astype(np.float32)
            feats.write(key, x, kaldi_native_io.CompressionMethod.kSpeechFeature)
            leaving = np.append(classes[1:] != classes[:-1], True)
            ali.write(key, [int(2 * c + 1 + gone) for c, gone in zip(classes, leaving, strict=True)])
            total = stats.setdefault(speaker, np.zeros((2, FEAT_DIM + 1)))
            total[0] += np.append(x.sum(0), length)
            total[1] += np.append((x**2).sum(0), 0)
            utt2spk.append(f"{key} {speaker}\n")
    with gzip.open(ali_dir / "ali.1.gz", "wb") as stream:
        stream.write((ali_dir / "ali.1").read_bytes())
    (ali_dir / "ali.1").unlink()
    with kaldi_native_io.DoubleMatrixWriter(f"ark,scp:{feat_dir}/cmvn.ark,{feat_dir}/cmvn.scp") as cmvn:
        for speaker in sorted(stats):
            cmvn.write(speaker, stats[speaker])
    scp = feat_dir / "feats.scp"
    scp.write_text("".join(sorted(scp.read_text().splitlines(keepends=True))))
    (feat_dir / "utt2spk").write_text("".join(sorted(utt2spk)))
    (ali_dir / "final.mdl").write_text(transition_model())
    (ali_dir / "tree").write_text("a tree is copied, never read\n")
    (ali_dir / "num_jobs").write_text("1\n")
    (ali_dir / "phones.txt").write_text("<eps> 0\n" + "".join(f"P{p} {p}\n" for p in range(1, NUM_PDFS + 1)))
    return Toy(feat_dir, ali_dir, work)


def launch_command(num_learners: int, options: Sequence[str]) -> list[str]:
    """The command line that trains with real MPI ranks."""
    return [
        *[sys.executable, "-m", "kaldi_mpi", "launch", "-n", str(num_learners), "--"],
        *[sys.executable, "-m", "kaldi_mpi", "train", *options],
    ]


def environment() -> dict[str, str]:
    """What the command needs around it."""
    return os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def train(num_learners: int, options: Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a training in `num_learners` real ranks to its end, good or bad."""
    return subprocess.run(
        launch_command(num_learners, options),
        env=environment(),
        cwd=Path(options[2].partition("=")[2]),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
