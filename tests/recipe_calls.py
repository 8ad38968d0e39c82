"""All calls of Kaldi's four training programs in the recipes of a real Kaldi, as the recipes' shell would make them.

A script is not run: its assignments up to the call are, in their order, in a shell that can do nothing else; then the
shell takes the call apart. Variables that nothing is put into get a value that suits the option.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.paths import kaldi_root

_CALL = re.compile(r"steps/nnet3/train_(raw_)?(rnn|dnn)\.py\s")
_ASSIGNMENT = re.compile(r"^\s*(?:local\s+|export\s+)?([A-Za-z_]\w*)=")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)")
_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "SHELLOPTS", "BASH_ENV", "IFS")
# `exit` must not end the shell.
_STUBS = "exit() { :; }\ntree-info() { echo num-pdfs 120; }\nfeat-to-dim() { echo 40; }\n"
_WORDS = ("dir", "scp", "cmd", "opts", "email", "lang", "model", "schedule")  # options whose values are no numbers


@dataclass(frozen=True)
class RecipeCall:
    """A call: the script, the program (``rnn``, ``raw-dnn`` ...) and its arguments."""

    script: str
    program: str
    arguments: tuple[str, ...]


@functools.lru_cache(maxsize=1)
def recipe_calls() -> list[RecipeCall]:
    """Every call in the recipes' scripts; a script that is linked or copied counts once."""
    egs, found, seen = kaldi_root() / "egs", [], set()
    for folder, _, files in os.walk(egs, followlinks=False):
        for name in sorted(files):
            path = Path(folder) / name
            if path.suffix != ".sh" or path.is_symlink() or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            source = path.read_text(encoding="utf-8", errors="replace")
            source = source.replace("\\\n", " ")
            for match in _CALL.finditer(source):
                line = source[source.rfind("\n", 0, match.start()) + 1 : match.start()]
                if line.lstrip().startswith(("#", "echo")):
                    continue
                program = ("raw-" if match[1] else "") + match[2]
                text = _command(source[match.end() :])
                arguments = _evaluated(source[: match.start()], text)
                found.append(RecipeCall(str(path.relative_to(egs)), program, arguments))
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


def _evaluated(before: str, text: str) -> tuple[str, ...]:
    lines = []
    for line in before.splitlines():
        name = _ASSIGNMENT.match(line)
        if name is None or name[1] in _KEPT or line.count("'") % 2 or line.count('"') % 2 or line.endswith(("(", "|")):
            continue
        lines.append(f"eval {shlex.quote(line.strip().removeprefix('local '))} 2>/dev/null")
    # What the shell would find empty takes the next option for its value, or is no number.
    lines += [f': "${{{name}:={value}}}"' for name, value in _plausible(text)]
    script = "\n".join([_STUBS, "dir=exp/x", *lines, f"printf '%s\\0' {text}"])
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True, text=True, timeout=20, check=False, cwd="/", stdin=subprocess.DEVNULL,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )  # fmt: skip
    return tuple(done.stdout.split("\0")[:-1])


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
    path = s5 / "steps" / "nnet3" / f"train_{program.replace('-', '_')}.py"
    done = subprocess.run(
        [sys.executable, "-c", _THEIRS.replace("PROGRAM", repr(str(path)))],
        input=json.dumps([list(call) for call in calls]), cwd=s5,
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    answers: list[dict[str, Any] | str] = json.loads(done.stdout)
    return answers
