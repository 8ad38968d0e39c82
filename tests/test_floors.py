"""Who may import whom: the floors of docs/architecture.md, of which a module may only use lower ones.

Imports are read from the source, wherever they stand: at the top, in functions, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.paths import REPO

PACKAGE = "kaldi_mpi"


class Import(NamedTuple):
    """`line` of module `importer` imports `module`, or `name` from it."""

    importer: str
    line: int
    module: str
    name: str | None = None

    def __str__(self) -> str:
        what = f"import {self.module}" if self.name is None else f"from {self.module} import {self.name}"
        return f"{self.importer}:{self.line}: {what}"


@cache
def modules() -> dict[str, Path]:
    """The files of the package by module name; a folder's name stands for its ``__init__``."""
    found = {}
    for path in sorted((REPO / PACKAGE).rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> list[Import]:
    """All of the package; what ``from folder import module`` names is that module."""
    return [entry for name, path in modules().items() for entry in imports_of(name, path)]


def imports_of(importer: str, path: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(importer, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if module in modules():
                    yield Import(importer, node.lineno, module)
                else:
                    yield Import(importer, node.lineno, node.module, alias.name)


def room(module: str) -> str:
    """The package or module at top level that `module` belongs to; "" for that of all, and for what is not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else ""


@cache
def floors() -> dict[str, int]:
    """The number of each room's floor, as docs/architecture.md has them: one a line, the lowest first."""
    block = re.search(r"^```floors\n(.*?)^```$", (REPO / "docs/architecture.md").read_text("utf-8"), re.M | re.S)
    assert block is not None
    return {name: number for number, line in enumerate(block[1].splitlines(), 1) for name in line.split()}


def listed(entries: list[Import]) -> str:
    return "\n".join(["", *map(str, entries)])


def test_each_room_has_a_floor() -> None:
    assert set(map(room, modules())) - {"", "__main__"} == set(floors())


def test_imports_point_to_lower_floors() -> None:
    """What starts the program (``python -m kaldi_mpi``) stands above all, the package's own ``__init__`` below."""
    floor = {"": 0, **floors(), "__main__": len(floors()) + 1}
    found = []
    for entry in imports():
        above, below = room(entry.importer), room(entry.module)
        if entry.module in modules() and above != below and floor[above] <= floor[below]:
            found.append(entry)
    assert not found, listed(found)


def test_no_circle_of_imports() -> None:
    targets = {name: sorted({entry.module for entry in imports() if entry.importer == name}) for name in modules()}

    def circle(start: str) -> list[str]:
        """The shortest way from a module along imports back to it, or nothing."""
        came_from, layer = dict.fromkeys(targets[start], start), targets[start]
        while layer and start not in came_from:
            layer = [new for old in layer for new in targets.get(old, []) if came_from.setdefault(new, old) == old]
        way = [start]
        while start in came_from and (len(way) == 1 or way[-1] != start):
            way.append(came_from[way[-1]])
        return way[:0:-1]

    circles = {frozenset(way): way for way in map(circle, targets) if way}
    assert not circles, "\n".join(["", *(" -> ".join([*way, way[0]]) for way in circles.values())])


# Where messages really travel, and the lookup of whether MPI takes device pointers.
USES_MPI = {"kaldi_mpi.transport.mpi", "kaldi_mpi.transport.gpu"}


def test_mpi_is_imported_in_one_place() -> None:
    found = [entry for entry in imports() if entry.module.split(".")[0] == "mpi4py" and entry.importer not in USES_MPI]
    assert not found, listed(found)


# None: all of the module.
AVERAGING_USES = {"world": None, "number_formats": None, "messages": {"Channel"}}


def test_averaging_knows_of_transport_only_its_protocols_and_numbers() -> None:
    found = []
    for entry in imports():
        if room(entry.importer) == "averaging" and room(entry.module) == "transport":
            names = AVERAGING_USES.get(entry.module.removeprefix("kaldi_mpi.transport."), set())
            if names is not None and entry.name not in names:
                found.append(entry)
    assert not found, listed(found)


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("kaldi_mpi.cli", "torch mpi4py"),
        ("kaldi_mpi.launch", "torch mpi4py"),
        ("kaldi_mpi.formats", "torch mpi4py"),
        ("kaldi_mpi.loader", "torch mpi4py"),
        ("kaldi_mpi.averaging", "torch mpi4py"),
        ("kaldi_mpi.transport.world", "torch mpi4py"),
        ("kaldi_mpi.nnet3", "mpi4py"),
        ("kaldi_mpi.embedded", "torch mpi4py"),
        ("kaldi_mpi.learner", "mpi4py"),
    ],
)
def test_import_loads_neither_torch_nor_mpi_where_they_are_not_needed(module: str, without: str) -> None:
    code = f"import sys, {module}; print(*({set(without.split())!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
