"""Decoding a data directory into lattices: what nnet3-latgen-faster and gmm-latgen-faster do.

``kaldi-mpi decode --nj N --job J [options] GRAPH_DIR DATA_DIR DECODE_DIR`` decodes part J of
N with the model beside DECODE_DIR (``DECODE_DIR/../final.mdl``, as in Kaldi's decoding scripts), a GMM or an
nnet3 network, and writes ``lat.J.gz``. The lattices are raw: all arcs of the decoder within the lattice
beam, not determinized, since the wheels cannot; Kaldi's lattice programs take them as they are. Their
acoustic costs are not scaled. The decoder has no limit on active states: graphs of small vocabularies only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded import wheels
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.features import read_features
from kaldi_mpi.embedded.fst import read_fst
from kaldi_mpi.embedded.jobs import split_by_speaker
from kaldi_mpi.embedded.lattice import LatticeWriter
from kaldi_mpi.embedded.scorers import ChunkOptions, FloatMatrix, load_scorer
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.symbols import SymbolTable
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser


@dataclass(frozen=True)
class DecodeOptions:
    """Search options, with the values of steps/nnet3/decode.sh.

    Attributes:
        beam: states worse than the best by more than this are dropped.
        lattice_beam: so are lattice arcs on paths worse than the best by more than this.
        acwt: acoustic scale during the search; the lattices' acoustic costs are not scaled.
        allow_partial: give a lattice even if no final state was reached.
    """

    beam: float = 15.0
    lattice_beam: float = 8.0
    acwt: float = 0.1
    allow_partial: bool = True


@dataclass
class DecodeSummary:
    """Utterances decoded and failed; frames; log-likelihood of the best paths (scaled acoustics)."""

    done: int = 0
    failed: int = 0
    frames: int = 0
    log_like: float = 0.0


class Decoder:
    """Turns (T, num_pdfs) log-likelihoods into lattices.

    Args:
        graph: an HCLG.fst, of type const or vector.
        tid_to_pdf: (num_transition_ids + 1,) the pdf of each transition-id.
        options: beams and scales.

    Raises:
        DataError: the graph cannot be read or has labels beyond the transition-ids.
    """

    def __init__(self, graph: str | Path, tid_to_pdf: NDArray[np.int32], options: DecodeOptions) -> None:
        kaldi_decoder = wheels.load().kaldi_decoder
        self._fst = read_fst(graph)
        self._tid_to_pdf = tid_to_pdf
        self._options = options
        largest = _largest_input_label(self._fst)
        if largest >= len(tid_to_pdf):
            raise DataError(
                f"it has transition-id {largest}, the model has {len(tid_to_pdf) - 1}: graph and model do "
                "not belong together",
                file=str(graph),
            )
        config = kaldi_decoder.LatticeSimpleDecoderConfig(beam=options.beam, lattice_beam=options.lattice_beam)
        self._decoder = kaldi_decoder.LatticeSimpleDecoder(self._fst, config)

    def decode(self, key: str, log_likelihoods: FloatMatrix) -> tuple[Any, list[int], float] | None:
        """Decode one utterance.

        Args:
            key: the utterance, for messages.
            log_likelihoods: (T, num_pdfs), not scaled.

        Returns:
            the raw ``kaldifst.Lattice`` with unscaled acoustic costs, the best path's word-ids and its
            log-likelihood (acoustics scaled); None if the utterance could not be decoded.

        Raises:
            DataError: the matrix has another number of columns than the model has pdfs.
        """
        loaded = wheels.load()
        num_pdfs = int(self._tid_to_pdf.max()) + 1
        if log_likelihoods.shape[1] != num_pdfs:
            raise DataError(f"{log_likelihoods.shape[1]} columns of log-likelihoods, but {num_pdfs} pdfs", key=key)
        # A column per transition-id: the wheel looks a score up by the graph's label, minus one.
        scaled = np.float32(self._options.acwt) * log_likelihoods
        scores = np.ascontiguousarray(scaled[:, self._tid_to_pdf[1:]], dtype=np.float32)
        self._decoder.decode(loaded.kaldi_decoder.DecodableCtc(scores))
        if not np.isfinite(self._decoder.final_relative_cost()):
            if not self._options.allow_partial:
                logger.warning(
                    "Not producing output for utterance %s since no final-state reached and "
                    "--allow-partial=false.", key,
                )  # fmt: skip
                return None
            logger.warning("Outputting partial output for utterance %s since no final-state reached", key)
        found, best = self._decoder.get_best_path(use_final_probs=True)
        complete, lattice = self._decoder.get_raw_lattice(use_final_probs=True)
        if not found or not complete or lattice.num_states == 0:
            logger.warning("Failed to decode utterance with id %s", key)
            return None
        _, _, words, weight = loaded.kaldifst.get_linear_symbol_sequence(best)
        unscale = loaded.kaldifst.lattice_scale(1.0, 1.0 / self._options.acwt)
        loaded.kaldifst.scale_lattice(unscale, lattice)
        return lattice, words, -(weight.value1 + weight.value2)


def decode_to_lattices(
    decoder: Decoder,
    scores: Iterable[tuple[str, FloatMatrix]],
    words: SymbolTable,
    lattices: str | Path,
) -> DecodeSummary:
    """Decode utterances into a lattice archive, logging what Kaldi's decoders log.

    Args:
        decoder: see `Decoder`.
        scores: (utterance, log-likelihoods).
        words: the graph's words.txt.
        lattices: archive to write.

    Returns:
        counts.

    Raises:
        DataError: no utterance could be decoded; or see `Decoder.decode`.
    """
    summary, begin = DecodeSummary(), time.monotonic()
    with LatticeWriter(lattices) as writer:
        for key, log_likelihoods in scores:
            result = decoder.decode(key, log_likelihoods)
            if result is None:
                summary.failed += 1
                continue
            lattice, word_ids, log_like = result
            writer.write(key, lattice)
            frames = len(log_likelihoods)
            print(key, *(words.symbol(word) for word in word_ids), file=sys.stderr)
            logger.info("Log-like per frame for utterance %s is %.6g over %d frames.", key, log_like / frames, frames)
            summary.done += 1
            summary.frames += frames
            summary.log_like += log_like
    if summary.done == 0:
        Path(lattices).unlink()
        raise DataError(f"none of {summary.failed} utterances could be decoded", file=str(lattices))
    elapsed = time.monotonic() - begin
    logger.info(
        "Time taken %.4gs: real-time factor assuming 100 frames/sec is %.4g",
        elapsed, elapsed * 100.0 / summary.frames,
    )  # fmt: skip
    logger.info("Done %d utterances, failed for %d", summary.done, summary.failed)
    logger.info(
        "Overall log-likelihood per frame is %.6g over %d frames.",
        summary.log_like / summary.frames, summary.frames,
    )  # fmt: skip
    return summary


def decode_job(
    graph_dir: str | Path,
    data_dir: str | Path,
    decode_dir: str | Path,
    *,
    nj: int = 1,
    job: int = 1,
    iteration: str = "final",
    options: DecodeOptions | None = None,
    chunks: ChunkOptions | None = None,
) -> DecodeSummary:
    """Decode part `job` (from 1) of `nj` of a data directory into ``DECODE_DIR/lat.JOB.gz``.

    The model is ``DECODE_DIR/../ITERATION.mdl``. ``num_jobs`` is written too.

    Raises:
        DataError: unusable or mismatched input, or no utterance of the part could be decoded.
        ConfigError: there is no part `job`.
    """
    if not 1 <= job <= nj:
        raise ConfigError(f"job {job} of {nj} jobs")
    graph, directory = Path(graph_dir), Path(decode_dir)
    data = DataDir(data_dir)
    model = directory.parent / f"{iteration}.mdl"
    scorer, tid_to_pdf = load_scorer(model, data, chunks)
    decoder = Decoder(graph / "HCLG.fst", tid_to_pdf, options or DecodeOptions())
    words = SymbolTable.read(graph / "words.txt")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "num_jobs").write_text(f"{nj}\n", encoding="utf-8")
    utterances = split_by_speaker(data.utt2spk, nj)[job - 1]
    scores = ((key, scorer(key, feats)) for key, feats in read_features(data.file("feats.scp"), utterances))
    return decode_to_lattices(decoder, scores, words, directory / f"lat.{job}.gz")


def _largest_input_label(fst: Any) -> int:
    kaldifst = wheels.load().kaldifst
    labels = (arc.ilabel for state in kaldifst.StateIterator(fst) for arc in kaldifst.ArcIterator(fst, state))
    return max(labels, default=0)


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi decode``; see the module's text."""
    parser = Parser(prog="kaldi-mpi decode", description=__doc__)
    parser.add_argument("graph_dir")
    parser.add_argument("data_dir")
    parser.add_argument("decode_dir")
    parser.add_argument("--nj", type=int, default=1, help="parts that the data are split into")
    parser.add_argument("--job", type=int, default=1, help="which part to decode, from 1")
    parser.add_argument("--iter", default="final", help="decode with ITER.mdl")
    parser.add_argument("--beam", type=float, default=DecodeOptions.beam)
    parser.add_argument("--lattice-beam", type=float, default=DecodeOptions.lattice_beam)
    parser.add_argument("--acwt", type=float, default=DecodeOptions.acwt)
    parser.add_argument("--allow-partial", choices=("true", "false"), default="true")
    parser.add_argument("--frames-per-chunk", type=int, default=0, help="0: whole utterances")
    parser.add_argument("--extra-left-context", type=int, default=0)
    parser.add_argument("--extra-right-context", type=int, default=0)
    parser.add_argument("--extra-left-context-initial", type=int, default=-1)
    parser.add_argument("--extra-right-context-final", type=int, default=-1)
    parser.add_argument("--online-ivector-dir", help="for networks that take i-vectors")
    chosen = parser.parse_args(arguments)
    decode_job(
        chosen.graph_dir,
        chosen.data_dir,
        chosen.decode_dir,
        nj=chosen.nj,
        job=chosen.job,
        iteration=chosen.iter,
        options=DecodeOptions(chosen.beam, chosen.lattice_beam, chosen.acwt, chosen.allow_partial == "true"),
        chunks=ChunkOptions(
            chosen.frames_per_chunk,
            chosen.extra_left_context,
            chosen.extra_right_context,
            chosen.extra_left_context_initial,
            chosen.extra_right_context_final,
            chosen.online_ivector_dir,
        ),
    )
