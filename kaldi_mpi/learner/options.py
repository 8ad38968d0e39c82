"""The options of a training: Kaldi's (`recipe_options`), by their names there, and ours beside.

A command line is read whole, and everything that is wrong with it is told at once, a line each.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kaldi_mpi.averaging import NAMES, Settings, check_settings
from kaldi_mpi.averaging.sequence import PhaseSpec, parse_sequence
from kaldi_mpi.averaging.settings import add_options, settings_of
from kaldi_mpi.chain.objective import ChainOptions
from kaldi_mpi.chain.phone_lm import PhoneLmOptions
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.formats.cmvn_options import CmvnOptions, parse_cmvn_opts
from kaldi_mpi.learner import recipe_options
from kaldi_mpi.learner.dropout_schedule import DropoutSchedule
from kaldi_mpi.learner.faults import Fault, parse_faults
from kaldi_mpi.learner.images import ImageAugmentation
from kaldi_mpi.learner.passed_on import Notes, egs_options, phone_lm_options, train_options
from kaldi_mpi.learner.recipe_options import (
    CHAIN,
    DNN,
    FOR_GET_EGS,
    IGNORED,
    PROGRAMS,
    RAW_DNN,
    RAW_RNN,
    RNN,
    WHOLE,
    options_of,
)
from kaldi_mpi.learner.shrinking import Shrinking
from kaldi_mpi.loader import MinibatchRule
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser, Words, at_least, boolean, optional

# Where neither --trainer.num-epochs nor --strategy says it, as in train_rnn.py and chain/train.py.
_EPOCHS, _CHAIN_EPOCHS = 8.0, 10.0


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What a training reads, and how it is cut and shuffled.

    Attributes:
        feat_dir: None with `egs_dir`, if it was not given.
        ali_dir: "" in the raw programs, which have none.
        targets_scp: of the raw programs.
        use_dense_targets: whether these are matrices of all outputs.
        image_augmentation: options of nnet3-egs-augment-image.
        chunk_widths: labelled frames of chunks, the usual width first.
        chunk_left_context_initial, chunk_right_context_final: of an utterance's first and last chunk; -1: as others.
        minibatch: chunks of a learner and step; frames, where they are single.
        frame_subsampling_factor: frames of an output frame of chain examples; None: others.
        single_frames: whether each labelled frame is drawn alone for training, as in train_dnn.py; passes that only
            evaluate take chunks of `chunk_widths` all the same.
        seed: of the order, of what is held out, and of the parameters at the start.
        loader_threads: that read, a learner.
        memory: bytes of data that are in memory, and shuffled, at a time.
        skip_bad_utterances: utterances or examples of a part that may be unreadable, those found at opening included.
    """

    feat_dir: str | None
    ali_dir: str
    targets_scp: str | None
    use_dense_targets: bool
    image_augmentation: str | None
    egs_dir: str | None
    cmvn: CmvnOptions
    online_ivector_dir: str | None
    num_utts_subset: int
    chunk_widths: tuple[int, ...]
    chunk_left_context: int
    chunk_right_context: int
    chunk_left_context_initial: int
    chunk_right_context_final: int
    minibatch: MinibatchRule
    frame_subsampling_factor: int | None
    single_frames: bool
    seed: int
    loader_threads: int
    memory: int
    skip_bad_utterances: int


