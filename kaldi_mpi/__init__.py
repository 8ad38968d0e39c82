"""kaldi_mpi: persistent MPI learners that train Kaldi nnet3 acoustic models."""

__version__ = "0.1.0"
