"""Options inside options: what ``--egs.opts`` hands to get_egs.sh, and ``--trainer.add-option`` to nnet3-train.

Neither program runs here. Each of their options has an effect or a line in the log that says why it has none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.options import at_least

_NO_EGS = "no examples are made, features are read as they are needed"
_GIVEN_OTHERWISE = "an option of the training itself says it"
_ALL_HELD_OUT = "validations are of all held-out utterances"
_NO_OVERLAP = "chunks do not overlap"
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
    **dict.fromkeys(("frames-overlap-per-eg", "constrained"), _NO_OVERLAP),
    "length-tolerance": "features and labels must be of the same length",
    **dict.fromkeys(("num-utts-subset-valid", "num-utts-subset-train"), "--num-utts-subset says how many are held out"),
}  # fmt: skip
# Those that would change the training: their harmless value needs no line, any other one gets a warning.
_EGS_HARMLESS = {"online-cmvn": "false", "frame-subsampling-factor": "1", "transform-dir": ""}
_EGS_CHANGES = {
    "online-cmvn": "online CMVN is not done, normalisation is by speaker",
    "frame-subsampling-factor": "every frame gets an output",
    "transform-dir": "features are not transformed",
}

# nnet3-train's options that act here: name -> (field, type)
_ACTING: dict[str, tuple[str, Callable[[str], Any]]] = {
    "momentum": ("momentum", at_least(0, float)),
    "max-param-change": ("max_param_change", at_least(0, float)),
    "backstitch-training-scale": ("backstitch_scale", at_least(0, float)),
    "backstitch-training-interval": ("backstitch_interval", at_least(1)),
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


def egs_options(words: str, egs_dir_given: bool, notes: Notes) -> int:
    """The held-out utterances that ``--egs.opts`` asks for; everything else in it goes to `notes`.

    Args:
        words: ``--a 1 --b 2``, as get_egs.sh takes them; _ and - are the same.

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
        elif name in _EGS_HARMLESS:
            if value != _EGS_HARMLESS[name] and not egs_dir_given:
                notes.warnings.append(f"{where} --{name} {value} does nothing: {_EGS_CHANGES[name]}")
        elif name not in _EGS:
            complaints.append(f"{where}: get_egs.sh has no option --{name}")
        elif not egs_dir_given:
            notes.lines.append(f"{where} --{name} {value} is ignored: {_EGS[name]}")
    if complaints:
        raise ConfigError("\n".join(complaints))
    return subset


def train_options(options: Sequence[str], notes: Notes) -> Mapping[str, Any]:
    """Fields that ``--trainer.add-option`` sets, by name; options without an effect go to `notes`.

    Args:
        options: each ``--name=value``, or several of them with spaces between.

    Raises:
        ConfigError: an option that nnet3-train does not have, or a value that is none.
    """
    where, complaints = "--trainer.add-option", []
    fields: dict[str, Any] = {}
    for word in " ".join(options).split():
        name, _, value = word.removeprefix("--").replace("_", "-").partition("=")
        prefix = next((why for start, why in _TRAIN_PREFIXES.items() if name.startswith(start)), None)
        why = _TRAIN.get(name, prefix)
        if not word.startswith("--"):
            complaints.append(f"{where}: {word!r} is no option of nnet3-train: they are --name=value")
        elif name in _ACTING:
            field, kind = _ACTING[name]
            fields[field] = _collected(kind, value, f"{where}: --{name}", complaints)
        elif why is None:
            complaints.append(f"{where}: nnet3-train has no option --{name}")
        else:
            notes.lines.append(f"{where} {word} is ignored: {why}")
    if complaints:
        raise ConfigError("\n".join(complaints))
    return fields


def _collected(kind: Callable[[str], Any], value: str, where: str, complaints: list[str]) -> Any:
    """A value inside a string of options; a malformed one goes to `complaints`, as argparse would say it."""
    try:
        return kind(value)
    except argparse.ArgumentTypeError as error:
        complaints.append(f"{where}: {error}")
        return None
