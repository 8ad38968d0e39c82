"""A learner that was started as one of several and finds itself alone stops, before it overwrites the others' files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.status import check_size
from tests.toy import environment

TASK = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}
STEP = TASK | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    "variables",
    [
        STEP,
        TASK | {"SLURM_NTASKS": "4"},
        TASK | {"SLURM_NPROCS": "4"},
        STEP | {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.7.0"},
        STEP | {"WORLD_SIZE": "1"},
        {"PMI_SIZE": "4", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"WORLD_SIZE": "4", "RANK": "0"},
        STEP | {"SLURM_NTASKS": "1"},
    ],
)
def test_one_of_four_is_told_what_works(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_size(variables, 1, "Open MPI v5")
    assert "=4 says that this is one of 4 learners, but Open MPI v5 counts 1" in str(error.value)
    assert "kaldi-mpi launch -n 4 -- kaldi-mpi train ..." in str(error.value)
    assert "\n" not in str(error.value)
    check_size(variables, 4, "Open MPI v5")


def test_pmix_tells_only_the_rank() -> None:
    with pytest.raises(ConfigError, match=r"PMIX_RANK=3 says .* one of several learners.* launch -n N -- "):
        check_size({"PMIX_RANK": "3", "PMIX_NAMESPACE": "x"}, 1, "MPICH")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"},  # a shell of salloc
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # one of salloc's that is a step itself
        STEP | {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},  # under mpiexec -n 1
        STEP | {"PMI_SIZE": "1"},
        STEP | {"KALDI_MPI_NUM_LEARNERS": "1"},  # under our launcher
        {"PMIX_RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "many"},
    ],
)
def test_one_alone_goes_on(variables: dict[str, str]) -> None:
    check_size(variables, 1, "Open MPI v5")


def test_our_launchers_word_counts() -> None:
    with pytest.raises(ConfigError, match="asked for 2 learners but MPI counts 1: mpiexec and MPICH do not belong"):
        check_size({"KALDI_MPI_NUM_LEARNERS": "2"}, 1, "MPICH")


def test_a_task_of_plain_srun_ends_before_it_writes_anything(tmp_path: Path) -> None:
    """As the first of four tasks comes up when Slurm and the MPI library do not know each other."""
    program = "import sys; from kaldi_mpi import cli; sys.exit(cli.main())"
    result = subprocess.run(
        [sys.executable, "-c", program, "train", "--feat-dir", "data", "--ali-dir", "ali", "--dir", "exp"],
        env=environment() | STEP, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("ERROR (kaldi-mpi-train")
    assert "SLURM_STEP_NUM_TASKS=4 says that this is one of 4 learners" in line and "kaldi-mpi launch -n 4 --" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tasks", ["1", "4"])
def test_our_launcher_works_in_a_batch_script(tmp_path: Path, tasks: str) -> None:
    program = """
from kaldi_mpi.transport.guard import guarded
from kaldi_mpi.transport.mpi import MpiWorld
world = MpiWorld()
with guarded(world):
    assert world.size == 2
    open(f"was-here.{world.rank}", "w").close()
    world.close()
"""
    result = subprocess.run(
        [sys.executable, "-m", "kaldi_mpi", "launch", "-n", "2", "--", sys.executable, "-c", program],
        env=environment() | {"SLURM_NTASKS": tasks, "SLURM_NPROCS": tasks, "SLURM_PROCID": "0"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["was-here.0", "was-here.1"]
