"""Learners that cannot start, die, or cannot write: one clear line, a bad exit status, nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kaldi_mpi.processes import STOPPED
from tests.toy import Toy, environment, launch_command, make_toy, train


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"), num_utterances=24)


def start(toy: Toy, name: str, num_learners: int, *options: str) -> tuple[Path, subprocess.Popen[str]]:
    """Begin a training that would go on for a long time, and wait until it has begun to train."""
    folder = toy.experiment(name)
    process = subprocess.Popen(
        launch_command(num_learners, toy.options(folder, "--trainer.num-epochs=100000", *options)),
        env=environment(), cwd=folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (folder / "log" / "train.0.1.log").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    return folder, process


def pid_of(folder: Path, rank: int) -> int:
    (status,) = folder.glob(f".learners.*/rank.{rank}")
    return int(json.loads(status.read_text())["pid"])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("strategy", [("--strategy=allreduce",), ("--strategy=periodic", "--frames-per-average=400")])
def test_a_killed_learner_ends_the_run_and_is_named(toy: Toy, strategy: tuple[str, ...]) -> None:
    folder, process = start(toy, f"killed-{len(strategy)}", 3, *strategy)
    pids = [pid_of(folder, rank) for rank in range(3)]
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    assert f"learner rank 1 (process {pids[1]} on " in said and "was killed or crashed without a word" in said
    assert not any(is_running(pid) for pid in pids)
    assert not (folder / "final.mdl").exists() and not list(folder.glob(".learners.*"))


def test_a_killed_training_goes_on_from_its_checkpoint(toy: Toy) -> None:
    """Killed in mid-training and started again, it ends with the very bytes of a training left in peace."""
    options = ("--strategy=periodic", "--frames-per-average=300", "--trainer.num-epochs=12")
    undisturbed = toy.experiment("undisturbed")
    assert train(2, toy.options(undisturbed, *options)).returncode == 0
    folder = toy.experiment("disturbed")
    process = subprocess.Popen(
        launch_command(2, toy.options(folder, *options)), env=environment(), cwd=folder, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (folder / "checkpoint" / "current.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid_of(folder, 0), signal.SIGKILL)
    assert process.wait(30) != 0 and not (folder / "final.mdl").exists()
    again = train(2, toy.options(folder, *options))
    assert again.returncode == 0 and "going on at step" in again.stderr, again.stderr
    assert (folder / "final.mdl").read_bytes() == (undisturbed / "final.mdl").read_bytes()
    assert not (folder / "checkpoint").exists()


def test_terminating_the_launcher_ends_all_learners(toy: Toy) -> None:
    folder, process = start(toy, "terminated", 2)
    pids = [pid_of(folder, rank) for rank in range(2)]
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == STOPPED and (folder / "checkpoint" / "current.json").exists(), said
    assert "stopped: signal SIGTERM; the same command goes on from the checkpoint" in said
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_more_learners_than_utterances(toy: Toy, tmp_path: Path) -> None:
    few = make_toy(tmp_path / "few", num_utterances=4)
    result = train(4, few.options(few.experiment("too-many")))
    assert result.returncode == 1
    assert "4 learners, but only 3 utterances to train on in" in result.stderr
    assert "start at most 3 learners" in result.stderr


def test_a_learner_that_fails_is_named_with_its_reason(toy: Toy) -> None:
    """Rank 0 tells an error that all ranks find; the launcher repeats it with the rank."""
    folder = toy.experiment("misfit")
    config = folder / "configs" / "network.xconfig"
    config.write_text(config.read_text().replace("dim=5 ", "dim=7 "))
    result = train(3, toy.options(folder))
    assert result.returncode == 1
    wanted = f"learner rank 0 failed: {config}: the output has dim=7, but the tree has 5 pdf-ids"
    assert wanted in result.stderr
    assert not (folder / "final.mdl").exists()


def run_alone(toy: Toy, folder: Path, *options: str) -> None:
    from kaldi_mpi.learner.options import parse
    from kaldi_mpi.learner.run import train as train_session
    from kaldi_mpi.transport.world import SoloWorld

    train_session(parse(toy.options(folder, *options)), SoloWorld())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--feat-dir=/nowhere"], r"/nowhere: no such directory \(given by --feat-dir\)"),
        (["--ali-dir=/nowhere"], r"/nowhere: no such directory \(given by --ali-dir\)"),
        (["--xconfig=/nowhere"], r"/nowhere: no such file \(the network's xconfig\)"),
        (["--no-such-option=1"], "unrecognized arguments: --no-such-option=1"),
        (["--egs.chunk-width=0"], "argument --egs.chunk-width: expected widths above 0 as in '20' or '20,15', got '0'"),
        (["--trainer.num-epochs=some"], "argument --trainer.num-epochs: expected a number, got 'some'"),
        (["--trainer.optimization.momentum=1"], "must be below 1"),
        (["--binary=yes"], "argument --binary: expected true or false, got 'yes'"),
        (["--strategy=gossip"], "--strategy gossip: there is no strategy 'gossip'; there are allreduce, "),
        (["--feat.cmvn-opts=--norm-meens=true"], "--feat.cmvn-opts: '--norm-meens=true' is not one of"),
        (["--feat.cmvn-opts=--norm-means=maybe"], "--norm-means: expected true or false, got 'maybe'"),
        (["--egs.opts=--num-utts-subset few"], "--egs.opts: --num-utts-subset: expected a number, got 'few'"),
        (
            ["--trainer.dropout-schedule=0,2"],
            "--trainer.dropout-schedule: '0,2': a proportion between 0 and 1 expected",
        ),
        (["--trainer.optimization.proportional-shrink=50"], "proportional-shrink 50: too large"),
        (
            ["--trainer.optimization.backstitch-training-scale=0.2", "--strategy=expair"],
            "needs --trainer.optimization.momentum=0",
        ),
        (["--trainer.rnn.num-chunk-per-minibatch=128="], "minibatch size '128=': '' is not a number from 1"),
        (["--use-gpu=yes"], "--use-gpu yes: learner rank 0 sees no CUDA device"),
    ],
)
def test_bad_options_are_named(toy: Toy, tmp_path: Path, options: list[str], message: str) -> None:
    import torch

    from kaldi_mpi.errors import KaldiMpiError

    if "--use-gpu=yes" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    folder = toy.experiment(f"bad-{tmp_path.name}")
    with pytest.raises(KaldiMpiError, match=message) as caught:
        run_alone(toy, folder, *options)
    assert "\n" not in str(caught.value)
    assert not (folder / "final.mdl").exists()


def test_options_of_train_rnn_are_accepted(toy: Toy, tmp_path: Path) -> None:
    """A recipe's call of train_rnn.py can be kept: options without a meaning here change nothing."""
    from kaldi_mpi.learner.options import parse

    plain = toy.options(tmp_path)
    recipe = [
        "--stage=-10", "--cmd=queue.pl --mem 4G", "--cleanup.remove-egs=true", "--egs.dir=", "--lang=data/lang",
        "--trainer.optimization.num-jobs-initial=3", "--trainer.optimization.num-jobs-final=15",
        "--trainer.optimization.shrink-value=0.99", "--feat.online-ivector-dir=", "--cleanup", "true",
    ]  # fmt: skip
    steered = dataclasses.replace(parse(plain), stage=-10, num_jobs_initial=3, num_jobs_final=15, shrink_value=0.99)
    assert parse(plain + recipe) == steered


