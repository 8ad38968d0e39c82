"""nnet3 files: read, write, to and from PyTorch."""
