"""A pytest plugin: has the tests use another build of the C extension, named by the environment.

The build stands in for ``kaldi_mpi.loader._csrc`` before anything imports that, so that the tree's own build stays
as it is. See tests/sanitize.py, which sets this up.
"""

from __future__ import annotations

import importlib.util
import os
import sys

ENVIRONMENT = "KALDI_MPI_TEST_EXTENSION"
NAME = "kaldi_mpi.loader._csrc"


def load(path: str) -> None:
    """Load the extension at `path` under its usual name."""
    if NAME in sys.modules:
        raise RuntimeError(f"{NAME} is imported already")
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module


if ENVIRONMENT in os.environ:
    load(os.environ[ENVIRONMENT])