@pytest.mark.parametrize("what", ["longer", "shorter", "missing"])
def test_alignments_that_do_not_fit(toy: Toy, tmp_path: Path, what: str) -> None:
    import gzip

    import kaldi_native_io

    from kaldi_mpi.errors import DataError

    bad = make_toy(tmp_path, num_utterances=12)
    key = "spk1-utt005"
    path = bad.ali_dir / "ali.1.gz"
    plain = bad.ali_dir / "ali.1"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    with kaldi_native_io.SequentialInt32VectorReader(f"ark:{plain}") as reader:
        ali = {name: list(ids) for name, ids in reader}
    ali[key] = {"longer": [*ali[key], 1], "shorter": ali[key][:-1], "missing": []}[what]
    if what == "missing":
        del ali[key]
    with kaldi_native_io.Int32VectorWriter(f"ark:{plain}") as writer:
        for name, ids in ali.items():
            writer.write(name, ids)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    folder = bad.experiment("x")
    if what == "missing":  # some utterances always fail to align: the rest is trained on
        run_alone(bad, folder, "--trainer.num-epochs=0.5")
        assert key not in (folder / "valid_uttlist").read_text() and (folder / "final.mdl").exists()
        return
    with pytest.raises(DataError, match=f"{key}.*frames") as caught:
        run_alone(bad, folder)
    print(caught.value)
    assert not (folder / "final.mdl").exists()


def test_truncated_features_end_all_ranks(tmp_path: Path) -> None:
    bad = make_toy(tmp_path, num_utterances=12)
    archive = bad.feat_dir / "feats.ark"
    archive.write_bytes(archive.read_bytes()[:-100])
    folder = bad.experiment("x")
    result = train(2, bad.options(folder))
    assert result.returncode == 1
    assert f"{archive}, key spk3-utt011, byte offset " in result.stderr, result.stderr
    assert not (folder / "final.mdl").exists()


def test_a_full_disk_at_export_leaves_no_half_written_model(toy: Toy) -> None:
    """A real refusal by the kernel: a limit on file size that only final.mdl exceeds."""
    folder = toy.experiment("full")
    earlier = b"an earlier model"
    (folder / "final.mdl").write_bytes(earlier)
    program = (
        "import resource, sys\n"
        "from kaldi_mpi.learner import export, run\n"
        "from kaldi_mpi.learner.options import parse\n"
        "from kaldi_mpi.transport.world import SoloWorld\n"
        "write = export.write_final_model\n"
        "def limited(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "    return write(*arguments)\n"
        "export.write_final_model = limited\n"
        "try:\n"
        "    run.train(parse(sys.argv[1:]), SoloWorld())\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    import sys

    result = subprocess.run(
        [sys.executable, "-c", program, *toy.options(folder, "--trainer.num-epochs=0.5")],
        env=environment(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert result.stdout.startswith(f"DataError {folder}/final.mdl: cannot write: File too large"), result.stdout
    assert (folder / "final.mdl").read_bytes() == earlier
    assert not list(folder.glob(".final.mdl*"))
