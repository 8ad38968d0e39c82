"""The shell's base: option parsing, the local launcher, and the recipe's first two stages."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.features import read_features
from tests.paths import REPO, kaldi_root
from tests.speech import digit_strings, tone_dir

PARSE_OPTIONS, RUN = REPO / "steps_mpi" / "parse_options.sh", REPO / "steps_mpi" / "run.py"

SCRIPT = """
cmd=run.pl; nj=4; flag=true; empty=; num_epochs=1
help_message="Usage: script\\n  --nj N"
set -eu
. {parse_options}
echo "nj=$nj flag=$flag empty=$empty cmd=$cmd epochs=$num_epochs rest=$#:$*"
"""
DEFAULTS = "nj=4 flag=true empty= cmd=run.pl epochs=1 rest="


def run_script(folder: Path, parse_options: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    (folder / "script.sh").write_text(SCRIPT.format(parse_options=parse_options))
    (folder / "c.conf").write_text("nj=9\nflag=false\n")
    return subprocess.run(["bash", "script.sh", *arguments], cwd=folder, capture_output=True, text=True, check=False)


GOOD = [
    ([], DEFAULTS + "0:"),
    (["--nj", "3", "a", "--nj", "5"], DEFAULTS.replace("nj=4", "nj=3") + "3:a --nj 5"),
    (["--num-epochs", "8"], DEFAULTS.replace("epochs=1", "epochs=8") + "0:"),
    (["--cmd", "queue.pl --mem 2G"], DEFAULTS.replace("run.pl", "queue.pl --mem 2G") + "0:"),
    (["--empty", "a 'b", "x"], DEFAULTS.replace("empty=", "empty=a 'b") + "1:x"),
    (["--config", "c.conf"], DEFAULTS.replace("nj=4 flag=true", "nj=9 flag=false") + "0:"),
    (["--nj", "2", "--config", "c.conf"], DEFAULTS.replace("nj=4 flag=true", "nj=2 flag=false") + "0:"),
]
BAD = [
    (["--no-such", "3"], "script.sh: invalid option --no-such"),
    (["--nj=3"], "script.sh: options have the form --name value, got '--nj=3'"),
    (["--flag", "maybe"], "script.sh: expected true or false: --flag maybe"),
    (["--nj"], "script.sh: option --nj needs a value"),
    (["--cmd", ""], "script.sh: empty argument to the --cmd option"),
    (["--config", "none.conf"], "script.sh: cannot read the configuration file 'none.conf'"),
]


@pytest.mark.parametrize(("arguments", "expected"), GOOD)
def test_options_are_set(tmp_path: Path, arguments: list[str], expected: str) -> None:
    done = run_script(tmp_path, PARSE_OPTIONS, arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_options_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run_script(tmp_path, PARSE_OPTIONS, arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message + "\n")


def test_help(tmp_path: Path) -> None:
    done = run_script(tmp_path, PARSE_OPTIONS, ["--help"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "Usage: script\n  --nj N\n")


@pytest.mark.kaldi
def test_kaldis_option_parser_agrees(tmp_path: Path) -> None:
    theirs = kaldi_root() / "egs/wsj/s5/utils/parse_options.sh"
    for arguments, expected in GOOD:
        done = run_script(tmp_path, theirs, arguments)
        assert (done.returncode, done.stdout) == (0, expected + "\n")
    for arguments, _ in BAD:
        if arguments != ["--nj"]:  # Kaldi's loops for ever there under some shells' settings
            assert run_script(tmp_path, theirs, arguments).returncode == 1


def launch(folder: Path, *arguments: str, program: Path = RUN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=30
    )


def test_jobs_run_with_their_number_and_log_in_kaldis_form(tmp_path: Path) -> None:
    done = launch(
        tmp_path,
        *["--mem", "4G", "--gpu", "0", "JOB=2:4", "--num-threads", "2", "log/x.JOB.log"],
        *["echo", "a  b", "JOB", "|", "tr", "a-z", "A-Z", ">", "out.JOB", ";", "echo", "'done'", "$((JOB+1))"],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [(tmp_path / f"out.{job}").read_text() for job in (2, 3, 4)] == [f"A  B {job}\n" for job in (2, 3, 4)]
    log = (tmp_path / "log" / "x.3.log").read_text()
    assert re.fullmatch(
        r'# echo "a  b" 3 \| tr a-z A-Z > out\.3 ; echo \'done\' \$\(\(3\+1\)\)\n'
        r"# Started at [^\n]+\n#\ndone 4\n# Accounting: time=\d+ threads=1\n"
        r"# Ended \(code 0\) at [^\n]+, elapsed time \d+ seconds\n",
        log,
    )


def test_the_failed_jobs_logs_are_named_and_the_others_still_run(tmp_path: Path) -> None:
    done = launch(tmp_path, "JOB=1:4", "log/y.JOB.log", "touch", "ran.JOB", ";", "exit", "$((JOB%2))")
    assert done.returncode == 1 and len(list(tmp_path.glob("ran.*"))) == 4
    assert done.stderr == "run.py: 2 / 4 failed, log is in log/y.1.log, log/y.3.log\n"
    assert "# Ended (code 1) at" in (tmp_path / "log" / "y.1.log").read_text()
    done = launch(tmp_path, "z.log", "no-such-program")
    assert (done.returncode, done.stderr) == (1, "run.py: job failed, log is in z.log\n")
    assert "no-such-program: command not found" in (tmp_path / "z.log").read_text()


def test_max_jobs_run_limits_how_many_run_at_once(tmp_path: Path) -> None:
    check = ["mkdir", "busy", "&&", "sleep", "0.05", "&&", "rmdir", "busy"]
    assert launch(tmp_path, "--max-jobs-run", "1", "JOB=1:4", "log/a.JOB.log", *check).returncode == 0
    both = ["touch", "here.JOB;", "for", "i", "in", "{1..200};", "do", "[", "-e", "here.$((3-JOB))", "]", "&&"]
    both += ["exit", "0;", "sleep", "0.02;", "done;", "exit", "1"]
    assert launch(tmp_path, "--max-jobs-run", "2", "JOB=1:2", "log/b.JOB.log", *both).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["JOB=1:4", "x.log", "true"], "several jobs cannot share the log x.log: it must contain JOB"),
        (["JOB=3:2", "x.JOB.log", "true"], "invalid job range JOB=3:2"),
        (["JOB=0:2", "x.JOB.log", "true"], "invalid job range JOB=0:2"),
        (["--max-jobs-run", "0", "x.log", "true"], "invalid option --max-jobs-run 0"),
        (["x.log"], "usage: run.py"),
    ],
)
def test_wrong_use_of_the_launcher(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = launch(tmp_path, *arguments)
    assert done.returncode == 1 and done.stderr.startswith(f"run.py: {message}")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_jobs(tmp_path: Path, how: signal.Signals) -> None:
    command = [str(RUN), "JOB=1:2", "log.JOB", "echo", "$BASHPID", ">", "pid.JOB;", "sleep", "60", "|", "cat"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while len([p for p in tmp_path.glob("pid.*") if p.read_text()]) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        assert process.wait(timeout=20) == 1
    for job in (1, 2):
        pid = int((tmp_path / f"pid.{job}").read_text())
        while running(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not running(pid)
        assert "# Ended (code 0; signal 15)" in (tmp_path / f"log.{job}").read_text()


def running(pid: int) -> bool:
    """Whether the process lives; one that ended but that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.kaldi
