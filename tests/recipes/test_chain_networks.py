"""Every network of Kaldi's chain recipes takes two steps of chain training. Needs KALDI_ROOT."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kaldi_mpi.chain.objective import ChainOptions
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.chain_objective import OUTPUT, XENT, LfMmi
from kaldi_mpi.learner.faults import Injector
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.network import stand_in
from kaldi_mpi.learner.objective import DerivativeTimes
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.schedule import ExponentialRate
from kaldi_mpi.learner.scores import Term
from kaldi_mpi.learner.state import TrainingState
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.loader import Minibatch
from kaldi_mpi.models import AcousticModel, Config, build_model, parse_xconfig_text, transform_files
from kaldi_mpi.models.graph import Graph
from tests.chain_minibatch import made_denominator, made_minibatch
from tests.recipe_networks import RecipeNetwork, recipe_networks
from tests.recipe_scripts import scripts

pytestmark = pytest.mark.kaldi

_SEQUENCES, _FRAMES = 2, 8
_LEAKY = 0.1


class Told(LfMmi):
    """Keeps what each minibatch came to."""

    def __init__(self, model: AcousticModel) -> None:
        xent = 0.1 if XENT in model.outputs else 0.0
        options = ChainOptions(l2_regularize=5e-5, xent_regularize=xent, leaky_hmm_coefficient=_LEAKY)
        super().__init__(made_denominator(model.output_dim, _LEAKY), options)
        self.terms: list[Mapping[str, Term]] = []

    def train(
        self, model: AcousticModel, feats: Tensor, batch: Minibatch[Tensor], derivatives: DerivativeTimes
    ) -> Mapping[str, Term]:
        self.terms.append(super().train(model, feats, batch, derivatives))
        return self.terms[-1]
