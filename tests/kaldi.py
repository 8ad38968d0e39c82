"""Programs of a real Kaldi, for tests that compare with what they make."""

from __future__ import annotations

import os
import subprocess

from tests.paths import kaldi_root


def nnet3(program: str, *words: str) -> None:
    """Run one of src/nnet3bin; it must succeed. Skips the test where no Kaldi is given."""
    done = subprocess.run(
        [str(kaldi_root() / "src/nnet3bin" / program), *words], capture_output=True, text=True, check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
