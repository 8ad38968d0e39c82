"""Options inside options: ``--egs.opts`` is for get_egs.sh, ``--trainer.add-option`` for nnet3-train, and so on.

Neither program runs here. Each of their options has an effect or a line in the log that says why it has none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kaldi_mpi.chain.phone_lm import PhoneLmOptions
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.options import at_least, boolean, number

_NO_EGS = "no examples are made, features are read as they are needed"
_GIVEN_OTHERWISE = "an option of the training itself says it"
_ALL_HELD_OUT = "validations are of all held-out utterances"
# Options of steps/nnet3/get_egs.sh and get_egs_targets.sh, by what the log says of them; those that older recipes
# still pass are among them.
_EGS: dict[str, str] = {
    **dict.fromkeys(("cmd", "nj", "stage", "srand", "compress", "generate-egs-scp", "feat-type", "config"), _NO_EGS),
    **dict.fromkeys(
        ("samples-per-iter", "frames-per-eg", "left-context", "right-context", "left-context-initial",
         "right-context-final", "online-ivector-dir", "cmvn-opts", "target-type", "num-targets"), _GIVEN_OTHERWISE,
    ),
    **dict.fromkeys(("num-frames-diagnostic", "num-egs-diagnostic"), _ALL_HELD_OUT),
    **dict.fromkeys(
        ("num-valid-frames-combine", "num-train-frames-combine", "num-valid-egs-combine", "num-train-egs-combine"),
        "no examples are set apart for the combination of models",
    ),
    "frames-overlap-per-eg": "chunks do not overlap",
    "length-tolerance": "features and labels must be of the same length",
    **dict.fromkeys(("num-utts-subset-valid", "num-utts-subset-train"), "--num-utts-subset says how many are held out"),
}  # fmt: skip
# Those that would change the training: the harmless value, which needs no line, and what the warning of another says.
_EGS_CHANGES = {
    "online-cmvn": ("false", "online CMVN is not done, normalisation is by speaker"),
    "frame-subsampling-factor": ("1", "every frame gets an output"),
    "transform-dir": ("", "features are not transformed"),
}
# Those of steps/nnet3/chain/get_egs.sh, which is called with them.
_CHAIN_EGS = frozenset(
    ("acwt", "alignment-subsampling-factor", "cmd", "cmvn-opts", "compress", "config", "constrained",
     "deriv-weights-scp", "frame-subsampling-factor", "frames-overlap-per-eg", "frames-per-eg", "frames-per-iter",
     "generate-egs-scp", "lattice-lm-scale", "lattice-prune-beam", "left-context", "left-context-initial",
     "left-tolerance", "max-jobs-run", "max-shuffle-jobs-run", "num-egs-diagnostic", "num-train-egs-combine",
     "num-utts-subset", "num-valid-egs-combine", "online-cmvn", "online-ivector-dir", "right-context",
     "right-context-final", "right-tolerance", "srand", "stage")
)  # fmt: skip

# nnet3-train's options that act here: name -> (field, type)
_ACTING: dict[str, tuple[str, Callable[[str], Any]]] = {
    "momentum": ("momentum", at_least(0, float)),
    "max-param-change": ("max_param_change", at_least(0, float)),
    "backstitch-training-scale": ("backstitch_scale", at_least(0, float)),
    "backstitch-training-interval": ("backstitch_interval", at_least(1)),
}
# The same of nnet3-chain-train.
_CHAIN_ACTING: dict[str, tuple[str, Callable[[str], Any]]] = {
    **_ACTING,
    "l2-regularize": ("chain_l2", at_least(0, float)),
    "xent-regularize": ("chain_xent", at_least(0, float)),
    "leaky-hmm-coefficient": ("chain_leaky", at_least(0, float, True)),
    "out-of-range-regularize": ("out_of_range_regularize", at_least(0, float)),
    "apply-deriv-weights": ("apply_deriv_weights", boolean),
}
_COMPILER = "there is no computation to compile"
_TRAIN: dict[str, str] = {
    **dict.fromkeys(("srand", "use-gpu", "binary"), _GIVEN_OTHERWISE),
    **dict.fromkeys(("print-interval", "verbose", "print-args", "config"), "the log has its own form"),
    **dict.fromkeys(("read-cache", "write-cache", "binary-write-cache", "debug"), _COMPILER),
    **dict.fromkeys(("optimization.min-deriv-time", "optimization.max-deriv-time",
        "optimization.max-deriv-time-relative"), "--trainer.deriv-truncate-margin says it"),
    **dict.fromkeys(("store-component-stats", "zero-component-stats"), "statistics are kept as they are needed"),
    "batchnorm-stats-scale": "it is 0.8, as in Kaldi",
    "l2-regularize-factor": "it is 1 / the number of learners, as Kaldi's is 1 / the number of jobs",
}  # fmt: skip
_CHAIN_TRAIN = {**_TRAIN, "numerator-graph-threads": "the numerator takes the learner's threads"}
# Learning without forgetting, by posteriors of another model that nnet3-chain-add-post-to-egs puts into examples.
_LWF = ("lwf-scale", "lwf-den-scale")
_TRAIN_PREFIXES = {
    "optimization.": _COMPILER,
    "compiler.": _COMPILER,
    "computation.": _COMPILER,
    "cuda-": "PyTorch keeps the GPU's memory",
}


class Notes:
    """What is to be said of a command line in the log: ignored options as lines, changed trainings as warnings."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []


