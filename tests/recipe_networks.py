"""All networks of the recipes of a real Kaldi: their xconfigs, as the recipes' scripts write them.

The variables in them get the values that the scripts' assignments give them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from tests.recipe_scripts import evaluated, scripts

_HEREDOC = re.compile(
    r"^[^#\n]*cat\s*(?:>+\s*(?P<file1>\S+\bxconfig)\s*)?<<-?\s*(?P<quote>['\"]?)(?P<end>\w+)(?P=quote)"
    r"\s*(?:>+\s*(?P<file2>\S+\bxconfig))?\s*\n(?P<text>.*?)^\s*(?P=end)\s*$",
    re.M | re.S,
)
# Layers for each language are added by a loop after the document.
_LOOP = re.compile(r"^(?:\s*#[^\n]*\n|\s*\n)*(?P<loop>\s*for [^\n]*\n.*?^\s*done) *>> *\S+\bxconfig$", re.M | re.S)
_VARIABLE = re.compile(r"\$\{?(\w+)")
_SET = re.compile(r"^\s*(\w+)=(.*)$", re.M)
_BRANCH = re.compile(r"^\s*(if|elif|else|fi)\b")
# What a script takes from a data directory, a tree or an environment of its own.
_GIVEN = {
    "num_targets": "2000", "feat_dim": "40", "ivector_dim": "100", "num_leaves": "2000", "num_pdfs": "2000",
    "dir": "exp", "num_targets_phone": "60", "num_langs": "2", "lang_list": "(one two)",
}  # fmt: skip
_OWN = {"hi_mia/w1/local/chain/tuning/run_tdnn_1a.sh": {"feat_dim": "71"}}
# The same as _GIVEN, unless the script itself says how many.
_ELSE = {"dim": "40", "input_dim": "40", "embedding_dim": "200"}

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
    """A network: where it stands, its kind (``chain``, ``nnet3`` or ``rnnlm``) and its xconfig.

    `branches`: which of the script's branches were taken before it; ``all``: one after the other. `documents`: how
    many documents of how many scripts say the same, but for their directories and number of targets.
    """

    script: str
    kind: str
    text: str
    branches: str = "all"
    documents: int = 1


@functools.lru_cache(maxsize=1)
def recipe_networks() -> list[RecipeNetwork]:
    """Every distinct xconfig of the recipes, by what it says; also those that a script makes with other branches."""
    found: dict[str, RecipeNetwork] = {}
    for script, source in scripts():
        kind = "rnnlm" if "rnnlm" in script else "chain" if "chain" in script else "nnet3"
        for match in _HEREDOC.finditer(source) if "xconfig" in source else ():
            if not (match["file1"] or match["file2"]):
                continue
            before, loop = source[: match.start()], _LOOP.match(source[match.end() :])
            names = _names(before, match["text"])
            ways = {_only(branches, before, names): branches for branches in ("else", "then", "all")}
            for way, branches in reversed(ways.items()):
                text = _filled_in(script, way, match["text"], loop["loop"] if loop else "", match["quote"])
                lines = (line.split("#")[0].rstrip() for line in text.splitlines())
                key = "\n".join(" ".join(line.split()) for line in lines if line)
                if not key:
                    continue
                if key not in found:
                    found[key] = RecipeNetwork(script, kind, text, branches, 0)
                if branches == "all":
                    found[key] = replace(found[key], documents=found[key].documents + 1)
    return sorted(found.values(), key=lambda network: (network.script, network.branches))


def _filled_in(script: str, before: str, document: str, loop: str, quote: str) -> str:
    """The document with the script's variables put in, and what a loop adds to it."""
    values = {**_GIVEN, **_OWN.get(script, {})}
    given = [_STUBS, *(f"{name}={value}" for name, value in values.items())]
    otherwise = [f'[ -n "${name}" ] || {name}={value}' for name, value in _ELSE.items()]
    command = f"cat <<{quote}{_END}{quote}\n{document}{_END}\n{loop}\n"
    return evaluated(before, command, given, more=otherwise, kept=list(_GIVEN))


def _names(before: str, document: str) -> set[str]:
    """The variables that a document depends on."""
    names: set[str] = set()
    new = set(_VARIABLE.findall(document))
    while new:
        names |= new
        new = {
            inner for name, value in _SET.findall(before) if name in names for inner in _VARIABLE.findall(value)
        } - names
    return names - set(_GIVEN)


def _only(branches: str, before: str, names: set[str]) -> str:
    """A script without the branches that are not taken: ``then``, or ``else``; ``all``: as it stands.

    What the place itself stands in, what depends on the stage that a script is begun from, and what sets none of
    `names`, is always taken.
    """
    lines = before.replace("\\\n", " ").splitlines()
    taken = [True] * len(lines)
    if branches == "all":
        return "\n".join(lines)
    open_: list[tuple[int, int]] = []  # begin of an if, and of its first branch after the then-branch
    for number, line in enumerate(lines):
        word = _BRANCH.match(line)
        if word is None:
            continue
        if word[1] == "if" and not re.search(r"\bfi\b", line):
            open_.append((number, 0))
        elif word[1] in ("elif", "else") and open_:
            open_[-1] = (open_[-1][0], open_[-1][1] or number)
        elif word[1] == "fi" and open_:
            start, other = open_.pop()
            first, last = (other or number, number) if branches == "then" else (start, other or number)
            if "stage" in lines[start] or not names & {name for name, _ in _SET.findall("\n".join(lines[first:last]))}:
                continue
            taken[first:last] = [False] * (last - first)
    return "\n".join(line for line, keep in zip(lines, taken, strict=True) if keep)
