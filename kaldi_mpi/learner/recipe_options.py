"""The options of Kaldi's five training programs, once each: which program has it, its default, what becomes of it.

``steps/nnet3/train_rnn.py``, ``train_dnn.py``, ``train_raw_rnn.py``, ``train_raw_dnn.py`` and ``chain/train.py`` share
most of their options (``steps/libs/nnet3/train/common.py``). A recipe's call is taken as it stands: every option is
honoured, translated into what it means for learners that stay, or ignored with a line in the log. The table of
docs/training.md is checked against this one.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.dropout_schedule import DropoutSchedule
from kaldi_mpi.loader import MinibatchRule
from kaldi_mpi.options import at_least, boolean, number

RNN, DNN, RAW_RNN, RAW_DNN, CHAIN = "rnn", "dnn", "raw-rnn", "raw-dnn", "chain"
PROGRAMS = (RNN, DNN, RAW_RNN, RAW_DNN, CHAIN)
_CROSS_ENTROPY = (RNN, DNN, RAW_RNN, RAW_DNN)
_CHUNKS, _FRAMES, _RAW = (RNN, RAW_RNN, CHAIN), (DNN, RAW_DNN), (RAW_RNN, RAW_DNN)
_RECURRENT, _CHAIN = (RNN, RAW_RNN), (CHAIN,)

WHOLE = (-1,)  # widths of chunks that are whole utterances
HONOURED, TRANSLATED, IGNORED = "honoured", "translated", "ignored"


@dataclasses.dataclass(frozen=True)
class RecipeOption:
    """An option of Kaldi's.

    Attributes:
        name: without its dashes.
        use: HONOURED, TRANSLATED or IGNORED.
        note: what it does here; of an ignored one: why it does nothing.
        dest: the field that it sets; "" for those that are ignored.
        kind: from its text to its value; raises argparse.ArgumentTypeError.
        default: where no program of its own has another.
        defaults: of programs that have another.
        programs: that have it.
        required_by: programs that cannot do without it.
        ignored_by: programs that have it and do nothing with it, in Kaldi too.
        aliases: other names.
        old: whether Kaldi has it no longer, but a recipe of Kaldi still gives it.
    """

    name: str
    use: str
    note: str
    dest: str = ""
    kind: Callable[[str], Any] = str
    default: Any = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    programs: tuple[str, ...] = PROGRAMS
    required_by: tuple[str, ...] = ()
    ignored_by: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    old: bool = False

    def default_of(self, program: str) -> Any:
        """The value in `program` where the option is not given."""
        return self.defaults.get(program, self.default)


def text(given: str) -> str | None:
    """Words of which empty ones count as not given: shell variables that nothing was put into."""
    return given if given.strip() else None


def widths(given: str) -> tuple[int, ...]:
    """``20,15`` as train_rnn.py takes it: the usual width, then others; ``-1`` is `WHOLE`."""
    if given == "-1":
        return WHOLE
    try:
        found = tuple(int(width) for width in given.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected widths above 0 as in '20' or '20,15', got {given!r}")
    return found


def minibatch_rule(given: str) -> MinibatchRule:
    """A rule of minibatch sizes, as ``nnet3-merge-egs --minibatch-size`` takes it."""
    return _parsed(MinibatchRule.parse, given)


def dropout_schedule(given: str) -> DropoutSchedule:
    """The option's text, or none where it is empty."""
    return _parsed(DropoutSchedule.parse, given)


def _parsed(parse: Callable[[str], Any], given: str) -> Any:
    try:
        return parse(given)
    except ConfigError as error:
        # The option's name is put in front again.
        message = "; ".join(line.removeprefix("--trainer.dropout-schedule: ") for line in str(error).splitlines())
        raise argparse.ArgumentTypeError(message) from None


def choice(*values: str) -> Callable[[str], str]:
    """One of `values`."""

    def convert(given: str) -> str:
        if given not in values:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(values)}, got {given!r}")
        return given

    return convert


_COUNT, _WHOLE, _FROM_MINUS_1, _ANY = at_least(1), at_least(0), at_least(-1), number(int)
_REAL, _POSITIVE = number(float), at_least(0, float, True)
_NOT_NEGATIVE = at_least(0, float)
_OPTIMIZATION = "trainer.optimization."


def _honoured(name: str, dest: str, kind: Callable[[str], Any], default: Any, note: str, **more: Any) -> RecipeOption:
    return RecipeOption(name, HONOURED, note, dest, kind, default, **more)


def _translated(name: str, dest: str, kind: Callable[[str], Any], default: Any, note: str, **more: Any) -> RecipeOption:
    return RecipeOption(name, TRANSLATED, note, dest, kind, default, **more)


def _ignored(name: str, kind: Callable[[str], Any], default: Any, note: str, **more: Any) -> RecipeOption:
    return RecipeOption(name, IGNORED, note, "", kind, default, **more)


