"""What a learner keeps from the first minibatch to the last: its model, its optimiser, how far it has come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kaldi_mpi.averaging import Strategy
from kaldi_mpi.errors import DataError
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.optimiser import KaldiSgd
from kaldi_mpi.models import AcousticModel


@dataclasses.dataclass
class TrainingState:
    """One rank's; in a checkpoint, with it a new run goes on bit for bit.

    Attributes:
        model: the same on all ranks at the start; on this learner's device.
        flat: its parameters and gradients.
        optimiser: what makes a change of gradients.
        strategies: of the training's phases, in order.
        step: the next global step to take.
        frames: trained on, over all learners.
        begun_at: the step that this run began with, where it did so with a model and without a checkpoint.
    """

    model: AcousticModel
    flat: FlatParameters
    optimiser: KaldiSgd
    strategies: Sequence[Strategy]
    step: int = 0
    frames: int = 0
    begun_at: int = 0

    def state_dict(self, changed: dict[Strategy, Any] | None = None) -> dict[str, Any]:
        """All of it, between two steps, as a copy that does not change.

        Args:
            changed: the state of strategies which other threads may be at work on.
        """
        changed = changed or {}
        return {
            "step": self.step,
            "frames": self.frames,
            "parameters": self.flat.values.cpu().clone(),
            "buffers": {name: value.cpu().clone() for name, value in self.model.named_buffers()},
            "preconditioners": {name: c.training_state() for name, c in self.model.by_name.items()},
            "chance": self.model.mode.chance.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "strategies": [changed.get(strategy) or strategy.state_dict() for strategy in self.strategies],
        }

    def load_state_dict(self, state: dict[str, Any], same_ranks: bool = True) -> None:
        """Go on from it.

        Args:
            same_ranks: whether as many learners have saved it; where not, what belongs to one learner begins anew.
        """
        self.step, self.frames = state["step"], state["frames"]
        self.flat.load(state["parameters"].numpy())
        for name, component in self.model.by_name.items():
            component.load_training_state(state["preconditioners"][name])
        load_buffers(self.model, state["buffers"])
        self.optimiser.load_state_dict(state["optimiser"])
        if same_ranks:
            self.model.mode.chance.load_state_dict(state["chance"])
        for strategy, saved in zip(self.strategies, state["strategies"], strict=True):
            if same_ranks or not strategy.asynchronous:
                strategy.load_state_dict(saved)


def load_buffers(model: AcousticModel, buffers: dict[str, Tensor]) -> None:
    """Put a model's buffers back; statistics that did not exist yet get their size."""
    for name, value in buffers.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        own = getattr(module, leaf)
        if own.shape == value.shape:
            own.copy_(value)
        else:
            setattr(module, leaf, value.to(own.device))


def copy_model(source: AcousticModel, target: AcousticModel, file: str) -> None:
    """Give `target` the parameters and statistics of `source`, component by component.

    Raises:
        DataError: they are not the same network; names `file`, which `source` is from, and the component.
    """
    if list(source.by_name) != list(target.by_name):
        raise DataError("it has other components than the network that is trained", file=file)
    for name, module in source.by_name.items():
        own = target.by_name[name]
        for mine, theirs in zip(own.parameters(), module.parameters(), strict=True):
            if mine.shape != theirs.shape:
                raise DataError(
                    f"parameters of shape {tuple(theirs.shape)}, the network that is trained has {tuple(mine.shape)}",
                    file=file, key=name,
                )  # fmt: skip
            mine.data.copy_(theirs.data)
    load_buffers(target, dict(source.named_buffers()))
