"""Kaldi's chain training and ours on the same examples, tree, network and learning rates: who ends better?

As bench/kaldi_training.py, whose --work, --train, --test and --snr these are, with a chain recipe: lattices of the
triphone GMM, a left-biphone tree at a third of the frames, Kaldi's training with 1, 2 and 4 jobs, and ours, in the same
words, with as many learners, averaging after as many frames (periodic) or in pairs (expair); nnet3-chain-compute-prob
on the held-out examples and decode.sh with a third of the frames. Table and JSON line are as there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kaldi_training
from kaldi_training import NETS, Net, jobs

TREE, LATS = "exp/chain/tree", "exp/tri1_lats"
_SMALL = "l2-regularize=0.03 bypass-scale=0.66 dim=128 bottleneck-dim=32"
XCONFIG = f"""\
idct-layer name=idct input=input dim=40 cepstral-lifter=22 affine-transform-file=DIR/configs/idct.mat
batchnorm-component name=batchnorm0 input=idct
delta-layer name=delta input=batchnorm0
no-op-component name=input2 input=delta
relu-batchnorm-layer name=tdnn1 l2-regularize=0.03 dim=128 input=input2
tdnnf-layer name=tdnnf2 {_SMALL} time-stride=1
tdnnf-layer name=tdnnf3 {_SMALL} time-stride=1
tdnnf-layer name=tdnnf4 {_SMALL} time-stride=0
tdnnf-layer name=tdnnf5 {_SMALL} time-stride=3
tdnnf-layer name=tdnnf6 {_SMALL} time-stride=3
linear-component name=prefinal-l dim=48 l2-regularize=0.03 orthonormal-constraint=-1.0
prefinal-layer name=prefinal-chain input=prefinal-l l2-regularize=0.03 small-dim=48 big-dim=128
output-layer name=output include-log-softmax=false dim=PDFS l2-regularize=0.015
prefinal-layer name=prefinal-xent input=prefinal-l l2-regularize=0.03 small-dim=48 big-dim=128
output-layer name=output-xent dim=PDFS learning-rate-factor=5.0 l2-regularize=0.015
"""
NETS["chain"] = Net(
    "chain/train.py",
    "mini_librispeech/s5/local/chain/tuning/run_tdnn_1k.sh",
    XCONFIG,
    (
        "--chain.xent-regularize=0.1",
        "--chain.leaky-hmm-coefficient=0.1",
        "--chain.l2-regularize=0.00005",
        "--chain.apply-deriv-weights=false",
        "--chain.lm-opts='--num-extra-lm-states=100'",
        "--egs.chunk-width=140,100,60",
        "--trainer.num-chunk-per-minibatch=32,16",
        "--trainer.frames-per-iter=150000",
        "--trainer.optimization.initial-effective-lrate=0.002",
        "--trainer.optimization.final-effective-lrate=0.0002",
    ),
)
MADE = ("den.fst", "normalization.fst", "phone_lm.fst", "0.trans_mdl", "tree")


class ChainBench(kaldi_training.Bench):
    """The same with chain models."""

    egs_opts = "--num-utts-subset 60 --frames-overlap-per-eg 0"

    def prepare(self) -> None:
        """Lattices, tree and graph besides."""
        super().prepare()
        if (self.recipe / TREE / "graph/HCLG.fst").exists():
            return
        self.run(
            f"steps/align_fmllr_lats.sh --nj 2 --cmd run.pl data/train data/lang exp/tri1 {LATS} && "
            "rm -rf data/lang_chain && cp -r data/lang data/lang_chain && "
            "steps/nnet3/chain/gen_topo.py $(cat data/lang/phones/nonsilence.csl) $(cat data/lang/phones/silence.csl) "
            "> data/lang_chain/topo && "
            "steps/nnet3/chain/build_tree.sh --frame-subsampling-factor 3 --cmd run.pl --context-opts "
            f"'--context-width=2 --central-position=1' {self.options.leaves} data/train data/lang_chain exp/tri1_ali "
            f"{TREE} && utils/mkgraph.sh --self-loop-scale 1.0 data/lang {TREE} {TREE}/graph",
            self.recipe / "prepare_chain.out",
        )

    def pdfs(self) -> str:
        """How many the tree has."""
        return self.run(f"tree-info {TREE}/tree | awk '/num-pdfs/ {{print $2}}'").split()[-1]

    def call(self, net: str, folder: Path, seed: int, more: str) -> str:
        """See there; the examples' directory has the graphs of all."""
        words = super().call(net, folder, seed, more)
        given = f"--tree-dir={TREE} --lat-dir={LATS}"
        return re.sub(r"--ali-dir=\S+", given, words).replace("--trainer.prior-subset-size=2000 ", "")

    def run_arm(self, net: str, arm: str, seed: int, folder: Path) -> Path:
        """See there; what Kaldi's stages before the examples make is taken from them."""
        egs, model = self.examples(net), self.start(net, seed).relative_to(self.recipe)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        own = "--stage=-10" if arm.startswith("own") else "--stage=-4"
        for name in MADE if own == "--stage=-4" else ():
            shutil.copy(egs.parent / name, folder)
        more = f"--egs.dir={egs.relative_to(self.recipe)} --trainer.input-model={model} {own}"
        strategy, learners = arm.split("-")
        if strategy == "kaldi":
            program = f"steps/nnet3/{self.call(net, folder, seed, f'{more} {jobs(int(learners))}')}"
        else:
            name = "periodic" if strategy == "own" else strategy
            more += f" --num-learners={learners} --strategy={name} {self.options.more}"
            if name == "periodic":
                more += f" --frames-per-average={int(learners) * self.frames_of_job(net, egs) // 3}"
            program = f"$KALDI_MPI_ROOT/steps_mpi/nnet3/{self.call(net, folder, seed, more)}"
        self.run(program, folder / "train.out")
        return egs

    def score(self, folder: Path, egs: Path) -> dict[str, float]:
        """The objective on the held-out examples, per output frame, cross-entropy's, and the word error rate."""
        name = folder.relative_to(self.recipe)
        valid = f"ark:nnet3-chain-merge-egs --minibatch-size=1:64 ark:{egs}/valid_diagnostic.cegs ark:- |"
        said = self.run(
            "nnet3-chain-compute-prob --leaky-hmm-coefficient=0.1 --xent-regularize=0.1 "
            f'"nnet3-am-copy --raw=true {name}/final.mdl - |" {egs.parent}/den.fst "{valid}" 2>&1'
        )
        objective, xent = (
            float(re.findall(rf"Overall log-probability for '{output}' is (\S+)", said)[0])
            for output in ("output", "output-xent")
        )
        self.run(
            "steps/nnet3/decode.sh --nj 1 --cmd run.pl --iter final --acwt 1.0 --post-decode-acwt 10.0 "
            f"--frames-per-chunk 140 {TREE}/graph data/test_hires {name}/decode_test"
        )
        best = self.run(f"kaldi-mpi best-wer {name}/decode_test")
        # By the names of the table's columns.
        return {
            "log-likelihood": objective, "accuracy": xent, "wer": float(re.findall(r"%WER (\S+)", best)[0]),
        }  # fmt: skip


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where everything goes; outside the checkout")
    parser.add_argument("--train", help="data directory of the training speech; needed at first")
    parser.add_argument("--test", help="data directory of the test speech")
    parser.add_argument("--snr", nargs=2, type=float, metavar=("LOW", "HIGH"), help="see bench/kaldi_training.py")
    hows = ("kaldi", "periodic", "expair", "own")
    arms = [f"{how}-{n}" for n in (1, 2, 4) for how in hows if (how, n) != ("expair", 1)]
    parser.add_argument("--arms", nargs="+", default=arms, choices=arms, help="own-2: with graphs of our own; ...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--leaves", type=int, default=120, help="of the tree, at most")
    parser.add_argument("--more", default="", help="more options of our program")
    options = parser.parse_args()
    if not os.environ.get("KALDI_ROOT"):
        parser.error("KALDI_ROOT is not set")
    bench = ChainBench(options.work.resolve(), options)
    bench.prepare()
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for seed, arm in itertools.product(options.seeds, options.arms):
        one = bench.train("chain", arm, seed)
        print(f"{arm} seed {seed}: " + ", ".join(f"{key} {value:.6g}" for key, value in one.items()), flush=True)
        figures.setdefault("chain", {}).setdefault(arm, {})[str(seed)] = one
    print("\nlog-likelihood: the chain objective on held-out examples; accuracy: cross-entropy at output-xent")
    kaldi_training.table(figures)
    print(json.dumps({"nets": figures, "epochs": options.epochs}))


if __name__ == "__main__":
    main()
