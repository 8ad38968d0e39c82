"""The graphs of chain training in a model's directory: the phone LM, ``den.fst`` and ``normalization.fst``.

As chain/train.py has them: made at its stages -6 and -5, which its default (-4) skips. The objective's denominator is
of ``den.fst``, whoever has made it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kaldi_mpi.chain.den_graph import make_den_fst, make_normalization_fst
from kaldi_mpi.chain.denominator import Denominator
from kaldi_mpi.chain.denominator_graph import denominator_graph, initial_probabilities
from kaldi_mpi.chain.phone_hmm import PhoneHmms
from kaldi_mpi.chain.phone_lm import estimate_phone_lm
from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.fst import Fst, read_fst, write_fst
from kaldi_mpi.formats.tokens import Writer
from kaldi_mpi.formats.transition import TransitionModel, write_transitions
from kaldi_mpi.formats.tree import read_tree
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.learner.stages import DENOMINATOR, PHONE_LM
from kaldi_mpi.loader import read_alignments
from kaldi_mpi.log import logger

PHONE_LM_FST, DEN_FST, NORMALIZATION_FST = "phone_lm.fst", "den.fst", "normalization.fst"


def make_graphs(options: TrainOptions, transitions: TransitionModel) -> None:
    """Make what ``--stage`` asks for; on one rank.

    Args:
        transitions: of the tree's directory.

    Raises:
        DataError: alignments, tree and transition model do not fit each other, or a file is missing or malformed.
    """
    assert options.chain is not None
    folder, tree_dir = Path(options.dir), Path(options.data.ali_dir)
    if options.stage > DENOMINATOR:
        return
    began = time.monotonic()
    hmms = PhoneHmms(read_tree(tree_dir / "tree"), transitions)
    if options.stage <= PHONE_LM:
        forward = np.zeros(transitions.num_transition_ids + 1, np.bool_)
        forward[[hmm.forward_id for hmm in hmms.by_id().values()]] = True
        phone_lm = estimate_phone_lm(_phones(tree_dir, transitions, forward), options.chain.lm_opts)
        write_fst(folder / PHONE_LM_FST, phone_lm)
    else:
        phone_lm = _existing(folder / PHONE_LM_FST, options.stage)
    den = make_den_fst(phone_lm, hmms, file=str(folder / PHONE_LM_FST))
    write_fst(folder / DEN_FST, den)
    write_fst(folder / NORMALIZATION_FST, make_normalization_fst(den, initial_probabilities(den)))
    with atomic_write(folder / "0.trans_mdl") as stream:
        write_transitions(transitions, Writer(stream, binary=True))
    logger.info(
        "phone LM of %d states and %d arcs, %s of %d and %d, in %.1f s",
        len(phone_lm.finals), len(phone_lm.costs), DEN_FST, len(den.finals), len(den.costs), time.monotonic() - began,
    )  # fmt: skip


def _phones(tree_dir: Path, transitions: TransitionModel, forward: np.ndarray) -> Iterator[tuple[str, list[int]]]:
    """The phones of each alignment: each has its forward transition once."""
    for key, tids in read_alignments(tree_dir).items():
        if len(tids) and not 1 <= tids.min() <= tids.max() < len(forward):
            raise DataError(
                f"transition-id {tids.max()}: the model has 1 to {len(forward) - 1}", file=str(tree_dir), key=key
            )
        yield key, transitions.tid_to_phone[tids[forward[tids]]].tolist()


def _existing(path: Path, stage: int) -> Fst:
    if not path.is_file():
        raise DataError(f"no such file (--stage {stage} begins after it is made)", file=str(path))
    return read_fst(path)


def read_denominator(options: TrainOptions, num_pdfs: int, says: bool) -> Denominator:
    """The denominator of a chain training's directory.

    Args:
        num_pdfs: of the tree.
        says: whether its size is logged.

    Raises:
        DataError: there is none, or it is malformed, or of another tree.
    """
    assert options.chain is not None
    path = Path(options.dir) / DEN_FST
    graph = denominator_graph(_existing(path, options.stage), num_pdfs, str(path))
    if says:
        logger.info("denominator: %d states, %d arcs", graph.num_states, graph.num_arcs)
    return Denominator(graph, options.chain.objective.leaky_hmm_coefficient)
