"""Prints how many source files each package has, and their lines: ``make lines``."""

from __future__ import annotations

import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

SOURCES = ["*.py", "*.pyi", "*.c", "*.h", "*.sh"]


def main() -> None:
    """Count the files that git knows below the working directory."""
    packages: dict[str, list[int]] = defaultdict(list)
    for name in subprocess.run(
        ["git", "ls-files", *SOURCES], capture_output=True, text=True, check=True
    ).stdout.split():
        lines = Path(name).read_bytes().count(b"\n")
        top, *below = Path(name).parts[:-1] or (".",)
        of = [f"{top}/{below[0]}" if below else f"{top}/*.py", f"{top} in all"] if top == "kaldi_mpi" else [top]
        for package in [*of, "in all"]:
            packages[package].append(lines)
    print(f"{'':24}{'files':>8}{'median':>8}{'lines':>8}")
    for package, counts in sorted(packages.items(), key=lambda item: (item[0] == "in all", item[0])):
        print(f"{package:24}{len(counts):8}{statistics.median(counts):8g}{sum(counts):8}")


if __name__ == "__main__":
    main()
