"""Kaldi's side of a recipe: data, features, alignments, graphs, decoding, scoring."""
