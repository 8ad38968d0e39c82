"""What the terminal shows when a run ends badly: the reason last, mpiexec's own words only where nobody says more."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kaldi_mpi.relay import Stream
from tests.toy import environment

RULE = b"-" * 74 + b"\n"
OPEN_MPI = (
    RULE + b"MPI_ABORT was invoked on rank 0 in communicator MPI COMM 3 DUP FROM 0\n"
    b"  Proc: [[15493,1],0]\n  Errorcode: 1\n\n"
    b"NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.\n" + RULE,
    RULE + b'prterun has exited due to process rank 0 with PID 0 on node vm calling\n"abort".\n' + RULE,
)
MPICH = (
    b"Abort(1) on node 0 (rank 0 in comm 496): application called MPI_Abort(comm=0x84000002, 1) - process 0\n",
    b"=" * 83
    + b"\n=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n=   PID 5939 RUNNING AT vm\n"
    + b"=" * 83
    + b"\n",
    b"YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Aborted (signal 6)\n"
    b"This typically refers to a problem with your application.\nPlease see the FAQ page for debugging suggestions\n",
)
OF_LEARNERS = [
    b"LOG (learner) a line\n",
    RULE + b"a learner's own\nrule and another\n" + RULE,
    b"WARNING: Errorcode: 7 of somebody else\n",
    b"half a line",
]


def relayed(pieces: list[bytes]) -> tuple[bytes, Stream]:
    """What came out of a relay that was given these pieces, each as it was written."""
    source, end = os.pipe()
    sink = io.BytesIO()
    with open(source, "rb") as stream:
        relay = Stream(stream, sink)
        passed = b"".join(relay._without_banners(piece) for piece in pieces)
        os.close(end)
        relay.run()
    return passed + sink.getvalue(), relay


@pytest.mark.parametrize("size", [1, 7, 80, 10_000])
def test_open_mpis_banners_wait_however_they_arrive(size: int) -> None:
    text = b"".join([OF_LEARNERS[0], *OPEN_MPI, b"\0", *OF_LEARNERS[1:]])
    passed, relay = relayed([text[start : start + size] for start in range(0, len(text), size)])
    assert passed == b"".join(OF_LEARNERS)
    assert relay.banners.rstrip(b"\0") == b"".join(OPEN_MPI)


@pytest.mark.parametrize("together", [False, True])
def test_mpichs_banners_wait(together: bool) -> None:
    lines = [OF_LEARNERS[0], *MPICH, *OF_LEARNERS[1:]]
    passed, relay = relayed([b"".join(lines)] if together else lines)
    assert passed == b"".join(OF_LEARNERS) and relay.banners == b"".join(MPICH)


def test_a_line_without_its_end_does_not_wait() -> None:
    sink = io.BytesIO()
    with open(os.devnull, "rb") as nothing:
        relay = Stream(nothing, sink)
        assert relay._without_banners(b"\riteration 7 of 100") == b"\riteration 7 of 100"


def test_a_banner_without_an_end_is_not_lost() -> None:
    text = b"before\n" + RULE + b"prterun stops in the middle of\n"
    assert relayed([text])[0] == text
    long = text + 5000 * b"of a long line"
    assert relayed([long, b"\nafter"])[0] == long + b"\nafter"


LEARNER = """
import os, sys
from kaldi_mpi import log
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.guard import guarded
from kaldi_mpi.processes import die_with_parent
from kaldi_mpi.transport.mpi import MpiWorld
die_with_parent()
world = MpiWorld()
log.set_up("learner", world.rank)
with guarded(world):
    world.barrier()
    {main}
    world.barrier()
    world.close()
"""


def launched(cwd: Path, main: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kaldi_mpi", "launch", "-n", "2", "--", sys.executable, "-c", LEARNER.format(main=main)],
        env=environment(), cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("who", ["True", "world.rank == 1"], ids=["all", "one"])
def test_the_reason_is_the_last_line_and_nothing_hides_it(tmp_path: Path, who: str) -> None:
    result = launched(tmp_path, f"if {who}: raise ConfigError('--egs.left: no such option')")
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines and all(line.startswith("ERROR (") for line in lines), result.stderr
    assert lines[-1].endswith("failed: --egs.left: no such option") and "kaldi-mpi-launch" in lines[-1]
    assert result.stdout == ""


def test_what_mpiexec_says_stays_where_no_learner_said_a_word(tmp_path: Path) -> None:
    result = launched(tmp_path, "if world.rank == 1: world._comm.Abort(1)")
    assert result.returncode == 1
    assert "MPI_A" in result.stderr, result.stderr  # MPI_ABORT was invoked; application called MPI_Abort
    assert "kaldi-mpi-launch" in result.stderr.splitlines()[-1]
