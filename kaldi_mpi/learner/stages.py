"""What of a training is to be done: ``--stage`` skips what an earlier run has done, ``--exit-stage`` stops early.

The numbers are Kaldi's (``steps/nnet3/train_*.py``); an iteration is the stretch between two validations.

    stage           acoustic model              raw network         chain model
    phone LM        (none)                      (none)              -6
    denominator     (none)                      (none)              -5
    LDA             -3                          -2                  -2
    prior scale     -2                          (none)              (none)
    initial model   -1                          -1                  -1
    iteration i      i                           i                   i
    combination     number of iterations        the same            the same
    priors          the same + 1                average output      (none)

The other stages make examples and a network for LDA's statistics; here features are read as they are needed.
"""

from __future__ import annotations

import dataclasses

from kaldi_mpi.learner.options import TrainOptions

_LDA, _PRIOR_SCALE, _INITIAL = -3, -2, -1
_LDA_WITHOUT_PRIORS = -2  # of raw networks and chain models
PHONE_LM, DENOMINATOR, AFTER_EXAMPLES = -6, -5, -2


@dataclasses.dataclass(frozen=True)
class Stages:
    """What is to be done.

    Attributes:
        lda: estimate lda.mat, where the network has one and no input model is given.
        prior_scale: write presoftmax_prior_scale.vec.
        initial: begin with a new model, or the input model; else with that of `first_iteration`.
        first_iteration, end_iteration: those to train are first_iteration .. end_iteration - 1.
        combine: the last models, where --trainer.optimization.do-final-combination is on.
        combined_before: that is on, and an earlier run has done it.
        priors: and final.mdl; of a raw network its average output, where that is asked for; chain models have none.
        exits: whether the training ends before its last iteration, and nothing comes after.
    """

    lda: bool
    prior_scale: bool
    initial: bool
    first_iteration: int
    end_iteration: int
    combine: bool
    combined_before: bool
    priors: bool
    exits: bool

    def begins_with(self, iteration: int) -> bool:
        """Whether a checkpoint at the beginning of `iteration` is where this run may go on."""
        return self.initial or iteration == self.first_iteration


def stages_to_do(options: TrainOptions, num_iterations: int) -> Stages:
    """What `options` leave to do of a training of `num_iterations`.

    As in Kaldi, an exit stage that is no iteration has no effect, and iterations before `stage` are passed over even
    where the exit stage is among them.
    """
    stage, leave, fresh = options.stage, options.exit_stage, options.input_model is None
    exits = leave is not None and 0 <= leave < num_iterations
    end = leave if exits and leave is not None else num_iterations
    return Stages(
        lda=fresh and stage <= (_LDA if options.has_priors else _LDA_WITHOUT_PRIORS),
        prior_scale=fresh and options.has_priors and stage <= _PRIOR_SCALE,
        initial=stage <= _INITIAL,
        first_iteration=min(max(0, stage), end),
        end_iteration=end,
        combine=not exits and options.do_final_combination and stage <= num_iterations,
        combined_before=options.do_final_combination and stage > num_iterations,
        priors=not exits
        and stage <= num_iterations + 1
        and (options.has_priors or (options.raw and options.compute_average_posteriors)),
        exits=exits,
    )
