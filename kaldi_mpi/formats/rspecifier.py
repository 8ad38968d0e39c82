"""Kaldi's rspecifiers: ``ark:feats.ark``, ``scp,p:feats.scp``, ``ark,s,cs:gunzip -c feats.*.gz |``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_KINDS = ("ark", "scp")
# b, t: binary or text is found out from the data. o, bg, cs: how a program goes through the table, and the
# loader does in its own way. The others are in the class.
_OPTIONS = ("b", "t", "o", "no", "p", "np", "s", "ns", "cs", "ncs", "bg")


@dataclass(frozen=True)
class Rspecifier:
    """A table to be read.

    Attributes:
        kind: ``ark``: an archive; ``scp``: a script file.
        rxfilename: a path, or a command that ends in ``|``.
        permissive: option ``p``: entries that cannot be read are as if they were not there.
        sorted: option ``s``: the keys must be in the C locale's order.
    """

    kind: str
    rxfilename: str
    permissive: bool = False
    sorted: bool = False


def parse_rspecifier(text: str) -> Rspecifier | None:
    """Take an rspecifier apart; None for what is none (a path, even one with a colon in it).

    The rule is Kaldi's: options before the first colon, between commas or spaces, one of them ``ark`` or
    ``scp``, all of them known; of two that contradict each other the later one counts.
    """
    before, colon, rxfilename = text.partition(":")
    options = re.split("[, ]", before)
    kinds = [option for option in options if option in _KINDS]
    if not colon or text[-1:].isspace() or len(kinds) != 1:
        return None
    if any(option not in (*_KINDS, *_OPTIONS) for option in options):
        return None
    return Rspecifier(kinds[0], rxfilename, _last(options, "p", "np"), _last(options, "s", "ns"))


def _last(options: list[str], yes: str, no: str) -> bool:
    said = [option for option in options if option in (yes, no)]
    return bool(said) and said[-1] == yes
