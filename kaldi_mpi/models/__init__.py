"""Acoustic models in PyTorch, defined by xconfig files, computing what Kaldi's nnet3 computes."""

from kaldi_mpi.models.config import Config
from kaldi_mpi.models.lda import LdaStats
from kaldi_mpi.models.model import (
    AcousticModel,
    Component,
    build_model,
    missing_transforms,
    transform_files,
)
from kaldi_mpi.models.xconfig import parse_xconfig, parse_xconfig_text

__all__ = [
    "AcousticModel",
    "Component",
    "Config",
    "LdaStats",
    "build_model",
    "missing_transforms",
    "parse_xconfig",
    "parse_xconfig_text",
    "transform_files",
]