def egs_options(words: str, egs_dir_given: bool, notes: Notes, chain: bool = False) -> int:
    """The held-out utterances that ``--egs.opts`` asks for; everything else in it goes to `notes`.

    Args:
        words: ``--a 1 --b 2``, as get_egs.sh takes them; _ and - are the same.
        chain: whether that is steps/nnet3/chain/get_egs.sh, which is called with all of them.

    Raises:
        ConfigError: an option that get_egs.sh does not have, one without a value, or a number that is none.
    """
    where, subset, complaints = "--egs.opts", 300, []
    given, rest = {}, words.replace("=", " ").split()
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or not rest:
            complaints.append(f"{where}: {name!r} is not an option with a value")
            continue
        given[name[2:].replace("_", "-")] = rest.pop(0)
    if given and egs_dir_given and not complaints:
        notes.lines.append(f"{where} is ignored: the examples of --egs.dir are there already")
    for name, value in given.items():
        if name == "num-utts-subset":
            subset = _collected(at_least(1), value, f"{where}: --{name}", complaints)
        elif chain:
            if name not in _CHAIN_EGS:
                complaints.append(f"{where}: chain/get_egs.sh has no option --{name}")
        elif name in _EGS_CHANGES:
            harmless, why = _EGS_CHANGES[name]
            if value != harmless and not egs_dir_given:
                notes.warnings.append(f"{where} --{name} {value} does nothing: {why}")
        elif name not in _EGS:
            complaints.append(f"{where}: get_egs.sh has no option --{name}")
        elif not egs_dir_given:
            notes.lines.append(f"{where} --{name} {value} is ignored: {_EGS[name]}")
    if complaints:
        raise ConfigError("\n".join(complaints))
    return subset


def train_options(
    options: Sequence[str], notes: Notes, chain: bool = False, where: str = "--trainer.add-option"
) -> Mapping[str, Any]:
    """Fields that ``--trainer.add-option`` sets, by name; options without an effect go to `notes`.

    Args:
        options: each ``--name=value``, or several of them with spaces between.
        chain: whether they are nnet3-chain-train's, and not nnet3-train's.
        where: the option that they are given in.

    Raises:
        ConfigError: an option that the program does not have, one that is not done here, or a value that is none.
    """
    program, acting, ignored = "nnet3-train", _ACTING, _TRAIN
    if chain:
        program, acting, ignored = "nnet3-chain-train", _CHAIN_ACTING, _CHAIN_TRAIN
    complaints: list[str] = []
    fields: dict[str, Any] = {}
    for word in " ".join(options).split():
        name, _, value = word.removeprefix("--").replace("_", "-").partition("=")
        prefix = next((why for start, why in _TRAIN_PREFIXES.items() if name.startswith(start)), None)
        why = ignored.get(name, prefix)
        if not word.startswith("--"):
            complaints.append(f"{where}: {word!r} is no option of {program}: they are --name=value")
        elif name in acting:
            field, kind = acting[name]
            fields[field] = _collected(kind, value, f"{where}: --{name}", complaints)
        elif chain and name in _LWF:
            if _collected(number(float), value, f"{where}: --{name}", complaints):
                complaints.append(f"{where}: {word}: learning without forgetting is not done (0 is none)")
            else:
                notes.lines.append(f"{where} {word} is ignored: there is no learning without forgetting")
        elif why is None:
            complaints.append(f"{where}: {program} has no option --{name}")
        else:
            notes.lines.append(f"{where} {word} is ignored: {why}")
    if complaints:
        raise ConfigError("\n".join(complaints))
    return fields


_PHONE_LM = {"ngram-order": at_least(2), "no-prune-ngram-order": at_least(1), "num-extra-lm-states": at_least(0)}


def phone_lm_options(words: str) -> PhoneLmOptions:
    """``--chain.lm-opts``: options of chain-est-phone-lm, ``--name=value`` each.

    Raises:
        ConfigError: all that is wrong with them, a line each.
    """
    where, program = "--chain.lm-opts", "chain-est-phone-lm"
    fields: dict[str, Any] = {}
    complaints: list[str] = []
    for word in words.split():
        name, _, value = word.removeprefix("--").replace("_", "-").partition("=")
        if not word.startswith("--"):
            complaints.append(f"{where}: {word!r} is no option of {program}: they are --name=value")
        elif name in _PHONE_LM:
            fields[name.replace("-", "_")] = _collected(_PHONE_LM[name], value, f"{where}: --{name}", complaints)
        else:
            complaints.append(f"{where}: {program} has no option --{name}")
    if complaints:
        raise ConfigError("\n".join(complaints))
    options = PhoneLmOptions(**fields)
    if options.no_prune_ngram_order > options.ngram_order:
        raise ConfigError(
            f"{where}: --no-prune-ngram-order={options.no_prune_ngram_order} is above "
            f"--ngram-order={options.ngram_order}"
        )
    return options


def _collected(kind: Callable[[str], Any], value: str, where: str, complaints: list[str]) -> Any:
    """A value inside a string of options; a malformed one goes to `complaints`, as argparse would say it."""
    try:
        return kind(value)
    except argparse.ArgumentTypeError as error:
        complaints.append(f"{where}: {error}")
        return None
