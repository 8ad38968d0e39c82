"""The programs that a recipe calls: what they run, what they say, and one whole training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.options import read
from kaldi_mpi.programs import start
from tests.paths import REPO, kaldi_root
from tests.toy import environment, make_toy

PROGRAMS = REPO / "steps_mpi" / "nnet3"
RUN = REPO / "steps_mpi" / "run.py"


def call(
    cwd: Path, program: str, *words: str, path: str = str(Path(sys.executable).parent)
) -> subprocess.CompletedProcess[str]:
    """A program as a recipe calls it, with the tests' Python first on PATH."""
    return subprocess.run(
        [str(PROGRAMS / program), *words],
        cwd=cwd, env=environment() | {"PATH": f"{path}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def fake(tmp_path: Path, program: str, *words: str) -> list[str]:
    """What would run: $cmd only writes its arguments down."""
    (tmp_path / "exp" / "configs").mkdir(parents=True, exist_ok=True)
    cmd = tmp_path / "queue.pl"
    cmd.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/said\n')
    cmd.chmod(0o755)
    done = call(tmp_path, program, "--feat-dir=data", "--dir", "exp", *words)
    assert done.returncode == 1 and "there is no new exp/final.mdl" in done.stderr, done.stderr
    return (tmp_path / "said").read_text().splitlines()


def test_the_job_that_is_run(tmp_path: Path) -> None:
    words = fake(
        tmp_path, "train_rnn.py", "--cmd", f"{tmp_path}/queue.pl --mem '4 G'", "--num-learners=3", "--ali-dir=ali",
        "--mpiexec-opts", "--hostfile hosts", "--on-hang=end", "--restarts", "2", "--st", "-10",
        "--trainer.dropout-schedule", "a*=0,0.1,0",
        "--feat.cmvn-opts=--norm-means=false --norm-vars=false", "--use-gpu", "wait", "--lang=",
        "--strategy=easgd", "--dedicated-server=true",
    )  # fmt: skip
    assert words[:7] == ["--mem", "4 G", "--num-threads", "3", "--gpu", "3", "exp/log/train.log"]
    launch = words.index("launch")
    assert words[launch : launch + 4] == ["launch", "--num-learners", "4", "--mpiexec-opts=--hostfile hosts"]
    assert words[launch + 4 : launch + 6] == ["--on-hang=end", "--restarts=2"]
    # run.pl hands words without spaces to bash as they are: a pattern must not become file names.
    assert words[words.index("train") :] == [
        "train", "--program=rnn", "--feat-dir=data", "--dir=exp",
        f"$'--cmd={tmp_path}/queue.pl\\x20--mem\\x20\\x274\\x20G\\x27'",
        "--ali-dir=ali", "--stage=-10", "'--trainer.dropout-schedule=a*=0,0.1,0'",
        "--feat.cmvn-opts=--norm-means=false --norm-vars=false", "--use-gpu=wait", "--lang=", "--strategy=easgd",
        "--dedicated-server=true",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "launcher", [str(RUN), pytest.param("egs/wsj/s5/utils/parallel/run.pl", marks=pytest.mark.kaldi)]
)
def test_words_reach_the_job_as_they_are(tmp_path: Path, launcher: str) -> None:
    """Nothing in an option is run by the shell that runs the job, with a space beside it or without."""
    words = [
        "--dir=exp/$(touch hit)", "exp/`touch hit`", "a b $(touch hit)", "a;touch hit", "a&b", "*", "~", "it's", 'q"q',
        "back\\slash", "$HOME", "a b\"c $HOME", "tab\there", "za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105", "!x",
        "#", "(", "--egs.opts=--frames 8 'x y'",
    ]  # fmt: skip
    show = tmp_path / "show.py"
    show.write_text("import json, sys\njson.dump(sys.argv[1:], open('said', 'w'))\n")
    program = launcher if launcher == str(RUN) else str(kaldi_root() / launcher)
    job = [program, "log", sys.executable, str(show), *(start._for_shell(word) for word in words)]
    done = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "said").read_text()) == words
    assert not (tmp_path / "hit").exists()


