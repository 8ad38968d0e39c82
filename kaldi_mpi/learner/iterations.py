"""What happens between two iterations: statistics are summed, the averaged model is written, parameters are shrunk.

``DIR/0.mdl``, ``1.mdl``, ... are the averaged models at the iterations' ends, under the names and with the lifetime
that they have in Kaldi: recipes decode with them, the final combination reads them, ``--stage N`` begins with one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.tokens import FloatArray
from kaldi_mpi.formats.transition import TransitionModel
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.nnet3 import from_torch, make_am, read_nnet, to_torch, write_am, write_nnet
from kaldi_mpi.transport.world import World

_LEAST_SCALE = 0.5  # as in Kaldi's scripts


@dataclasses.dataclass(frozen=True)
class Shrinking:
    """By what all parameters are multiplied as an iteration begins (``--trainer.optimization.*shrink*``).

    As in ``train_rnn.py``: 1 - `proportional` times the actual learning rate; or, where that is above `value`, `value`
    itself if this is the first iteration, or the model's saturation is above `threshold`, and else 1.

    Attributes:
        value: of shrink-value; 1 for never.
        threshold: of shrink-saturation-threshold.
        proportional: of proportional-shrink; 0 for never.
    """

    value: float = 1.0
    threshold: float = 0.4
    proportional: float = 0.0

    @property
    def acts(self) -> bool:
        """Whether any iteration can be shrunk."""
        return self.value != 1.0 or self.proportional != 0.0

    def scale(self, rate: float, first: bool, saturation: float) -> float:
        """The scale.

        Args:
            rate: the actual learning rate of a learner.
            first: whether this is the training's first iteration.
            saturation: of the model at the end of the one before, see `AcousticModel.saturation`.

        Raises:
            ConfigError: proportional-shrink makes it 0.5 or less.
        """
        scale = 1.0 - self.proportional * rate
        if scale <= _LEAST_SCALE:
            raise ConfigError(
                f"--trainer.optimization.proportional-shrink {self.proportional:g}: too large, at a learning rate of "
                f"{rate:g} it scales the parameters by {scale:g} each iteration, and Kaldi wants more than 0.5"
            )
        if self.value < scale:
            return self.value if first or saturation > self.threshold else 1.0
        return scale


def sum_statistics(model: AcousticModel, world: World) -> None:
    """Give the models of all learners the sums of their activation statistics, as nnet3-average would."""
    if world.size == 1:
        return
    own = [[part.cpu().numpy() for part in module.statistics()] for module in model.by_name.values()]
    everybody = world.gather(own)
    for number, module in enumerate(model.by_name.values()):
        parts = module.statistics()
        for index, part in enumerate(parts):
            # Who has stored nothing has empty sums.
            there = [of[number][index] for of in everybody if of[number][index].size]
            if there:
                parts[index] = torch.as_tensor(np.sum(there, axis=0)).to(part.device)
        module.load_statistics(parts)


def models_to_combine(num_iterations: int, iterations_per_epoch: float, most: int) -> list[int]:
    """The iterations whose models the final combination may take, ascending (``get_model_combine_iters``).

    They are `most`, if half of all are as many; where half an epoch has more, `most` or a few more of those, evenly
    spaced.
    """
    wanted = min(int(iterations_per_epoch / 2) + 1, num_iterations // 2)
    if wanted > most:
        found = set(range(num_iterations - wanted + 1, num_iterations + 1, wanted // most))
    else:
        found = set(range(num_iterations - min(most, num_iterations // 2) + 1, num_iterations + 1))
    return sorted(found | {num_iterations})


class IterationModels:
    """DIR/ITERATION.mdl, or .raw: written by rank 0, read by whoever asks.

    Attributes:
        acoustic: transition model of all models, and their first priors, (K,) float32; None: they are raw networks.

    Args:
        folder: DIR.
        acoustic: see above.
        num_iterations: of the training.
        kept: iterations that are kept while the training goes on (for the combination).
        interval: those that it divides are kept for good.
        binary: whether files are binary.
    """

    def __init__(
        self,
        folder: Path,
        acoustic: tuple[TransitionModel, FloatArray] | None,
        num_iterations: int,
        kept: Sequence[int],
        interval: int,
        binary: bool,
    ) -> None:
        self._folder, self.acoustic = folder, acoustic
        self._last, self._kept, self._interval, self._binary = num_iterations, frozenset(kept), interval, binary

    def path(self, name: int | str) -> Path:
        """Where the model of an iteration lies, or one with another name."""
        return self._folder / f"{name}.{'raw' if self.acoustic is None else 'mdl'}"

    def write(self, name: int | str, model: AcousticModel) -> None:
        """Write `model` as it is; of iterations before the last two, those go that nobody will want.

        Raises:
            DataError: it cannot be written.
        """
        if self.acoustic is None:
            write_nnet(from_torch(model), self.path(name), binary=self._binary)
        else:
            write_am(make_am(model, *self.acoustic), self.path(name), binary=self._binary)
        if isinstance(name, int):
            self._remove(name - 2, self._kept)

    def clean(self) -> None:
        """At the end: remove those before the last, but for each `interval`-th (``clean_nnet_dir``)."""
        for number in range(self._last):
            self._remove(number, frozenset())

    def _remove(self, number: int, kept: frozenset[int]) -> None:
        if number >= 0 and number % self._interval and number not in kept:
            self.path(number).unlink(missing_ok=True)

    def read(self, name: int | str, why: str) -> AcousticModel:
        """The network of a model that was written, as it is in the file.

        Args:
            why: what it is wanted for, if it is not there.

        Raises:
            DataError: there is no such file, or it is malformed.
        """
        if not self.path(name).is_file():
            raise DataError(f"no such file ({why})", file=str(self.path(name)))
        return to_torch(read_nnet(self.path(name)))


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
        for (leaf, buffer), my_buffer in zip(module.named_buffers(), own.buffers(), strict=True):
            _copy_buffer(own, leaf, my_buffer, buffer)


def _copy_buffer(module: torch.nn.Module, name: str, mine: Tensor, theirs: Tensor) -> None:
    if mine.shape == theirs.shape:
        mine.copy_(theirs)
    else:  # statistics, of which there were none yet
        setattr(module, name, theirs.to(mine.device).clone())


def log_shrinking(iteration: int, scale: float, saturation: float) -> None:
    """A line as Kaldi's scripts write it, where an iteration begins with shrunk parameters."""
    if scale != 1.0:
        logger.info("iteration %d: shrink: %.5f (saturation %.3f)", iteration, scale, saturation)
