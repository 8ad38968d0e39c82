"""Fuzzing of the C parsers: a target for each format, a seed corpus, and what builds and runs them."""
