"""LF-MMI as what a network is trained for: the chain objective of the minibatches' supervision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.chain.denominator import Denominator
from kaldi_mpi.chain.numerator import prepare_numerator
from kaldi_mpi.chain.objective import ChainObjective, ChainOptions, chain_objective
from kaldi_mpi.chain.supervision_graphs import SupervisionGraphs
from kaldi_mpi.learner.objective import DerivativeTimes
from kaldi_mpi.learner.scores import ChainOutput, ChainScore, Term
from kaldi_mpi.loader import ChainSupervision, Minibatch
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.transport.world import World

OUTPUT, XENT = "output", "output-xent"
_PENALISED = 0.5  # of the minibatches get the penalty of outputs out of range


class LfMmi:
    """The chain objective at ``output`` and, where it is regularised by it, cross-entropy at ``output-xent``.

    See `learner.objective.Objective`.

    Args:
        denominator: of the options' leaky-hmm-coefficient.
        options: of the objective.
    """

    def __init__(self, denominator: Denominator, options: ChainOptions) -> None:
        self._denominator, self._options = denominator, options
        self._outputs = (OUTPUT, XENT) if options.xent_regularize else (OUTPUT,)
        self._failed: Tensor | None = None  # on a GPU, which minibatches do not wait for: how many have failed

    def train(
        self, model: AcousticModel, feats: Tensor, batch: Minibatch[Tensor], derivatives: DerivativeTimes
    ) -> Mapping[str, Term]:
        """See there."""
        shape = batch.shape
        deriv = derivatives.within((shape.width - 1) * shape.subsampling + 1)
        outputs = self._evaluate(model, feats, batch, deriv)
        penalise = model.mode.chance.decide(OUTPUT, "penalty", _PENALISED)
        found = self._objective(batch, outputs, penalise=penalise)
        pairs = [(outputs[OUTPUT], found.derivative)]
        if found.xent_derivative is not None:
            pairs.append((outputs[XENT], found.xent_derivative))
        # The derivatives are of the objective, which gets larger; gradients are of a loss.
        torch.autograd.backward(
            [output for output, _ in pairs], [-derivative for _, derivative in pairs if derivative is not None]
        )
        if found.failed.device.type != "cpu":  # there `chain_objective` has warned
            self._failed = found.failed.long() if self._failed is None else self._failed + found.failed
        terms = {OUTPUT: Term(found.objf, found.weight, found.l2)}
        if found.xent is not None:
            terms[XENT] = Term(found.xent, found.weight)
        return terms

    @torch.no_grad()
    def forward(self, model: AcousticModel, batch: Minibatch[Tensor]) -> None:
        """See there; both outputs, as nnet3-chain-combine computes statistics."""
        self._evaluate(model, batch.feats, batch)

    @torch.no_grad()
    def score(
        self, model: AcousticModel, batches: Iterable[Minibatch[Tensor]], world: World, by_class: bool = False
    ) -> ChainScore:
        """See there; there is no accuracy."""
        self._warn()
        sums = np.zeros(2 + len(self._outputs))
        for batch in batches:
            found = self._objective(batch, self._evaluate(model, batch.feats, batch), derivatives=False)
            numbers = [found.objf, found.l2, *([] if found.xent is None else [found.xent])]
            sums[:-1] += [float(number) for number in numbers]
            sums[-1] += found.weight
        *numbers, weight = (world.sum_float64(sums)).tolist()
        objective, l2, *xent = (number / max(weight, 1e-20) for number in numbers)
        outputs = [ChainOutput(OUTPUT, objective, l2), *(ChainOutput(XENT, value, 0.0) for value in xent)]
        return ChainScore(outputs, weight)

    def _warn(self) -> None:
        failed, self._failed = 0 if self._failed is None else int(self._failed), None
        if failed:
            logger.warning(
                "%d minibatches had no finite objective, or sums that are off: each counts -10 a frame", failed
            )

    def _evaluate(
        self,
        model: AcousticModel,
        feats: Tensor,
        batch: Minibatch[Tensor],
        deriv: tuple[int | None, int | None] = (None, None),
    ) -> dict[str, Tensor]:
        shape = batch.shape
        times = range(0, shape.width * shape.subsampling, shape.subsampling)
        wanted = dict.fromkeys(self._outputs, times)
        return model.evaluate(feats, batch.first, wanted, ivectors=batch.ivectors, deriv=deriv)

    def _objective(
        self,
        batch: Minibatch[Tensor],
        outputs: Mapping[str, Tensor],
        *,
        derivatives: bool = True,
        penalise: bool = False,
    ) -> ChainObjective:
        supervision = batch.supervision
        assert supervision is not None, "chain training is of chain examples"
        numerator = prepare_numerator(graphs_of(supervision), outputs[OUTPUT].shape[2])
        return chain_objective(
            self._denominator,
            numerator,
            outputs[OUTPUT],
            self._options,
            xent=outputs.get(XENT),
            derivatives=derivatives,
            penalise=penalise,
            deriv_weights=supervision.deriv_weights if derivatives else None,
        )


def graphs_of(supervision: ChainSupervision[Tensor]) -> SupervisionGraphs:
    """A minibatch's supervision for the numerator; its arrays are those of the loader."""
    return SupervisionGraphs(
        weight=supervision.weight,
        frames=supervision.frames_per_sequence,
        num_pdfs=supervision.num_pdfs,
        cyclic=supervision.end2end,
        first_state=supervision.first_state.numpy(),
        first_sequence=supervision.first_sequence.numpy(),
        first_arc=supervision.first_arc.numpy(),
        finals=supervision.finals.numpy(),
        pdfs=supervision.pdfs.numpy(),
        costs=supervision.costs.numpy(),
        nexts=supervision.nexts.numpy(),
    )


def occupations(
    supervision: ChainSupervision[Tensor],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """How much a minibatch's supervision occupies pdfs by its own weights, where no output says anything.

    Returns:
        of all pdfs that occur: the row (sequence times T plus frame), the pdf and the occupation times the weight.
    """
    graphs = graphs_of(supervision)
    numerator = prepare_numerator(graphs, supervision.num_pdfs)
    _, posteriors = numerator.sums(torch.zeros(graphs.num_sequences, graphs.frames, graphs.num_pdfs))
    assert posteriors is not None
    rows, pdfs = np.divmod(numerator.entries, graphs.num_pdfs)
    return rows, pdfs, graphs.weight * posteriors.numpy().astype(np.float64)
