"""Kaldi's nnet3 model files: reading, writing, and conversion from and to PyTorch."""

from kaldi_mpi.nnet3.am import AmNnet, read_am, write_am
from kaldi_mpi.nnet3.convert import from_torch, make_am, to_torch
from kaldi_mpi.nnet3.network import Nnet, read_nnet, write_nnet

__all__ = [
    "AmNnet",
    "Nnet",
    "from_torch",
    "make_am",
    "read_am",
    "read_nnet",
    "to_torch",
    "write_am",
    "write_nnet",
]
