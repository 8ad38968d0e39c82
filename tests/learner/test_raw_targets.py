"""Raw networks trained on features and targets of their own, as train_raw_dnn.py and train_raw_rnn.py do."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import kaldi_native_io
import numpy as np
import pytest
import torch

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.scp import read_table
from kaldi_mpi.learner.objective import objective_of
from kaldi_mpi.learner.options import parse
from kaldi_mpi.learner.run import train
from kaldi_mpi.loader import ChunkShape, Minibatch
from kaldi_mpi.transport.world import SoloWorld
from tests.paths import kaldi_root
from tests.toy import FEAT_DIM, make_toy

OUTPUTS = 3
XCONFIG = f"""\
input dim={FEAT_DIM} name=input
relu-batchnorm-layer name=a dim=16 input=Append(-1,0,1)
output-layer name=output dim={OUTPUTS} max-change=1.5 LAST
"""
LAST = {"linear": "", "quadratic": "include-log-softmax=false objective-type=quadratic"}


@dataclasses.dataclass(frozen=True)
class Data:
    """Features, and targets that follow from them."""

    feat_dir: Path
    dense: Path
    sparse: Path
    work: Path

    def options(self, program: str, objective: str, targets: Path, *more: str) -> list[str]:
        """Of a short training into a new directory."""
        folder = self.work / f"{program}-{objective}-{targets.stem}"
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        (folder / "configs/network.xconfig").write_text(XCONFIG.replace("LAST", LAST[objective]))
        cut = (
            ["--egs.frames-per-eg=8", "--trainer.optimization.minibatch-size=128"]
            if program == "raw-dnn"
            else ["--egs.chunk-width=10", "--trainer.rnn.num-chunk-per-minibatch=12"]
        )
        return [
            f"--program={program}", f"--dir={folder}", f"--feat-dir={self.feat_dir}", f"--targets-scp={targets}",
            "--feat.cmvn-opts=--norm-means=true", "--trainer.num-epochs=3",
            "--trainer.optimization.initial-effective-lrate=0.01", "--trainer.optimization.final-effective-lrate=0.005",
            f"--use-dense-targets={str(targets == self.dense).lower()}", "--cleanup=false", *cut, *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    toy = make_toy(tmp_path_factory.mktemp("raw"))
    dense, sparse = toy.work / "dense.scp", toy.work / "sparse.scp"
    rng = np.random.default_rng(4)
    weights = rng.standard_normal((FEAT_DIM, OUTPUTS)) * 0.3
    matrices = kaldi_native_io.FloatMatrixWriter(f"ark,scp:{toy.work}/dense.ark,{dense}")
    vectors = kaldi_native_io.Int32VectorWriter(f"ark,scp:{toy.work}/sparse.ark,{sparse}")
    with matrices, vectors:
        for key, place in read_table(toy.feat_dir / "feats.scp").items():
            values = kaldi_native_io.FloatMatrix.read(place).numpy() @ weights
            soft = np.exp(values - values.max(axis=1, keepdims=True))
            soft[soft < 0.2] = 0.0
            soft /= soft.sum(axis=1, keepdims=True)
            soft[::7] = 0.0  # frames that a linear objective leaves out and a quadratic one does not
            matrices.write(key, soft.astype(np.float32))
            vectors.write(key, values.argmax(axis=1).tolist())
    return Data(toy.feat_dir, dense, sparse, toy.work)


def score(folder: Path, name: str) -> tuple[str, float, int]:
    """What of the held-out utterances was logged: its name, the mean, and of how many frames."""
    text = (folder / f"log/compute_prob_valid.{name}.log").read_text()
    what, mean, frames = re.findall(r"Overall (\S+) for 'output' is (\S+) per frame, over (\S+) frames", text)[0]
    return what, float(mean), int(frames)


CASES = [
    ("raw-dnn", "linear", True),
    ("raw-rnn", "quadratic", True),
    ("raw-dnn", "quadratic", True),
    ("raw-rnn", "linear", False),
]


@pytest.mark.parametrize(("program", "objective", "dense"), CASES)
def test_training_gets_better(data: Data, program: str, objective: str, dense: bool) -> None:
    options = data.options(program, objective, data.dense if dense else data.sparse)
    train(parse(options), SoloWorld())
    folder = Path(options[1].partition("=")[2])
    first, last = score(folder, "0"), score(folder, "final")
    assert first[0] == last[0] == ("log-likelihood" if objective == "linear" else "objective")
    assert last[1] > 0.7 * first[1] and first[1] < 0
    assert (folder / "final.raw").exists()
    assert "accuracy" in (folder / "log/compute_prob_valid.final.log").read_text() or objective == "quadratic"


def test_images_are_augmented_in_training_alone(data: Data) -> None:
    """A chunk of features does for an image: the first validation is the same, and the training is another one."""
    models = []
    for more in ([], ["--image.augmentation-opts=--horizontal-flip-prob=0.5 --vertical-shift=0.2"]):
        options = data.options("raw-dnn", "linear", data.sparse, "--trainer.num-epochs=1", *more)
        train(parse(options), SoloWorld())
        folder = Path(options[1].partition("=")[2])
        models.append((score(folder, "0"), (folder / "final.raw").read_bytes()))
        (folder / "final.raw").unlink()
    assert models[0][0] == models[1][0] and models[0][1] != models[1][1]
    with pytest.raises(ConfigError, match=r"--image\.augmentation-opts: --zoom=2 is no option"):
        parse(data.options("raw-dnn", "linear", data.sparse, "--image.augmentation-opts=--zoom=2"))


@pytest.mark.kaldi
@pytest.mark.parametrize(("program", "objective", "dense"), CASES)
def test_objectives_are_nnet3_compute_probs(
    data: Data, tmp_path: Path, program: str, objective: str, dense: bool
) -> None:
    """On examples that Kaldi's own program makes of the held-out utterances and their targets."""
    options = data.options(program, objective, data.dense if dense else data.sparse)
    folder = Path(options[1].partition("=")[2])
    if not (folder / "final.raw").exists():
        train(parse(options), SoloWorld())
    programs = [str(kaldi_root() / "src" / name) for name in ("bin", "featbin", "nnet3bin")]
    scp = data.dense if dense else data.sparse
    targets = f"scp:{scp}" if dense else f"ark:ali-to-post scp:{scp} ark:- |"
    make = f"nnet3-get-egs-dense-targets --num-targets={OUTPUTS}" if dense else f"nnet3-get-egs --num-pdfs={OUTPUTS}"
    table = read_table(data.feat_dir / "feats.scp")
    commands = []
    # Each utterance is one example: those of several would overlap.
    for number, key in enumerate((folder / "valid_uttlist").read_text().split()):
        (tmp_path / f"{number}.scp").write_text(f"{key} {table[key]}\n")
        frames = kaldi_native_io.FloatMatrix.read(table[key]).numpy().shape[0]
        normalise = f"apply-cmvn --utt2spk=ark:{data.feat_dir}/utt2spk scp:{data.feat_dir}/cmvn.scp"
        commands.append(
            f"{make} --left-context=1 --right-context=1 --num-frames={frames} --compress=false "
            f"'ark:{normalise} scp:{tmp_path}/{number}.scp ark:- |' '{targets}' ark:{tmp_path}/{number}.ark"
        )
    commands += [f"cat {tmp_path}/*.ark > {tmp_path}/egs", f"nnet3-compute-prob {folder}/final.raw ark:{tmp_path}/egs"]
    command = " && ".join([f"export PATH={':'.join(programs)}:$PATH", *commands])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"Overall (\S+) for 'output' is (\S+) per frame, over (\S+) frames", done.stdout + done.stderr)
    what, mean, counted = score(folder, "final")
    theirs = {name: (float(value), float(count)) for name, value, count in found}
    assert theirs[what][0] == pytest.approx(mean, rel=1e-4)
    assert theirs[what][1] == pytest.approx(counted, rel=1e-4)


