"""Kaldi's nnet3 model files: reading, writing, and conversion from and to PyTorch."""

from kaldi_mpi.nnet3.tokens import read_matrix, write_matrix
from kaldi_mpi.nnet3.transition import TransitionModel, parse_transition_model, read_transition_model

__all__ = [
    "TransitionModel",
    "parse_transition_model",
    "read_matrix",
    "read_transition_model",
    "write_matrix",
]
