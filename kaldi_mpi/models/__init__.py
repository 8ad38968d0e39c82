"""Acoustic models in PyTorch, built from Kaldi xconfig."""
