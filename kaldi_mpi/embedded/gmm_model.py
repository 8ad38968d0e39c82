"""GMM acoustic models in Kaldi's form: a transition model followed by the GMMs of all pdfs.

The transition model is the same at the head of every ``.mdl``, a neural network's too; `read_hmm` takes it
from there, which is all that a decoding graph needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kaldi_mpi.embedded.gmm import Gmms
from kaldi_mpi.embedded.hmm import Hmm
from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.tokens import Reader, Writer
from kaldi_mpi.formats.transition import (
    TransitionModel,
    parse_transition_model,
    read_transition_model,
    read_transitions,
    write_transitions,
)


@dataclass(frozen=True)
class GmmModel:
    """A GMM-HMM acoustic model."""

    hmm: Hmm
    gmms: Gmms


def read_hmm(tree: str | Path, model: str | Path) -> Hmm:
    """Read a tree and the transition model of any ``.mdl``.

    Raises:
        DataError: a file is missing, truncated or damaged, or the tree is not binary.
    """
    return _hmm(tree, read_transition_model(model), str(model))


def read_gmm_model(tree: str | Path, model: str | Path) -> GmmModel:
    """Read a tree and a GMM model, binary or text.

    Raises:
        DataError: see `read_hmm`; or the model holds no diagonal GMMs (but a neural network, for example).
    """
    reader = Reader(model)
    transitions = read_transitions(reader)
    reader.expect("<DIMENSION>")
    dim = reader.integer()
    reader.expect("<NUMPDFS>")
    num_pdfs = reader.integer()
    weights, means, variances = [], [], []
    for _ in range(num_pdfs):
        begin = reader.position
        reader.expect("<DiagGMM>", "<DiagGMMBegin>")
        if reader.accept("<GCONSTS>"):
            reader.vector()  # follows from the others
        reader.expect("<WEIGHTS>")
        weights.append(reader.vector())
        reader.expect("<MEANS_INVVARS>")
        means.append(reader.matrix())
        reader.expect("<INV_VARS>")
        variances.append(reader.matrix())
        reader.expect("</DiagGMM>", "<DiagGMMEnd>")
        if not means[-1].shape == variances[-1].shape == (len(weights[-1]), dim):
            raise reader.error("the parts of a GMM differ in size", begin)
    if num_pdfs != transitions.num_pdfs:
        raise reader.error(f"{num_pdfs} GMMs for {transitions.num_pdfs} pdfs")
    first = np.concatenate([[0], np.cumsum([len(w) for w in weights])]).astype(np.int64)
    gmms = Gmms(first, np.concatenate(weights), np.concatenate(means), np.concatenate(variances))
    return GmmModel(_hmm(tree, transitions, str(model)), gmms)


def write_gmm_model(path: str | Path, hmm: Hmm, gmms: Gmms) -> None:
    """Write a binary GMM model that Kaldi's programs read.

    Raises:
        DataError: the file cannot be written.
    """
    _, wheel_model = hmm.build()
    transitions = parse_transition_model(str(wheel_model))
    transitions.log_probs = hmm.log_probs  # the text form has six digits only
    with atomic_write(path) as stream:
        writer = Writer(stream)
        write_transitions(transitions, writer)
        writer.token("<DIMENSION>")
        writer.integer(gmms.dim)
        writer.token("<NUMPDFS>")
        writer.integer(gmms.num_pdfs)
        for pdf in range(gmms.num_pdfs):
            own = slice(int(gmms.first[pdf]), int(gmms.first[pdf + 1]))
            writer.token("<DiagGMM>")
            writer.token("<GCONSTS>")
            writer.vector(gmms.gconsts[own])
            writer.token("<WEIGHTS>")
            writer.vector(gmms.weights[own])
            writer.token("<MEANS_INVVARS>")
            writer.matrix(gmms.means_invvars[own])
            writer.token("<INV_VARS>")
            writer.matrix(gmms.inv_vars[own])
            writer.token("</DiagGMM>")


def _hmm(tree: str | Path, transitions: TransitionModel, model: str) -> Hmm:
    try:
        tree_bytes = Path(tree).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=str(tree)) from error
    if not transitions.is_hmm:
        raise DataError("self-loops with pdfs of their own (chain models) are not supported", file=model)
    return Hmm(tree_bytes, _topology_text(transitions), transitions.log_probs)


def _topology_text(model: TransitionModel) -> str:
    """The topology as a ``topo`` file; nine digits keep the probabilities bit for bit."""
    lines = ["<Topology>"]
    for number, states in enumerate(model.entries):
        phones = [str(phone) for phone in model.phones if model.phone_to_entry[phone] == number]
        lines += ["<TopologyEntry>", "<ForPhones>", " ".join(phones), "</ForPhones>"]
        for index, state in enumerate(states):
            pdf_class = f"<PdfClass> {state.pdf_class} " if state.pdf_class >= 0 else ""
            arcs = "".join(f"<Transition> {target} {prob:.9g} " for target, prob in state.transitions)
            lines.append(f"<State> {index} {pdf_class}{arcs}</State>")
        lines.append("</TopologyEntry>")
    return "\n".join([*lines, "</Topology>"]) + "\n"
