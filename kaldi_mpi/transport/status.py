"""What a learner and its starter tell each other: environment variables, and one small status file a rank."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.files import atomic_write

NUM_LEARNERS_ENV = "KALDI_MPI_NUM_LEARNERS"
STATUS_DIR_ENV = "KALDI_MPI_STATUS_DIR"
TERMINAL_ENV = "KALDI_MPI_TERMINAL"
RESTART_ENV = "KALDI_MPI_RESTART"  # how often the launcher has started this run again
FEWER_ENV = "KALDI_MPI_FEWER"  # where it has done so with fewer learners: a host was gone

_STOP = "stop"  # the file, beside the status files, by which learners are asked to


def check_size(environment: Mapping[str, str], size: int, library: str) -> None:
    """Stop a learner that is meant to be one of several and finds itself alone.

    That is how it comes out when starter and MPI library do not know each other (plain ``srun``, or another vendor's
    mpiexec): N trainings of one learner each, which overwrite each other's files.

    Args:
        environment: of this process.
        size: of the world, as MPI counts it.
        library: what MPI library it is, for the message.

    Raises:
        ConfigError: the environment tells of another number of learners.
    """
    expected = environment.get(NUM_LEARNERS_ENV)
    if expected is not None:
        if int(expected) != size:
            raise ConfigError(
                f"mpiexec was asked for {expected} learners but MPI counts {size}: mpiexec and "
                f"{library} do not belong together"
            )
        return
    told = _started(environment) if size == 1 else None
    if told is not None:
        variable, number = told
        raise ConfigError(
            f"{variable}={environment[variable]} says that this is one of {number or 'several'} learners, but "
            f"{library} counts 1: each would train alone and overwrite the others' files. "
            f"What works, started once: kaldi-mpi launch -n {number or 'N'} -- kaldi-mpi train ... "
            f"(or srun --mpi=pmix -n {number or 'N'} kaldi-mpi train ..., where Slurm and this library both have PMIx)"
        )


def _started(environment: Mapping[str, str]) -> tuple[str, int | None] | None:
    """The variable that tells that several processes were started, and how many if it is known; None for one."""

    def number(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else 0

    # The starters of MPI come first: where mpiexec has started this process, Slurm's variables are those of the batch
    # script around it, or of mpiexec's daemons.
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if number(name):
            return (name, number(name)) if number(name) > 1 else None
    # A shell of salloc has SLURM_NTASKS too; a task, or a batch script, also has its number.
    steps = ["SLURM_STEP_NUM_TASKS"] if number("SLURM_STEP_NUM_TASKS") else ["SLURM_NTASKS", "SLURM_NPROCS"]
    for name in [*(steps if "SLURM_PROCID" in environment else []), "WORLD_SIZE"]:
        if number(name) > 1:
            return name, number(name)
    return ("PMIX_RANK", None) if number("PMIX_RANK") else None  # PMIx tells the rank alone


class Status:
    """This learner's status file: what the launcher reads when the run ends badly.

    Without a launcher (no status directory in the environment) there is none.

    Attributes:
        state: that was written last.
    """

    def __init__(self, rank: int) -> None:
        folder = os.environ.get(STATUS_DIR_ENV)
        self._path = Path(folder) / f"rank.{rank}" if folder else None
        self._rank, self._shm, self._spared = rank, shared_memory(), False
        self.write("running", "")

    def spare(self, spared: bool) -> None:
        """From now on the others go on, or do not, should this process die: under an MPI that survives it."""
        self._spared = spared
        self.write(self.state, *self._last)

    @property
    def is_read(self) -> bool:
        """Whether there is a launcher, who reads it."""
        return self._path is not None

    def write(
        self, state: str, message: str, stops: bool = False, mend: bool = False, lost: Sequence[int] = ()
    ) -> None:
        """Replace the file.

        Args:
            state: running, stopped (after a checkpoint, as it was asked to), finished, failed, or left behind.
            message: the last words.
            stops: whether it would stop if it was asked to.
            mend: whether it has failed by something that the user must mend.
            lost: ranks without which it has ended.
        """
        self.state, self._last = state, (message, stops, mend, lost)
        if self._path is None:
            return
        with atomic_write(self._path, "w", sync=False) as stream:
            json.dump(
                {
                    "rank": self._rank,
                    "pid": os.getpid(),
                    "host": os.uname().nodename,
                    "state": state,
                    "message": message,
                    "stops": stops,
                    "mend": mend,
                    "lost": list(lost),
                    "spared": self._spared,
                    "shm": self._shm,
                },
                stream,
            )


def shared_memory() -> list[str]:
    """Files of shared memory that this process has mapped: after MPI's start, that of its library."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return sorted({line[line.index("/dev/shm/") :].split(" (")[0] for line in maps.splitlines() if "/dev/shm/" in line})


def ask_to_stop(folder: Path, why: str) -> None:
    """Ask all learners to write a checkpoint and end."""
    with atomic_write(folder / _STOP, "w", sync=False) as stream:
        stream.write(why)


def asked_to_stop() -> str:
    """Why this learner's run is to stop; "": it is not, or nobody could ask."""
    folder = os.environ.get(STATUS_DIR_ENV)
    try:
        return Path(folder, _STOP).read_text(encoding="utf-8") if folder else ""
    except FileNotFoundError:
        return ""


def started_again() -> bool:
    """Whether the launcher has started this run again; then it goes on from its checkpoint, also by --resume=false."""
    return int(os.environ.get(RESTART_ENV, "0")) > 0


def fewer_than_before() -> bool:
    """Whether it has done so without the learners of a host that is gone."""
    return FEWER_ENV in os.environ


def say_abort(rank: int, status: int) -> None:
    """Leave word that this rank is about to end the run with an MPI abort, unless it has already said why."""
    folder = os.environ.get(STATUS_DIR_ENV)
    if folder and all(s["state"] != "failed" for s in read_status(Path(folder)) if s["rank"] == rank):
        Status(rank).write("failed", f"it ended the run with status {status}")


def read_status(folder: Path) -> list[dict[str, Any]]:
    """All learners' status files in order of rank."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank.*")]
    return sorted(found, key=lambda status: int(status["rank"]))
