"""The options of a training: Kaldi's names where Kaldi has them (``steps/nnet3/train_rnn.py``), ours beside.

Every option of train_rnn.py is accepted, so that a recipe's call can be kept; those without a meaning for
persistent learners are logged once and ignored, those that would change the result if ignored are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kaldi_mpi.averaging import NAMES, Settings, check_settings
from kaldi_mpi.averaging.sequence import PhaseSpec, parse_sequence
from kaldi_mpi.averaging.settings import add_options, settings_of
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.formats.cmvn_options import CmvnOptions, parse_cmvn_opts
from kaldi_mpi.learner.dropout_schedule import DropoutSchedule
from kaldi_mpi.learner.faults import Fault, parse_faults
from kaldi_mpi.loader import MinibatchRule
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser, at_least, boolean, optional

_EPOCHS = 8.0  # where neither --trainer.num-epochs nor --strategy says it, as in train_rnn.py
_CHUNK_WIDTH = 20

# Accepted for the recipe's sake: they steer jobs, archives and schedulers that do not exist here.
_IGNORED = [
    "lang",
    "egs.stage",
    "egs.cmd",
    "trainer.shuffle-buffer-size",
    "trainer.lda.rand-prune",
    "trainer.num-jobs-compute-prior",
    "trainer.add-option",
    "trainer.compute-per-dim-accuracy",
    "trainer.optimization.num-jobs-initial",
    "trainer.optimization.num-jobs-final",
    "trainer.optimization.num-jobs-step",
    "trainer.optimization.combine-sum-to-one-penalty",
    "stage",
    "cmd",
    "cleanup",
    "cleanup.remove-egs",
    "cleanup.preserve-model-interval",
    "reporting.email",
    "reporting.interval",
]

# What Kaldi does with these is not done yet; a recipe's call is taken all the same, and the log says so.
_NOT_YET = [
    "trainer.presoftmax-prior-scale-power",
    "trainer.optimization.shrink-value",
    "trainer.optimization.shrink-saturation-threshold",
    "trainer.optimization.max-models-combine",
    "trainer.max-models-combine",
    "trainer.optimization.max-objective-evaluations",
    "trainer.max-objective-evaluations",
    "trainer.optimization.do-final-combination",
]

# Not there yet: any value but the one that switches it off is an error, not a silent change of the training.
_REFUSED = {
    "trainer.input-model": ("",),
    "trainer.optimization.proportional-shrink": ("0", "0.0"),
    "exit-stage": ("",),
}


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What a training reads, and how it is cut and shuffled.

    Attributes:
        feat_dir: None with `egs_dir`, if it was not given.
        chunk_widths: labelled frames of chunks, the usual width first.
        chunk_left_context_initial, chunk_right_context_final: of an utterance's first and last chunk; -1: as others.
        minibatch: chunks of a learner and step; frames, where they are single.
        seed: of the order, of what is held out, and of the parameters at the start.
        loader_threads: that read, a learner.
        memory: bytes of data that are in memory, and shuffled, at a time.
        skip_bad_utterances: utterances or examples of a part that may be unreadable, those found at opening included.
        single_frames: whether each labelled frame is drawn alone for training, as in train_dnn.py; passes that only
            evaluate take chunks of `chunk_widths` all the same.
    """

    feat_dir: str | None
    ali_dir: str
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
    seed: int
    loader_threads: int
    memory: int
    skip_bad_utterances: int
    single_frames: bool = False


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """One training, as asked for; see `parse` for the options' names and meanings.

    Attributes:
        dir: where the model goes.
        xconfig: the network.
        data: what is read.
        phases: strategies in turn, and how long each lasts.
        settings: of the strategies.
        samples_per_iter: in chunks; in frames, where they are single.
        faults: disturbances on purpose.
    """

    dir: str
    xconfig: str
    data: DataOptions
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
    initial_rate: float
    final_rate: float
    deriv_truncate_margin: int
    prior_subset_size: int
    max_lda_jobs: int
    use_gpu: str
    binary: bool
    checkpoint_interval: int | None
    resume: bool
    journal: bool
    faults: tuple[Fault, ...]


