"""Kaldi's own training and ours on the same examples, network, options and learning rates: who ends better?

With KALDI_ROOT set and speech of one's own (two Kaldi data directories with wav.scp, 8 kHz): the digits recipe makes
features, alignments and the graph below --work; Kaldi's xconfig_to_configs.py makes each network's configs and
get_egs.sh the examples, once a network, and nnet3-init the model to start from, once a seed (Kaldi's programs start
from the same one whatever --trainer.srand says). Kaldi's training then runs with 1, 2 and 4 jobs, and ours, called in
the same words, with as many learners, averaging after as many frames as Kaldi does (periodic) or in pairs (expair). Of
each final.mdl: nnet3-compute-prob on the held-out examples, and the word error rate of steps/nnet3/decode.sh. A
training that is there is not repeated. The table gives means over seeds; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import digits
import numpy as np

from kaldi_mpi.embedded.datadir import read_table
from kaldi_mpi.embedded.wave import encode_wave, read_wave

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Net:
    """A network and the options of its training: those of Kaldi's recipes, in a smaller size.

    Attributes:
        program: Kaldi's.
        like: the recipe whose learning rates, minibatch and label delay these are.
        xconfig: its layers above the input; DIR and PDFS in it are replaced.
        options: of the program.
    """

    program: str
    like: str
    xconfig: str
    options: tuple[str, ...]


_LDA = "fixed-affine-layer name=lda {delay}input=Append({splice}) affine-transform-file=DIR/configs/lda.mat\n"
_RNN = (
    "--egs.chunk-width=20",
    "--egs.chunk-left-context=40",
    "--trainer.rnn.num-chunk-per-minibatch=50",
    "--trainer.optimization.momentum=0.5",
    "--trainer.optimization.initial-effective-lrate=0.0003",
    "--trainer.optimization.final-effective-lrate=0.00003",
    "--trainer.samples-per-iter=1500",
)
_DNN = (
    "--egs.frames-per-eg=8",
    "--trainer.optimization.minibatch-size=256",
    "--trainer.optimization.initial-effective-lrate=0.0015",
    "--trainer.optimization.final-effective-lrate=0.00015",
    "--trainer.samples-per-iter=9000",
)
_DROPOUT = "dropout-proportion=0.0"

NETS = {
    "lstm": Net(
        "train_rnn.py",
        "ami/s5b/local/nnet3/run_lstm.sh",
        _LDA.format(delay="delay=5 ", splice="-2,-1,0,1,2")
        + "fast-lstm-layer name=lstm1 cell-dim=128 decay-time=20 delay=-3\n"
        + "fast-lstm-layer name=lstm2 cell-dim=128 decay-time=20 delay=-3\n"
        + "output-layer name=output output-delay=5 dim=PDFS max-change=1.5\n",
        _RNN,
    ),
    "blstm": Net(
        "train_rnn.py",
        "aspire/s5/local/nnet3/run_blstm.sh",
        _LDA.format(delay="", splice="-2,-1,0,1,2")
        + "fast-lstm-layer name=forward1 cell-dim=64 decay-time=20 delay=-3 input=lda\n"
        + "fast-lstm-layer name=backward1 cell-dim=64 decay-time=20 delay=3 input=lda\n"
        + "fast-lstm-layer name=forward2 cell-dim=64 decay-time=20 delay=-3 input=Append(forward1,backward1)\n"
        + "fast-lstm-layer name=backward2 cell-dim=64 decay-time=20 delay=3 input=Append(forward1,backward1)\n"
        + "output-layer name=output input=Append(forward2,backward2) dim=PDFS max-change=1.5\n",
        (*_RNN, "--egs.chunk-right-context=40"),
    ),
    "tdnn": Net(
        "train_dnn.py",
        "aishell/s5/local/nnet3/tuning/run_tdnn_1a.sh",
        _LDA.format(delay="", splice="-2,-1,0,1,2")
        + "relu-batchnorm-layer name=tdnn1 dim=192\n"
        + "relu-batchnorm-layer name=tdnn2 dim=192 input=Append(-1,2)\n"
        + "relu-batchnorm-layer name=tdnn3 dim=192 input=Append(-3,3)\n"
        + "relu-batchnorm-layer name=tdnn4 dim=192\n"
        + "output-layer name=output dim=PDFS max-change=1.5\n",
        _DNN,
    ),
    "tdnnf": Net(
        "train_dnn.py",
        "aishell/s5/local/nnet3/tuning/run_tdnn_1a.sh, layers of mini_librispeech/s5/local/chain/tuning/run_tdnn_1j.sh",
        _LDA.format(delay="", splice="-1,0,1")
        + "relu-batchnorm-dropout-layer name=tdnn1 l2-regularize=0.03 dropout-per-dim-continuous=true dim=192 "
        + f"{_DROPOUT}\n"
        + "".join(
            f"tdnnf-layer name=tdnnf{n} l2-regularize=0.03 {_DROPOUT} bypass-scale=0.66 dim=192 bottleneck-dim=48 "
            f"time-stride={stride}\n"
            for n, stride in ((2, 1), (3, 1), (4, 3), (5, 3))
        )
        + "linear-component name=prefinal-l l2-regularize=0.03 orthonormal-constraint=-1.0 dim=64\n"
        + "prefinal-layer name=prefinal input=prefinal-l l2-regularize=0.03 small-dim=64 big-dim=192\n"
        + "output-layer name=output dim=PDFS max-change=1.5 l2-regularize=0.015\n",
        (*_DNN, "--trainer.dropout-schedule=0,0@0.20,0.3@0.50,0"),
    ),
}


class Bench:
    """Everything below one working directory.

    Args:
        work: the directory.
        options: of the command line.
    """

    egs_opts = "--num-utts-subset 60 --nj 2"

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.options = work, options
        self.recipe = work / "egs" / "digits" / "s5"

    def run(self, command: str, log: Path | None = None) -> str:
        """`digits.run` in this copy of the recipe."""
        return digits.run(command, log, self.recipe)

    def prepare(self) -> None:
        """Features, alignments of a triphone GMM, the graph."""
        if (self.recipe / "exp/tri1_ali/final.mdl").exists() and (self.recipe / "exp/tri1/graph/HCLG.fst").exists():
            return
        shutil.copytree(
            digits.RECIPE, self.recipe, dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("data", "exp", "mfcc", "steps", "utils"),
        )  # fmt: skip
        for name in ("steps_mpi", "kaldi_mpi"):
            if not (self.work / name).exists():
                (self.work / name).symlink_to(ROOT / name)
        train, test = (self.speech(name) for name in ("train", "test"))
        self.run(f"./run.sh --train {train} --test {test} --stop-stage 3", self.recipe / "prepare.out")

    def speech(self, name: str) -> Path:
        """The data directory given as `name`, or with --snr a copy under noise."""
        given = Path(getattr(self.options, name)).resolve()
        if not self.options.snr:
            return given
        low, high = self.options.snr
        noisy = self.work / "noisy" / name
        noisy.mkdir(parents=True, exist_ok=True)
        for table in ("text", "utt2spk", "spk2utt"):
            shutil.copy(given / table, noisy)
        lines = []
        for number, (key, entry) in enumerate(sorted(read_table(given / "wav.scp").items())):
            rng = np.random.default_rng([number, len(name)])
            wave = read_wave(entry, scp=str(given / "wav.scp"), key=key)
            clean = wave.channel(0).astype(np.float64)
            loudness = np.sqrt(np.mean(clean**2)) * 10 ** (-rng.uniform(low, high) / 20)
            samples = np.clip(np.rint(clean + rng.normal(0, loudness, len(clean))), -32768, 32767).astype(np.int16)
            (noisy / f"{key}.wav").write_bytes(encode_wave(samples, wave.rate))
            lines.append(f"{key} {noisy / key}.wav\n")
        (noisy / "wav.scp").write_text("".join(lines))
        return noisy

    def configs(self, net: str, folder: Path) -> None:
        """The network's configs, as Kaldi's xconfig_to_configs.py makes them."""
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        pdfs = self.pdfs()
        relative = folder.relative_to(self.recipe)
        text = "input dim=40 name=input\n" + NETS[net].xconfig.replace("PDFS", pdfs).replace("DIR", str(relative))
        (folder / "configs/network.xconfig").write_text(text)
        xconfig = f"--xconfig-file {relative}/configs/network.xconfig --config-dir {relative}/configs"
        self.run(f"steps/nnet3/xconfig_to_configs.py {xconfig}")

    def pdfs(self) -> str:
        """How many the tree has."""
        return self.run("tree-info exp/tri1_ali/tree | awk '/num-pdfs/ {print $2}'").split()[-1]

    def call(self, net: str, folder: Path, seed: int, more: str) -> str:
        """The words of the program's call that both trainings share; `more` stand behind them."""
        options = [
            *NETS[net].options, f"--trainer.num-epochs={self.options.epochs}", f"--trainer.srand={seed}",
            "--trainer.optimization.max-models-combine=10", "--trainer.prior-subset-size=2000",
            "--feat.cmvn-opts='--norm-means=false --norm-vars=false'", "--use-gpu=false", "--cmd=run.pl",
            "--cleanup.remove-egs=false", "--cleanup.preserve-model-interval=1", "--stage=-10",
            "--feat-dir=data/train_hires", "--ali-dir=exp/tri1_ali", f"--dir={folder.relative_to(self.recipe)}",
        ]  # fmt: skip
        return f"{NETS[net].program} {' '.join(options)} {more}"

    def examples(self, net: str) -> Path:
        """The examples of a network's training program, made by a training of Kaldi's that ends before it begins."""
        folder = self.recipe / "exp" / f"{net}_examples"
        if not (folder / "egs/info/num_archives").exists():
            self.configs(net, folder)
            more = f"{jobs(1)} --exit-stage=0 --egs.opts='{self.egs_opts}' --cleanup=false"
            self.run(f"steps/nnet3/{self.call(net, folder, 0, more)}", folder / "examples.out")
        return folder / "egs"

    def start(self, net: str, seed: int) -> Path:
        """The model that all trainings of a network and seed start from: nnet3-init's, with the examples' LDA."""
        examples = self.examples(net).parent
        model = examples / f"start.{seed}.raw"
        if not model.exists():
            given, made = (path.relative_to(self.recipe) for path in (examples / "configs/final.config", model))
            # rand() of the C library takes the seeds 0 and 1 for the same.
            self.run(f"nnet3-init --srand={seed + 1} {given} {made}")
        return model

    def train(self, net: str, arm: str, seed: int) -> dict[str, float]:
        """Train, decode and score, if it has not been done."""
        folder = self.recipe / "exp" / f"{net}_{arm}_{seed}"
        result = folder / "result.json"
        if not result.exists():
            self.start(net, seed)
            began = time.monotonic()
            egs = self.run_arm(net, arm, seed, folder)
            seconds = time.monotonic() - began
            figures = {"seconds": seconds, "frames": self.frames(folder), **self.score(folder, egs)}
            result.write_text(json.dumps(figures))
        found: dict[str, float] = json.loads(result.read_text())
        return found

    def run_arm(self, net: str, arm: str, seed: int, folder: Path) -> Path:
        """Train into `folder`, which is made anew; returns the examples."""
        egs, model = self.examples(net), self.start(net, seed).relative_to(self.recipe)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        more = f"--egs.dir={egs.relative_to(self.recipe)} --trainer.input-model={model}"
        strategy, learners = arm.split("-")
        if strategy == "kaldi":
            program = f"steps/nnet3/{self.call(net, folder, seed, f'{more} {jobs(int(learners))}')}"
        else:
            more += f" --num-learners={learners} --strategy={strategy} {self.options.more}"
            if strategy == "periodic":
                more += f" --frames-per-average={int(learners) * self.frames_of_job(net, egs)}"
            program = f"$KALDI_MPI_ROOT/steps_mpi/nnet3/{self.call(net, folder, seed, more)}"
        self.run(program, folder / "train.out")
        return egs

    def frames_of_job(self, net: str, egs: Path) -> int:
        """Labelled frames on which a job of Kaldi trains in an iteration, on average: an archive's, or one of eight."""
        in_archive = int((egs / "info/num_frames").read_text()) // int((egs / "info/num_archives").read_text())
        return in_archive // (8 if NETS[net].program == "train_dnn.py" else 1)

    def frames(self, folder: Path) -> float:
        """Labelled frames that the training's logs say were trained on."""
        pattern = re.compile(r"Overall average objective function for 'output' is [^,\n]* over (\S+) frames")
        found = (pattern.findall(path.read_text(errors="replace")) for path in folder.glob("log/train.*.*.log"))
        return float(sum(float(words[-1]) for words in found if words))

    def seconds_per_iteration(self, folder: Path) -> tuple[float, int]:
        """Of a training's iterations but for the first, by the times at which its ITER.mdl were written; how many."""
        numbers = sorted(int(path.stem) for path in folder.glob("*.mdl") if path.stem.isdigit())
        first, last = (folder / f"{number}.mdl" for number in (numbers[1], numbers[-1]))
        return (last.stat().st_mtime - first.stat().st_mtime) / (numbers[-1] - numbers[1]), numbers[-1]

    def score(self, folder: Path, egs: Path) -> dict[str, float]:
        """Log-likelihood and accuracy on the held-out examples, per frame, and the word error rate in per cent."""
        name = folder.relative_to(self.recipe)
        valid = f"ark:nnet3-merge-egs --minibatch-size=64 ark:{egs}/valid_diagnostic.egs ark:- |"
        said = self.run(f'nnet3-compute-prob "nnet3-am-copy --raw=true {name}/final.mdl - |" "{valid}" 2>&1')
        values = {
            what: float(re.findall(rf"Overall {what} for 'output' is (\S+) per frame", said)[0])
            for what in ("log-likelihood", "accuracy")
        }
        self.run(
            "steps/nnet3/decode.sh --nj 1 --cmd run.pl --iter final --beam 11 --lattice-beam 4 exp/tri1/graph "
            f"data/test_hires {name}/decode_test"
        )
        best = self.run(f"kaldi-mpi best-wer {name}/decode_test")
        values["wer"] = float(re.findall(r"%WER (\S+)", best)[0])
        return values


