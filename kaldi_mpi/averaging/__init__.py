"""Strategies: how the models of several learners become one."""

from kaldi_mpi.averaging.strategy import Collective, Flat, Step, Strategy, make_strategy

__all__ = ["Collective", "Flat", "Step", "Strategy", "make_strategy"]
