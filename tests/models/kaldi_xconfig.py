"""Run with a real Kaldi's own xconfig modules: final.config's lines of many xconfigs, in one process.

    python -m tests.models.kaldi_xconfig KALDI_ROOT < texts.json > lines.json

Of each text either the lines, or a string: why Kaldi's parser refuses it.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path


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
