"""Compiles our own C files with every warning an error, and checks their format; prints what is wrong.

``python csrc/check.py`` exits with status 1 if anything is. The format is checked where clang-format is
installed (it is among the ``dev`` extras). ``CC`` names the compiler, by default ``cc``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

from build_csrc import CSRC, SOURCES, STANDARD, STRICT_WARNINGS


def main() -> int:
    """Check all of csrc/; returns the exit status."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = [*STANDARD, *STRICT_WARNINGS, "-Werror", "-fsyntax-only"]
    commands = [[*compiler, *flags, str(CSRC / name)] for name in SOURCES]
    formatter = shutil.which("clang-format", path=os.pathsep.join([os.path.dirname(sys.executable), os.defpath]))
    if formatter is None:
        print("check.py: clang-format is not installed, the format is not checked", file=sys.stderr)
    else:
        files = [str(path) for path in sorted(CSRC.glob("*.[ch]"))]
        commands.append([formatter, "--dry-run", "-Werror", *files])
    return 1 if sum(subprocess.run(command, check=False).returncode != 0 for command in commands) else 0


if __name__ == "__main__":
    sys.exit(main())
