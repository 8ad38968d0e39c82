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
from collections.abc import Sequence
from pathlib import Path

import torch

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner import progress
from kaldi_mpi.learner.options import TrainOptions, kaldi_names, make_parser, option_names, read
from kaldi_mpi.learner.recipe_options import DNN, RAW_DNN, RAW_RNN, RNN
from kaldi_mpi.options import Words
from kaldi_mpi.programs.link import steps_folder

# How the learners are started: options that they themselves do not have.
_LAUNCH = {
    "num-learners": "learners, a process each (default: the GPUs that the job has; without any "
    "--trainer.optimization.num-jobs-final, but no more than there are cores)",
    "mpiexec": "the mpiexec to use (default: the Python environment's own, else the one on PATH)",
    "mpiexec-opts": "more options for it, as in '--hostfile hosts'",
}
_LOCAL = ("run.pl", "run.py")  # launchers of jobs that run here
_REASON_LINES = 5


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


def general_main(arguments: Sequence[str]) -> int:
    """``steps_mpi/train.sh``."""
    return start("train.sh", None, arguments)


def start(name: str, program: str | None, arguments: Sequence[str]) -> int:
    """Run a training, and show its progress.

    Args:
        name: the program's, for its words to the user.
        program: that of Kaldi's whose options there are; None: train_rnn.py's and train_dnn.py's.

    Returns:
        0, or 1 where the training failed: the reason is then on standard error.

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
    command, complaint = job_command(dict(words.pairs).get("cmd", "").strip(), program)
    complaints += [complaint] if complaint else []
    if options is not None and program is not None:
        complaints += _missing(options)
    if complaints or options is None:
        raise ConfigError("\n".join(complaints))

    learners = int(asked) if asked else default_learners(options, command)
    folder = Path(options.dir)
    (folder / "log").mkdir(parents=True, exist_ok=True)
    log = folder / "log" / "train.log"
    python = [sys.executable, "-m", "kaldi_mpi"]
    processes = learners + (1 if options.settings.dedicated_server else 0)
    how = [f"--{option}={launch[option]}" for option in ("mpiexec", "mpiexec-opts") if launch.get(option)]
    job = [
        *command, "--num-threads", str(learners), *_gpu_request(options, command, learners), str(log),
        *(_for_shell(word) for word in [*python, "launch", "--num-learners", str(processes), *how]),
        "--", *(_for_shell(word) for word in [*python, "train", *passed]),
    ]  # fmt: skip
    status = progress.main([str(folder / "progress.json"), "--", *job])
    if status != 0:
        print(f"{name}: training failed; the reason, from {log}:", file=sys.stderr)
        print("\n".join(reason(log)), file=sys.stderr)
        return 1
    for line in _final_lines(log):
        print(line)
    print(f"{name}: trained {folder / ('final.raw' if options.raw else 'final.mdl')} with {learners} learner(s)")
    return 0


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
    """Quoted where bash would take it for more than a word.

    run.pl and its like put quotes around what has a space, and hand on everything else as it is.
    """
    return word if re.search(r"\s", word) else shlex.quote(word)


def reason(log: Path) -> list[str]:
    """The last lines of a log that say why a training failed."""
    lines = _lines(log)
    telling = [line for line in lines if re.match("(ERROR|WARNING) ", line) or "Error" in line]
    return (telling or lines or ["(there is no log: the job was not started)"])[-_REASON_LINES:]


def _final_lines(log: Path) -> list[str]:
    found = (re.search("iteration final: Overall.*", line) for line in _lines(log))
    return [match[0] for match in found if match][:2]


def _lines(log: Path) -> list[str]:
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _explain(verb: str, program: str | None) -> None:
    """Print all options, and end."""
    parser = make_parser(verb, program)
    group = parser.add_argument_group("options of how learners are started")
    for name, help_ in _LAUNCH.items():
        group.add_argument(f"--{name}", help=help_, metavar="X")
    parser.parse_args(["--help"])
