"""All calls of Kaldi's five training programs in the recipes of a real Kaldi, as the recipes' shell would make them.

The shell that knows a script's assignments takes the call apart. Variables that nothing is put into get a value that
suits the option.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.paths import kaldi_root
from tests.recipe_scripts import evaluated, scripts

_CALL = re.compile(r"steps/nnet3/(?:train_(raw_)?(rnn|dnn)|chain/train)\.py\s")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)")
_STUBS = "tree-info() { echo num-pdfs 120; }"
# What a script's defaults give where its branches, of which all are gone through here, exclude each other.
_OWN = {"cl_english/v1/local/chain/run_lwf_clean_1a.sh": ['lwf_opts="--lwf-scale=0.0 --lwf-den-scale=0.6"']}
_WORDS = ("dir", "scp", "cmd", "opts", "email", "lang", "model", "schedule")  # options whose values are no numbers


@dataclass(frozen=True)
class RecipeCall:
    """A call: the script, the program (``rnn``, ``raw-dnn`` ...) and its arguments."""

    script: str
    program: str
    arguments: tuple[str, ...]


@functools.lru_cache(maxsize=1)
def recipe_calls() -> list[RecipeCall]:
    """Every call in the recipes' scripts."""
    found = []
    for script, text in scripts():
        source = text.replace("\\\n", " ")
        for match in _CALL.finditer(source):
            line = source[source.rfind("\n", 0, match.start()) + 1 : match.start()]
            if line.lstrip().startswith(("#", "echo")):
                continue
            program = "chain" if match[2] is None else ("raw-" if match[1] else "") + match[2]
            words = _arguments(source[: match.start()], source[match.end() :], _OWN.get(script, ()))
            found.append(RecipeCall(script, program, words))
    return sorted(found, key=lambda call: (call.script, call.arguments))


def _command(rest: str) -> str:
    """What belongs to the command that `rest` goes on with: up to its line's end, or what ends it in shell."""
    quote = ""
    for place, letter in enumerate(rest):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "\n;|&><" or (letter == "#" and rest[place - 1].isspace()):
            return rest[:place]
    return rest


def _arguments(before: str, rest: str, own: Sequence[str]) -> tuple[str, ...]:
    """The words of the call that `rest` begins with; `own`: assignments after the script's."""
    text = _command(rest)
    # What the shell would find empty takes the next option for its value, or is no number.
    more = [*own, *(f': "${{{name}:={value}}}"' for name, value in _plausible(text))]
    return tuple(evaluated(before, f"printf '%s\\0' {text}", [_STUBS, "dir=exp/x"], more).split("\0")[:-1])


def _plausible(text: str) -> Iterator[tuple[str, str]]:
    """(variable, value) of the variables in a call, by the option that each belongs to."""
    option = ""
    for word in re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""", text):
        if word.startswith("--"):
            option = word[2:].partition("=")[0]
        for name in _VARIABLE.findall(word):
            last = re.split(r"[.-]", option)[-1]
            if option in (
                "trainer.dropout-schedule",
                "egs.opts",
                "trainer.add-option",
                "image.augmentation-opts",
                "reporting.email",
            ):
                continue
            if last in _WORDS:
                yield name, "run.pl" if last == "cmd" else f"exp/{name}"
            elif option in ("cleanup", "cleanup.remove-egs", "trainer.compute-per-dim-accuracy", "use-dense-targets"):
                yield name, "true"
            elif option == "use-gpu":
                yield name, "yes"
            else:
                yield name, "1"


_THEIRS = """
import argparse, importlib.util, json, sys
class Captured(Exception): pass
def capture(self, *words):
    raise Captured(self)
parse, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, capture
sys.argv = ["x"]
sys.stdout = sys.stderr
spec = importlib.util.spec_from_file_location("program", PROGRAM)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    module.get_args()
except Captured as caught:
    parser = caught.args[0]
argparse.ArgumentParser.parse_args = parse
def fail(message):
    raise ValueError(message)
parser.error = fail
answers = []
for words in json.load(sys.stdin):
    try:
        answers.append(vars(parser.parse_args(words)))
    except Exception as error:
        answers.append(str(error))
sys.__stdout__.write(json.dumps(answers))
"""


def kaldi_parses(program: str, calls: Sequence[Sequence[str]]) -> list[dict[str, Any] | str]:
    """What Kaldi's own program makes of each call: its options by their names in its source, or why it refuses."""
    s5 = kaldi_root() / "egs" / "wsj" / "s5"
    path = s5 / "steps/nnet3" / ("chain/train.py" if program == "chain" else f"train_{program.replace('-', '_')}.py")
    done = subprocess.run(
        [sys.executable, "-c", _THEIRS.replace("PROGRAM", repr(str(path)))],
        input=json.dumps([list(call) for call in calls]), cwd=s5,
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    answers: list[dict[str, Any] | str] = json.loads(done.stdout)
    return answers
