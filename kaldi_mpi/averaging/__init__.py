"""Strategies: how the models of several learners become one."""

from kaldi_mpi.averaging.driver import Participant, SteppingLearner, synchronous_step
from kaldi_mpi.averaging.registry import NAMES, make_strategy
from kaldi_mpi.averaging.settings import Settings, check_settings
from kaldi_mpi.averaging.strategy import Asynchronous, Hook, Strategy, Synchronous

__all__ = [
    "NAMES",
    "Asynchronous",
    "Hook",
    "Participant",
    "Settings",
    "SteppingLearner",
    "Strategy",
    "Synchronous",
    "check_settings",
    "make_strategy",
    "synchronous_step",
]
