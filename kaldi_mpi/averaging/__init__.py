"""Strategies: how the models of several learners become one."""

from kaldi_mpi.averaging.names import make_strategy
from kaldi_mpi.averaging.strategy import Flat, Step, Strategy

__all__ = ["Flat", "Step", "Strategy", "make_strategy"]
