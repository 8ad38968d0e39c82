"""The decoding graph HCLG.fst: what ``utils/mkgraph.sh`` does, without Kaldi.

``kaldi-mpi mkgraph LANG_DIR MODEL_DIR GRAPH_DIR`` composes lexicon, grammar, phonetic context
and HMMs of ``MODEL_DIR/{tree,final.mdl}``; any binary tree and any model that begins with a transition model
will do, with context or without. Two of mkgraph.sh's steps are left out because the wheels lack them, and
both change the graph's size or the place of its weights only, never the weight of a word sequence:
pushing weights (fstpushspecial) and local epsilon removal (fstrmepslocal).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kaldi_mpi.embedded import wheels
from kaldi_mpi.embedded.align import read_integers
from kaldi_mpi.embedded.fst import read_fst, write_fst
from kaldi_mpi.embedded.gmm_model import read_hmm
from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

# What decoding and scoring need besides HCLG.fst, so that they need no lang directory; mkgraph.sh's list.
_COPIED = ("words.txt", "phones.txt")
_COPIED_PHONE_FILES = (
    "word_boundary.*",
    "align_lexicon.*",
    "optional_silence.*",
    "disambig.txt",
    "disambig.int",
    "silence.csl",
)


def make_graph(
    lang_dir: str | Path,
    model_dir: str | Path,
    graph_dir: str | Path,
    *,
    transition_scale: float = 1.0,
    self_loop_scale: float = 0.1,
) -> None:
    """Write a graph directory; see the module's text.

    Args:
        lang_dir: with L_disambig.fst and G.fst.
        model_dir: with tree and final.mdl.
        graph_dir: is made.
        transition_scale: on the log-probabilities of transitions that are no self-loops.
        self_loop_scale: on those of self-loops.

    Raises:
        DataError: a file is missing or damaged, the model has phones that the lexicon's table lacks, or the
            graph is empty.
    """
    khg, kaldifst = wheels.load().khg, wheels.load().kaldifst
    lang, model, graph = Path(lang_dir), Path(model_dir), Path(graph_dir)
    hmm = read_hmm(model / "tree", model / "final.mdl")
    tree, transitions = hmm.build(str(model / "tree"))
    disambig = read_integers(f"{lang}/phones/disambig.int")
    grammar = read_fst(lang / "G.fst")

    fst = kaldifst.compose(read_fst(lang / "L_disambig.fst"), grammar)
    _determinize(fst, str(lang))
    kaldifst.minimize_encoded(fst)
    kaldifst.arcsort(fst, sort_type="ilabel")
    fst, ilabels = kaldifst.compose_context(
        disambig_syms=disambig,
        context_width=tree.context_width,
        central_position=tree.central_position,
        ifst=fst,
    )
    kaldifst.arcsort(fst, sort_type="ilabel")
    known = set(transitions.phones)
    for phone in {phone for window in ilabels for phone in window if phone > 0}:
        if phone not in known:
            raise DataError(f"phone {phone} of {lang} is not in the model", file=str(model / "final.mdl"))
    h_transducer, disambig_tids = khg.get_h_transducer(
        ilabel_info=ilabels,
        ctx_dep=tree,
        trans_model=transitions,
        config=khg.HTransducerConfig(transition_scale=transition_scale),
    )
    kaldifst.arcsort(h_transducer, sort_type="olabel")
    fst = kaldifst.compose(h_transducer, fst)
    _determinize(fst, str(lang))
    if fst.num_states == 0:
        raise DataError("the graph is empty: do lexicon and grammar share words?", file=str(lang / "G.fst"))
    fst = _without_input_labels(fst, set(disambig_tids))
    kaldifst.minimize_encoded(fst)
    fst = khg.add_self_loops(
        self_loop_scale=self_loop_scale, disambig_syms=[], reorder=True, trans_model=transitions, ifst=fst
    )

    (graph / "phones").mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        shutil.copy(lang / name, graph / name)
    for pattern in _COPIED_PHONE_FILES:
        for path in sorted((lang / "phones").glob(pattern)):
            shutil.copy(path, graph / "phones" / path.name)
    _write_lines(graph / "disambig_tid.int", disambig_tids)
    _write_lines(graph / "num_pdfs", [transitions.num_pdfs])
    write_fst(fst, graph / "HCLG.fst")
    logger.info("Wrote %s: %d states", graph / "HCLG.fst", fst.num_states)


def _determinize(fst: Any, lang: str) -> None:
    stopped_early = wheels.load().kaldifst.determinize_star(fst, max_states=20_000_000, use_log=True)
    if stopped_early:
        raise DataError("the lexicon cannot be determinized: are its disambiguation symbols right?", file=lang)


def _without_input_labels(fst: Any, labels: set[int]) -> Any:
    """Replace input labels by epsilon (fstrmsymbols); returns a new FST."""
    kaldifst = wheels.load().kaldifst
    result = kaldifst.StdVectorFst()
    for _ in range(fst.num_states):
        result.add_state()
    result.start = fst.start
    for state in kaldifst.StateIterator(fst):
        result.set_final(state, fst.final(state))
        for arc in kaldifst.ArcIterator(fst, state):
            label = 0 if arc.ilabel in labels else arc.ilabel
            result.add_arc(state, kaldifst.StdArc(label, arc.olabel, arc.weight, arc.nextstate))
    return result


def _write_lines(path: Path, values: Sequence[int]) -> None:
    with atomic_write(path, "w") as stream:
        stream.writelines(f"{value}\n" for value in values)


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi mkgraph``; see the module's text."""
    parser = Parser(prog="kaldi-mpi mkgraph", description=__doc__)
    parser.add_argument("lang_dir")
    parser.add_argument("model_dir")
    parser.add_argument("graph_dir")
    parser.add_argument("--transition-scale", type=float, default=1.0)
    parser.add_argument("--self-loop-scale", type=float, default=0.1)
    chosen = parser.parse_args(arguments)
    make_graph(
        chosen.lang_dir,
        chosen.model_dir,
        chosen.graph_dir,
        transition_scale=chosen.transition_scale,
        self_loop_scale=chosen.self_loop_scale,
    )
