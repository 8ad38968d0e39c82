"""What a training does after its last iteration: combination, batch-norm's statistics, priors, and the files it leaves.

As ``train_rnn.py`` does from ``--stage`` num-iterations on: ``combined.mdl``, then ``final.mdl``.
"""

from __future__ import annotations

import dataclasses

from kaldi_mpi.learner import export
from kaldi_mpi.learner.combine import combine
from kaldi_mpi.learner.iterations import IterationModels
from kaldi_mpi.learner.logs import TrainingLog
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.learner.stages import Stages
from kaldi_mpi.learner.state import copy_model
from kaldi_mpi.learner.validate import Pass, Validation, compute_prob, mean_posterior, recompute_batch_norm
from kaldi_mpi.loader import MinibatchRule
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel

_CHUNKS_FOR_PRIORS = 128  # of a minibatch, as in Kaldi's compute_average_posterior


def finish(
    options: TrainOptions,
    stages: Stages,
    validation: Validation,
    models: IterationModels,
    log: TrainingLog,
) -> None:
    """On all learners together, whose models are equal; rank 0 writes.

    Args:
        validation: of the model that has been trained.
        models: of the iterations.
        log: keeps nnet3-combine's lines.

    Raises:
        DataError: a model that is to be combined is not there, or a file cannot be written.
    """
    model, how = validation.model, validation.how
    writes, dataset = how.world.rank == 0, how.dataset
    model.eval()
    # As many whole chunks as --trainer.optimization.minibatch-size says, also where that counts single frames.
    combining = dataclasses.replace(how, minibatch=dataset.options.minibatch)
    if stages.combine:
        combine_models(models.kept[::-1], options.max_objective_evaluations, validation, models, log, combining)
    if not stages.combined_before:
        recompute_batch_norm(model, dataset.combination, combining)
    if writes and (stages.combine or models.combined == "final"):
        models.write(models.combined, model)
        if models.combined == "final":
            logger.info("wrote %s", models.path("final"))
    validation.score("final", model, how, None)
    if stages.priors:
        averaging = dataclasses.replace(how, minibatch=MinibatchRule.of(_CHUNKS_FOR_PRIORS))
        priors = mean_posterior(model, dataset.train, averaging, options.prior_subset_size, options.data.seed)
        if writes and models.acoustic is None:
            export.write_average_output(models.path("final").with_name("post.final.vec"), priors)
        elif writes and models.acoustic is not None:
            export.write_final_model(models.path("final"), model, models.acoustic[0], priors, options.binary)
    if writes and options.cleanup:
        models.clean()


def combine_models(
    newest_first: list[int],
    max_evaluations: int,
    validation: Validation,
    models: IterationModels,
    log: TrainingLog,
    how: Pass,
) -> None:
    """Put the best mean of these iterations' models into the model of `validation`.

    All learners read the models and share out the examples by which the means are compared; batch-norm takes its
    means from each minibatch then, and dropout is off, as in nnet3-combine.
    """
    model = validation.model
    lines: list[str] = []

    def score(candidate: AcousticModel) -> float:
        candidate.to(how.device).eval()
        with candidate.mode.evaluating(dropout=False):
            return compute_prob(candidate, how.dataset.combination, how).total

    def reader(number: int) -> AcousticModel:
        return models.read(number, "the final combination takes it").to(how.device)

    best, found = combine(
        [lambda number=number: reader(number) for number in newest_first],  # type: ignore[misc]
        score,
        max_evaluations,
        lines.append,
    )
    copy_model(best, model, str(models.path(newest_first[0])))
    if how.world.rank == 0:
        log.combination(lines)
        logger.info(
            "combined %d of the last %d models: the objective on the training subset went from %.5g to %.5g",
            found.count, len(newest_first), found.first, found.best,
        )  # fmt: skip