def _widths(text: str) -> tuple[int, ...]:
    """``20,15`` as train_rnn.py takes it: the usual width, then others."""
    try:
        widths = tuple(int(width) for width in text.split(","))
    except ValueError:
        widths = (0,)
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"expected widths above 0 as in '20' or '20,15', got {text!r}")
    return widths


def _rule(text: str) -> MinibatchRule:
    """A rule of minibatch sizes, as ``nnet3-merge-egs --minibatch-size`` takes it."""
    try:
        return MinibatchRule.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _faults(text: str) -> tuple[Fault, ...]:
    try:
        return tuple(parse_faults(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> Parser:
    parser = Parser(
        prog="kaldi-mpi train",
        description="Train an nnet3 acoustic model with N persistent learners (started by mpiexec).",
        epilog="e.g.: mpiexec -n 4 python -m kaldi_mpi train --feat-dir data/train_hires --ali-dir exp/tri_ali "
        "--dir exp/lstm --strategy periodic --frames-per-average 100000",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, whole = at_least(1), at_least(0)
    add = parser.add_argument
    add("--feat-dir", type=optional, help="data directory of the features (not needed with --egs.dir)")
    add("--ali-dir", required=True, help="alignment directory: ali.*.gz, final.mdl, tree")
    add("--dir", required=True, help="where the model and logs go")
    add("--xconfig", type=optional, help="the network: an xconfig, or Kaldi's final.config (default: final.config "
        "or network.xconfig in DIR/configs)")  # fmt: skip
    add(
        "--strategy",
        default="allreduce",
        help=f"{', '.join(NAMES)}; or several in turn, as in 'allreduce:1ep,adpsgd-random:14ep,periodic:1ep'",
    )
    add_options(parser)
    add(
        "--feat.cmvn-opts",
        dest="cmvn_opts",
        default="",
        help="such as '--norm-means=false --norm-vars=false'",
    )
    add("--feat.online-ivector-dir", dest="online_ivector_dir", type=optional,
        help="directory of ivector_online.scp, for networks that take i-vectors")  # fmt: skip
    add("--egs.dir", dest="egs_dir", type=optional, help="train on the examples in this directory of get_egs.sh")
    add("--egs.chunk-width", dest="chunk_widths", type=_widths, help="frames per chunk, and other widths for what is "
        f"left of utterances, as in '20,15' (default: {_CHUNK_WIDTH})")  # fmt: skip
    add("--egs.frames-per-eg", dest="frames_per_eg", type=count, help="for feed-forward networks: minibatches are of "
        "single frames, out of examples of so many; takes train_dnn.py's defaults of contexts, momentum, "
        "samples-per-iter and minibatch-size")  # fmt: skip
    add("--egs.chunk-left-context", dest="chunk_left_context", type=whole,
        help="frames before a chunk, beyond the model's own context (default: 40)")  # fmt: skip
    add("--egs.chunk-right-context", dest="chunk_right_context", type=whole, default=0, help="frames after it")
    add("--egs.chunk-left-context-initial", dest="chunk_left_context_initial", type=at_least(-1), default=-1,
        help="the same at the beginning of an utterance; -1: as elsewhere")  # fmt: skip
    add("--egs.chunk-right-context-final", dest="chunk_right_context_final", type=at_least(-1), default=-1,
        help="the same at its end")  # fmt: skip
    add("--egs.opts", dest="egs_opts", default="", help="of get_egs.sh; --num-utts-subset N is used")
    add("--trainer.srand", dest="seed", type=int, default=0, help="seed of everything random")
    add("--trainer.num-epochs", dest="num_epochs", type=at_least(0, float, True),
        help=f"epochs (default: what --strategy says, or {_EPOCHS:g})")  # fmt: skip
    add("--trainer.samples-per-iter", dest="samples_per_iter", type=count,
        help="chunks per learner between two validations (default: 20000); with --egs.frames-per-eg "
        "frames (400000)")  # fmt: skip
    add("--trainer.max-param-change", dest="max_param_change", type=at_least(0, float), default=2.0,
        help="limit on the norm of the whole model's change per minibatch")  # fmt: skip
    add("--trainer.prior-subset-size", dest="prior_subset_size", type=count, default=20000,
        help="chunks over which the priors are estimated")  # fmt: skip
    add("--trainer.lda.max-lda-jobs", dest="max_lda_jobs", type=count, default=10,
        help="LDA statistics come from at most this many times samples-per-iter chunks")  # fmt: skip
    add("--trainer.rnn.num-chunk-per-minibatch", dest="minibatch", type=_rule,
        help="chunks per minibatch and learner: a rule as in '128,64' or '128=64:128/256=32,64', of which the "
        "largest size counts (default: 100)")  # fmt: skip
    add("--trainer.optimization.minibatch-size", dest="minibatch_size", type=_rule,
        help="the same in frames, as train_dnn.py has it (default with --egs.frames-per-eg: 512)")  # fmt: skip
    add("--trainer.deriv-truncate-margin", dest="deriv_truncate_margin", type=whole, default=8,
        help="frames outside the chunk that still get derivatives")  # fmt: skip
    add("--trainer.optimization.initial-effective-lrate", dest="initial_rate", default=0.0003,
        type=at_least(0, float, True), help="effective learning rate at the start")  # fmt: skip
    add("--trainer.optimization.final-effective-lrate", dest="final_rate", default=0.00003,
        type=at_least(0, float, True), help="effective learning rate at the end")  # fmt: skip
    add(
        "--trainer.optimization.momentum",
        dest="momentum",
        type=at_least(0, float),
        help="momentum (default: 0.5)",
    )
    add("--trainer.dropout-schedule", dest="dropout_schedule", default="",
        help="how dropout changes with the data, as in '0,0@0.20,0.5@0.5,0' or 'lstm*=0,0.3,0'")  # fmt: skip
    add("--trainer.optimization.backstitch-training-scale", dest="backstitch_scale", type=at_least(0, float),
        default=0.0, help="backstitch: how far to step back first; 0: not at all")  # fmt: skip
    add("--trainer.optimization.backstitch-training-interval", dest="backstitch_interval", type=count, default=1,
        help="minibatches from one backstitch to the next")  # fmt: skip
    add("--natural-gradient", dest="natural_gradient", type=boolean, default=True,
        help="false: plain gradients, for which Kaldi's learning rates do not hold")  # fmt: skip
    add("--use-gpu", default="auto", choices=["auto", "yes", "true", "wait", "no", "false"],
        help="auto takes a GPU where there is one; yes, true and wait fail without")  # fmt: skip
    add("--loader-threads", type=count, default=1, help="reading threads per learner")
    add("--loader-memory", dest="memory", type=count, default=128,
        help="MB of data in memory per learner, out of which chunks are shuffled")  # fmt: skip
    add("--skip-bad-utterances", type=whole, default=0,
        help="leave out up to this many utterances or examples that cannot be read")  # fmt: skip
    add("--binary", type=boolean, default=True, help="write final.mdl in binary; false for text")
    add("--checkpoint-interval", type=whole, help="validations between checkpoints; 0 for none (default: 1, and 5 "
        "under asynchronous strategies, whose learners wait for each other at a checkpoint)")  # fmt: skip
    add("--journal", type=boolean, default=True, help="write every exchange of asynchronous strategies to DIR/journal")
    add("--inject", dest="faults", type=_faults, default=(),
        help="disturbances, as in 'slow:100x@rank2' (see docs/training.md)")  # fmt: skip
    add("--resume", type=boolean, default=True, help="go on from DIR's checkpoint, where there is one")
    for name in (*_IGNORED, *_NOT_YET):
        add(f"--{name}", action="append", help=argparse.SUPPRESS)
    for name in _REFUSED:
        add(f"--{name}", help=argparse.SUPPRESS)
    return parser


def parse(arguments: Sequence[str] | None = None) -> TrainOptions:
    """The options of a command line.

    Raises:
        ConfigError: an unknown, malformed or not yet supported option, named in one line.
    """
    given = vars(_parser().parse_args(arguments))
    for name, harmless in _REFUSED.items():
        value = given.pop(name.replace("-", "_"))
        if value is not None and value not in harmless:
            raise ConfigError(f"--{name} {value}: not supported yet")
    for name in _IGNORED:
        if given.pop(name.replace("-", "_")) is not None:
            logger.info("option --%s has no meaning for persistent learners and is ignored", name)
    for name in _NOT_YET:
        if given.pop(name.replace("-", "_")) is not None:
            logger.warning("option --%s: what it steers is not done yet; the training goes on without it", name)
    _apply_defaults(given)
    if given["backstitch_scale"] and given["momentum"]:
        raise ConfigError(
            "--trainer.optimization.backstitch-training-scale: needs --trainer.optimization.momentum=0, as in Kaldi"
        )
    if given["momentum"] >= 1:
        raise ConfigError(f"--trainer.optimization.momentum {given['momentum']}: must be below 1")
    given["dropout_schedule"] = DropoutSchedule.parse(given["dropout_schedule"])
    egs = _words_to_options(given.pop("egs_opts"))
    # nnet3's get_egs.sh hands cmvn_opts to apply-cmvn, whose own default is to normalise means.
    given["cmvn"] = parse_cmvn_opts(given.pop("cmvn_opts"), where="--feat.cmvn-opts")
    subset = egs.get("num-utts-subset", "300")
    given["num_utts_subset"] = _converted(at_least(1), subset, "--egs.opts: --num-utts-subset")
    given["settings"] = settings_of(given, given["seed"])
    phases = parse_sequence(given.pop("strategy"), given["num_epochs"], _EPOCHS, NAMES)
    given["phases"], given["num_epochs"] = tuple(phases), sum(phase.epochs for phase in phases)
    check_settings([phase.name for phase in phases], given["settings"])
    if given["backstitch_scale"] and any(phase.name == "allreduce" for phase in phases):
        raise ConfigError(
            "--trainer.optimization.backstitch-training-scale: under allreduce learners must not move apart; take "
            "--strategy periodic or an asynchronous one"
        )
    given["xconfig"] = given["xconfig"] or _network_in(Path(given["dir"]) / "configs")
    given["memory"] *= 2**20
    names = [field.name for field in dataclasses.fields(DataOptions)]
    data = DataOptions(**{name: given.pop(name) for name in names})
    return TrainOptions(data=data, **given)


def _network_in(configs: Path) -> str:
    """What Kaldi's xconfig_to_configs.py has made, where a recipe has called it; else the xconfig itself."""
    final = configs / "final.config"
    return str(final if final.exists() else configs / "network.xconfig")


def _apply_defaults(given: dict[str, Any]) -> None:
    """Settle what train_rnn.py and train_dnn.py have different defaults, names or units for.

    train_dnn.py counts minibatches and iterations in frames: it takes one frame out of each example of
    ``--egs.frames-per-eg`` at a time.
    """
    frames, size = given.pop("frames_per_eg"), given.pop("minibatch_size")
    if frames is None and size is not None:
        raise ConfigError(
            "--trainer.optimization.minibatch-size counts frames, of feed-forward networks: it needs "
            "--egs.frames-per-eg (recurrent ones have --trainer.rnn.num-chunk-per-minibatch)"
        )
    rnn = {"chunk_widths": (_CHUNK_WIDTH,), "chunk_left_context": 40, "momentum": 0.5, "samples_per_iter": 20000}
    dnn = {"chunk_widths": (frames,), "chunk_left_context": 0, "momentum": 0.0, "samples_per_iter": 400000}
    if frames is not None:
        for name, unset, option in (
            ("chunk_widths", None, "--egs.chunk-width"),
            ("minibatch", None, "--trainer.rnn.num-chunk-per-..."),
            ("chunk_left_context_initial", -1, "--egs.chunk-left-context-initial"),
            ("chunk_right_context_final", -1, "--egs.chunk-right-context-final"),
        ):
            if given[name] != unset:
                raise ConfigError(f"--egs.frames-per-eg and {option} exclude each other")
        given["minibatch"] = size or MinibatchRule.of(512)
    for name, default in (rnn if frames is None else dnn).items():
        if given[name] is None:
            given[name] = default
    given["minibatch"] = given["minibatch"] or MinibatchRule.of(100)
    given["single_frames"] = frames is not None
    if given["feat_dir"] is None and given["egs_dir"] is None:
        raise ConfigError("--feat-dir is needed (or --egs.dir, to train on existing examples)")


def _converted(kind: Callable[[str], Any], text: str, where: str) -> Any:
    """A value inside a string of options, with the error that argparse gives for options of its own."""
    try:
        return kind(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _words_to_options(text: str) -> dict[str, str]:
    """``--a 1 --b 2`` as get_egs.sh takes them (parse_options.sh style)."""
    words = text.replace("=", " ").split()
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=False)}
