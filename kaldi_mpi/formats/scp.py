"""Kaldi's tables as they are named: rspecifiers, text files of lines ``key value``, and where a value points."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.stream import InputStream

_KINDS = ("ark", "scp")
# b, t: binary or text is found out from the data. o, bg, cs: how a program goes through the table, and the
# loader does in its own way. The others are in the class.
_OPTIONS = ("b", "t", "o", "no", "p", "np", "s", "ns", "cs", "ncs", "bg")

# A row range may exceed the matrix by this many frames and is then clipped: the rule of Kaldi's reader,
# because the times in segments are rounded.
ROW_RANGE_TOLERANCE = 3


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


class TextTable(dict[str, str]):
    """Keys and values of a text file (scp, utt2spk), in its order.

    Attributes:
        name: the file, or the command that printed it; for messages.
    """

    def __init__(self, name: str, values: Mapping[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.name = name


def read_table(path: str | os.PathLike[str], *, allow_empty_value: bool = False) -> TextTable:
    """Read a text file of lines ``key value`` (scp, utt2spk); the value may contain spaces.

    Args:
        path: the file.
        allow_empty_value: whether a line may hold a key alone (an empty transcript in ``text``).

    Raises:
        DataError: the file cannot be read, a line has no value, or a key comes twice; names file and key.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as stream:
            return parse_table(stream, name=name, allow_empty_value=allow_empty_value)
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=name) from error


def parse_table(lines: Iterable[bytes], *, name: str, allow_empty_value: bool = False) -> TextTable:
    """`read_table` of lines that are there already; `name` is their file, for messages."""
    table = TextTable(name)
    at = 0
    for number, line in enumerate(lines, 1):
        fields = line.split(maxsplit=1)  # at ASCII blanks, as in Kaldi: others may be part of a word
        if not fields:
            raise DataError(f"line {number} is blank: a key and a value are expected", file=name)
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"line {number} is not text in UTF-8", file=name, offset=at + error.start) from error
        key, value = fields[0].decode("utf-8"), b"".join(fields[1:]).rstrip().decode("utf-8")
        if not (value or allow_empty_value):
            raise DataError(f"line {number} has no value after the key", file=name, key=key)
        if key in table:
            raise DataError(f"the key is there twice (again in line {number})", file=name, key=key)
        table[key] = value
        at += len(line)
    return table


def read_script(rxfilename: str) -> TextTable:
    """The lines of a script file, which may be what a command prints.

    Raises:
        DataError: see `read_table`; it is standard input; the command fails.
    """
    if not rxfilename.endswith("|"):
        if rxfilename in ("", "-"):
            raise DataError("a script file cannot be standard input, which the ranks do not share", file="-")
        return read_table(rxfilename)
    with InputStream(rxfilename) as stream:
        text = stream.rest()
        stream.check_status()
    return parse_table(text.splitlines(keepends=True), name=rxfilename)


def check_sorted(keys: Sequence[str], name: str) -> None:
    """Check the promise of the rspecifier's option ``s``.

    Raises:
        DataError: a key is not behind the one before it in the C locale's order.
    """
    for before, key in itertools.pairwise(keys):
        if key.encode() <= before.encode():
            raise DataError(f"not in the order that option s promises: it comes after {before}", file=name, key=key)


class Location(NamedTuple):
    """Where a matrix lies: ``path:offset[first_row:last_row,first_col:last_col]``.

    Attributes:
        path: the archive, relative to the working directory as in Kaldi; or a command, ending in ``|``.
        offset: byte offset of its ``\\0B``; 0 for a command.
        first_row: first row that belongs to the key.
        last_row: the last one (inclusive), or None for all rows.
        first_col: first column that belongs to the key.
        last_col: the last one (inclusive), or None for all columns. `tables.locate` leaves no column ranges.
    """

    path: str
    offset: int
    first_row: int = 0
    last_row: int | None = None
    first_col: int = 0
    last_col: int | None = None

    @property
    def is_command(self) -> bool:
        """Whether the matrix is what a command prints."""
        return self.path.endswith("|")