OPTIONS: tuple[RecipeOption, ...] = (
    _honoured("feat-dir", "feat_dir", text, None, "data directory of the features; not needed with --egs.dir",
        required_by=(RAW_RNN, CHAIN)),
    _honoured("ali-dir", "ali_dir", text, None, "alignment directory: ali.*.gz, final.mdl, tree",
        programs=(RNN, DNN), required_by=(RNN, DNN)),
    _honoured("tree-dir", "tree_dir", text, None, "tree, final.mdl (its transition model) and ali.*.gz, of which the "
        "phone LM is made", programs=_CHAIN, required_by=_CHAIN),
    _translated("lat-dir", "lat_dir", text, None, "lattices of the alignments; not needed with --egs.dir",
        programs=_CHAIN, required_by=_CHAIN),
    _honoured("dir", "dir", text, None, "where the model and logs go; the network stands in its configs",
        required_by=PROGRAMS),
    _honoured("targets-scp", "targets_scp", text, None, "table of target matrices", programs=_RAW,
        required_by=(RAW_RNN,)),
    _honoured("use-dense-targets", "use_dense_targets", boolean, True, "targets are matrices of all outputs; false: "
        "posteriors", programs=_RAW),
    _honoured("feat.cmvn-opts", "cmvn_opts", text, None, "`--norm-means`, `--norm-vars`, by speaker while reading; "
        "written to `cmvn_opts`"),
    _honoured("feat.online-ivector-dir", "online_ivector_dir", text, None, "directory of `ivector_online.scp`, for "
        "networks that take i-vectors"),
    _honoured("egs.dir", "egs_dir", text, None, "train on the examples in this directory of get_egs.sh"),
    _honoured("egs.chunk-width", "chunk_widths", widths, (20,), "labelled frames of a chunk, and other widths for what "
        "is left of utterances, as in `20,15`", programs=_CHUNKS),
    _ignored("egs.nj", _ANY, 0, "no jobs make examples", programs=_CHAIN),
    _honoured("egs.frames-per-eg", "frames_per_eg", _COUNT, 8, "labelled frames of a chunk; each goes into another "
        "minibatch", programs=_FRAMES),
    _honoured("egs.chunk-left-context", "chunk_left_context", _WHOLE, 40, "frames before a chunk, beyond the "
        "network's own context", programs=_CHUNKS, defaults={CHAIN: 0}),
    _honoured("egs.chunk-right-context", "chunk_right_context", _WHOLE, 0, "frames after it", programs=_CHUNKS),
    _honoured("egs.chunk-left-context-initial", "chunk_left_context_initial", _FROM_MINUS_1, -1, "the same at the "
        "beginning of an utterance; -1: as elsewhere", programs=_CHUNKS),
    _honoured("egs.chunk-right-context-final", "chunk_right_context_final", _FROM_MINUS_1, -1, "the same at its end; "
        "-1: as elsewhere", programs=_CHUNKS),
    _translated("egs.opts", "egs_opts", text, None, "options of get_egs.sh, which is called for chain training alone: "
        "elsewhere `--num-utts-subset N` utterances are held out (at most a tenth of all), and the others are ignored, "
        "each with a line"),
    _ignored("egs.stage", _ANY, 0, "no examples are made, features are read as they are needed"),
    _ignored("egs.cmd", text, None, "no examples are made, features are read as they are needed"),
    _honoured("image.augmentation-opts", "image_augmentation", text, None, "options of nnet3-egs-augment-image: images "
        "are shifted, mirrored and turned at random", programs=(RAW_DNN,)),
    _honoured("trainer.srand", "seed", _ANY, 0, "seed of everything random: same seed and number of learners, same "
        "bytes"),
    _honoured("trainer.num-epochs", "num_epochs", _POSITIVE, None, "epochs; fractions work (default: what --strategy "
        "says, or 8)"),
    _honoured("chain.lm-opts", "lm_opts", text, None, "options of chain-est-phone-lm", programs=_CHAIN),
    _honoured("chain.l2-regularize", "chain_l2", _NOT_NEGATIVE, 0.0, "l2 of the network's output", programs=_CHAIN),
    _honoured("chain.xent-regularize", "chain_xent", _NOT_NEGATIVE, 0.0, "scale of the cross-entropy at `output-xent`; "
        "0: that output is not computed", programs=_CHAIN),
    _honoured("chain.leaky-hmm-coefficient", "chain_leaky", _POSITIVE, 0.00001, "probability of leaving the "
        "denominator's graph for any state, a frame", programs=_CHAIN),
    _honoured("chain.left-tolerance", "left_tolerance", _WHOLE, 5, "frames by which a phone may begin earlier than in "
        "its alignment", programs=_CHAIN),
    _honoured("chain.right-tolerance", "right_tolerance", _WHOLE, 5, "the same of its end", programs=_CHAIN),
    _honoured("chain.apply-deriv-weights", "apply_deriv_weights", boolean, True, "whether the examples' weights scale "
        "derivatives", programs=_CHAIN),
    _honoured("chain.frame-subsampling-factor", "frame_subsampling_factor", _COUNT, 3, "frames of an output frame",
        programs=_CHAIN),
    _honoured("chain.alignment-subsampling-factor", "alignment_subsampling_factor", _COUNT, 3, "the same of the "
        "lattices", programs=_CHAIN),
    _translated("chain.left-deriv-truncate", "left_deriv_truncate", _ANY, None, "--trainer.deriv-truncate-margin of "
        "its negative", programs=_CHAIN),
    _translated("chain-opts", "chain_opts", text, None, "more options of nnet3-chain-train, behind those of "
        "--trainer.add-option", programs=_CHAIN),
    _translated("trainer.frames-per-iter", "frames_per_iter", _COUNT, 800000, "input frames of a learner between two "
        "validations, an iteration in the logs", programs=_CHAIN),
    _translated("trainer.samples-per-iter", "samples_per_iter", _COUNT, 20000, "chunks (with frames-per-eg: frames) "
        "of a learner between two validations, an iteration in the logs",
        defaults={DNN: 400000, RAW_DNN: 400000, CHAIN: 400000}, ignored_by=_CHAIN),
    _ignored("trainer.shuffle-buffer-size", _WHOLE, 5000, "chunks are shuffled in --loader-memory MB"),
    _honoured("trainer.max-param-change", "max_param_change", _NOT_NEGATIVE, 2.0, "limit on the norm of the whole "
        "model's change per minibatch"),
    _honoured("trainer.dropout-schedule", "dropout_schedule", dropout_schedule, DropoutSchedule(), "how dropout "
        "changes with the data, as in `'0,0@0.20,0.5@0.5,0'` or `'lstm*=0,0.3,0'`; at each step, not each iteration"),
    _honoured("trainer.input-model", "input_model", text, None, "begin with this model instead of `DIR/configs`"),
    _honoured("trainer.presoftmax-prior-scale-power", "presoftmax_prior_scale_power", _REAL, -0.25, "power of the "
        "class counts in `presoftmax_prior_scale.vec`, for networks that read it", ignored_by=_CHAIN),
    _honoured("trainer.deriv-truncate-margin", "deriv_truncate_margin", _WHOLE, 8, "frames outside the chunk that "
        "still get derivatives (chain/train.py: all, where it is not given)", programs=_CHUNKS, defaults={CHAIN: None}),
    _translated("trainer.rnn.num-chunk-per-minibatch", "minibatch", minibatch_rule, MinibatchRule.of(100),
        "chunks per minibatch and learner, as `128,64` or `128=64:128/256=32,64`; the largest size counts, and what "
        "is left is trained on in smaller ones", programs=_RECURRENT),
    _translated("trainer.num-chunk-per-minibatch", "minibatch", minibatch_rule, MinibatchRule.of(128), "the same",
        programs=_CHAIN),
    _ignored("trainer.rnn.num-bptt-steps", _COUNT, None, "chunk-width and deriv-truncate-margin say it", old=True,
        programs=_RECURRENT),
    _translated(f"{_OPTIMIZATION}minibatch-size", "minibatch_size", minibatch_rule, MinibatchRule.of(512),
        "the same in frames", programs=_FRAMES),
    _translated("trainer.lda.max-lda-jobs", "max_lda_jobs", _COUNT, 10, "lda.mat is estimated from at most this many "
        "times samples-per-iter chunks"),
    _ignored("trainer.lda.rand-prune", _REAL, 4.0, "all of the frames count for lda.mat, none is pruned"),
    _honoured("trainer.prior-subset-size", "prior_subset_size", _COUNT, 20000, "chunks over which the priors are "
        "estimated", programs=_CROSS_ENTROPY),
    _ignored("trainer.num-jobs-compute-prior", _COUNT, 10, "the learners compute the priors together",
        programs=_CROSS_ENTROPY),
    _translated("trainer.add-option", "train_opts", text, None, "options of nnet3-train: `--momentum`, "
        "`--max-param-change`, `--backstitch-training-scale` and `-interval` act, in nnet3-chain-train also those of "
        "its objective, the others are ignored, each with a line"),
    _honoured("trainer.compute-per-dim-accuracy", "compute_per_dim_accuracy", boolean, False, "accuracy by class at "
        "validations", ignored_by=_CHAIN),
    _honoured(f"{_OPTIMIZATION}initial-effective-lrate", "initial_rate", _POSITIVE, 0.0003, "effective learning rate "
        "at the start; it falls exponentially with the frames processed", defaults={CHAIN: 0.0002}),
    _honoured(f"{_OPTIMIZATION}final-effective-lrate", "final_rate", _POSITIVE, 0.00003, "the same at the end",
        defaults={CHAIN: 0.00002}),
    _translated(f"{_OPTIMIZATION}num-jobs-initial", "num_jobs_initial", _COUNT, 1, "the effective rate is kept: each "
        "of N learners applies N times it, as each of n jobs applies n times it"),
    _translated(f"{_OPTIMIZATION}num-jobs-final", "num_jobs_final", _COUNT, 8, "the same; without a GPU also the "
        "number of learners, where --num-learners does not say it"),
    _translated(f"{_OPTIMIZATION}num-jobs-step", "num_jobs_step", _COUNT, 1, "the same"),
    _honoured(f"{_OPTIMIZATION}momentum", "momentum", _NOT_NEGATIVE, 0.5, "as in nnet3-train: the step is scaled by "
        "1 - momentum", defaults={DNN: 0.0, RAW_DNN: 0.0, CHAIN: 0.0}),
    _honoured(f"{_OPTIMIZATION}proportional-shrink", "proportional_shrink", _NOT_NEGATIVE, 0.0, "parameters are "
        "scaled by 1 - this times the learning rate, each iteration"),
    _honoured(f"{_OPTIMIZATION}shrink-value", "shrink_value", _POSITIVE, 0.99, "parameters are scaled by this where "
        "sigmoids and tanhs are saturated", programs=_CHUNKS, defaults={CHAIN: 1.0}),
    _honoured(f"{_OPTIMIZATION}shrink-saturation-threshold", "shrink_saturation_threshold", _REAL, 0.40, "how much "
        "saturation that takes", programs=_CHUNKS),
    _honoured(f"{_OPTIMIZATION}backstitch-training-scale", "backstitch_scale", _NOT_NEGATIVE, 0.0, "how far to step "
        "back first; 0: not at all; needs momentum 0"),
    _honoured(f"{_OPTIMIZATION}backstitch-training-interval", "backstitch_interval", _COUNT, 1, "minibatches from one "
        "such step to the next"),
    _honoured(f"{_OPTIMIZATION}do-final-combination", "do_final_combination", boolean, True, "whether the last "
        "iterations' models are combined"),
    _honoured(f"{_OPTIMIZATION}max-models-combine", "max_models_combine", _COUNT, 20, "how many at most",
        aliases=("trainer.max-models-combine",)),
    _honoured(f"{_OPTIMIZATION}max-objective-evaluations", "max_objective_evaluations", _COUNT, 30, "evaluations that "
        "this may take", aliases=("trainer.max-objective-evaluations",)),
    _ignored(f"{_OPTIMIZATION}combine-sum-to-one-penalty", _REAL, 0.0, "it does nothing in Kaldi either"),
    _honoured("compute-average-posteriors", "compute_average_posteriors", boolean, False, "write the average output "
        "to `post.final.vec`", programs=_RAW),
    _honoured("stage", "stage", _ANY, -4, "skips what is done: LDA, training, combination, priors"),
    _honoured("exit-stage", "exit_stage", _ANY, None, "stop before this iteration"),
    _translated("cmd", "cmd", text, "queue.pl", "how the one job of all learners is run"),
    _honoured("use-gpu", "use_gpu", choice("auto", "true", "false", "yes", "no", "wait"), "auto", "`auto` takes a GPU "
        "where there is one; `yes`, `true` and `wait` fail without; learners of a host take its GPUs in turn"),
    _translated("cleanup", "cleanup", boolean, True, "whether the models of iterations are removed at the end"),
    _translated("cleanup.remove-egs", "remove_egs", boolean, True, "there are no examples to remove; those of "
        "--egs.dir stay, as in Kaldi"),
    _translated("cleanup.preserve-model-interval", "preserve_model_interval", _COUNT, 100, "every so many "
        "iterations' models are kept"),
    _ignored("reporting.email", text, None, "no mail is sent"),
    _ignored("reporting.interval", _NOT_NEGATIVE, 0.1, "no mail is sent"),
    _ignored("lang", text, None, "nothing needs it, in Kaldi neither", programs=(RNN, DNN)),
    _ignored("nj", _COUNT, 4, "no examples are made, features are read as they are needed", programs=_RAW),
)  # fmt: skip

BY_NAME: dict[str, RecipeOption] = {name: option for option in OPTIONS for name in (option.name, *option.aliases)}


FOR_GET_EGS = ("egs.stage", "egs.cmd")  # what chain/train.py has for get_egs.sh, where that makes examples


def options_of(program: str | None) -> list[RecipeOption]:
    """Those that `program` has; None: those of train_rnn.py and train_dnn.py together."""
    programs = {program} if program is not None else {RNN, DNN}
    return [option for option in OPTIONS if programs & set(option.programs)]
