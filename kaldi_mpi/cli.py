"""The console command ``kaldi-mpi``: one word that names what to do, and its options.

Everything here is a thin door to a module that does the work (``python -m MODULE`` is the same).
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

import kaldi_mpi

# name -> (module that runs as a script, what it does)
_COMMANDS = {
    "train": ("kaldi_mpi.train", "one learner of a training (inside mpiexec)"),
    "launch": ("kaldi_mpi.launch", "start N learners under mpiexec and watch over them"),
    "progress": ("kaldi_mpi.learner.watch", "show the progress of a training that writes to a log"),
    "synth": ("kaldi_mpi.embedded.synth", "make a corpus of spoken digits (embedded back end)"),
    "features": ("kaldi_mpi.embedded.features", "compute MFCCs and CMVN statistics (embedded back end)"),
    "decode": ("kaldi_mpi.embedded.decode", "decode into Kaldi lattices (embedded back end)"),
    "score": ("kaldi_mpi.embedded.score", "score lattices as steps/score_kaldi.sh does (embedded back end)"),
}


def usage() -> str:
    """The list of commands."""
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in _COMMANDS.items()]
    return "\n".join(
        [
            f"kaldi-mpi {kaldi_mpi.__version__}: persistent MPI learners for Kaldi nnet3 acoustic models",
            "usage: kaldi-mpi COMMAND [OPTIONS]   (kaldi-mpi COMMAND --help tells the options)",
            *lines,
            "e.g.: kaldi-mpi launch -n 4 -- kaldi-mpi train --feat-dir data/train --ali-dir exp/tri_ali --dir exp/lstm",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command named first; returns its exit status, or leaves with it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 1
    if words[0] == "--version":
        print(kaldi_mpi.__version__)
        return 0
    if words[0] not in _COMMANDS:
        print(f"kaldi-mpi: no command {words[0]!r}\n{usage()}", file=sys.stderr)
        return 1
    sys.argv = [f"kaldi-mpi {words[0]}", *words[1:]]
    runpy.run_module(_COMMANDS[words[0]][0], run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
