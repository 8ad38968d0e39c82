"""The training programs that a recipe calls: check the options, run the learners as one job, say how it went.

    train_rnn.py -> this -> $cmd -> kaldi-mpi launch -> mpiexec -> N x kaldi-mpi train

The programs in steps_mpi/nnet3 have Kaldi's names and options; steps_mpi/train.sh takes those of train_rnn.py and
train_dnn.py together. The options are the learners', but for those that say how they are started.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.hangs import ON_HANG
from kaldi_mpi.learner.options import TrainOptions, kaldi_names, make_parser, option_names, read
from kaldi_mpi.learner.recipe_options import CHAIN, DNN, RAW_DNN, RAW_RNN, RNN
from kaldi_mpi.learner.stages import AFTER_EXAMPLES
from kaldi_mpi.options import Words
from kaldi_mpi.processes import STOPPED
from kaldi_mpi.programs.chain_egs import make_examples, missing_for_examples, remove_examples
from kaldi_mpi.programs.job import lines_of, run_job
from kaldi_mpi.programs.link import steps_folder

# How the learners are started: options that they themselves do not have.
_LAUNCH = {
    "num-learners": "learners, a process each (default: the GPUs that the job has; without any "
    "--trainer.optimization.num-jobs-final, but no more than there are cores)",
    "mpiexec": "the mpiexec to use (default: the Python environment's own, else the one on PATH)",
    "mpiexec-opts": "more options for it, as in '--hostfile hosts'",
    "on-hang": "where all learners stand still: wait, which only tells (default), or end",
    "restarts": "how often to start again from the last checkpoint after a learner's death or such an end (default 0)",
}
_LOCAL = ("run.pl", "run.py")  # launchers of jobs that run here


def rnn_main(arguments: Sequence[str]) -> int:
    """``steps_mpi/nnet3/train_rnn.py``."""
    return start("train_rnn.py", RNN, arguments)


def dnn_main(arguments: Sequence[str]) -> int:
    """``steps_mpi/nnet3/train_dnn.py``."""
    return start("train_dnn.py", DNN, arguments)


def raw_rnn_main(arguments: Sequence[str]) -> int:
    """``steps_mpi/nnet3/train_raw_rnn.py``."""
    return start("train_raw_rnn.py", RAW_RNN, arguments)


def raw_dnn_main(arguments: Sequence[str]) -> int:
    """``steps_mpi/nnet3/train_raw_dnn.py``."""
    return start("train_raw_dnn.py", RAW_DNN, arguments)


def chain_main(arguments: Sequence[str]) -> int:
    """``steps_mpi/nnet3/chain/train.py``."""
    return start("chain/train.py", CHAIN, arguments)


def general_main(arguments: Sequence[str]) -> int:
    """``steps_mpi/train.sh``."""
    return start("train.sh", None, arguments)


def start(name: str, program: str | None, arguments: Sequence[str]) -> int:
    """Run a training, and show its progress.

    Args:
        name: the program's, for its words to the user.
        program: that of Kaldi's whose options there are; None: train_rnn.py's and train_dnn.py's.

    Returns:
        0; `STOPPED` where it was asked to stop and can go on; else it failed: the reason is on standard error.

    Raises:
        ConfigError: all that is wrong with the options, a line each; nothing has been started.
    """
    verb = f"kaldi-mpi train-{program}" if program else "kaldi-mpi start"
    if "--help" in arguments or "-h" in arguments:
        _explain(verb, program)
    words = Words(arguments, (*option_names(program), *_LAUNCH), kaldi_names(program))
    launch = {option: value for option, value in words.pairs if option in _LAUNCH}
    passed = [f"--{option}={value}" for option, value in words.pairs if option not in _LAUNCH]
    passed = [f"--program={program}", *passed] if program else passed
    complaints = [f"{verb}: {complaint}" for complaint in words.complaints]
    options = None
    try:
        options, _ = read(passed, verb)
    except ConfigError as error:
        complaints += str(error).splitlines()
    asked = launch.get("num-learners", "")
    if asked and (not re.fullmatch("[0-9]+", asked) or int(asked) == 0):
        complaints.append(f"--num-learners {asked}: expected a number above 0")
    if launch.get("on-hang", ON_HANG[0]) not in ON_HANG:
        complaints.append(f"--on-hang {launch['on-hang']}: expected {' or '.join(ON_HANG)}")
    if not re.fullmatch("[0-9]+", launch.get("restarts", "0")):
        complaints.append(f"--restarts {launch['restarts']}: expected a number from 0")
    command, complaint = job_command(dict(words.pairs).get("cmd", "").strip(), program)
    complaints += [complaint] if complaint else []
    if options is not None and program is not None:
        complaints += _missing(options)
    if options is not None and program == CHAIN:
        complaints += missing_for_examples(options)
    if complaints or options is None:
        raise ConfigError("\n".join(complaints))

    learners = int(asked) if asked else default_learners(options, command)
    folder = Path(options.dir)
    (folder / "log").mkdir(parents=True, exist_ok=True)
    egs = None
    if program == CHAIN and options.data.egs_dir is None:
        egs = make_examples(options, dict(words.pairs))
        passed = [word for word in passed if not word.startswith(("--egs.opts=", "--feat.cmvn-opts="))]
        passed += [f"--egs.dir={egs}", f"--stage={max(options.stage, AFTER_EXAMPLES)}"]
    log = folder / "log" / "train.log"
    python = [sys.executable, "-m", "kaldi_mpi"]
    processes = learners + (1 if options.settings.dedicated_server else 0)
    how = [f"--{option}={launch[option]}" for option in _LAUNCH if option != "num-learners" and launch.get(option)]

    def job(starter: Path) -> list[str]:
        return [
            *command, "--num-threads", str(learners), *_gpu_request(options, command, learners), str(log),
            *(_for_shell(word) for word in [*python, "launch", "--num-learners", str(processes), *how]),
            _for_shell(f"--starter={starter}"), "--", *(_for_shell(word) for word in [*python, "train", *passed]),
        ]  # fmt: skip

    began = time.time()
    status, said = run_job(name, folder, job, log)
    if status == STOPPED:
        print("\n".join(f"{name}: {line}" for line in said), file=sys.stderr)
        return status
    if status != 0:
        print(f"{name}: training failed; the reason, from {log}:", *said, sep="\n", file=sys.stderr)
        return status
    for line in _lines_with("iteration final: Overall", log):
        print(line)
    final = folder / ("final.raw" if options.raw else "final.mdl")
    if final.exists() and final.stat().st_mtime >= int(began):
        if egs is not None and options.cleanup and options.remove_egs:
            remove_examples(egs)
        print(f"{name}: trained {final} with {learners} learner(s)")
        return 0
    left = _lines_with("stopped before iteration", log)
    if options.exit_stage is not None and left:
        print(f"{name}: {left[-1]}")
        return 0
    print(f"{name}: the job says that it has succeeded, but there is no new {final}; its log: {log}", file=sys.stderr)
    return 1


def job_command(cmd: str, program: str | None) -> tuple[list[str], str]:
    """What runs the job, with its own options, and what is wrong with it, or "".

    Kaldi's programs have queue.pl as their default, train.sh has run.pl; where PATH has it not, what stands beside
    train.sh is taken.
    """
    if not cmd:
        usual = "run.pl" if program is None else "queue.pl"
        try:
            return [usual if shutil.which(usual) else str(steps_folder() / "run.py")], ""
        except ConfigError as error:
            return [], f"--cmd is not given, and {usual} is not on PATH: {error}"
    try:
        command = shlex.split(cmd)
    except ValueError as error:
        return [], f"--cmd {cmd}: {error}"
    if shutil.which(command[0]) is None:
        return [], f"--cmd {cmd}: no such program: {command[0]}"
    return command, ""


def default_learners(options: TrainOptions, command: Sequence[str]) -> int:
    """The GPUs that the job has; where it has none, ``num-jobs-final``, but no more than there are cores."""
    gpus = 0
    if options.use_gpu not in ("no", "false"):
        asked = _gpus_asked(command)
        if asked is not None:
            gpus = asked
        elif Path(command[0]).name in _LOCAL:
            gpus = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return gpus or min(options.num_jobs_final, cores)


def _gpus_asked(command: Sequence[str]) -> int | None:
    """The number in the launcher's ``--gpu N``."""
    for option, value in itertools.pairwise(command):
        if option == "--gpu" and value.isdecimal():
            return int(value)
    return None


