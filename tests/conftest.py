"""Tests in real MPI ranks from a plain pytest: ``@pytest.mark.ranks(n)`` runs a test under mpiexec.

The parent never imports MPI. It starts just that test in n ranks, in a process group of its own and with a
deadline; each rank writes its outcome to a file of its own; a rank that fails ends the others after it has
reported. Deadlocks and killed ranks then cost seconds, and the failure names the rank.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kaldi_mpi import launch
from kaldi_mpi.log import logger
from tests.paths import REPO
from tests.recipe import digits

__all__ = ["digits"]  # a fixture of all test files

REPORT_DIR_ENV = "KALDI_MPI_TEST_REPORTS"
# Seconds for a test that runs the recipe; all others have the `timeout` of pyproject.toml.
SLOW_TIMEOUT = 1500

# In a rank: the deadline is the parent's.
NO_TIME_LIMIT = ["--timeout=0", "-o", "faulthandler_timeout=0"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton, which PyTorch may import at any time, defines its own functions for the interpreter or for a GPU.
os.environ["TRITON_INTERPRET"] = "1"

# nohup, and the & of a script's shell, have their children ignore these, and so everything that a test starts.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _usual)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run the tests that repeat others in more variants, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests of a real Kaldi where there is none, and thorough ones, with the reason; give slow tests more time."""
    thorough = config.getoption("--thorough") or REPORT_DIR_ENV in os.environ
    for item in items:
        if item.get_closest_marker("thorough") and not thorough:
            item.add_marker(pytest.mark.skip(reason="a variant of another test, which runs; this one with --thorough"))
        if item.get_closest_marker("kaldi") and not os.environ.get("KALDI_ROOT"):
            item.add_marker(pytest.mark.skip(reason="needs a real Kaldi: KALDI_ROOT is not set"))
        slow = item.get_closest_marker("slow") or "digits" in getattr(item, "fixturenames", ())
        if slow and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Undo `log.set_up` of the programs that a test runs in this process.

    Else later tests write to a closed stream, and pytest captures twice what is logged when one of them turns on
    propagation.
    """
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """In the parent, run a `ranks` test under mpiexec in place of calling it."""
    marker = pyfuncitem.get_closest_marker("ranks")
    if marker is None or REPORT_DIR_ENV in os.environ:
        return None
    _run_in_ranks(pyfuncitem.nodeid, marker.args[0], marker.kwargs.get("timeout", 60))
    return True


def _run_in_ranks(nodeid: str, num_ranks: int, timeout: float) -> None:
    mpiexec = launch.find_mpiexec()
    vendor = launch.mpi_vendor(mpiexec)
    with tempfile.TemporaryDirectory(prefix="ranks.") as folder:
        environment = launch.learner_environment(vendor, num_ranks, Path(folder))
        environment |= {REPORT_DIR_ENV: folder, "PYTHONPATH": str(REPO)}
        command = [
            *launch.mpiexec_command(mpiexec, vendor, num_ranks),
            *[sys.executable, "-m", "mpi4py", "-m", "pytest", "-q", "-p", "no:cacheprovider", *NO_TIME_LIMIT, nodeid],
        ]
        process = subprocess.Popen(
            command, env=environment, cwd=REPO, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(
                f"{num_ranks} ranks did not end within {timeout} s\n{_reports(folder, num_ranks)}\n{output[-3000:]}"
            )
        reports = _reports(folder, num_ranks)
        outcomes = [(Path(folder) / f"report.{rank}") for rank in range(num_ranks)]
        states = [path.read_text().split("\n", 1)[0] if path.exists() else "silent" for path in outcomes]
        if all(state == "skipped" for state in states):
            pytest.skip(outcomes[0].read_text().split("\n", 1)[1])
        if process.returncode != 0 or any(state != "passed" for state in states):
            pytest.fail(f"ranks: {states}, mpiexec ended with {process.returncode}\n{reports}\n{output[-3000:]}")


def _reports(folder: str, num_ranks: int) -> str:
    paths = [(rank, Path(folder) / f"report.{rank}") for rank in range(num_ranks)]
    return "\n".join(
        f"--- rank {rank}: {path.read_text() if path.exists() else 'no report (killed or hanging)'}"
        for rank, path in paths
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In a rank, write what became of the test, and end the other ranks if it failed."""
    folder = os.environ.get(REPORT_DIR_ENV)
    if folder is None:
        return
    if report.when != "call" and report.passed:
        return
    from mpi4py import MPI

    path = Path(folder) / f"report.{MPI.COMM_WORLD.Get_rank()}"
    if path.exists() and not report.failed:
        return
    path.write_text(f"{report.outcome}\n{report.longreprtext if report.failed else report.longrepr or ''}")
    if report.failed:
        MPI.COMM_WORLD.Abort(1)


def in_ranks(*sizes: int, timeout: float = 60) -> pytest.MarkDecorator:
    """Parametrise a test over numbers of ranks: its argument ``num_ranks`` is the number it runs in."""
    return pytest.mark.parametrize(
        "num_ranks",
        [pytest.param(n, marks=pytest.mark.ranks(n, timeout=timeout), id=f"{n}ranks") for n in sizes],
    )
