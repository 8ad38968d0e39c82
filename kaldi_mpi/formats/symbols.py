"""Kaldi's symbol tables: ``words.txt`` and ``phones.txt``, one ``symbol number`` per line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write


class SymbolTable:
    """Symbols and their numbers, both ways.

    Args:
        numbers: symbol -> number.
        file: named in errors.
    """

    def __init__(self, numbers: Mapping[str, int], file: str | None = None) -> None:
        self._numbers = dict(numbers)
        self._symbols = {number: symbol for symbol, number in self._numbers.items()}
        self._file = file

    @classmethod
    def numbered(cls, symbols: Iterable[str]) -> SymbolTable:
        """A table that numbers `symbols` from 0."""
        return cls({symbol: number for number, symbol in enumerate(symbols)})

    @classmethod
    def read(cls, path: str | Path) -> SymbolTable:
        """Read a table.

        Raises:
            DataError: no such file, or a line that is not ``symbol number``.
        """
        numbers = {}
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the symbol table: {error}", file=str(path)) from error
        for count, line in enumerate(text.splitlines(), 1):
            fields = line.split()
            if len(fields) != 2 or not fields[1].isdecimal():
                raise DataError(f"line {count} is not 'symbol number': {line!r}", file=str(path))
            numbers[fields[0]] = int(fields[1])
        return cls(numbers, str(path))

    def write(self, path: str | Path) -> None:
        """Write the table in the order of its numbers."""
        with atomic_write(path, "w") as stream:
            for number in sorted(self._symbols):
                stream.write(f"{self._symbols[number]} {number}\n")

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def id(self, symbol: str) -> int:
        """The number of `symbol`.

        Raises:
            DataError: it is not in the table.
        """
        try:
            return self._numbers[symbol]
        except KeyError:
            raise DataError(f"symbol {symbol} is not in the table", file=self._file) from None

    def ids(self, symbols: Iterable[str]) -> list[int]:
        """The numbers of several symbols; see `id`."""
        return [self.id(symbol) for symbol in symbols]

    def symbol(self, number: int) -> str:
        """The symbol of `number`.

        Raises:
            DataError: no symbol has this number.
        """
        try:
            return self._symbols[number]
        except KeyError:
            raise DataError(f"number {number} is not in the table", file=self._file) from None