def test_the_quadratic_objective_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    output = torch.randn(2, 4, OUTPUTS, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[[0, 2], [1, -1], [-1, -1], [0, -1]], [[2, -1], [0, 1], [1, 2], [-1, -1]]])
    weights = torch.rand(2, 4, 2, generator=generator) * 2 - 1
    weights[0, 3, 0] = 0.0  # a frame of which all targets are 0
    batch = Minibatch(torch.zeros(2, 4, 1), labels, 6, 6, 0.0, 0, 0, ChunkShape(4, 0, 0), weights=weights)
    total, count = 0.0, 0
    expected = torch.zeros_like(output)
    for n in range(2):
        for t in range(4):
            target = np.zeros(OUTPUTS)
            for label, weight in zip(labels[n, t].tolist(), weights[n, t].tolist(), strict=True):
                if label >= 0:
                    target[label] += weight
            if labels[n, t, 0] < 0:
                continue
            difference = output[n, t].detach().numpy() - target
            total, count = total - 0.5 * float(difference @ difference), count + 1
            expected[n, t] = -torch.from_numpy(difference)
    objective, weight_ = objective_of("quadratic", output, batch)
    assert objective.item() == pytest.approx(total, rel=1e-6) and float(weight_) == count == 6
    torch.testing.assert_close(torch.autograd.grad(objective, output)[0], expected, rtol=1e-6, atol=1e-6)


def test_what_is_wrong_with_targets_is_told(data: Data, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.scp"
    lines = data.sparse.read_text().splitlines(keepends=True)
    with pytest.raises(DataError, match=r"wrong.scp: no such file \(--targets-scp\)"):
        train(parse(data.options("raw-dnn", "linear", wrong)), SoloWorld())
    key, place = read_table(data.sparse).popitem()
    with kaldi_native_io.Int32VectorWriter(f"ark,scp:{tmp_path}/wrong.ark,{wrong}") as writer:
        labels = kaldi_native_io.SequentialInt32VectorReader(f"scp:{data.sparse}")
        with labels:
            for name, values in labels:
                writer.write(name, [OUTPUTS if name == key and t == 3 else v for t, v in enumerate(values)])
    with pytest.raises(DataError, match=rf"{key}.*target {OUTPUTS} at frame 3, and the network's outputs are 0 to 2"):
        train(parse(data.options("raw-dnn", "linear", wrong)), SoloWorld())
    narrow = tmp_path / "narrow.scp"
    with kaldi_native_io.FloatMatrixWriter(f"ark,scp:{tmp_path}/narrow.ark,{narrow}") as writer:
        writer.write(lines[0].split()[0], np.ones((5, 2), np.float32))
    with pytest.raises(DataError, match=r"targets of 2 columns, and the network has 3 outputs"):
        train(parse([*data.options("raw-rnn", "linear", narrow), "--use-dense-targets=true"]), SoloWorld())
    narrow.write_text(f"{lines[0].split()[0]} {tmp_path}/absent.ark:5\n")
    with pytest.raises(DataError, match=r"narrow.scp.*the matrix at .*absent.ark:5 cannot be read"):
        train(parse([*data.options("raw-rnn", "linear", narrow), "--use-dense-targets=true"]), SoloWorld())
    assert place
