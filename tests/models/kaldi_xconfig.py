"""Final configs as a real Kaldi's own xconfig modules make them, of many xconfigs in one process.

    python -m tests.models.kaldi_xconfig KALDI_ROOT < texts.json > lines.json

Of each text either the lines, or a string: why Kaldi's parser refuses it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.paths import REPO, kaldi_root

# Under Python 3, Kaldi's modules write some quotients as 256.0 (a projection's default width, filters of a residual
# block), which its programs then refuse; Python 2 wrote 256, as we do.
_COUNTS = re.compile(r"\b((?:[\w-]+-)?dim|num-filters-in|num-filters-out|dim-offset|time-offsets)=(\S+)")


def kaldi_lines(texts: Sequence[str], folder: Path) -> list[list[str] | str]:
    """What a real Kaldi makes of each; files that layers write (idct) are relative to `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.kaldi_xconfig", str(kaldi_root())],
        input=json.dumps(list(texts)), capture_output=True, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPO)}, timeout=300, check=True,
    )  # fmt: skip
    found: list[list[str] | str] = json.loads(done.stdout)
    return found


def comparable(lines: Iterable[str]) -> list[str]:
    """Config lines without what means nothing: comments, empty lines, spaces in a row or after a comma."""
    plain = (re.sub(r"\s*,\s*", ",", " ".join(line.split("#")[0].split())) for line in lines)
    return [_COUNTS.sub(lambda m: f"{m[1]}=" + re.sub(r"(\d)\.0\b", r"\1", m[2]), line) for line in plain if line]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.path.insert(0, f"{sys.argv[1]}/egs/wsj/s5/steps")
    parser = importlib.import_module("libs.nnet3.xconfig.parser")
    found: list[list[str] | str] = []
    for text in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.xconfig"
            path.write_text(text)
            try:
                layers = parser.read_xconfig_file(str(path))
                lines = [line for layer in layers for name, line in layer.get_full_config() if name == "final"]
            except Exception as error:  # noqa: BLE001 - whatever it says, it is Kaldi's refusal
                found.append(f"{type(error).__name__}: {error}")
            else:
                found.append(lines)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
