"""The recipes' scripts of a real Kaldi, and what their variables hold.

A script is not run: its assignments up to a place are, in their order, in a shell that can do nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.paths import kaldi_root

_ASSIGNMENT = re.compile(r"^\s*(?:local\s+|export\s+)?([A-Za-z_]\w*)=")
_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "SHELLOPTS", "BASH_ENV", "IFS")
# `exit` must not end the shell.
_STUBS = "exit() { :; }\nfeat-to-dim() { echo 40; }\n"


def scripts() -> Iterator[tuple[str, str]]:
    """(path below egs, text) of each; one that is linked or copied counts once."""
    egs, seen = kaldi_root() / "egs", set()
    for folder, _, files in os.walk(egs, followlinks=False):
        for name in sorted(files):
            path = Path(folder) / name
            if path.suffix != ".sh" or path.is_symlink() or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            yield str(path.relative_to(egs)), path.read_text(encoding="utf-8", errors="replace")


def evaluated(
    before: str, command: str, given: Sequence[str] = (), more: Sequence[str] = (), kept: Sequence[str] = ()
) -> str:
    """What `command` prints in a shell that knows a script's variables.

    Args:
        before: the script up to the place.
        given: lines at the beginning.
        more: lines after the script's own assignments.
        kept: further variables that the script must not set.
    """
    lines = []
    for line in before.replace("\\\n", " ").splitlines():
        name = _ASSIGNMENT.match(line)
        if name is None or name[1] in (*_KEPT, *kept):
            continue
        if line.count("'") % 2 or line.count('"') % 2 or line.rstrip().endswith(("(", "|")):
            continue  # it goes on in another line
        # What cannot be found out here must not end the shell.
        lines.append(f"eval {shlex.quote(line.strip().removeprefix('local '))} 2>/dev/null")
    done = subprocess.run(
        ["bash", "-c", "\n".join([_STUBS, *given, *lines, *more, command])],
        capture_output=True, text=True, timeout=20, check=False, cwd="/", stdin=subprocess.DEVNULL,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )  # fmt: skip
    return done.stdout
