"""Monophone GMM-HMM training from a flat start: what ``steps/train_mono.sh`` does, without Kaldi.

``kaldi-mpi train-mono [--nj N] DATA_DIR LANG_DIR EXP_DIR`` writes ``final.mdl``, ``final.occs``,
``tree``, ``phones.txt``, ``cmvn_opts`` and ``num_jobs``. The same data give the same model, byte for byte,
whatever the number of jobs (as long as there are as many speakers).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded import wheels
from kaldi_mpi.embedded.align import Aligner, AlignmentOptions, AlignmentSummary, AlignmentTask
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.gmm import Gmms, GmmStatistics
from kaldi_mpi.embedded.gmm_model import write_gmm_model
from kaldi_mpi.embedded.hmm import Hmm
from kaldi_mpi.embedded.jobs import WorkerPool, split_by_speaker
from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.cmvn_options import parse_cmvn_opts
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

_REALIGN = frozenset([*range(1, 11), 12, 14, 16, 18, 20, 23, 26, 29, 32, 35, 38])


@dataclass(frozen=True)
class MonoOptions:
    """train_mono.sh's options, with its defaults.

    Attributes:
        nj: number of worker processes.
        num_iters: passes over the data, the last one exclusive.
        max_iter_inc: last pass at which Gaussians are added.
        totgauss: number of Gaussians at the end.
        initial_beam: of the first alignment.
        regular_beam: of the later ones.
        retry_beam: for utterances that fail.
        power: a pdf's share of Gaussians goes with its count to this power.
        cmvn_opts: apply-cmvn options, stored in the model directory.
        seed: of the perturbations when Gaussians are split.
    """

    nj: int = 4
    num_iters: int = 40
    max_iter_inc: int = 30
    totgauss: int = 1000
    initial_beam: float = 6.0
    regular_beam: float = 10.0
    retry_beam: float = 40.0
    power: float = 0.25
    cmvn_opts: str = ""
    seed: int = 0


def train_mono(data_dir: str | Path, lang_dir: str | Path, exp_dir: str | Path, options: MonoOptions) -> None:
    """Train and write a monophone system; see the module's text and `MonoOptions`.

    Raises:
        DataError: unusable input, or no utterance could be aligned.
    """
    begin = time.monotonic()
    data, lang, directory = DataDir(data_dir), Path(lang_dir), Path(exp_dir)
    (directory / "log").mkdir(parents=True, exist_ok=True)
    cmvn = parse_cmvn_opts(options.cmvn_opts, where="--cmvn-opts")
    hmm = Hmm.monophone(lang / "topo", lang / "phones" / "sets.int")
    parts = split_by_speaker(data.utt2spk, options.nj)
    tasks = [AlignmentTask(str(data_dir), str(lang_dir), part, hmm, cmvn) for part in parts]
    with WorkerPool(Aligner, tasks) as workers:
        model = _Training(workers, hmm, options).run()
    with atomic_write(directory / "tree") as stream:
        stream.write(hmm.tree)
    write_gmm_model(directory / "final.mdl", hmm.with_log_probs(model.log_probs), model.gmms)
    with atomic_write(directory / "final.occs", "w") as stream:
        stream.write(f" [ {' '.join(f'{occ:.9g}' for occ in model.occupancy)} ]\n")
    shutil.copy(lang / "phones.txt", directory / "phones.txt")
    (directory / "cmvn_opts").write_text(f"{options.cmvn_opts}\n", encoding="utf-8")
    (directory / "num_jobs").write_text(f"{options.nj}\n", encoding="utf-8")
    logger.info(
        "Trained %s in %.0f s: %d pdfs, %d Gaussians",
        directory / "final.mdl", time.monotonic() - begin, model.gmms.num_pdfs, model.gmms.num_gauss,
    )  # fmt: skip


@dataclass
class _Model:
    gmms: Gmms
    log_probs: NDArray[np.float32]
    occupancy: NDArray[np.float64]


class _Training:
    """The passes of train_mono.sh, over workers that hold the data."""

    def __init__(self, workers: WorkerPool, hmm: Hmm, options: MonoOptions) -> None:
        self._workers, self._hmm, self._options = workers, hmm, options
        self._rng = np.random.default_rng(options.seed)
        _, self._transitions = hmm.build()

    def run(self) -> _Model:
        options = self._options
        model = self._initial_model()
        num_gauss = model.gmms.num_gauss
        increment = max(0, (options.totgauss - num_gauss) // options.max_iter_inc)
        AlignmentSummary.total(self._workers.call("align_equally")).report("equal alignment")
        # Rare phones would lose their only Gaussian with the usual minimum count, and never align properly.
        model = self._update(0, model, num_gauss, min_occupancy=3.0)
        for iteration in range(1, options.num_iters):
            if iteration in _REALIGN:
                beam = options.initial_beam if iteration == 1 else options.regular_beam
                alignment = AlignmentOptions(beam, options.retry_beam)
                answers = self._workers.call("align", model.gmms, model.log_probs, alignment)
                AlignmentSummary.total(answers).report(f"alignment of pass {iteration}")
            model = self._update(iteration, model, num_gauss, min_occupancy=10.0)
            if iteration <= options.max_iter_inc:
                num_gauss += increment
        return model

    def _initial_model(self) -> _Model:
        blocks = [block for answer in self._workers.call("feature_sums") for block in answer]
        frames = sum(count for count, _ in blocks)
        sums = np.sum([totals for _, totals in blocks], axis=0)
        mean = sums[0] / frames
        gmms = Gmms.single(self._transitions.num_pdfs, mean, sums[1] / frames - mean**2)
        return _Model(gmms, self._hmm.log_probs, np.zeros(gmms.num_pdfs))

    def _update(self, iteration: int, model: _Model, num_gauss: int, min_occupancy: float) -> _Model:
        khg = wheels.load().khg
        total = GmmStatistics.zeros(model.gmms)
        transitions = np.zeros(len(model.log_probs))
        for answer in self._workers.call("accumulate", model.gmms):
            for statistics, counts in answer:
                total.add(statistics)
                transitions += counts
        if total.frames == 0:
            raise DataError("no utterance could be aligned: do the transcripts belong to the audio?")
        logger.info(
            "Pass %d: average log-likelihood per frame is %.4f over %d frames, %d Gaussians",
            iteration, total.log_like / total.frames, total.frames, model.gmms.num_gauss,
        )  # fmt: skip
        _, updated = self._hmm.with_log_probs(model.log_probs).build()
        updated.mle_update(transitions, khg.MleTransitionUpdateConfig())
        occupancy = np.add.reduceat(total.occupancy, model.gmms.first[:-1])
        gmms = model.gmms.estimate(total, min_occupancy=min_occupancy)
        gmms = gmms.split(occupancy, num_gauss, power=self._options.power, rng=self._rng)
        return _Model(gmms, np.array(updated.log_probs, dtype=np.float32), occupancy)


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi train-mono``; see the module's text."""
    defaults = MonoOptions()
    parser = Parser(prog="kaldi-mpi train-mono", description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("lang_dir")
    parser.add_argument("exp_dir")
    parser.add_argument("--nj", type=int, default=defaults.nj)
    parser.add_argument("--totgauss", type=int, default=defaults.totgauss)
    parser.add_argument("--num-iters", type=int, default=defaults.num_iters)
    parser.add_argument("--max-iter-inc", type=int, default=defaults.max_iter_inc)
    parser.add_argument("--cmvn-opts", default=defaults.cmvn_opts)
    chosen = parser.parse_args(arguments)
    options = MonoOptions(
        nj=chosen.nj,
        totgauss=chosen.totgauss,
        num_iters=chosen.num_iters,
        max_iter_inc=chosen.max_iter_inc,
        cmvn_opts=chosen.cmvn_opts,
    )
    train_mono(chosen.data_dir, chosen.lang_dir, chosen.exp_dir, options)
