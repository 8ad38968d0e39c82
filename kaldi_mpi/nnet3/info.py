"""What a .mdl file holds, in a few lines: ``kaldi-mpi model-info FILE``.

For any model (GMM or nnet3) the counts of its transition model, under the names that Kaldi's ``tree-info``
and ``am-info`` use; for an nnet3 model also its network.
"""

from __future__ import annotations

from collections.abc import Sequence

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.nnet3.am import read_am
from kaldi_mpi.nnet3.convert import to_torch
from kaldi_mpi.options import Parser


def describe(path: str) -> list[str]:
    """The lines for the model in `path`.

    Raises:
        DataError: it has no transition model, or it is an nnet3 model and malformed.
    """
    transitions = read_transition_model(path)
    lines = [
        f"num-phones {len(transitions.phones)}",
        f"num-pdfs {transitions.num_pdfs}",
        f"num-transition-ids {transitions.num_transition_ids}",
    ]
    with open(path, "rb") as stream:
        if b"<Nnet3>" not in stream.read():
            return lines
    am = read_am(path)
    model = to_torch(am.nnet)
    return [
        *lines,
        f"input-dim {model.input_dim}",
        f"left-context {model.left_context}",
        f"right-context {model.right_context}",
        f"num-parameters {sum(p.numel() for c in model.updatable_components() for p in c.parameters)}",
        f"prior-dimension {len(am.priors)}",
        *am.nnet.config_lines,
    ]


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi model-info``; see the module's text."""
    parser = Parser(prog="kaldi-mpi model-info", description="Describe a .mdl file.")
    parser.add_argument("model")
    model = parser.parse_args(arguments).model
    try:
        print("\n".join(describe(model)))
    except OSError as error:
        raise DataError(error.strerror or str(error), file=model) from error
