"""The objective of chain (LF-MMI) training and its derivatives at the network's outputs.

With w the supervision's weight, B sequences of T frames, y the output (Povey et al. 2016, sections 2 and 5; the rules
of penalty and failure are Kaldi's):

    objf = w (numerator - denominator);  weight = w B T;  l2 = -w l2_regularize / 2 sum y^2
    at y:       w (posterior - occupation) - w l2_regularize y [+ 2 out_of_range_regularize (clip(y, -30, 30) - y)]
    xent:       objective  w sum posterior log p,  at log p:  xent_regularize w posterior

The penalty of outputs out of range is added in half of the minibatches, twice as large as its name says, and is in
no objective. A minibatch that fails has an objective of -10 a frame and no derivative but that of l2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kaldi_mpi.chain.denominator import Denominator
from kaldi_mpi.chain.denominator_torch import LIMIT, DenominatorSums
from kaldi_mpi.chain.numerator import PreparedNumerator
from kaldi_mpi.log import logger

FAILED = -10.0  # a frame
# How far the sums over a minibatch's sequences may be off before it fails; and, a sequence, before there is a warning.
MOST_OFF = 2.0
STATES_OFF, PDFS_OFF = 0.001, 0.01


@dataclass(frozen=True)
class ChainOptions:
    """Kaldi's options of the objective, with its defaults.

    Attributes:
        l2_regularize: of the squares of the output; 0: none.
        xent_regularize: of the second output's derivative; 0: there is no second output.
        leaky_hmm_coefficient: between 0 and 1.
        out_of_range_regularize: of outputs beyond 30.
        apply_deriv_weights: whether the examples' weights of frames scale both derivatives.
    """

    l2_regularize: float = 0.0
    xent_regularize: float = 0.0
    leaky_hmm_coefficient: float = 1e-5
    out_of_range_regularize: float = 0.01
    apply_deriv_weights: bool = True


@dataclass(frozen=True, eq=False)
class ChainObjective:
    """What a minibatch is worth; scalars are 0-dim float64 on the output's device, which has not been waited for.

    Attributes:
        objf: w (numerator - denominator), or -10 weight.
        l2: at most 0.
        weight: w B T.
        xent: None without a second output.
        derivative: at the output, (B, T, P); None if not wanted.
        xent_derivative: at the second output.
        failed: 0-dim bool: whether this minibatch has failed.
        off: (2,) float64: by how much the denominator's sums over states and over pdfs at frame 0 differ from the
            number of sequences; None without derivatives.
    """

    objf: Tensor
    l2: Tensor
    weight: float
    xent: Tensor | None
    derivative: Tensor | None
    xent_derivative: Tensor | None
    failed: Tensor
    off: Tensor | None

    def warn(self) -> None:
        """Log what went wrong; waits for the device."""
        sequences = 0 if self.derivative is None else len(self.derivative)
        states, pdfs = (0.0, 0.0) if self.off is None else self.off.tolist()
        if self.failed:
            logger.warning(
                "objective of a minibatch is not finite or was not computed well: it is taken as -10 a frame"
            )
        # NaN compares false: a minibatch with one has failed.
        if states > STATES_OFF * sequences or pdfs > PDFS_OFF * sequences:
            logger.warning(
                "denominator's sums of %d sequences are off by %.3g (alpha times beta) and %.3g (occupations)",
                sequences, states, pdfs,
            )  # fmt: skip


def chain_objective(
    denominator: Denominator,
    numerator: PreparedNumerator,
    output: Tensor,
    options: ChainOptions,
    *,
    xent: Tensor | None = None,
    derivatives: bool = True,
    penalise: bool = False,
    deriv_weights: Tensor | None = None,
) -> ChainObjective:
    """The objective of a minibatch, with its derivatives unless they are not wanted.

    Training goes on with ``torch.autograd.backward([output, xent], [-derivative, -xent_derivative])``: the objective is
    to rise. Nothing waits for a GPU; there the caller calls `warn` of the result when it reads the objective, which on
    a CPU has been done.

    Args:
        denominator: of the options' leaky_hmm_coefficient.
        numerator: of this minibatch.
        output: (B, T, P), the network's `output`.
        xent: (B, T, P), its `output-xent`, log-probabilities; or None.
        penalise: whether the penalty of outputs out of range is added: in half of the minibatches it is to be.
        deriv_weights: (B, T), on the same device; scale both derivatives' rows if the options say so.

    Raises:
        ValueError: the shapes do not fit each other, or the coefficient is not the denominator's.
    """
    if denominator.leaky != options.leaky_hmm_coefficient:
        raise ValueError(f"denominator of {denominator.leaky:g} for {options.leaky_hmm_coefficient:g}")
    output, graphs = output.detach(), numerator.graphs
    w, weight = graphs.weight, graphs.weight * graphs.num_sequences * graphs.frames
    derivative = torch.empty_like(output, memory_format=torch.contiguous_format) if derivatives else None
    den = denominator(output, derivative, -w)
    if derivative is not None and penalise and options.out_of_range_regularize:
        derivative.add_(output.clamp(-LIMIT, LIMIT).sub_(output), alpha=2.0 * options.out_of_range_regularize)
    sums, posteriors = numerator.sums(output, derivatives or xent is not None)
    objf = w * (sums.sum() - den.log_probs.sum())
    failed, off = _failure(objf, den)
    objf = torch.where(failed, FAILED * weight, objf)
    entries = numerator.entries_on(output.device)
    if derivative is not None and posteriors is not None:
        derivative.view(-1)[entries] += w * posteriors
        derivative = _zero_if(failed, derivative)
    l2 = _add_l2(options.l2_regularize * w, output, derivative, sums if graphs.cyclic else None)
    of_xent, xent_derivative = None, None
    if xent is not None and posteriors is not None:
        scaled = _zero_if(failed, w * posteriors)
        of_xent = (xent.detach().reshape(-1)[entries].double() * scaled.double()).sum()
        if derivatives and options.xent_regularize:
            xent_derivative = torch.zeros_like(xent, memory_format=torch.contiguous_format)
            xent_derivative.view(-1)[entries] = options.xent_regularize * scaled
    if deriv_weights is not None and options.apply_deriv_weights:
        for of_output in (derivative, xent_derivative):
            if of_output is not None:
                of_output.mul_(deriv_weights.unsqueeze(2))
    found = ChainObjective(objf, l2, weight, of_xent, derivative, xent_derivative, failed, off)
    if output.device.type == "cpu":
        found.warn()
    return found


def _failure(objf: Tensor, den: DenominatorSums) -> tuple[Tensor, Tensor | None]:
    """Whether a minibatch has failed, and by how much the denominator's sums are off."""
    failed = ~torch.isfinite(objf)
    if den.state_sums is None or den.pdf_sums is None:
        return failed, None
    sums = torch.stack([den.state_sums[0].sum(), den.pdf_sums[0].sum()])
    off = (sums - den.log_probs.numel()).abs()
    return failed | ~(off <= MOST_OFF).all(), off