def test_how_many_learners(monkeypatch: pytest.MonkeyPatch) -> None:
    def number(cmd: str, *words: str) -> int:
        options, _ = read(["--program=dnn", "--feat-dir=f", "--ali-dir=a", "--dir=d", *words])
        return start.default_learners(options, cmd.split())

    jobs = "--trainer.optimization.num-jobs-final=15"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert number("run.pl") == 8 and number("run.pl", jobs) == 12 and number("queue.pl --gpu 4", jobs) == 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert number("utils/run.pl", jobs) == 2 and number("run.pl --gpu 1", jobs) == 1
    assert number("queue.pl --mem 4G", jobs) == 12, "this machine's GPUs are not the job's"
    assert number("run.pl", jobs, "--use-gpu=no") == 12


@pytest.mark.parametrize("program", ["train_rnn.py", "train_dnn.py", "train_raw_rnn.py", "train_raw_dnn.py"])
def test_what_is_wrong_is_told_before_anything_starts(tmp_path: Path, program: str) -> None:
    done = call(
        tmp_path, program, "--num-learners=none", "--cmd=no-such.pl --mem 1G", "--dir=exp", "--trainer.srand=x",
        "--on-hang=never", "--restarts=-1",
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and all(line.startswith("ERROR (kaldi-mpi-train-") for line in lines), lines
    for says in (
        "argument --trainer.srand: expected a number, got 'x'", "--num-learners none: expected a number above 0",
        "--on-hang never: expected wait or end", "--restarts -1: expected a number from 0",
        "--cmd no-such.pl --mem 1G: no such program: no-such.pl", "--feat-dir is needed",
    ):  # fmt: skip
        assert sum(says in line for line in lines) == 1, (says, lines)
    assert list(tmp_path.iterdir()) == []


def test_the_directory_is_the_recipes(tmp_path: Path) -> None:
    words = ["--feat-dir=f", "--ali-dir=a", f"--dir={tmp_path}/exp", f"--cmd={RUN}"]
    with pytest.raises(ConfigError, match="exp: no such directory; the recipe makes it"):
        start.rnn_main(words)
    (tmp_path / "exp").mkdir()
    with pytest.raises(ConfigError, match=r"exp: it has no configs, with the network, and --trainer\.input-model"):
        start.rnn_main(words)
    with pytest.raises(ConfigError, match=r"--trainer\.input-model none\.raw: no such file"):
        start.rnn_main([*words, "--trainer.input-model=none.raw"])
    with pytest.raises(ConfigError, match=r"--cmd run\.pl 'x: No closing quotation"):
        start.rnn_main([*words, "--cmd=run.pl 'x"])


def test_a_python_without_kaldi_mpi(tmp_path: Path) -> None:
    other = tmp_path / "python3"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without its site-packages
    other.chmod(0o755)
    done = call(tmp_path, "train_dnn.py", path=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_dnn.py: ") and "cannot import kaldi_mpi" in done.stderr


def test_a_training_and_the_reason_of_a_failure(tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    folder = toy.experiment("exp")
    words = [word for word in toy.options(folder) if "samples-per-iter" not in word]
    more = [
        "--cmd", f"{RUN} --mem 1G", "--num-learners=1", "--trainer.num-epochs", "1", "--stage=-10", "--use-gpu=no",
        "--trainer.optimization.num-jobs-initial=2", "--egs.opts", "--frames-overlap-per-eg 0 --num-utts-subset 5",
    ]  # fmt: skip
    done = call(tmp_path, "train_rnn.py", *words, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"train_rnn.py: trained {folder}/final.mdl with 1 learner(s)"
    assert done.stdout.startswith("iteration final: Overall ") and (folder / "final.mdl").exists()
    log = (folder / "log" / "train.log").read_text()
    assert log.count("--egs.opts --frames-overlap-per-eg 0 is ignored: chunks do not overlap\n") == 1
    assert log.count("jobs from 2 to 8: ") == 1

    stopped = call(
        tmp_path,
        "train_rnn.py",
        *words,
        *more,
        "--trainer.num-epochs=40",
        "--trainer.samples-per-iter=60",
        "--exit-stage=1",
    )
    assert stopped.returncode == 0 and stopped.stdout.splitlines()[-1] == (
        "train_rnn.py: stopped before iteration 1 (--exit-stage); the same command goes on from there"
    )

    shutil.rmtree(toy.ali_dir)
    done = call(tmp_path, "train_rnn.py", *words, *more)
    assert (
        done.returncode == 1
        and f"train_rnn.py: training failed; the reason, from {folder}/log/train.log:" in done.stderr
    )
    assert done.stderr.splitlines()[-1].endswith("no such directory (given by --ali-dir)")
