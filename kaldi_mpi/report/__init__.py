"""Logs that Kaldi's tools parse, and progress."""
