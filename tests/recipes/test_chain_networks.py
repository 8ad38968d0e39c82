"""Every network of Kaldi's chain recipes takes two steps of chain training. Needs KALDI_ROOT."""

from __future__ import annotations

import functools
import math
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
from kaldi_mpi.models.chance import Chance
from kaldi_mpi.models.config import ComponentNode
from tests.chain_minibatch import made_denominator, made_minibatch
from tests.recipe_networks import RecipeNetwork, recipe_networks
from tests.recipe_scripts import scripts

pytestmark = pytest.mark.kaldi

PARTS = 4  # so that a part stays within a test's time
_SEQUENCES, _FRAMES, _STEPS = 2, 8, 2
_LEAKY, _RATE, _LONG = 0.1, 0.001, 10**9
# Widths from `_WIDE` on are a quarter, so that all networks take a minute; 200 is filters times height of an i-vector.
_WIDE, _KEPT = 128, 200
_DIM = re.compile(r"(?<![\w-])((?:[\w-]+-)?dim)=(\d+)")
_FACTOR = re.compile(r"--chain\.frame-subsampling-factor[ =]+[\"']?(\d+|\$\{?\w+)")


class Recorded(LfMmi):
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


class FirstNever(Chance):
    """Has what chance decides never happen at the first minibatch, and always at others.

    The orthonormal constraint changes new parameters more than a step does.
    """

    minibatch = 0

    def decide(self, component: str, what: str, probability: float) -> bool:
        return self.minibatch > 0

    decide_together = decide


def narrow(text: str) -> str:
    """An xconfig with widths of a quarter."""

    def quarter(found: re.Match[str]) -> str:
        width = int(found[2])
        return f"{found[1]}={width // 4 if width >= _WIDE and width != _KEPT else width}"

    return _DIM.sub(quarter, text)


@functools.lru_cache(maxsize=1)
def configs() -> list[tuple[RecipeNetwork, Config]]:
    """The distinct networks of the chain recipes that Kaldi accepts (tests/models has what it refuses)."""
    found: dict[str, tuple[RecipeNetwork, Config]] = {}
    for network in recipe_networks():
        if network.kind != "chain":
            continue
        try:
            whole = parse_xconfig_text(network.text, network.script)
        except ConfigError:
            continue
        try:
            config = parse_xconfig_text(narrow(network.text), network.script)
        except ConfigError:  # widths that must fit each other
            config = whole
        key = "\n".join([*map(str, whole.components), *whole.node_lines()])
        found.setdefault(key, (network, config))
    return list(found.values())


def subsampling_factors() -> dict[str, int]:
    """Of the scripts whose networks have another frame-subsampling-factor than 3."""
    found = {}
    for script, source in scripts():
        given = _FACTOR.search(source)
        if given is not None:
            values = re.findall(rf"^\s*{given[1].lstrip('${')}=(\d+)", source, re.M) if "$" in given[1] else [given[1]]
            found[script] = int(values[0]) if values else 3
    return found


def trained_by(model: AcousticModel) -> set[str]:
    """Components that the trained outputs depend on."""
    nodes = {node.name: node for node in model.config.nodes}
    left = [name for name in (OUTPUT, XENT) if name in model.outputs]
    reached: set[str] = set()
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += model.graph.inputs_of(nodes[name])
    return {node.component for node in nodes.values() if isinstance(node, ComponentNode) and node.name in reached}


def complaints(config: Config, factor: int, folder: Path) -> list[str]:
    """What goes wrong when a network takes two steps."""
    transforms = {path: stand_in(config, component) for component, path in transform_files(config)}
    model = build_model(config, seed=0, transforms=transforms)
    flat = FlatParameters.of_model(model)
    model.use_natural_gradient()
    model.train()
    model.mode.chance = chance = FirstNever()
    rate, objective = ExponentialRate(_RATE, _RATE, _LONG), Recorded(model)
    state = TrainingState(model, flat, KaldiSgd(flat, 0.0, 2.0), [])
    log = TrainingLog(folder, 0, rate, 1.0)
    learner = LearnerStep(state, rate, 1, DerivativeTimes(), log, Injector((), 0), objective=objective)
    start = flat.values.clone()
    batch = made_minibatch(model, _SEQUENCES, _FRAMES, factor, seed=0)
    for chance.minibatch in range(_STEPS):
        learner.begin(batch, _SEQUENCES)
        learner.compute(batch)
        learner.update(None, together=False)
    wrong = [] if torch.isfinite(flat.values).all() else ["parameters that are not finite"]
    for name in objective.terms[0]:
        values = [float(terms[name].objective) for terms in objective.terms]
        # Log-probabilities, and what is allowed is part of what the denominator has.
        if not all(math.isfinite(value) and value < 0 for value in values):
            wrong.append(f"objective at {name} {values}")
        elif name == OUTPUT and not values[1] > values[0]:  # the other's targets, the posteriors, have moved as well
            wrong.append(f"objective at {name} does not rise: {values}")
    reached = trained_by(model)
    for c in flat.components:
        moved = bool((flat.values[c.where] != start[c.where]).any())
        if c.name not in reached:
            if flat.gradients[c.where].any():
                wrong.append(f"{c.name} has a gradient, and nothing depends on it")
        elif c.learning_rate_factor and not (moved and flat.gradients[c.where].any()):
            wrong.append(f"{c.name} does not change")
    return wrong


@pytest.mark.parametrize("part", range(PARTS))
def test_they_take_two_steps(part: int, tmp_path: Path) -> None:
    """Outputs begin at 0, so it is the second step that has gradients everywhere."""
    torch.set_num_threads(1)
    (tmp_path / "log").mkdir()
    networks, factors = configs(), subsampling_factors()
    assert len(networks) >= 190 and set(factors.values()) >= {3, 4, 5, 6}
    began, wrong = time.process_time(), []
    for network, config in networks[part::PARTS]:
        found = complaints(config, factors.get(network.script, 3), tmp_path)
        wrong += [f"{network.script} ({network.branches}): {complaint}" for complaint in found]
    print(f"{len(networks[part::PARTS])} of {len(networks)} networks, {time.process_time() - began:.0f} s of CPU")
    assert not wrong, "\n".join(wrong)
