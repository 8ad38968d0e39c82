"""Strategies: how the models of several learners become one."""

from kaldi_mpi.averaging.names import make_strategy
from kaldi_mpi.averaging.strategy import Collective, Flat, Step, Strategy

__all__ = ["Collective", "Flat", "Step", "Strategy", "make_strategy"]