@dataclasses.dataclass(frozen=True)
class ChainSettings:
    """What chain training has beside; `recipe_options` has the options' names and meanings.

    Attributes:
        objective: of the network's outputs.
        lm_opts: options of chain-est-phone-lm.
        frames_per_iter: input frames of a learner between two validations.
        left_tolerance, right_tolerance: in frames of the alignment.
        alignment_subsampling_factor: frames of the alignment of an output frame.
    """

    objective: ChainOptions
    lm_opts: PhoneLmOptions
    frames_per_iter: int
    left_tolerance: int
    right_tolerance: int
    alignment_subsampling_factor: int


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """One training, as asked for; `recipe_options` and `_add_own` have the options' names and meanings.

    Attributes:
        program: that of Kaldi's whose defaults hold: rnn, dnn, raw-rnn, raw-dnn or chain.
        dir: where the model goes.
        xconfig: the network; need not be there with `input_model`.
        data: what is read; of chain training its alignment directory is the tree's.
        lat_dir: of chain training, lattices for examples that are still to be made.
        chain: of chain training; None: cross-entropy (or a raw network's objective).
        phases: strategies in turn, and how long each lasts.
        settings: of the strategies.
        samples_per_iter: in chunks; in frames, where they are single.
        deriv_truncate_margin: None: derivatives go everywhere.
        shrink_value: scales the parameters where the saturation is above its threshold; 1: never (train_dnn.py).
        proportional_shrink: the parameters' scale is 1 - this times the learning rate; 0: none.
        stage, exit_stage: see `stages.stages_to_do`.
        num_jobs_initial, num_jobs_final, num_jobs_step: Kaldi's, which no learner takes for its number.
        cleanup: whether the models of iterations go at the end, but for each `preserve_model_interval`-th.
        faults: disturbances on purpose.
    """

    program: str
    dir: str
    xconfig: str
    data: DataOptions
    chain: ChainSettings | None
    lat_dir: str | None
    phases: tuple[PhaseSpec, ...]
    settings: Settings
    num_epochs: float
    samples_per_iter: int
    max_param_change: float
    momentum: float
    natural_gradient: bool
    dropout_schedule: DropoutSchedule
    backstitch_scale: float
    backstitch_interval: int
    shrink_value: float
    shrink_saturation_threshold: float
    proportional_shrink: float
    initial_rate: float
    final_rate: float
    deriv_truncate_margin: int | None
    input_model: str | None
    presoftmax_prior_scale_power: float
    prior_subset_size: int
    compute_average_posteriors: bool
    max_lda_jobs: int
    do_final_combination: bool
    max_models_combine: int
    max_objective_evaluations: int
    num_jobs_initial: int
    num_jobs_final: int
    num_jobs_step: int
    compute_per_dim_accuracy: bool
    stage: int
    exit_stage: int | None
    cleanup: bool
    remove_egs: bool
    preserve_model_interval: int
    use_gpu: str
    binary: bool
    checkpoint_interval: int
    checkpoint_minutes: float | None
    checkpoints_kept: int
    lost_after: float
    resume: bool
    journal: bool
    faults: tuple[Fault, ...]

    @property
    def raw(self) -> bool:
        """Whether the model is a network alone, without a transition model and priors."""
        return self.program in (RAW_RNN, RAW_DNN)

    @property
    def trains_xent(self) -> bool:
        """Whether a second output is trained by cross-entropy with the chain objective's numerator."""
        return self.chain is not None and self.chain.objective.xent_regularize > 0

    @property
    def has_priors(self) -> bool:
        """Whether its outputs are posteriors, which decoding divides by priors."""
        return self.program in (RNN, DNN)


