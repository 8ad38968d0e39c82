"""Passes over data that do not train: validation (at once, or in the background), priors, LDA statistics.

Each learner takes its share of the chunks, and the sums are added over learners in rank order, so that the
figures do not depend on timing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.learner.batches import Batch
from kaldi_mpi.learner.chain_objective import occupations
from kaldi_mpi.learner.dataset import Dataset
from kaldi_mpi.learner.flat import FlatParameters
from kaldi_mpi.learner.iterations import IterationModels, sum_statistics
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.objective import FrameObjective, Objective, labelled_rows
from kaldi_mpi.learner.scores import ChainScore, Score
from kaldi_mpi.loader import MinibatchRule, Source
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.models.components import BatchNorm
from kaldi_mpi.models.lda import LdaStats
from kaldi_mpi.transport.beat import Beat
from kaldi_mpi.transport.world import SoloWorld, World

# LDA statistics are taken of features rounded to this. Their squares and sums are then exact in float64 (up to
# values of 256 and 2**25 frames, where all weights are 1), so that the transform has the same bits for any number of
# learners; without it, directions in which classes do not differ, and which rounding alone decides, would come out
# at random.
_LDA_QUANTUM = 2.0**-6


@dataclasses.dataclass(frozen=True)
class IterationEnd:
    """Where all learners stand between two steps and an iteration ends.

    Attributes:
        mean: (P,) float32, the model to validate.
        spread: the learners' models' mean squared distance from it.
    """

    mean: NDArray[np.float32]
    spread: float


@dataclasses.dataclass(frozen=True)
class Pass:
    """How a pass cuts its data: whole chunks, this learner's share of them, and its device.

    Attributes:
        minibatch: chunks of a minibatch, where that makes a difference, since batch-norm takes its means from it; None:
            as is convenient.
        beat: is told that the pass goes on; None: nobody is.
        objective: what the network is trained for.
    """

    dataset: Dataset
    world: World
    device: torch.device
    minibatch: MinibatchRule | None = None
    beat: Beat | None = None
    objective: Objective = dataclasses.field(default_factory=FrameObjective)

    def batches(self, source: Source, seed: int | None = None, max_chunks: int | None = None) -> Iterator[Batch]:
        """This learner's minibatches of one epoch, but for those without frames.

        They come in the source's order, or shuffled by `seed`; after `max_chunks` chunks, over all learners and
        rounded up to whole steps, there are no more.
        """
        chunks = 0
        with self.dataset.batches(
            source,
            self.device,
            rank=self.world.rank,
            size=self.world.size,
            trains=False,
            seed=seed or 0,
            shuffle=seed is not None,
            num_epochs=1,
            whole=self.minibatch,
        ) as batches:
            for batch in batches:
                if self.beat is not None:
                    self.beat.goes_on()
                if max_chunks is not None and chunks >= max_chunks:
                    break
                chunks += batches.reader.plan.chunks_of_step(batch.step)
                if batch.frames:
                    yield batch


@contextlib.contextmanager
def with_parameters(model: AcousticModel, flat: FlatParameters, values: NDArray[np.float32]) -> Iterator[None]:
    """Put `values` into the model for a block that only evaluates, then the learner's own parameters back."""
    own = flat.to_numpy()
    flat.load(values)
    model.eval()
    try:
        yield
    finally:
        flat.load(own)
        model.train()


def compute_prob(model: AcousticModel, source: Source, how: Pass, by_class: bool = False) -> Score | ChainScore:
    """What `model` makes of all of `source`, each learner taking its share; every rank gets the same score.

    With `by_class` the accuracy of each pdf-id, too.
    """
    return how.objective.score(model, how.batches(source), how.world, by_class)


@torch.no_grad()
def recompute_batch_norm(model: AcousticModel, source: Source, how: Pass) -> None:
    """Give all batch-norms the statistics of one pass over `source` in training mode, on all learners together.

    A mean of models has other activations than the models had; Kaldi's nnet3-combine does the same at its end, and
    with dropout as here. Activation statistics are of the same pass.
    """
    modules = [module for module in model.by_name.values() if isinstance(module, BatchNorm)]
    if not modules:
        return
    for module in model.by_name.values():
        module.zero_statistics()
    with model.mode.evaluating(collect=True):
        for batch in how.batches(source):
            how.objective.forward(model, batch)
    for module in modules:
        sums = module.take_sums()
        module.set_sums(torch.from_numpy(how.world.sum_float64(sums.numpy())))
    sum_statistics(model, how.world)


@torch.no_grad()
def mean_posterior(model: AcousticModel, source: Source, how: Pass, max_chunks: int, seed: int) -> NDArray[np.float64]:
    """The mean of the model's posteriors over about `max_chunks` random chunks: the priors of final.mdl.

    As Kaldi's ``compute_average_posterior`` and ``nnet3-am-adjust-priors``: (K,) float64, summing to 1. As there,
    batch-norm takes its means from each minibatch, and dropout is on.
    """
    total = np.zeros(model.output_dim)
    with model.mode.evaluating():
        for batch in how.batches(source, seed, max_chunks):
            output = model(batch.feats, batch.first, batch.shape.width, ivectors=batch.ivectors)
            total += output[labelled_rows(batch)].double().exp().sum(dim=0).cpu().numpy()
    total = how.world.sum_float64(total)
    # A posterior that underflows everywhere would make a prior of zero and its log infinite.
    total = np.maximum(total / total.sum(), 1e-20)
    return np.asarray(total / total.sum(), np.float64)


