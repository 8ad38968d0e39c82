"""All networks of the recipes of a real Kaldi: their xconfigs, as the recipes' scripts write them.

A script is not run: its assignments up to the xconfig are, in their order, in a shell that can do nothing else.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.paths import kaldi_root

_HEREDOC = re.compile(
    r"^[^#\n]*cat\s*(?:>+\s*(?P<file1>\S+\.xconfig)\s*)?<<-?\s*(?P<quote>['\"]?)(?P<end>\w+)(?P=quote)"
    r"\s*(?:>+\s*(?P<file2>\S+\.xconfig))?\s*\n(?P<text>.*?)^\s*(?P=end)\s*$",
    re.M | re.S,
)
_ASSIGNMENT = re.compile(r"^\s*(?:local\s+|export\s+)?([A-Za-z_]\w*)=")
# What a script takes from a data directory, a tree or an environment of its own.
_GIVEN = {
    "num_targets": "2000", "feat_dim": "40", "ivector_dim": "100", "num_leaves": "2000", "dim": "40",
    "input_dim": "40", "num_pdfs": "2000", "dir": "exp", "num_targets_phone": "60",
}  # fmt: skip

# `exit` must not end the shell; some recipes print by Python 2.
_STUBS = """exit() { :; }
parenthesised() { sed -E 's/^ *print +\\(?(.*[^)])\\)?;? *$/print(\\1)/'; }
python() { if [ $# -eq 0 ]; then parenthesised | python3; else python3 "$@"; fi; }
python2() { python "$@"; }
python2.7() { python "$@"; }
feat-to-dim() { echo 40; }
tree-info() { echo num-pdfs 2000; }
"""


@dataclass(frozen=True)
class RecipeNetwork:
    """A network: where it stands, its kind (``chain`` or ``nnet3``) and its xconfig."""

    script: str
    kind: str
    text: str


@functools.lru_cache(maxsize=1)
def recipe_networks() -> list[RecipeNetwork]:
    """Every distinct xconfig of the recipes, by what it says."""
    egs = kaldi_root() / "egs"
    found: dict[str, RecipeNetwork] = {}
    seen: set[Path] = set()
    for folder, _, files in os.walk(egs, followlinks=False):
        for name in sorted(files):
            path = Path(folder) / name
            if path.suffix != ".sh" or path.is_symlink() or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            source = path.read_text(encoding="utf-8", errors="replace")
            if ".xconfig" not in source:
                continue
            for match in _HEREDOC.finditer(source):
                if not (match["file1"] or match["file2"]):
                    continue
                text = _evaluated(source[: match.start()], match)
                kind = "chain" if "chain" in str(path.relative_to(egs)) else "nnet3"
                key = "\n".join(line.split("#")[0].rstrip() for line in text.splitlines() if line.split("#")[0].strip())
                if key and key not in found:
                    found[key] = RecipeNetwork(str(path.relative_to(egs)), kind, text)
    return sorted(found.values(), key=lambda network: network.script)


def _evaluated(before: str, match: re.Match[str]) -> str:
    """The document with the script's variables put in."""
    if match["quote"]:
        return match["text"]
    assignments = []
    for line in before.replace("\\\n", " ").splitlines():
        name = _ASSIGNMENT.match(line)
        if name is None or line.count("'") % 2 or line.count('"') % 2 or line.rstrip().endswith(("(", "|")):
            continue
        if name[1] in _GIVEN or name[1] in ("PATH", "LD_LIBRARY_PATH", "HOME", "SHELLOPTS", "BASH_ENV"):
            continue
        assignments.append(line.strip().removeprefix("local "))
    given = [f"{name}={value}" for name, value in _GIVEN.items()]
    # What cannot be found out here must not end the shell.
    script = "\n".join([_STUBS, *given, *(f"eval {shlex.quote(line)} 2>/dev/null" for line in assignments)])
    document = match["text"]
    end = "END_OF_XCONFIG"
    done = subprocess.run(
        ["bash", "-c", f"{script}\ncat <<{end}\n{document}{end}\n"],
        capture_output=True, text=True, timeout=20, check=False, cwd="/", stdin=subprocess.DEVNULL,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )  # fmt: skip
    return done.stdout