def _gpu_request(options: TrainOptions, command: Sequence[str], learners: int) -> list[str]:
    """``--gpu N`` for a queue, as Kaldi's programs ask for one a job; not where --cmd has it already."""
    if options.use_gpu not in ("yes", "true", "wait") or _gpus_asked(command) is not None:
        return []
    return ["--gpu", str(learners)]


def _missing(options: TrainOptions) -> list[str]:
    """What Kaldi's programs look for first: the directory, and its configs or an input model."""
    folder, model = Path(options.dir), options.input_model
    if not folder.is_dir():
        return [f"--dir {folder}: no such directory; the recipe makes it, with the network in its configs"]
    if model is not None and not Path(model).is_file():
        return [f"--trainer.input-model {model}: no such file"]
    if model is None and not (folder / "configs").is_dir():
        return [f"--dir {folder}: it has no configs, with the network, and --trainer.input-model is not given"]
    return []


def _for_shell(word: str) -> str:
    """As bash would write it, without white space where there is anything that bash would not take as it is.

    run.pl and its like hand on as it is what has no white space, and put double quotes around the rest, within which
    bash would still run a $(command).
    """
    if re.fullmatch(r"[\w@%+=:,./ -]+", word):
        return word
    if not re.search(r"[\s'\\]", word):
        return f"'{word}'"
    return "$'" + re.sub(r"[\s'\\]", lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode()), word) + "'"


def _lines_with(words: str, log: Path) -> list[str]:
    """The first two lines of the log with these words, from there on."""
    return [line[line.index(words) :] for line in lines_of(log) if words in line][:2]


def _explain(verb: str, program: str | None) -> None:
    """Print all options, and end."""
    parser = make_parser(verb, program)
    group = parser.add_argument_group("options of how learners are started")
    for name, help_ in _LAUNCH.items():
        group.add_argument(f"--{name}", help=help_, metavar="X")
    parser.parse_args(["--help"])
