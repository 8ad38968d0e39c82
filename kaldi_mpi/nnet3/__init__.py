"""Kaldi's nnet3 model files: reading, writing, and conversion from and to PyTorch."""

from kaldi_mpi.formats.tokens import read_matrix, write_matrix
from kaldi_mpi.formats.transition import TransitionModel, parse_transition_model, read_transition_model
from kaldi_mpi.nnet3.am import AmNnet, read_am, write_am
from kaldi_mpi.nnet3.convert import from_torch, make_am, to_torch
from kaldi_mpi.nnet3.network import Nnet, read_nnet, write_nnet

__all__ = [
    "AmNnet",
    "Nnet",
    "TransitionModel",
    "from_torch",
    "make_am",
    "parse_transition_model",
    "read_am",
    "read_matrix",
    "read_nnet",
    "read_transition_model",
    "to_torch",
    "write_am",
    "write_matrix",
    "write_nnet",
]
