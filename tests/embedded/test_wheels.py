"""The wheels of the embedded back end: that they can be imported at all, in the orders that occur."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest

from kaldi_mpi.embedded import wheels
from kaldi_mpi.errors import ConfigError
from tests.paths import REPO

LOAD = "from kaldi_mpi.embedded import wheels; wheels.load()"


@pytest.mark.parametrize(
    "statements",
    [
        [LOAD],
        ["import torch", LOAD],
        [LOAD, "import torch"],
        ["import kaldialign, kaldi_native_fbank, kaldi_native_io", LOAD],
        [LOAD, "import kaldialign, kaldi_native_fbank, kaldi_native_io"],
        ["from mpi4py import MPI", "import torch, kaldi_native_io", LOAD],
        ["import kaldifst", LOAD],  # somebody else's code came first
        ["import kaldi_mpi.embedded.decode, kaldi_mpi.embedded.score", LOAD],
    ],
    ids=" then ".join,
)
def test_wheels_can_be_imported_and_exchange_objects(statements: list[str]) -> None:
    # With versions that do not fit, this hangs for ever or dies: hence a process of its own and a limit.
    use = (
        "w = wheels.load()\n"
        "fst = w.kaldifst.make_linear_acceptor([1, 2])\n"
        "config = w.kaldi_decoder.FasterDecoderOptions(beam=10)\n"
        "w.kaldi_decoder.FasterDecoder(fst, config)\n"
        "print('works')"
    )
    code = "\n".join([*statements, use])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=REPO
    )
    assert done.stdout == "works\n", done.stderr


def test_other_versions_are_refused_before_they_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "kaldilm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.8.3" if name == "kaldifst" else wheels.PINS[name][1]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError) as caught:
        wheels.check_versions()
    assert str(caught.value) == (
        "kaldifst is 1.8.3 but must be 1.7.17, kaldilm is not installed: "
        "install the embedded back end with: pip install 'kaldi-mpi[embedded]'"
    )


def test_the_extra_installs_the_versions_that_are_checked() -> None:
    extra = re.search(r"^embedded = \[(.*?)\]", (REPO / "pyproject.toml").read_text(), re.M | re.S)
    assert extra is not None
    pinned = dict(re.findall(r'"([\w-]+)==([\d.]+)"', extra[1]))
    assert pinned == {name: version for name, (_, version) in wheels.PINS.items()}


def test_nothing_else_imports_the_wheels() -> None:
    names = "|".join(module for module, _ in wheels.PINS.values())
    pattern = re.compile(rf"^\s*(import|from)\s+({names})\b", re.M)
    offenders = [path for path in (REPO / "kaldi_mpi").rglob("*.py") if pattern.search(path.read_text())]
    assert offenders == []