def parse_location(rxfilename: str, *, file: str, key: str | None) -> Location:
    """Take a script file's value apart.

    Args:
        rxfilename: ``path``, ``path:offset`` or ``command |``, each of them also with a range behind it:
            ``[r0:r1]`` (rows, inclusive), ``[r0:r1,c0:c1]`` or ``[:,c0:c1]``.
        file: the script file, for messages.
        key: the key of the line, for messages.

    Raises:
        DataError: standard input, an output pipe, or a range that makes no sense.
    """
    rest = rxfilename
    ranges: tuple[int, int | None, int, int | None] = (0, None, 0, None)
    if rest.endswith("]"):
        rest, bracket, text = rest[:-1].rpartition("[")
        if not bracket:
            raise DataError(f"'{rxfilename}' ends in ']' without '['", file=file, key=key)
        ranges = _parse_ranges(text, file=file, key=key)
    if rest.endswith("|") and not rest.startswith("|"):
        if not rest[:-1].strip():
            raise DataError(f"'{rxfilename}' is a pipe from no command", file=file, key=key)
        return Location(rest, 0, *ranges)
    if "|" in rest:
        raise DataError(f"'{rxfilename}': a command to read from ends in '|'", file=file, key=key)
    path, colon, digits = rest.rpartition(":")
    if not (colon and digits.isascii() and digits.isdecimal()):
        path, digits = rest, "0"
    if path in ("", "-"):
        raise DataError(
            f"'{rxfilename}' is standard input, which cannot be read again in every epoch and which the ranks "
            "of a parallel run do not share; write it to a file",
            file=file,
            key=key,
        )
    if path != path.strip():
        raise DataError(f"'{rxfilename}': a blank beside the file's name", file=file, key=key)
    if len(digits) > 18:
        raise DataError(f"offset {digits} is beyond any file", file=file, key=key)
    return Location(path, int(digits), *ranges)


def _parse_ranges(text: str, *, file: str, key: str | None) -> tuple[int, int | None, int, int | None]:
    """``r0:r1`` or ``:``, with ``,c0:c1`` or ``,:`` behind it."""
    rows, comma, columns = text.partition(",")
    first_row, last_row = _parse_range(rows, f"row range [{text}]", file=file, key=key)
    first_col, last_col = _parse_range(columns, f"column range [{text}]", file=file, key=key) if comma else (0, None)
    return first_row, last_row, first_col, last_col


def _parse_range(text: str, what: str, *, file: str, key: str | None) -> tuple[int, int | None]:
    if text == ":":
        return 0, None
    begin, _, end = text.partition(":")
    if all(part.isascii() and part.isdecimal() and len(part) < 10 for part in (begin, end)):
        first, last = int(begin), int(end)
        if first <= last:
            return first, last
    raise DataError(f"invalid {what}", file=file, key=key)


def rows_in_range(location: Location, rows: int, *, file: str, key: str) -> int:
    """How many rows of a matrix with `rows` rows belong to `location`, by Kaldi's rule for ranges.

    Raises:
        DataError: the range exceeds the matrix by more than the two frames that Kaldi tolerates.
    """
    if location.last_row is None:
        return rows
    if location.last_row >= rows + ROW_RANGE_TOLERANCE or location.first_row >= rows:
        raise DataError(
            f"row range [{location.first_row}:{location.last_row}] of a matrix with {rows} rows",
            file=file,
            key=key,
        )
    return min(location.last_row, rows - 1) - location.first_row + 1


def columns_in_range(location: Location, cols: int, *, file: str, key: str) -> int:
    """How many columns of a matrix with `cols` columns belong to `location`; they are never clipped.

    Raises:
        DataError: the range exceeds the matrix.
    """
    if location.last_col is None:
        return cols
    if location.last_col >= cols:
        raise DataError(
            f"column range [{location.first_col}:{location.last_col}] of a matrix with {cols} columns",
            file=file,
            key=key,
        )
    return location.last_col - location.first_col + 1
