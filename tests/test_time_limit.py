"""A test that hangs ends the run within its limit, and says where it hung."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPO

HANGS = {
    "waits itself": "threading.Event().wait()",
    "waits for a thread": "t = threading.Thread(target=threading.Event().wait); t.start(); t.join()",
    "waits in C": "ctypes.CDLL(None).sleep(60)",
    "holds the interpreter's lock in C": "ctypes.PyDLL(None).sleep(60)",
}


@pytest.mark.parametrize("how", HANGS)
def test_a_hanging_test_ends_the_run(tmp_path: Path, how: str) -> None:
    """With the configuration of all tests, but for the numbers of seconds."""
    hanging = tmp_path / "test_hanging.py"
    hanging.write_text(
        f"import ctypes, threading\n\ndef test_hangs():\n    {HANGS[how]}\n\ndef test_next():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(REPO / "pyproject.toml")]
    command += ["-o", "timeout=1", "-o", "faulthandler_timeout=5", str(hanging)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=50, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "Timeout" in said and re.search(r'test_hanging\.py", line 4,? in test_hangs', said), said
