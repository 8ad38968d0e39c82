"""Kaldi's files, without PyTorch and MPI: what loader, nnet3 and embedded have in common."""
