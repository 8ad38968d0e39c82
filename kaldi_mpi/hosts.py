"""The hosts of a run: who of them still answers, and how mpiexec is told to do without the others."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kaldi_mpi.processes import die_with_parent

# By which mpiexec is told of hosts one by one; a file of them (--hostfile, -f) or an allocation stays as it is, and the
# hosts named are picked from it.
_NAMED = {
    "openmpi": ("--host", "-host", "-H"),
    "mpich": ("-hosts", "--hosts", "-host", "--host"),
}
# For a host that is gone: mpiexec waits for ssh, which gives up sooner where the network says so.
_ANSWER_SECONDS = 30.0


def hosts_of(statuses: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many learners each host had, in the order of their ranks."""
    return dict(Counter(str(s["host"]) for s in sorted(statuses, key=lambda s: int(s["rank"]))))


def on_hosts(vendor: str, options: Sequence[str], hosts: Mapping[str, int]) -> list[str]:
    """mpiexec's `options` with these hosts in place of those that they name; so many learners on each."""
    names = _NAMED.get(vendor, _NAMED["openmpi"])
    left: list[str] = []
    skip = False
    for word in options:
        if skip or word.startswith(tuple(f"{name}=" for name in names if name.startswith("--"))):
            skip = False
        elif word in names:
            skip = True
        else:
            left.append(word)
    return [*left, names[0], ",".join(f"{host}:{number}" for host, number in hosts.items())]


def who_answer(
    mpiexec: Sequence[str],
    vendor: str,
    options: Sequence[str],
    hosts: Mapping[str, int],
    environment: Mapping[str, str],
) -> dict[str, int]:
    """Those of `hosts` on which mpiexec can start a program; this one is always among them.

    Args:
        mpiexec: its command line for one rank, without options.
        vendor: its kind.
        options: of the run that has failed.
        hosts: and how many learners each had.
        environment: for mpiexec.
    """
    answering = {}
    for host, number in hosts.items():
        if host == os.uname().nodename or _answers(
            [*mpiexec, *on_hosts(vendor, options, {host: 1}), "true"], environment
        ):
            answering[host] = number
    return answering


def _answers(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    try:
        done = subprocess.run(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=_ANSWER_SECONDS, check=False, preexec_fn=die_with_parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