def jobs(count: int) -> str:
    """Kaldi's options for as many from the first iteration to the last."""
    return " ".join(f"--trainer.optimization.num-jobs-{end}={count}" for end in ("initial", "final"))


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where everything goes; outside the checkout")
    parser.add_argument("--train", help="data directory of the training speech; needed at first")
    parser.add_argument("--test", help="data directory of the test speech")
    parser.add_argument(
        "--snr", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="put the speech under white noise, each utterance at a ratio (dB) between these",
    )  # fmt: skip
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    arms = [f"{how}-{n}" for n in (1, 2, 4) for how in ("kaldi", "periodic", "expair") if (how, n) != ("expair", 1)]
    parser.add_argument("--arms", nargs="+", default=arms, choices=arms, help="kaldi-2: Kaldi with two jobs; ...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--more", default="", help="more options of our programs")
    options = parser.parse_args()
    if not os.environ.get("KALDI_ROOT"):
        parser.error("KALDI_ROOT is not set")
    bench = Bench(options.work.resolve(), options)
    bench.prepare()
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for seed, net, arm in itertools.product(options.seeds, options.nets, options.arms):
        try:
            one = bench.train(net, arm, seed)
        except RuntimeError as error:  # Kaldi, for example, wants as many archives as jobs
            print(f"{net} {arm} seed {seed}: {str(error).splitlines()[-1]}", flush=True)
            continue
        print(f"{net} {arm} seed {seed}: " + ", ".join(f"{key} {value:.6g}" for key, value in one.items()), flush=True)
        figures.setdefault(net, {}).setdefault(arm, {})[str(seed)] = one
    table(figures)
    print(json.dumps({"nets": figures, "epochs": options.epochs}))


def table(figures: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Means over seeds, with the difference from Kaldi's with as many jobs (or with two, where that is not there)."""
    print(
        "\n| network | trained by | log-likelihood | - Kaldi's | accuracy | WER | / Kaldi's | s |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for net, arms in figures.items():
        means = {
            arm: {
                key: statistics.fmean(one[key] for one in seeds.values())
                for key in ("log-likelihood", "accuracy", "wer", "seconds")
            }
            for arm, seeds in arms.items()
        }
        for arm, m in means.items():
            base = means.get(f"kaldi-{arm.split('-')[1]}", means.get("kaldi-2"))
            better = f"{m['log-likelihood'] - base['log-likelihood']:+.4f}" if base else ""
            ratio = f"{m['wer'] / base['wer']:.3f}" if base and base["wer"] else ""
            print(
                f"| {net} | {arm} | {m['log-likelihood']:.4f} | {better} | {m['accuracy']:.4f} | {m['wer']:.2f} % "
                f"| {ratio} | {m['seconds']:.0f} |"
            )


if __name__ == "__main__":
    main()
