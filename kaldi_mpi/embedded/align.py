"""Forced alignment with a GMM-HMM, and statistics over the aligned frames: ``steps/align_si.sh`` without Kaldi.

``kaldi-mpi align-si [--nj N] DATA_DIR LANG_DIR SRC_DIR ALI_DIR`` writes ``ali.JOB.gz`` (binary int32 vectors of
transition-ids), with the source's ``tree``, ``final.mdl``, ``phones.txt`` and ``cmvn_opts``, and ``num_jobs``: an
alignment directory as training takes it.

One `Aligner` holds the features and training graphs of one job's utterances; see `kaldi_mpi.embedded.jobs` for
how several run side by side.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded import wheels
from kaldi_mpi.embedded.cmvn import read_cmvn_opts, speaker_cmvn
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.features import add_deltas, read_features
from kaldi_mpi.embedded.fst import read_fst
from kaldi_mpi.embedded.gmm import Gmms, GmmStatistics
from kaldi_mpi.embedded.gmm_model import read_gmm_model
from kaldi_mpi.embedded.hmm import Hmm, tid_to_pdf
from kaldi_mpi.embedded.jobs import WorkerPool, split_by_speaker
from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.cmvn_options import CmvnOptions
from kaldi_mpi.formats.symbols import SymbolTable
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

# Utterances whose statistics are summed in single precision before they are added to the total. Blocks end
# with a speaker too, so that the sums do not depend on how speakers are spread over jobs.
_BLOCK = 32

_INT32_ARCHIVE_ITEM = np.dtype([("size", "u1"), ("value", "<i4")])


@dataclass(frozen=True)
class AlignmentTask:
    """What a job needs to start.

    Attributes:
        data_dir: with feats.scp, cmvn.scp, utt2spk and text.
        lang_dir: with L.fst, words.txt, oov.int and phones/disambig.int.
        utterances: those of this job.
        hmm: tree and topology.
        cmvn: how to normalise the features, before deltas are added.
    """

    data_dir: str
    lang_dir: str
    utterances: Sequence[str]
    hmm: Hmm
    cmvn: CmvnOptions


@dataclass(frozen=True)
class AlignmentOptions:
    """Scales and beams, with gmm-align-compiled's names and align_si.sh's values."""

    beam: float = 10.0
    retry_beam: float = 40.0
    transition_scale: float = 1.0
    acoustic_scale: float = 0.1
    self_loop_scale: float = 0.1


@dataclass
class AlignmentSummary:
    """Counts over the utterances of a job: aligned, failed, retried; frames; sum of log-likelihoods."""

    done: int = 0
    failed: int = 0
    retried: int = 0
    frames: int = 0
    log_like: float = 0.0

    @classmethod
    def total(cls, summaries: Sequence[AlignmentSummary]) -> AlignmentSummary:
        """The sums over jobs."""
        total = cls()
        for summary in summaries:
            total.done += summary.done
            total.failed += summary.failed
            total.retried += summary.retried
            total.frames += summary.frames
            total.log_like += summary.log_like
        return total

    def report(self, what: str) -> None:
        """Log the counts.

        Raises:
            DataError: no utterance was aligned.
        """
        if self.done == 0:
            raise DataError(f"{what}: no utterance could be aligned; do the transcripts belong to the audio?")
        logger.info(
            "%s: done %d, retried %d, failed %d; overall log-likelihood per frame is %.4f over %d frames",
            what.capitalize(), self.done, self.retried, self.failed,
            self.log_like / self.frames, self.frames,
        )  # fmt: skip


class Aligner:
    """Reads features and compiles the graphs of a task's utterances.

    Raises:
        DataError: a file is missing or unusable.
    """

    def __init__(self, task: AlignmentTask) -> None:
        khg = wheels.load().khg
        self._task = task
        tree, self._transitions = task.hmm.build()
        self._tid_to_pdf = tid_to_pdf(self._transitions)
        data = DataDir(task.data_dir)
        normalise = speaker_cmvn(data, task.cmvn)
        self._feats = {
            utterance: add_deltas(normalise(utterance, feats))
            for utterance, feats in read_features(data.file("feats.scp"), task.utterances)
        }
        self._blocks = _blocks(task.utterances, data.utt2spk)
        disambig = read_integers(f"{task.lang_dir}/phones/disambig.int")
        compiler = khg.TrainingGraphCompiler(
            trans_model=self._transitions,
            ctx_dep=tree,
            lex_fst=read_fst(f"{task.lang_dir}/L.fst"),
            disambig_syms=disambig,
            # Transition probabilities change from pass to pass and are added when aligning.
            opts=khg.TrainingGraphCompilerOptions(transition_scale=0.0, self_loop_scale=0.0, reorder=True),
        )
        transcripts = _transcripts(data, task.lang_dir, task.utterances)
        self._graphs = {key: compiler.compile_graph_from_text(ids) for key, ids in transcripts.items()}
        # The pdfs that occur in an utterance's graph: only their likelihoods are needed.
        self._tids = {key: _transition_ids(graph) for key, graph in self._graphs.items()}
        self._alignments: dict[str, NDArray[np.int32]] = {}

    def feature_sums(self) -> list[tuple[int, NDArray[np.float64]]]:
        """Per block the number of frames, and (2, D) float64 sums of features and of their squares."""
        sums = []
        for block in self._blocks:
            feats = np.concatenate([self._feats[key] for key in block])
            totals = np.stack([feats.sum(axis=0, dtype=np.float64), (feats.astype(np.float64) ** 2).sum(axis=0)])
            sums.append((len(feats), totals))
        return sums

    def align_equally(self) -> AlignmentSummary:
        """Give each state of an utterance's graph about as many frames as the others: the flat start."""
        kaldifst = wheels.load().kaldifst
        summary = AlignmentSummary()
        self._alignments.clear()
        for key, graph in self._graphs.items():
            frames = len(self._feats[key])
            # The seed decides between pronunciations and silences; its value is fixed by the utterance.
            seed = sum(key.encode())
            succeeded, path = kaldifst.equal_align(graph, frames, seed)
            if not succeeded:
                logger.warning("Utterance %s is too short for its transcript: %d frames", key, frames)
                summary.failed += 1
                continue
            _, tids, _, _ = kaldifst.get_linear_symbol_sequence(path)
            self._alignments[key] = np.array(tids, dtype=np.int32)
            summary.done += 1
            summary.frames += frames
        return summary

    def align(self, gmms: Gmms, log_probs: NDArray[np.float32], options: AlignmentOptions) -> AlignmentSummary:
        """Find each utterance's best path; those that fail are left without alignment.

        Args:
            gmms: one GMM per pdf.
            log_probs: the transition model's, see `Hmm`.
            options: scales and beams.
        """
        khg = wheels.load().khg
        _, self._transitions = self._task.hmm.with_log_probs(log_probs).build()
        config = khg.AlignConfig(options.beam, options.retry_beam, False)
        summary = AlignmentSummary()
        self._alignments.clear()
        for key, graph in self._graphs.items():
            feats = self._feats[key]
            with_probs = graph.copy()
            khg.add_transition_probs(
                fst=with_probs,
                trans_model=self._transitions,
                disambig_syms=[],
                transition_scale=options.transition_scale,
                self_loop_scale=options.self_loop_scale,
            )
            scores = self._scaled_scores(gmms, key, feats, options.acoustic_scale)
            done, _, retried, log_like, _, tids, _ = khg.align_utterance_wrapper(
                config, key, options.acoustic_scale, with_probs, khg.DecodableCtc(scores), 0, 0, 0, 0.0, 0
            )
            summary.retried += retried
            if not done or len(tids) != len(feats):
                logger.warning("Did not successfully align utterance %s, len = %d", key, len(feats))
                summary.failed += 1
                continue
            self._alignments[key] = np.array(tids, dtype=np.int32)
            summary.done += 1
            summary.frames += len(feats)
            summary.log_like += log_like
        return summary

    def accumulate(self, gmms: Gmms) -> list[tuple[GmmStatistics, NDArray[np.float64]]]:
        """Per block, statistics of the aligned frames and (num_transition_ids + 1) counts of transitions."""
        statistics = []
        for block in self._blocks:
            keys = [key for key in block if key in self._alignments]
            if not keys:
                continue
            tids = np.concatenate([self._alignments[key] for key in keys])
            feats = np.concatenate([self._feats[key] for key in keys])
            counts = np.bincount(tids, minlength=len(self._tid_to_pdf)).astype(np.float64)
            statistics.append((gmms.accumulate(feats, self._tid_to_pdf[tids]), counts))
        return statistics

    def write(self, path: str) -> None:
        """Write the alignments as a gzipped binary archive of int32 vectors (``ali.JOB.gz``)."""
        with (
            atomic_write(path) as raw,
            # No time and no name in the header: equal alignments give equal files.
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as stream,
        ):
            for key, tids in self._alignments.items():
                items = np.empty(len(tids) + 1, dtype=_INT32_ARCHIVE_ITEM)
                items["size"] = 4
                items["value"][0] = len(tids)
                items["value"][1:] = tids
                stream.write(key.encode() + b" \0B" + items.tobytes())

    def _scaled_scores(self, gmms: Gmms, key: str, feats: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
        """(T, num_transition_ids): column tid - 1 holds the scaled score of the transition-id's pdf."""
        tids = self._tids[key]
        pdfs, column = np.unique(self._tid_to_pdf[tids], return_inverse=True)
        likelihoods = gmms.select(pdfs).log_likelihoods(feats)
        likelihoods *= np.float32(scale)
        scores = np.zeros((len(feats), len(self._tid_to_pdf) - 1), dtype=np.float32)
        scores[:, tids - 1] = likelihoods[:, column]
        return scores


def align_data(
    data_dir: str | Path,
    lang_dir: str | Path,
    src_dir: str | Path,
    ali_dir: str | Path,
    *,
    nj: int = 4,
    options: AlignmentOptions | None = None,
) -> AlignmentSummary:
    """Align all utterances of a data directory; see the module's text.

    Args:
        data_dir: features, CMVN statistics and transcripts.
        lang_dir: lexicon; its phones must be the source system's.
        src_dir: a GMM system over delta features (no LDA).
        ali_dir: is made.
        nj: number of processes, and of ``ali.JOB.gz``.
        options: beams and scales; those of align_si.sh by default.

    Returns:
        counts over all utterances; those that fail are left out of the archives and warned about.

    Raises:
        DataError: unusable input, another phone set, or no utterance could be aligned.
    """
    source, target = Path(src_dir), Path(ali_dir)
    if (source / "final.mat").exists():
        raise DataError("systems with an LDA transform need Kaldi's own scripts", file=str(source))
    model = read_gmm_model(source / "tree", source / "final.mdl")
    _check_same_phones(Path(lang_dir) / "phones.txt", source / "phones.txt")
    cmvn = read_cmvn_opts(source / "cmvn_opts", CmvnOptions())
    data = DataDir(data_dir)
    parts = split_by_speaker(data.utt2spk, nj)
    tasks = [AlignmentTask(str(data_dir), str(lang_dir), part, model.hmm, cmvn) for part in parts]
    (target / "log").mkdir(parents=True, exist_ok=True)
    for old in target.glob("ali.*.gz"):
        old.unlink()
    with WorkerPool(Aligner, tasks) as workers:
        answers = workers.call("align", model.gmms, model.hmm.log_probs, options or AlignmentOptions())
        summary = AlignmentSummary.total(answers)
        summary.report("alignment")
        workers.call("write", each=[str(target / f"ali.{job}.gz") for job in range(1, nj + 1)])
    for name in ("tree", "final.mdl", "final.occs", "phones.txt", "cmvn_opts"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    (target / "num_jobs").write_text(f"{nj}\n", encoding="utf-8")
    return summary


def _check_same_phones(ours: Path, theirs: Path) -> None:
    """Compare phone tables up to their disambiguation symbols, whose number may differ."""

    def table(path: Path) -> list[str]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=str(path)) from error
        return [line for line in lines if not line.startswith("#")]

    if table(ours) != table(theirs):
        raise DataError(f"its phones are not those of {theirs}", file=str(ours))


def read_integers(path: str) -> list[int]:
    """Read a file of white-space separated integers, such as ``disambig.int``.

    Raises:
        DataError: no such file, or something else in it.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            return [int(field) for field in stream.read().split()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read integers: {error}", file=path) from error


def _blocks(utterances: Sequence[str], utt2spk: dict[str, str]) -> list[list[str]]:
    blocks: list[list[str]] = []
    speaker = None
    for utterance in utterances:
        if utt2spk[utterance] != speaker or len(blocks[-1]) == _BLOCK:
            blocks.append([])
            speaker = utt2spk[utterance]
        blocks[-1].append(utterance)
    return blocks


def _transcripts(data: DataDir, lang_dir: str, utterances: Sequence[str]) -> dict[str, list[int]]:
    words = SymbolTable.read(f"{lang_dir}/words.txt")
    (oov,) = read_integers(f"{lang_dir}/oov.int")
    unknown: set[str] = set()
    transcripts = {}
    for utterance in utterances:
        if utterance not in data.text:
            raise DataError("no transcript for the utterance", file=data.file("text"), key=utterance)
        text = data.text[utterance]
        unknown.update(word for word in text if word not in words)
        transcripts[utterance] = [words.id(word) if word in words else oov for word in text]
    if unknown:
        shown = " ".join(sorted(unknown)[:10])
        logger.warning("%d words are not in the lexicon (taken as unknown words): %s", len(unknown), shown)
    return transcripts


def _transition_ids(graph: Any) -> NDArray[np.int32]:
    kaldifst = wheels.load().kaldifst
    labels = {arc.ilabel for state in kaldifst.StateIterator(graph) for arc in kaldifst.ArcIterator(graph, state)}
    return np.array(sorted(labels - {0}), dtype=np.int32)


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi align-si``; see the module's text."""
    parser = Parser(prog="kaldi-mpi align-si", description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("lang_dir")
    parser.add_argument("src_dir")
    parser.add_argument("ali_dir")
    parser.add_argument("--nj", type=int, default=4)
    parser.add_argument("--beam", type=float, default=AlignmentOptions.beam)
    parser.add_argument("--retry-beam", type=float, default=AlignmentOptions.retry_beam)
    chosen = parser.parse_args(arguments)
    align_data(
        chosen.data_dir,
        chosen.lang_dir,
        chosen.src_dir,
        chosen.ali_dir,
        nj=chosen.nj,
        options=AlignmentOptions(beam=chosen.beam, retry_beam=chosen.retry_beam),
    )
