"""Command lines in Kaldi's manner, on top of argparse.

Option names contain dots (``--trainer.optimization.momentum``); ``--name=value`` and ``--name value`` both
work and unique prefixes do; booleans are the strings true and false; an empty string means "not given" for
options that have no default. These are the rules of Kaldi's ``steps/nnet3/train_rnn.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from kaldi_mpi.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError, naming the option, where argparse would exit with 2."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError in one line."""
        raise ConfigError(f"{self.prog}: {message}")


def boolean(text: str) -> bool:
    """``true`` or ``false``, as Kaldi's scripts want them; any other string is an error."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text == "true"


def optional(text: str) -> str | None:
    """An empty string counts as not given."""
    return text or None


def number(kind: type) -> Callable[[str], float | int]:
    """A type for whole numbers (`kind` is int) or for any (float); the range is checked elsewhere."""

    def convert(text: str) -> float | int:
        try:
            value: float | int = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        return value

    return convert


def at_least(low: float, kind: Callable[[str], float] = int, exclusive: bool = False) -> Callable[[str], float | int]:
    """A type for numbers from `low` on (above it, if `exclusive`); `kind` is int or float."""

    def convert(text: str) -> float | int:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (value > low if exclusive else value >= low):
            raise argparse.ArgumentTypeError(f"expected a number {'above' if exclusive else 'from'} {low}, got {text}")
        return value

    return convert


def kaldi_options(text: str, known: Sequence[str], where: str) -> dict[str, str]:
    """Split a string of Kaldi options, ``--norm-means=false --norm-vars=false``, into a dictionary.

    Args:
        text: the string; options may be ``--name=value``, or ``--name`` alone for true.
        known: the names that may occur.
        where: what to call the string in an error, for example ``--feat.cmvn-opts``.

    Raises:
        ConfigError: a word that is not an option, or an option that is not in `known`.
    """
    found: dict[str, str] = {}
    for word in text.split():
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in known:
            raise ConfigError(f"{where}: {word!r} is not one of {', '.join('--' + k for k in known)}")
        found[name] = value if equals else "true"
    return found


class Words:
    """A command line of options that take one value each, taken apart by argparse's rules but all at once.

    argparse ends at the first mistake; here all of them are found. Where an abbreviated name could be one of several,
    those in `first` have precedence, so that a recipe's abbreviations stay unique whatever names are added to Kaldi's.

    Attributes:
        pairs: (name, value) in the order given, the names in full, without their dashes.
        complaints: what cannot be understood.

    Args:
        words: the command line.
        names: all that there are.
        first: those of them that Kaldi has.
    """

    def __init__(self, words: Sequence[str], names: Collection[str], first: Collection[str] = ()) -> None:
        self.pairs: list[tuple[str, str]] = []
        self.complaints: list[str] = []
        self._names, self._first = frozenset(names), frozenset(first)
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if not word.startswith("--") or word == "--":
                self.complaints.append(f"unrecognized arguments: {word}")
                continue
            name, equals, value = word[2:].partition("=")
            full = self._resolve(name, word)
            if not equals:
                if not rest or _looks_like_an_option(rest[0]):
                    if full is not None:
                        self.complaints.append(f"argument --{full}: expected one argument")
                    continue
                value = rest.pop(0)
            if full is not None:
                self.pairs.append((full, value))

    def _resolve(self, name: str, word: str) -> str | None:
        """The full name, or None, with a complaint."""
        if name in self._names:
            return name
        for group in (self._first, self._names):
            found = sorted(full for full in group if full.startswith(name)) if name else []
            if len(found) == 1:
                return found[0]
            if found:
                could = ", ".join(f"--{full}" for full in found)
                self.complaints.append(f"ambiguous option: --{name} could match {could}")
                return None
        self.complaints.append(f"unrecognized arguments: {word}")
        return None


def _looks_like_an_option(word: str) -> bool:
    """Whether argparse would not take it for a value: numbers and what has spaces are values."""
    if not word.startswith("-") or word == "-" or " " in word:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False
