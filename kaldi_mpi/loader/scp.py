"""Kaldi's script files: tables ``key value``, and where a value that names a matrix points."""

from __future__ import annotations

import os
from typing import NamedTuple

from kaldi_mpi.errors import DataError

# A row range may exceed the matrix by this many frames and is then clipped: the rule of Kaldi's reader,
# because the times in segments are rounded.
ROW_RANGE_TOLERANCE = 3


class Location(NamedTuple):
    """Where a matrix lies: ``path:offset[first_row:last_row]``.

    Attributes:
        path: the archive, relative to the working directory as in Kaldi.
        offset: byte offset of its ``\\0B``.
        first_row: first row that belongs to the key.
        last_row: the last one (inclusive), or None for all rows.
    """

    path: str
    offset: int
    first_row: int = 0
    last_row: int | None = None


def read_table(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a text file of lines ``key value`` (scp, utt2spk); the value may contain spaces.

    Raises:
        DataError: the file cannot be read, a line has no value, or a key comes twice; names file and key.
    """
    name = os.fspath(path)
    table: dict[str, str] = {}
    try:
        with open(name, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                fields = line.split(maxsplit=1)
                if len(fields) < 2:
                    key = fields[0] if fields else None
                    raise DataError(f"line {number}: a key and a value are expected", file=name, key=key)
                key = fields[0]
                if key in table:
                    raise DataError(f"line {number}: the key comes twice", file=name, key=key)
                table[key] = fields[1].rstrip()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=name) from error
    except UnicodeDecodeError as error:
        raise DataError("not a text file in UTF-8", file=name, offset=error.start) from error
    return table


def parse_location(rxfilename: str, *, file: str, key: str) -> Location:
    """Take a script file's value apart.

    Args:
        rxfilename: ``path``, ``path:offset`` or either with ``[first:last]`` (rows, inclusive).
        file: the script file, for messages.
        key: the key of the line, for messages.

    Raises:
        DataError: a command, standard input, a column range, or a range that makes no sense.
    """
    rest, first, last = rxfilename, 0, None
    if rest.endswith("|") or rest.startswith("|"):
        raise DataError(
            f"'{rest}' is a command; only archives on disk (path:offset) can be read so far",
            file=file,
            key=key,
        )
    if rest.endswith("]"):
        rest, bracket, row_range = rest[:-1].rpartition("[")
        if not bracket:
            raise DataError(f"'{rxfilename}' ends in ']' without '['", file=file, key=key)
        first, last = _parse_range(row_range, file=file, key=key)
    path, colon, digits = rest.rpartition(":")
    if not (colon and digits.isascii() and digits.isdecimal()):
        path, digits = rest, "0"
    if path in ("", "-"):
        raise DataError(f"'{rxfilename}' does not name a file", file=file, key=key)
    if len(digits) > 18:
        raise DataError(f"offset {digits} is beyond any file", file=file, key=key)
    return Location(path, int(digits), first, last)


def _parse_range(text: str, *, file: str, key: str) -> tuple[int, int | None]:
    """``r0:r1`` or ``:``, with ``,:`` allowed for all columns."""
    rows, comma, columns = text.partition(",")
    if comma and columns != ":":
        raise DataError(f"column range [{text}] is not supported", file=file, key=key)
    if rows == ":":
        return 0, None
    begin, _, end = rows.partition(":")
    if all(part.isascii() and part.isdecimal() and len(part) < 10 for part in (begin, end)):
        first, last = int(begin), int(end)
        if first <= last:
            return first, last
    raise DataError(f"invalid row range [{text}]", file=file, key=key)


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
