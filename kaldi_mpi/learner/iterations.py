"""Where an iteration ends: statistics are summed over learners, and the averaged model is written.

``DIR/0.mdl``, ``1.mdl``, ... are the averaged models at the iterations' ends, under the names and with the lifetime
that they have in Kaldi: recipes decode with them, the final combination reads them, ``--stage N`` begins with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.tokens import FloatArray
from kaldi_mpi.formats.transition import TransitionModel
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.nnet3 import from_torch, make_am, read_nnet, to_torch, write_am, write_nnet
from kaldi_mpi.transport.world import World


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


class IterationModels:
    """DIR/ITERATION.mdl, or .raw: written by rank 0, read by whoever asks.

    Attributes:
        acoustic: transition model of all models, and their first priors, (K,) float32, or (0,) of chain models; None:
            they are raw networks.
        kept: iterations whose models are kept while the training goes on: those that will be combined, ascending.
        combined: the name of the model that the combination makes, Kaldi's; ``final`` where nothing comes after it.

    Args:
        folder: DIR.
        acoustic, kept: see above.
        num_iterations: of the training.
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
        self._folder, self.acoustic, self.kept = folder, acoustic, list(kept)
        self.combined = "final" if acoustic is None or not len(acoustic[1]) else "combined"
        self._last, self._interval, self._binary = num_iterations, interval, binary

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
            self._describe(name, model)
            self._remove(name - 2, self.kept)

    def _describe(self, number: int, model: AcousticModel) -> None:
        """What the scripts in ``steps/info`` look for in ``log/progress.ITER.log``: sizes."""
        inputs = [(model.input_name, model.input_dim), ("ivector", model.ivector_dim)]
        lines = [
            f"num-parameters: {sum(p.numel() for c in model.updatable_components() for p in c.parameters)}",
            *(f"input-node name={node} dim={dim}" for node, dim in inputs if dim),
            *(f"output-node name={node} dim={model.graph.dim(node)}" for node in model.outputs),
        ]
        with atomic_write(self._folder / "log" / f"progress.{number}.log", "w", sync=False) as stream:
            stream.writelines(f"{line}\n" for line in lines)

    def clean(self) -> None:
        """At the end: remove those before the last, but for each `interval`-th (``clean_nnet_dir``)."""
        for number in range(self._last):
            self._remove(number, ())

    def _remove(self, number: int, kept: Sequence[int]) -> None:
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