def _faults(text: str) -> tuple[Fault, ...]:
    try:
        return tuple(parse_faults(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser(prog: str, program: str | None) -> Parser:
    """Of every option one action; those of Kaldi have None as their default, which `_settle` replaces."""
    parser = Parser(
        prog=prog,
        description="Train an nnet3 acoustic model with N persistent learners.",
        epilog="Options are --name value or --name=value. Those about jobs, archives and queues are ignored, each with "
        "a line in the log.",
    )
    recipe = parser.add_argument_group("Kaldi's options")
    for option in options_of(program):
        names = [f"--{name}" for name in (option.name, *option.aliases)]
        action = "append" if option.dest == "train_opts" else "store"
        recipe.add_argument(
            *names, dest=option.dest or option.name, type=option.kind, action=action, metavar="X",
            help=argparse.SUPPRESS if option.use == IGNORED else option.note.replace("%", "%%"),
        )  # fmt: skip
    _add_own(parser)
    return parser


def _add_own(parser: Parser) -> None:
    """The options that Kaldi does not have."""
    count, whole = at_least(1), at_least(0)
    group = parser.add_argument_group("options of our own")
    add = group.add_argument
    add("--xconfig", type=optional, help="the network: an xconfig, or Kaldi's final.config (default: final.config "
        "or network.xconfig in DIR/configs)")  # fmt: skip
    add("--strategy", help=f"{', '.join(NAMES)} (default: allreduce; expair with backstitch); or several in turn, as "
        "in 'allreduce:1ep,expair:14ep,periodic:1ep'")  # fmt: skip
    add_options(parser)
    add("--natural-gradient", dest="natural_gradient", type=boolean, default=True,
        help="false: plain gradients, for which Kaldi's learning rates do not hold")  # fmt: skip
    add("--loader-threads", type=count, default=1, help="reading threads per learner")
    add("--loader-memory", dest="memory", type=count, default=128,
        help="MB of data in memory per learner, out of which chunks are shuffled")  # fmt: skip
    add("--skip-bad-utterances", type=whole, default=0,
        help="leave out up to this many utterances or examples that cannot be read")  # fmt: skip
    add("--binary", type=boolean, default=True, help="write final.mdl in binary; false for text")
    add("--checkpoint-interval", type=whole, default=1, help="validations between checkpoints; 0 for none (default 1)")
    add("--checkpoint-minutes", type=at_least(0, float), help="minutes between checkpoints, beside those of "
        "--checkpoint-interval (default: none by time)")  # fmt: skip
    add("--lost-after", type=at_least(0, float), default=10.0, help="seconds without a sign of life after which "
        "strategies that wait for nobody go on without a learner; 0: never (default 10)")  # fmt: skip
    add("--journal", type=boolean, default=True, help="write every exchange of asynchronous strategies to DIR/journal")
    add("--inject", dest="faults", type=_faults, default=(),
        help="disturbances, as in 'slow:100x@rank2' (see docs/training.md)")  # fmt: skip
    add("--checkpoints-kept", type=count, default=2, help="checkpoints that are kept: should the newest be damaged, "
        "the one before is taken (default 2)")  # fmt: skip
    add("--resume", type=boolean, default=True, help="go on from DIR's checkpoint, where there is one")


def parse(arguments: Sequence[str]) -> TrainOptions:
    """The options of a learner's command line; the log gets a line for each that does nothing.

    Raises:
        ConfigError: all that is wrong with them, a line each.
    """
    options, notes = read(arguments)
    for line in notes.lines:
        logger.info("%s", line)
    for line in notes.warnings:
        logger.warning("%s", line)
    return options


def read(arguments: Sequence[str], prog: str = "kaldi-mpi train") -> tuple[TrainOptions, Notes]:
    """The same, with what is to be logged beside it; errors begin with `prog`."""
    arguments = list(arguments)
    program, arguments = _program_of(arguments)
    parser = make_parser(prog, program)
    if "--help" in arguments or "-h" in arguments:
        parser.parse_args(["--help"])
    words = Words(arguments, option_names(program), kaldi_names(program))
    complaints = [f"{prog}: {complaint}" for complaint in words.complaints]
    values = parser.parse_args([])
    for name, value in words.pairs:
        try:
            parser.parse_args([f"--{name}={value}"], values)
        except ConfigError as error:
            complaints += str(error).splitlines()
    given, notes = vars(values), Notes()
    options = _settle(given, program, dict(words.pairs), notes, complaints)
    if complaints or options is None:
        raise ConfigError("\n".join(complaints))
    return options, notes


def _program_of(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take ``--program=rnn`` out of the arguments: it decides which options there are."""
    rest = [word for word in arguments if not word.startswith("--program=")]
    found = [word.partition("=")[2] for word in arguments if word.startswith("--program=")]
    if found and found[-1] not in PROGRAMS:
        raise ConfigError(f"--program={found[-1]}: must be one of {', '.join(PROGRAMS)}")
    return (found[-1] if found else None), rest


@functools.cache
def option_names(program: str | None) -> tuple[str, ...]:
    """The names, without dashes, of all options of a training by `program` (None: of train.sh)."""
    actions = make_parser("", program)._actions
    return tuple(name[2:] for action in actions for name in action.option_strings if name.startswith("--"))


@functools.cache
def kaldi_names(program: str | None) -> tuple[str, ...]:
    """Those of them that Kaldi has."""
    there = (option for option in options_of(program) if not option.old)
    return tuple(name for option in there for name in (option.name, *option.aliases))


def _settle(
    given: dict[str, Any], program: str | None, words: dict[str, str], notes: Notes, complaints: list[str]
) -> TrainOptions | None:
    """Defaults, what options have to do with each other, and what the log should say; None if anything is wrong."""

    def checked(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except ConfigError as error:
            complaints.extend(str(error).splitlines())
            return None

    decided = program or (RNN if given["frames_per_eg"] is None else DNN)
    given["single_frames"] = decided in (DNN, RAW_DNN)
    _note_options(given, decided, words, notes)
    checked(lambda: _apply_defaults(given, decided))
    if complaints:
        return None
    in_chain = decided == CHAIN
    given.update(checked(lambda: train_options(given.pop("train_opts") or (), notes, in_chain)) or {})
    if in_chain:
        # The same program's, and behind the others on its command line.
        chain_opts = [given.pop("chain_opts") or ""]
        given.update(checked(lambda: train_options(chain_opts, notes, True, "--chain-opts")) or {})
    given["num_utts_subset"] = checked(
        lambda: egs_options(given.pop("egs_opts") or "", given["egs_dir"] is not None, notes, in_chain)
    )
    # nnet3's get_egs.sh hands cmvn_opts to apply-cmvn, whose own default is to normalise means.
    cmvn_opts = given.pop("cmvn_opts") or ""
    if in_chain and given["egs_dir"] is not None and cmvn_opts:
        notes.lines.append("--feat.cmvn-opts is ignored: the examples of --egs.dir are there already")
        cmvn_opts = ""
    given["cmvn"] = checked(lambda: parse_cmvn_opts(cmvn_opts, where="--feat.cmvn-opts"))
    given["settings"] = checked(lambda: settings_of(given, given["seed"]))
    usual = _CHAIN_EPOCHS if in_chain else _EPOCHS
    strategy = given.pop("strategy")
    if strategy is None:
        strategy = "expair" if given["backstitch_scale"] else "allreduce"
        if given["backstitch_scale"]:
            notes.lines.append("--strategy is expair: under allreduce there is no backstitch")
    phases = checked(lambda: parse_sequence(strategy, given["num_epochs"], usual, NAMES))
    given.setdefault("frame_subsampling_factor", None)
    given.setdefault("lat_dir", None)
    given["chain"] = checked(lambda: _chain_options(given)) if in_chain else None
    if complaints:
        return None
    given["phases"], given["num_epochs"] = tuple(phases), sum(phase.epochs for phase in phases)
    checked(lambda: check_settings([phase.name for phase in phases], given["settings"]))
    checked(lambda: _check_together(given))
    if complaints:
        return None
    given["xconfig"] = given["xconfig"] or _network_in(Path(given["dir"]) / "configs")
    given["memory"] *= 2**20
    data = DataOptions(**{field.name: given[field.name] for field in dataclasses.fields(DataOptions)})
    names = [field.name for field in dataclasses.fields(TrainOptions) if field.name not in ("data", "program")]
    return TrainOptions(data=data, program=decided, **{name: given[name] for name in names})


def _chain_options(given: dict[str, Any]) -> ChainSettings:
    """Those of chain training; raises ConfigError with all that is wrong with them."""
    complaints: list[str] = []
    if given["chain_leaky"] >= 1:
        complaints.append(f"--chain.leaky-hmm-coefficient {given['chain_leaky']}: must be below 1")
    try:
        lm_opts = phone_lm_options(given["lm_opts"] or "")
    except ConfigError as error:
        complaints += str(error).splitlines()
    if complaints:
        raise ConfigError("\n".join(complaints))
    objective = ChainOptions(
        l2_regularize=given["chain_l2"],
        xent_regularize=given["chain_xent"],
        leaky_hmm_coefficient=given["chain_leaky"],
        apply_deriv_weights=given["apply_deriv_weights"],
        out_of_range_regularize=given.get("out_of_range_regularize", ChainOptions.out_of_range_regularize),
    )
    fields = [field.name for field in dataclasses.fields(ChainSettings)[2:]]
    return ChainSettings(objective, lm_opts, **{name: given[name] for name in fields})


def _note_options(given: dict[str, Any], program: str, words: dict[str, str], notes: Notes) -> None:
    """A line for each option that does nothing, and one for a number of jobs."""
    for option in options_of(None if program in (RNN, DNN) else program):
        word = next((words[name] for name in (option.name, *option.aliases) if name in words), None)
        if word is None:
            continue
        if program == CHAIN and given["egs_dir"] is None and option.name in FOR_GET_EGS:
            continue  # programs/chain_egs.py hands them on
        if option.use == IGNORED and given[option.name] != option.default_of(program):
            notes.lines.append(f"option --{option.name} {word} is ignored: {option.note}")
        if program in option.ignored_by and given[option.dest] != option.default_of(program):
            notes.lines.append(f"option --{option.name} {word} is ignored: it does nothing in Kaldi's program either")
    jobs = [given[f"num_jobs_{end}"] for end in ("initial", "final")]
    if any(jobs):
        first, last = (recipe_options.BY_NAME[f"trainer.optimization.num-jobs-{end}"].default if n is None else n
            for n, end in zip(jobs, ("initial", "final"), strict=True))  # fmt: skip
        notes.lines.append(
            f"jobs from {first} to {last}: learning rates are effective ones, of the averaged model, and stay so: "
            f"each of N learners applies N times them, where Kaldi's jobs apply {first} to {last} times"
        )


def _apply_defaults(given: dict[str, Any], program: str) -> None:
    """Put in the defaults of `program`, and settle what the programs have different names or units for.

    train_dnn.py counts minibatches and iterations in frames.
    """
    complaints = []
    margin = given.get("left_deriv_truncate")
    if program == CHAIN and margin is not None:
        given["deriv_truncate_margin"] = -margin
    if program in (RNN, RAW_RNN) and given.get("minibatch_size") is not None:
        complaints.append(
            "--trainer.optimization.minibatch-size counts frames, of feed-forward networks: it needs "
            "--egs.frames-per-eg (recurrent ones have --trainer.rnn.num-chunk-per-minibatch)"
        )
    if program in (DNN, RAW_DNN):
        for name in ("egs.chunk-width", "trainer.rnn.num-chunk-per-minibatch", "egs.chunk-left-context-initial",
            "egs.chunk-right-context-final"):  # fmt: skip
            if given.get(recipe_options.BY_NAME[name].dest) not in (None, -1):
                complaints.append(f"--egs.frames-per-eg and --{name} exclude each other")
    for option in recipe_options.OPTIONS:
        if option.dest and given.get(option.dest) is None:
            given[option.dest] = option.default_of(program) if program in option.programs else None
        if program in option.required_by and not given[option.dest]:
            complaints.append(f"--{option.name} is needed")
    if given["feat_dir"] is None and given["egs_dir"] is None and program != RAW_RNN:
        complaints.append("--feat-dir is needed (or --egs.dir, to train on existing examples)")
    if program == RAW_DNN and given["targets_scp"] is None and given["egs_dir"] is None:
        complaints.append("--targets-scp is needed (or --egs.dir, to train on existing examples)")
    if program == CHAIN:
        given["ali_dir"] = given["tree_dir"]
        # Of chunks that are whole utterances, more than there will be.
        given["samples_per_iter"] = max(1, given["frames_per_iter"] // max(1, given["chunk_widths"][0]))
    elif given["chunk_widths"] == WHOLE:
        complaints.append("--egs.chunk-width -1: chunks are whole utterances in chain training alone")
    if complaints:
        raise ConfigError("\n".join(complaints))
    margin = None if program == CHAIN else 8
    defaults = {"ali_dir": "", "use_dense_targets": True, "compute_average_posteriors": False, "prior_subset_size": 0,
        "shrink_value": 1.0, "shrink_saturation_threshold": 0.4, "deriv_truncate_margin": margin,
        "chunk_right_context": 0, "chunk_left_context": 0, "chunk_left_context_initial": -1,
        "chunk_right_context_final": -1}  # fmt: skip
    for name, value in defaults.items():
        given[name] = value if given[name] is None else given[name]
    if program in (DNN, RAW_DNN):
        given["chunk_widths"], given["minibatch"] = (given["frames_per_eg"],), given["minibatch_size"]


def _check_together(given: dict[str, Any]) -> None:
    """Raises ConfigError where options exclude each other, all of it at once."""
    complaints = []
    if given["momentum"] >= 1:
        complaints.append(f"--trainer.optimization.momentum {given['momentum']}: must be below 1")
    if given["backstitch_scale"] and given["momentum"]:
        complaints.append(
            "--trainer.optimization.backstitch-training-scale: needs --trainer.optimization.momentum=0, as in Kaldi"
        )
    if given["backstitch_scale"] and any(phase.name in ("allreduce", "adpsgd-delay1") for phase in given["phases"]):
        complaints.append(
            "--trainer.optimization.backstitch-training-scale: under allreduce and adpsgd-delay1 learners must not "
            "move apart within a step; take --strategy periodic or an asynchronous one"
        )
    try:
        # Of one learner; with more of them it is looked at where their number is known.
        rate = max(given["initial_rate"], given["final_rate"])
        Shrinking(proportional=given["proportional_shrink"]).scale(rate, first=False, saturation=0.0)
    except ConfigError as error:
        complaints.append(str(error))
    if given["image_augmentation"]:
        try:
            ImageAugmentation.parse(given["image_augmentation"])
        except ConfigError as error:
            complaints.append(str(error))
    if complaints:
        raise ConfigError("\n".join(complaints))


def _network_in(configs: Path) -> str:
    """What Kaldi's xconfig_to_configs.py has made, where a recipe has called it; else the xconfig itself."""
    final = configs / "final.config"
    return str(final if final.exists() else configs / "network.xconfig")
