"""Ranks in network namespaces of their own, so that one can be cut off from all others: for tests and the chaos run.

Needs root, and the programs `ip` and `nsenter`. Open MPI is told to talk over the bridge that joins the namespaces, by
TCP alone: shared memory would go round what is cut.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


class Network:
    """A network namespace for each rank, joined by a bridge, from which a rank can be cut off.

    Args:
        ranks: how many.
        folder: for the program that puts a rank into its namespace.
    """

    def __init__(self, ranks: int, folder: Path) -> None:
        self._ranks = ranks
        self.wrapper = folder / "in_its_namespace"
        self.wrapper.write_text('#!/bin/bash\nexec nsenter --net=/run/netns/kmpi$OMPI_COMM_WORLD_RANK "$@"\n')
        self.wrapper.chmod(0o755)
        self.environment = {
            "PMIX_MCA_ptl_base_if_include": "kmpibr", "PRTE_MCA_prte_if_include": "kmpibr",
            "OMPI_MCA_btl": "self,tcp",  # shared memory would go round what is cut
            "OMPI_MCA_btl_tcp_if_include": "10.77.0.0/24",
        }  # fmt: skip

    @staticmethod
    def is_possible() -> bool:
        """Whether this machine lets us."""
        return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("nsenter") is not None

    def __enter__(self) -> Network:
        self.__exit__()
        _ip("link add kmpibr type bridge", "addr add 10.77.0.1/24 dev kmpibr", "link set kmpibr up")
        for rank in range(self._ranks):
            space = f"kmpi{rank}"
            _ip(
                f"netns add {space}", f"link add kmpiv{rank} type veth peer name eth0 netns {space}",
                f"link set kmpiv{rank} master kmpibr up", f"-n {space} addr add 10.77.0.{10 + rank}/24 dev eth0",
                f"-n {space} link set eth0 up", f"-n {space} link set lo up",
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        # A namespace's end of a link goes with it some time after; the next network wants the same names.
        links = [f"link del kmpiv{rank}" for rank in range(self._ranks)]
        for line in ("link del kmpibr", *links, *(f"netns del kmpi{rank}" for rank in range(self._ranks))):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(line)

    @classmethod
    @contextlib.contextmanager
    def where_possible(cls, ranks: int, folder: Path) -> Iterator[Network | None]:
        """A network while the block runs, or None, saying so, where this machine does not let us."""
        if not cls.is_possible():
            print("no partitions: they need root, ip and nsenter", file=sys.stderr)
            yield None
            return
        with cls(ranks, folder) as network:
            yield network

    def cut(self, rank: int, off: bool) -> None:
        """Take a rank off the bridge, or put it back; packets are lost meanwhile, no connection is closed."""
        _ip(f"link set kmpiv{rank} nomaster" if off else f"link set kmpiv{rank} master kmpibr")


def _ip(*lines: str) -> None:
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True, capture_output=True)
