"""Where the tests find files that other programs wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
DATA = REPO / "tests" / "data"
SHARED = REPO.parent / "shared"


def golden(name: str) -> Path:
    """The path of a file that a real Kaldi wrote (tests/data/golden/README.md).

    What is too large for this repository may lie beside the checkout; where it does not, the test is skipped.
    """
    path = DATA / "golden" / name
    if path.exists():
        return path
    path = SHARED / "golden" / name
    if not path.exists():
        pytest.skip(f"needs shared/golden/{name}, which is not beside this checkout")
    return path


def fsdd() -> Path:
    """The folder of real digit recordings; skips the test where it is absent."""
    path = SHARED / "fsdd"
    if not path.exists():
        pytest.skip("needs shared/fsdd, which is not beside this checkout")
    return path


def kaldi_root() -> Path:
    """KALDI_ROOT; skips the test where no real Kaldi is given."""
    root = os.environ.get("KALDI_ROOT")
    if not root:
        pytest.skip("needs a real Kaldi: KALDI_ROOT is not set")
    return Path(root)
