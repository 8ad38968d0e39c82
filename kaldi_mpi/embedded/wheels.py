"""The wheels of the embedded back end: imported late, in one order, at exactly the versions that fit together.

kaldi-hmm-gmm, kaldifst, kaldi-decoder and kaldilm exchange C++ objects and each carries OpenFst. Other
versions than those below do not raise a clean error: importing them together can hang for ever. So the
versions are compared before the first import, and nothing outside this module imports these packages.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

from kaldi_mpi.errors import ConfigError

# Distribution name -> (module, the only version that works with the others); imported in this order.
PINS: dict[str, tuple[str, str]] = {
    "kaldi-hmm-gmm": ("kaldi_hmm_gmm", "1.1.4"),
    "kaldifst": ("kaldifst", "1.7.17"),
    "kaldi-decoder": ("kaldi_decoder", "0.2.11"),
    "kaldilm": ("kaldilm", "1.15.4"),
}

_ADVICE = "install the embedded back end with: pip install 'kaldi-mpi[embedded]'"


@dataclass(frozen=True)
class Wheels:
    """The imported modules; typed Any, for they come without annotations."""

    khg: Any
    kaldifst: Any
    kaldi_decoder: Any
    kaldilm: Any


def check_versions() -> None:
    """Compare the installed versions with `PINS`, importing nothing.

    Raises:
        ConfigError: a wheel is missing or has another version; the message names all of them.
    """
    problems = []
    for name, (_, wanted) in PINS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        if found != wanted:
            problems.append(f"{name} is {found} but must be {wanted}")
    if problems:
        raise ConfigError(f"{', '.join(problems)}: {_ADVICE}")


@functools.cache
def load() -> Wheels:
    """Import the wheels of the embedded back end, once per process.

    Raises:
        ConfigError: see `check_versions`, or a wheel that is installed but cannot be imported.
    """
    check_versions()
    modules = []
    for name, (module, _) in PINS.items():
        try:
            modules.append(importlib.import_module(module))
        except ImportError as error:
            raise ConfigError(f"{name} cannot be imported ({error}): {_ADVICE}") from error
    return Wheels(*modules)


def load_kaldialign() -> Any:
    """Import kaldialign (edit distances), which does not depend on the others' versions.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("kaldialign")
    except ImportError as error:
        raise ConfigError(f"kaldialign cannot be imported ({error}): {_ADVICE}") from error
