"""The best word error rate of decoding directories, whichever back end scored them.

``python -m kaldi_mpi.embedded.best_wer DECODE_DIR...`` prints a line per directory, as
``grep WER DECODE_DIR/wer_* | utils/best_wer.sh`` does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from kaldi_mpi.embedded.command import run_command
from kaldi_mpi.errors import DataError

_WER = re.compile(r"^%WER (\S+) \[.*", re.MULTILINE)


def best_wer(files: Iterable[str | Path]) -> str:
    """The ``%WER`` line of the file with the smallest rate, followed by the file's name.

    Args:
        files: ``wer_*`` files; the first of equal ones wins.

    Raises:
        DataError: a file cannot be read, none has a ``%WER`` line, or there are no files.
    """
    best: tuple[float, str] | None = None
    for file in files:
        try:
            match = _WER.search(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=str(file)) from error
        if match is not None and (best is None or float(match[1]) < best[0]):
            best = (float(match[1]), f"{match[0].strip()} {file}")
    if best is None:
        raise DataError("no wer_* file with a %WER line")
    return best[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="kaldi_mpi.embedded.best_wer", description=__doc__)
    parser.add_argument("decode_dir", nargs="+")
    for directory in parser.parse_args(arguments).decode_dir:
        files = sorted(Path(directory).glob("wer_*_*"))
        if not files:
            raise DataError("it has no wer_* files: was it scored?", file=str(directory))
        print(best_wer(files))


if __name__ == "__main__":
    run_command(main)
