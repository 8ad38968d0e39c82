"""The command ``kaldi-mpi`` (also ``python -m kaldi_mpi``): one word that names what to do, and its options.

A verb is a function of some module that takes the words after the verb; the module is imported when its verb is
used, so that a verb loads no more than it needs. What all programs have in common stands in `run`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

import kaldi_mpi
from kaldi_mpi import log
from kaldi_mpi.errors import KaldiMpiError

Verb = Callable[[Sequence[str]], "int | None"]

# name -> (module, function, what it does); those that stand in for a script of Kaldi's have its name
VERBS = {
    "launch": ("kaldi_mpi.launch", "main", "start N learners under mpiexec and watch over them"),
    "start": ("kaldi_mpi.programs.start", "general_main", "start a training, as steps_mpi/train.sh does"),
    "train-rnn": ("kaldi_mpi.programs.start", "rnn_main", "the same with train_rnn.py's options"),
    "train-dnn": ("kaldi_mpi.programs.start", "dnn_main", "the same with train_dnn.py's options"),
    "train-raw-rnn": ("kaldi_mpi.programs.start", "raw_rnn_main", "the same with train_raw_rnn.py's options"),
    "train-raw-dnn": ("kaldi_mpi.programs.start", "raw_dnn_main", "the same with train_raw_dnn.py's options"),
    "train-chain": ("kaldi_mpi.programs.start", "chain_main", "the same with chain/train.py's options"),
    "link": ("kaldi_mpi.programs.link", "main", "put steps_mpi into a recipe's directory"),
    "train": ("kaldi_mpi.learner.run", "main", "be one learner of a training (inside mpiexec)"),
    "progress": ("kaldi_mpi.learner.progress", "main", "run a command that trains and show its progress"),
    "journal": ("kaldi_mpi.averaging.journal", "main", "tell of a training's exchanges"),
    "model-info": ("kaldi_mpi.nnet3.info", "main", "tell what a .mdl file holds"),
    "copy-data-dir": ("kaldi_mpi.embedded.datadir", "copy_main", "take a data directory into a recipe"),
    "validate-data-dir": ("kaldi_mpi.embedded.datadir", "validate_main", "check a data directory"),
    "make-mfcc": ("kaldi_mpi.embedded.mfcc", "main", "compute MFCCs"),
    "compute-cmvn-stats": ("kaldi_mpi.embedded.cmvn", "main", "compute CMVN statistics by speaker"),
    "prepare-lang": ("kaldi_mpi.embedded.lang", "main", "make a lang directory from a dictionary"),
    "train-mono": ("kaldi_mpi.embedded.mono", "main", "train a monophone GMM system"),
    "align-si": ("kaldi_mpi.embedded.align", "main", "align data with a GMM system"),
    "get-chain-egs": ("kaldi_mpi.embedded.chain_egs", "main", "make examples for chain training"),
    "mkgraph": ("kaldi_mpi.embedded.graph", "main", "make a decoding graph"),
    "decode": ("kaldi_mpi.embedded.decode", "main", "decode into lattices"),
    "score": ("kaldi_mpi.embedded.score", "main", "score lattices, as steps/score_kaldi.sh does"),
    "best-wer": ("kaldi_mpi.embedded.score", "best_wer_main", "print the best word error rates"),
}


def usage() -> str:
    """The list of verbs."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {what}" for name, (_, _, what) in VERBS.items()]
    return "\n".join(
        [
            f"kaldi-mpi {kaldi_mpi.__version__}: persistent MPI learners for Kaldi nnet3 acoustic models",
            "usage: kaldi-mpi VERB [OPTIONS]   (kaldi-mpi VERB --help tells the options)",
            *lines,
            "e.g.: kaldi-mpi launch -n 4 -- kaldi-mpi train --feat-dir data/train --ali-dir exp/tri_ali --dir exp/lstm",
        ]
    )


def run(program: str, function: Verb, arguments: Sequence[str]) -> int:
    """Run a program: its log in Kaldi's form, and the user's errors as an ERROR line each and status 1.

    Args:
        program: its name in the log.
        function: takes the arguments; returns the exit status, None meaning 0.
        arguments: without the program's name.

    Returns:
        the exit status.
    """
    log.set_up(program)
    try:
        return function(arguments) or 0
    except KaldiMpiError as error:
        for line in str(error).splitlines():  # several where several things are wrong
            log.logger.error("%s", line)
        return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb named first; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 1
    if words[0] == "--version":
        print(kaldi_mpi.__version__)
        return 0
    if words[0] not in VERBS:
        print(f"kaldi-mpi: no verb {words[0]!r}\n{usage()}", file=sys.stderr)
        return 1

    def verb(rest: Sequence[str]) -> int | None:
        module, function, _ = VERBS[words[0]]
        status: int | None = getattr(importlib.import_module(module), function)(rest)
        return status

    return run(f"kaldi-mpi-{words[0]}", verb, words[1:])