def test_same_log_as_kaldis_launcher(tmp_path: Path) -> None:
    theirs = kaldi_root() / "egs/wsj/s5/utils/parallel/run.pl"
    arguments = [
        "--mem",
        "1G",
        "JOB=1:2",
        "log.JOB",
        "echo",
        "it's  here",
        'a "b" c',
        "JOB",
        "\\>",
        ";",
        "exit",
        "$((JOB-1))",
    ]
    logs = []
    for program in (RUN, theirs):
        folder = tmp_path / program.stem / program.suffix[1:]
        folder.mkdir(parents=True)
        done = launch(folder, *arguments, program=program)
        assert done.returncode == 1 and "1 / 2 failed" in done.stderr
        text = "".join((folder / f"log.{job}").read_text() for job in (1, 2))
        logs.append(re.sub(r" +\n", "\n", re.sub(r" at [^,\n]+", " at DATE", text)))
    assert logs[0] == logs[1]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A copy of the digits recipe without data, in a tree like the repository's."""
    s5 = tmp_path / "tree" / "egs" / "digits" / "s5"
    ignore = shutil.ignore_patterns("data", "exp", "mfcc", "steps", "utils")
    shutil.copytree(REPO / "egs" / "digits" / "s5", s5, ignore=ignore)
    for name in ("kaldi_mpi", "steps_mpi"):
        (tmp_path / "tree" / name).symlink_to(REPO / name)
    return s5