def _asking_is_free(value: Tensor) -> bool:
    """Whether a value can be looked at without waiting for a device."""
    return value.device.type == "cpu"


def _zero_if(failed: Tensor, values: Tensor) -> Tensor:
    """The values, or 0: they may be NaN. Where asking is free, they are not gone over to no end."""
    if _asking_is_free(failed):
        return values.zero_() if failed else values
    return values.masked_fill_(failed, 0.0)


def _add_l2(factor: float, output: Tensor, derivative: Tensor | None, sums: Tensor | None) -> Tensor:
    """l2 of the output, whose derivative is added; none of both where `sums` are given and are not all finite."""
    if factor == 0.0:
        return torch.zeros((), dtype=torch.float64, device=output.device)
    # Rows in the output's numbers, which is fast, and their sum in float64.
    l2 = -0.5 * factor * torch.linalg.vector_norm(output, dim=2).double().square().sum()
    there = torch.isfinite(l2.new_zeros(()) if sums is None else sums).all()
    if sums is None or (_asking_is_free(there) and there):
        added: Tensor | None = output
    else:
        added = None if _asking_is_free(there) else torch.where(there, output, torch.zeros_like(output))
    if derivative is not None and added is not None:
        derivative.add_(added, alpha=-factor)
    return torch.where(there, l2, torch.zeros_like(l2))
