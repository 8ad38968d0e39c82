"""What training leaves to chance, and in which mode components work."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Chance:
    """Draws of one learner: decisions on the host, masks on the device; neither makes one wait for the other.

    Args:
        seed: the same seed gives the same draws, in the same order of calls.
        rank: of the learner; learners differ in all draws but those of `decide_together`.
    """

    def __init__(self, seed: int = 0, rank: int = 0) -> None:
        # 'cha': apart from every other use of the seed.
        self._host = np.random.default_rng([seed, 0x636861, 1 + rank])
        self._common = np.random.default_rng([seed, 0x636861])
        self._seed = int(np.random.SeedSequence([seed, 0x636861, 1 + rank]).generate_state(1)[0])
        self._device: dict[torch.device, torch.Generator] = {}

    def decide(self, component: str, what: str, probability: float) -> bool:
        """Whether something happens in this minibatch.

        Args:
            component: its name, for those who replace chance by a record.
            what: ``stats``, ``repair`` or ``oderiv``.
        """
        return bool(self._host.random() < probability)

    def decide_together(self, component: str, what: str, probability: float) -> bool:
        """The same on all learners that have made as many steps: models that must not differ are changed by it.

        Args:
            what: ``orthonormal``.
        """
        return bool(self._common.random() < probability)

    def integer(self, low: int, high: int) -> int:
        """One of low .. high, both included."""
        return int(self._host.integers(low, high + 1))

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Uniform in [0, 1), of the dtype and on the device of `like`."""
        device = like.device
        if device not in self._device:
            self._device[device] = torch.Generator(device).manual_seed(self._seed)
        return torch.rand(*shape, dtype=like.dtype, device=device, generator=self._device[device])

    def state_dict(self) -> dict[str, Any]:
        """All generators' states, for a checkpoint."""
        return {
            "host": self._host.bit_generator.state,
            "common": self._common.bit_generator.state,
            "device": {str(device): generator.get_state() for device, generator in self._device.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._host.bit_generator.state = state["host"]
        self._common.bit_generator.state = state["common"]
        for name, value in state["device"].items():
            device = torch.device(name)
            self._device[device] = torch.Generator(device)
            self._device[device].set_state(value)


@dataclasses.dataclass
class Mode:
    """How the components of one model work; shared by all of them.

    Kaldi's programs differ in this: nnet3-train switches everything on, nnet3-compute and decoders everything off,
    nnet3-combine takes batch-norm's means from the minibatch but no dropout, nnet3-compute-from-egs (priors) both
    but keeps no statistics.

    Attributes:
        dropout: masks are drawn; otherwise the test mode of each component.
        batch_statistics: batch-norm normalises by the minibatch's own mean and variance.
        store: statistics of activations and of batch-norm are kept where a gradient is taken, self-repair acts.
        collect: statistics are kept also without a gradient (they are computed anew).
        chance: where draws come from.
    """

    dropout: bool = False
    batch_statistics: bool = False
    store: bool = False
    collect: bool = False
    chance: Chance = dataclasses.field(default_factory=Chance)

    def train(self) -> None:
        """As nnet3-train works."""
        self.dropout = self.batch_statistics = self.store = True

    @contextlib.contextmanager
    def evaluating(self, collect: bool = False, dropout: bool = True) -> Iterator[None]:
        """For a block, as nnet3-compute-from-egs works: batch-norm by minibatch, dropout on; then test mode.

        Without dropout, as nnet3-combine evaluates.
        """
        self.dropout, self.batch_statistics, self.collect = dropout, True, collect
        try:
            yield
        finally:
            self.test()

    def test(self) -> None:
        """As nnet3-compute works."""
        self.dropout = self.batch_statistics = self.store = self.collect = False