def run_recipe(recipe: Path, *arguments: str, kaldi: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "KALDI_ROOT"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{environment['PATH']}"
    environment["VIRTUAL_ENV"] = sys.prefix
    if kaldi:
        environment["KALDI_ROOT"] = kaldi
    return subprocess.run(
        ["./run.sh", "--stop-stage", "2", *arguments],
        cwd=recipe, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_path_sh_runs_under_plain_sh_and_twice(recipe: Path) -> None:
    # Kaldi's Perl scripts source it with the system's sh.
    environment = {name: value for name, value in os.environ.items() if name != "KALDI_ROOT"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{environment['PATH']}"
    script = ". ./path.sh && . ./path.sh && command -v run.py && echo $PATH"
    done = subprocess.run(
        ["sh", "-eu", "-c", script], cwd=recipe, env=environment, capture_output=True, text=True, check=False
    )
    program, path = done.stdout.splitlines()
    steps = str(recipe.parents[2] / "steps_mpi")
    assert done.returncode == 0 and program == f"{steps}/run.py" and path.split(":").count(steps) == 1
    done = run_recipe(recipe, kaldi="/nowhere/kaldi")
    assert done.returncode == 1 and "KALDI_ROOT=/nowhere/kaldi is no Kaldi" in done.stderr


def test_path_sh_says_where_kaldi_mpi_comes_from(recipe: Path) -> None:
    script = ". ./path.sh || exit 9"
    done = subprocess.run(
        ["bash", "-c", script], cwd=recipe, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 9 and done.stderr.startswith("path.sh: no kaldi-mpi on PATH: run make in ")
    assert done.stderr.count("\n") == 1


def check_features(recipe: Path) -> None:
    for part, count in (("train", 12), ("test", 6)):
        for kind, dim in (("", 13), ("_hires", 40)):
            data = DataDir(recipe / "data" / f"{part}{kind}")
            data.validate(feats=True)
            for key, feats in read_features(data.path / "feats.scp"):
                assert feats.shape == (data.utt2num_frames[key], dim) and np.isfinite(feats).all()
            assert len(data.utterances) == count and len(data.cmvn_scp) == 3
            archives = {place.rsplit(":", 1)[0] for place in data.feats_scp.values()}
            assert archives == {f"{recipe}/mfcc/raw_mfcc_{part}{kind}.{job}.ark" for job in (1, 2)}


def test_recipe_makes_features_of_a_users_data(recipe: Path, tmp_path: Path) -> None:
    strings = digit_strings(tmp_path / "strings")
    done = run_recipe(recipe, "--train", str(strings / "train"), "--test", str(strings / "test"))
    assert done.returncode == 0, done.stdout + done.stderr
    check_features(recipe)


def test_recipe_names_what_is_wrong_with_a_users_data(recipe: Path, tmp_path: Path) -> None:
    data = tone_dir(tmp_path / "user")
    done = run_recipe(recipe, "--train", str(data), "--test", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path}: not a Kaldi data directory: it has no wav.scp and no feats.scp" in done.stderr
    done = run_recipe(recipe, "--train", str(data))
    assert done.returncode == 1 and "--train and --test belong together" in done.stderr
    scp = data / "wav.scp"
    scp.write_text(scp.read_text().replace(f"spk1-02 {tmp_path}", f"spk1-02 cat /nowhere{tmp_path}").replace(
        "spk1-02.wav", "spk1-02.wav |"))  # fmt: skip
    done = run_recipe(recipe, "--train", str(data), "--test", str(data))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "/wav.scp, key spk1-02: the command failed with status 1: cat /nowhere" in done.stderr


@pytest.mark.kaldi
def test_recipe_with_kaldi_writes_the_same_files(recipe: Path, tmp_path: Path) -> None:
    strings = digit_strings(tmp_path / "strings")
    arguments = ["--train", str(strings / "train"), "--test", str(strings / "test")]
    done = run_recipe(recipe, *arguments, kaldi=str(kaldi_root()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "steps/make_mfcc.sh" in done.stdout
    check_features(recipe)
    kaldi = {part: dict(read_features(recipe / f"data/{part}/feats.scp")) for part in ("train", "train_hires")}
    files = {str(p.relative_to(recipe)) for p in (recipe / "data").rglob("*") if p.is_file()}
    assert run_recipe(recipe, *arguments).returncode == 0
    check_features(recipe)
    assert {str(p.relative_to(recipe)) for p in (recipe / "data").rglob("*") if p.is_file()} == files
    for part, theirs in kaldi.items():
        for key, feats in read_features(recipe / f"data/{part}/feats.scp"):
            step = np.ptp(theirs[key], axis=0).max() / 63  # of the compression, where values are sparse
            assert np.abs(feats - theirs[key]).max() < step and np.abs(feats - theirs[key]).mean() < 0.02
