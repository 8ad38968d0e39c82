"""All networks of the recipes of a real Kaldi: their xconfigs, as the recipes' scripts write them.

The variables in them get the values that the scripts' assignments give them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from tests.recipe_scripts import evaluated, scripts

_HEREDOC = re.compile(
    r"^[^#\n]*cat\s*(?:>+\s*(?P<file1>\S+\.xconfig)\s*)?<<-?\s*(?P<quote>['\"]?)(?P<end>\w+)(?P=quote)"
    r"\s*(?:>+\s*(?P<file2>\S+\.xconfig))?\s*\n(?P<text>.*?)^\s*(?P=end)\s*$",
    re.M | re.S,
)
# What a script takes from a data directory, a tree or an environment of its own.
_GIVEN = {
    "num_targets": "2000", "feat_dim": "40", "ivector_dim": "100", "num_leaves": "2000", "dim": "40",
    "input_dim": "40", "num_pdfs": "2000", "dir": "exp", "num_targets_phone": "60",
}  # fmt: skip

_END = "END_OF_XCONFIG"
# Some recipes print by Python 2.
_STUBS = """
parenthesised() { sed -E 's/^ *print +\\(?(.*[^)])\\)?;? *$/print(\\1)/'; }
python() { if [ $# -eq 0 ]; then parenthesised | python3; else python3 "$@"; fi; }
python2() { python "$@"; }
python2.7() { python "$@"; }
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
    found: dict[str, RecipeNetwork] = {}
    for script, source in scripts():
        for match in _HEREDOC.finditer(source) if ".xconfig" in source else ():
            if not (match["file1"] or match["file2"]):
                continue
            text = match["text"] if match["quote"] else _filled_in(source[: match.start()], match["text"])
            key = "\n".join(line.split("#")[0].rstrip() for line in text.splitlines() if line.split("#")[0].strip())
            if key and key not in found:
                found[key] = RecipeNetwork(script, "chain" if "chain" in script else "nnet3", text)
    return sorted(found.values(), key=lambda network: network.script)


def _filled_in(before: str, document: str) -> str:
    """The document with the script's variables put in."""
    given = [_STUBS, *(f"{name}={value}" for name, value in _GIVEN.items())]
    return evaluated(before, f"cat <<{_END}\n{document}{_END}\n", given, kept=list(_GIVEN))