@torch.no_grad()
def lda_statistics(
    model: AcousticModel, component: str, source: Source, how: Pass, max_chunks: int, seed: int
) -> LdaStats:
    """LDA statistics of what `component` receives, over about `max_chunks` random chunks and all learners.

    A frame with several labels counts for each of them by its weight, as in nnet3-acc-lda-stats; a chain example's by
    what its supervision occupies, as in nnet3-chain-acc-lda-stats. With a label delay (``delay=``) a label belongs to
    the frame that much later, as in Kaldi's init.config.

    Args:
        model: built with any transform for `component`; only the layers below it are used.
        component: name of the fixed-affine component.
    """
    delay = model.config.lda_delays.get(component, 0)
    stats = LdaStats(model.by_name[component].input_dim, model.output_dim)
    for batch in how.batches(source, seed, max_chunks):
        if batch.supervision is not None:
            last = (batch.shape.width - 1) * batch.shape.subsampling + 1
            spliced = model.node_input(component, batch.feats, batch.first - delay, last, batch.ivectors).cpu()
            rows = spliced[:, :: batch.shape.subsampling].reshape(-1, spliced.shape[2]).numpy().astype(np.float64)
            where, pdfs, occupied = occupations(batch.supervision)
            stats.accumulate(np.rint(rows / _LDA_QUANTUM)[where] * _LDA_QUANTUM, pdfs, occupied)
            continue
        # With an output delay the network needs less context than the component: frames may be missing at the ends.
        first = batch.first - delay
        low, high = model.node_frames(component, batch.shape.rows, first, batch.shape.width)
        if high < low:
            continue
        frames = high - low + 1
        spliced = model.node_input(component, batch.feats, first - low, frames, batch.ivectors).cpu()
        labels = batch.labels[:, low : high + 1].cpu().reshape(*spliced.shape[:2], -1)
        weights = None if batch.weights is None else batch.weights[:, low : high + 1].cpu().reshape(labels.shape)
        for target in range(labels.shape[2]):
            labelled = labels[..., target] >= 0
            rounded = np.rint(spliced[labelled].numpy().astype(np.float64) / _LDA_QUANTUM) * _LDA_QUANTUM
            weight = None if weights is None else weights[..., target][labelled].numpy()
            stats.accumulate(rounded, labels[..., target][labelled].numpy(), weight)
    for array in stats.arrays():
        array[...] = how.world.sum_float64(array)
    return stats


def spread_of(own: NDArray[np.float32], mean: NDArray[np.float32], world: World) -> float:
    """(1/N) sum_i |x_i - mean|^2, on every rank."""
    if world.size == 1:
        return 0.0
    difference = own.astype(np.float64) - mean
    return float(world.sum_float64(np.array([difference @ difference]))[0]) / world.size


class Validation:
    """Scores of a model on the held-out and on the diagnostic set, kept in the log.

    Args:
        model: this learner's; `flat`: its parameters.
        how: this learner's share of the pass.
        log: is told the scores.
        models: keeps the models of iterations, on rank 0; None: nobody does.
        by_class: whether the accuracy of each pdf-id is wanted.
    """

    def __init__(
        self,
        model: AcousticModel,
        flat: FlatParameters,
        how: Pass,
        log: TrainingLog,
        models: IterationModels | None = None,
        by_class: bool = False,
    ) -> None:
        self.model, self.flat, self.how, self.log = model, flat, how, log
        self._models, self._by_class = models, by_class

    def run(self, name: int | str, mean: NDArray[np.float32], spread: float | None) -> None:
        """Evaluate `mean`, (P,) float32, on all ranks together; `spread`: the models' mean squared distance from it."""
        with with_parameters(self.model, self.flat, mean):
            self.score(name, self.model, self.how, spread)

    def score(self, name: int | str, model: AcousticModel, how: Pass, spread: float | None) -> None:
        """Evaluate `model` as it is; keep it, if `name` is an iteration's."""
        valid, diagnostic = (
            compute_prob(model, part, how, self._by_class) for part in (how.dataset.valid, how.dataset.diagnostic)
        )
        self.log.validation(name, valid, diagnostic, spread)
        if self._models is not None and isinstance(name, int):
            self._models.write(name, model)


class BackgroundValidation:
    """Validates mean models one after the other beside the training: rank 0's second thread, with a model of its own.

    Args:
        validation: rank 0's; its model's structure is copied, its parameters are not touched.
    """

    def __init__(self, validation: Validation) -> None:
        self._validation = validation
        self._model = copy.deepcopy(validation.model)
        self._flat = FlatParameters.of_model(self._model)
        self._alone = dataclasses.replace(validation.how, world=SoloWorld())
        self._jobs: queue.Queue[tuple[int, NDArray[np.float32], float | None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="validation", daemon=True)
        self._thread.start()

    def start(self, iteration: int, mean: NDArray[np.float32], spread: float | None) -> None:
        """Queue the validation of `mean`, which ends `iteration`."""
        self._jobs.put((iteration, mean, spread))

    def drain(self) -> None:
        """Return when all that was queued is done."""
        self._jobs.join()

    def close(self) -> None:
        """End the thread after what is queued."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            iteration, mean, spread = job
            with torch.no_grad():
                self._flat.load(mean)
                self._model.eval()
                self._validation.score(iteration, self._model, self._alone, spread)
            self._jobs.task_done()
