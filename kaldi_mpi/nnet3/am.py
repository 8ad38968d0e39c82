"""Acoustic models (.mdl): a transition model, a network and the priors of its outputs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.tokens import FloatArray, Reader, Writer
from kaldi_mpi.formats.transition import TransitionModel, read_transitions, write_transitions
from kaldi_mpi.nnet3.network import Nnet, read_network, write_network


@dataclass
class AmNnet:
    """What a final.mdl holds.

    Attributes:
        priors: (num_pdfs,) or empty (then decoding does not divide by priors).
        left_context, right_context: of the network; Kaldi computes them anew when it reads the file.
    """

    transition_model: TransitionModel
    nnet: Nnet
    priors: FloatArray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    left_context: int = 0
    right_context: int = 0


def read_am(path: str | os.PathLike[str]) -> AmNnet:
    """Read a .mdl file, binary or text.

    Raises:
        DataError: names the file, the component and the byte offset.
    """
    reader = Reader(path)
    transition_model = read_transitions(reader)
    nnet = read_network(reader)
    reader.expect("<LeftContext>")
    left = reader.integer()
    reader.expect("<RightContext>")
    right = reader.integer()
    reader.expect("<Priors>")
    before = reader.position
    priors = reader.vector()
    if len(priors) not in (0, transition_model.num_pdfs):
        raise reader.error(f"{len(priors)} priors for {transition_model.num_pdfs} pdfs", before)
    return AmNnet(transition_model, nnet, priors, left, right)


def write_am(am: AmNnet, path: str | os.PathLike[str], binary: bool = True) -> None:
    """Write a .mdl file; it appears whole or not at all.

    Raises:
        DataError: the file cannot be written (a full disk, for example); names it and the cause.
        ValueError: the number of priors is not that of pdfs.
    """
    if len(am.priors) not in (0, am.transition_model.num_pdfs):
        raise ValueError(f"{len(am.priors)} priors for {am.transition_model.num_pdfs} pdfs")
    with atomic_write(path) as stream:
        writer = Writer(stream, binary)
        write_transitions(am.transition_model, writer)
        write_network(am.nnet, writer)
        writer.token("<LeftContext>")
        writer.integer(am.left_context)
        writer.token("<RightContext>")
        writer.integer(am.right_context)
        writer.token("<Priors>")
        writer.vector(am.priors)
