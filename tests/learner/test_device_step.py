"""A step on a device never waits for the host: the whole of it on tensors that have no values.

Tensors of PyTorch's meta device know shapes and dtypes alone, so whatever would need a value on the host (``item``,
a Python ``if`` on a tensor, an index by a mask, a copy to main memory) raises an error, forward, backward and in the
optimiser. Fake CUDA tensors would do the same, but a PyTorch without CUDA ends the process where autograd meets them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kaldi_mpi.learner.faults import Injector
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.objective import DerivativeTimes
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.learner.schedule import ExponentialRate
from kaldi_mpi.learner.shrinking import Shrinking
from kaldi_mpi.learner.state import TrainingState
from kaldi_mpi.learner.step import LearnerStep
from kaldi_mpi.loader import ChunkShape, Minibatch
from kaldi_mpi.models import AcousticModel, build_model, natural_gradient
from kaldi_mpi.models.chance import Chance
from kaldi_mpi.models.xconfig import parse_xconfig_text

META = torch.device("meta")
OUTPUT = "output-layer name=output dim=15 max-change=1.5 l2-regularize=0.01\n"
NETS = {
    "lstm": (
        "fast-lstm-layer name=a cell-dim=16 delay=-3 decay-time=20\n"
        "fast-lstmp-layer name=b cell-dim=16 delay=-1 recurrent-projection-dim=4 dropout-proportion=0.3\n"
    ),
    "blstm": (
        "fast-lstm-layer name=a cell-dim=16 delay=-3 input=input\n"
        "fast-lstm-layer name=b cell-dim=16 delay=3 input=input\n"
        "relu-renorm-layer name=c dim=16 input=Append(a,b)\n"
    ),
    "tdnnf": (
        "relu-batchnorm-dropout-layer name=a dim=24 dropout-proportion=0.1 dropout-per-dim-continuous=true\n"
        "tdnnf-layer name=b dim=24 bottleneck-dim=6 time-stride=2 dropout-proportion=0.1 l2-regularize=0.01\n"
        "prefinal-layer name=c big-dim=24 small-dim=8\n"
    ),
    "dnn": (
        "sigmoid-layer name=a dim=16\ntanh-layer name=b dim=16\nrelu-renorm-layer name=c dim=16 input=Append(-1,0,1)\n"
    ),
}
CNN = (
    "component name=conv type=TimeHeightConvolutionComponent height-in=12 height-out=6 height-subsample-out=2 "
    "num-filters-in=1 num-filters-out=4 height-offsets=-1,0,1 time-offsets=-1,0,1\n"
    "component-node name=conv component=conv input=input\n"
    "component name=norm type=BatchNormComponent dim=24 block-dim=4\n"
    "component-node name=norm component=norm input=conv\n"
    "component name=relu type=RectifiedLinearComponent dim=24 block-dim=4 self-repair-scale=2e-05\n"
    "component-node name=relu component=relu input=norm\n"
    "component name=affine type=NaturalGradientAffineComponent input-dim=24 output-dim=15\n"
    "component-node name=affine component=affine input=relu\n"
    "component name=softmax type=LogSoftmaxComponent dim=15\n"
    "component-node name=softmax component=softmax input=affine\n"
    "output-node name=output input=softmax\n"
)


def model_of(name: str) -> AcousticModel:
    if name == "cnn":
        from kaldi_mpi.models.config import Place, parse_config

        lines = (
            (line, Place("cnn", number))
            for number, line in enumerate(("input-node name=input dim=12\n" + CNN).splitlines())
        )
        return build_model(parse_config(lines, "cnn"), seed=0)
    return build_model(parse_xconfig_text("input dim=12 name=input\n" + NETS[name] + OUTPUT), seed=0)


class Copies(TorchDispatchMode):
    """Counts what comes from main memory to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.brought: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [part for part in args if isinstance(part, torch.Tensor)]
        if (
            isinstance(result, torch.Tensor)
            and result.device == META
            and any(part.device != META and part.dim() for part in tensors)
        ):
            self.brought.append(f"{func} {[tuple(part.shape) for part in tensors]}")
        return result


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Moments of preconditioners "arrive" with made-up values: their way to the host is behind the learner's back."""
    sizes: list[int] = []

    def send(packed: torch.Tensor) -> tuple[torch.Tensor, Any]:
        assert packed.device == META
        sizes.append(packed.numel())
        rank = int(np.sqrt((packed.numel() - 1) / 2))
        parts = [torch.eye(rank).reshape(-1), torch.eye(rank).reshape(-1), torch.tensor([2.0 * rank])]
        return torch.cat(parts), Arrived()

    monkeypatch.setattr(natural_gradient, "send_to_host", send)
    yield sizes


class WithoutGenerator(Chance):
    """A device without values has no generator."""

    def uniform(self, *shape: int, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device)


class Arrived:
    def synchronize(self) -> None:
        """It is there."""


@pytest.mark.parametrize(("name", "backstitch"), [*((name, 0.0) for name in (*NETS, "cnn")), ("tdnnf", 0.3)])
def test_a_step_needs_no_value_on_the_host(tmp_path: Path, no_host: list[int], name: str, backstitch: float) -> None:
    (tmp_path / "log").mkdir()
    model = model_of(name).to(META)
    flat = FlatParameters.of_model(model)
    model.use_natural_gradient()
    model.train()
    model.mode.chance = WithoutGenerator(0, 0)
    rate = ExponentialRate(0.001, 0.0001, 10**6)
    state = TrainingState(model, flat, KaldiSgd(flat, 0.0 if backstitch else 0.5, 2.0), [])
    log = TrainingLog(tmp_path, 0, rate, 1.0)
    learner = LearnerStep(
        state, rate, 2, DerivativeTimes.of_margin(8, model.left_context, model.right_context), log, Injector((), 0),
        backstitch_scale=backstitch, backstitch_interval=2, shrinking=Shrinking(0.99, 0.4),
    )  # fmt: skip
    shape = ChunkShape(12, model.left_context + 5, model.right_context + 5)
    feats, labels = torch.empty(8, shape.rows, 12, device=META), torch.empty(8, 12, dtype=torch.int64, device=META)
    batch = Minibatch(feats, labels, 96, 192, 96.0, 0, 0, shape)
    learner.begin_iteration(0, 0)
    with Copies() as copies:
        for step in range(24):
            if step == 16:
                # By now every shape is known, and preconditioners update each fourth time.
                copies.brought.clear()
                no_host.clear()
            learner.begin(batch, 16)
            learner.compute(batch)
            learner.update(None, together=False)
    assert no_host, "no preconditioner was updated"
    # What still comes to the device is the preconditioners' small matrices.
    assert len(copies.brought) <= len(no_host), copies.brought
    assert all("_to_copy" in brought for brought in copies.brought), copies.brought
