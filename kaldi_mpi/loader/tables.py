"""Where the matrices of a table are: script files and archives, whatever they point to, made readable at random.

Archives on disk stay where they are. What a command prints, what is written in text and what a column range
cuts is copied to a temporary file (see `scratch`), once, when the table is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.scp import (
    Location,
    Rspecifier,
    TextTable,
    check_sorted,
    columns_in_range,
    parse_location,
    parse_rspecifier,
    read_script,
    rows_in_range,
)
from kaldi_mpi.formats.stream import PIPE_BLOCK, InputStream
from kaldi_mpi.loader.native import Archives, ffi
from kaldi_mpi.loader.scratch import ScratchFile, add_full, copy_object, run_commands, skip_object
from kaldi_mpi.log import logger

# A script file, also one that has been read already, or an rspecifier.
TableSource = str | os.PathLike[str] | TextTable

OnBad = Callable[[str, DataError], None]

SCAN_BLOCK = 4096  # bytes read at each object of an archive that is scanned
LONGEST_KEY = 4096  # bytes
_KEY = re.compile(rb"\S+(?=\s)")


@dataclass
class Table:
    """What `locate` finds.

    Attributes:
        keys: all keys of the table, in its order.
        locations: of those wanted (and readable), in the same order, each a path that the `Archives` know.
    """

    keys: list[str] = field(default_factory=list)
    locations: dict[str, Location] = field(default_factory=dict)


def locate(
    source: TableSource,
    archives: Archives,
    *,
    wanted: Collection[str] | None = None,
    threads: int | None = None,
    scratch_dir: str | os.PathLike[str] | None = None,
    doubles: bool = False,
    on_bad: OnBad | None = None,
) -> Table:
    """Find where the matrices of a table lie, so that `archives.open(location.path, ...)` can read them all.

    Args:
        source: a script file, or what `read_table` has read of it; or an rspecifier ``scp:...`` or ``ark:...``,
            also of a command. The values of a script file are what Kaldi reads: ``path``, ``path:offset``,
            ``command |``, each with or without a range; binary or text.
        archives: opens what is found; commands' output, text and matrices cut by columns become one file of it.
        wanted: only these keys; commands of other keys are not run. By default all.
        threads: commands that run at a time; by default as many as there are cores, at most 8.
        scratch_dir: directory of the temporary file; by default TMPDIR.
        doubles: matrices in text are kept in double precision (statistics).
        on_bad: called with a key and its error instead of raising; the key is then left out. With the
            rspecifier's option ``p`` such keys are left out with a warning.

    Raises:
        DataError: anything that cannot be read; names file (or command), key and byte offset.
    """
    name = name_of(source)
    given = source if isinstance(source, TextTable) else None
    rspecifier = (parse_rspecifier(name) if given is None else None) or Rspecifier("scp", name)
    if rspecifier.permissive and on_bad is None:
        on_bad = _warn
    reader = _Reader(name, archives, wanted, threads, scratch_dir, doubles, on_bad)
    try:
        if rspecifier.kind == "ark":
            reader.archive(rspecifier.rxfilename, permissive=rspecifier.permissive)
        else:
            reader.script(read_script(rspecifier.rxfilename) if given is None else given)
        reader.finish()
    finally:
        reader.close()
    if rspecifier.sorted:
        check_sorted(reader.table.keys, name)
    return reader.table


def name_of(source: TableSource) -> str:
    """What a table is called in messages."""
    return source.name if isinstance(source, TextTable) else os.fspath(source)


def _warn(key: str, error: DataError) -> None:
    logger.warning("%s is left out, for the rspecifier is permissive: %s", key, error)


class _Reader:
    """The work of `locate`."""

    def __init__(
        self,
        name: str,
        archives: Archives,
        wanted: Collection[str] | None,
        threads: int | None,
        scratch_dir: str | os.PathLike[str] | None,
        doubles: bool,
        on_bad: OnBad | None,
    ) -> None:
        self.table = Table()
        self._name, self._archives, self._wanted = name, archives, wanted
        self._threads, self._scratch_dir, self._doubles, self._on_bad = threads, scratch_dir, doubles, on_bad
        self._scratch: ScratchFile | None = None
        self._file = -1  # the scratch file's index in the archives
        self._seen: set[str] = set()  # keys of an archive
        self._matrix = ffi.new("km_matrix *")

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.close()

    def finish(self) -> None:
        """Tell the archives how long the scratch file has become."""
        if self._scratch is not None:
            self._archives.resize(self._file, self._scratch.size)
            logger.info(
                "%s: %d bytes of commands' output, text and cut matrices are in a temporary file in %s",
                self._name,
                self._scratch.size,
                self._scratch.directory,
            )

    def _scratch_file(self) -> ScratchFile:
        if self._scratch is None:
            self._scratch = ScratchFile(self._scratch_dir)
            self._file = self._archives.adopt(f"temporary file of {self._name}", self._scratch.descriptor())
        return self._scratch

    def _bad(self, key: str, error: DataError) -> None:
        if self._on_bad is None:
            raise error
        self._on_bad(key, error)

    def script(self, values: TextTable) -> None:
        """Go through a script file, then run its commands, read its text and cut its columns."""
        rxfilename = values.name
        self.table.keys = list(values)
        found: dict[str, Location] = {}
        pending: dict[str, list[str]] = {}  # what is copied to the scratch file -> keys
        for key in self.table.keys:
            if self._wanted is not None and key not in self._wanted:
                continue
            try:
                found[key] = location = parse_location(values[key], file=rxfilename, key=key)
                if location.is_command:
                    pending.setdefault(location.path, []).append(key)
                elif not self._is_binary(location, rxfilename, key):
                    pending.setdefault(f"{location.path}:{location.offset}", []).append(key)
            except DataError as error:
                found.pop(key, None)
                self._bad(key, error)
        self._copy_all(pending, found, rxfilename)
        for key, location in found.items():
            try:
                if location.first_col or location.last_col is not None:
                    location = self._cut(location, values[key], rxfilename, key)
                self.table.locations[key] = location
            except DataError as error:
                self._bad(key, error)

    def _is_binary(self, location: Location, named_in: str, key: str) -> bool:
        """Whether C can read it where it is; also where there is nothing, for C knows best what to say."""
        index = self._archives.open(location.path, named_in=named_in, key=key)
        head = self._archives.peek(index, location.offset, 2)
        return len(head) < 2 or head == b"\0B"

    def _copy_all(self, pending: dict[str, list[str]], found: dict[str, Location], named_in: str) -> None:
        """Copy to the scratch file what is not binary on disk, and move the locations there."""
        if not pending:
            return
        scratch = self._scratch_file()

        def copy(stream: InputStream, key: str) -> int:
            return copy_object(stream, scratch, key=key, doubles=self._doubles)

        jobs = {name: (found[keys[0]], keys[0]) for name, keys in pending.items()}
        for name, result in run_commands(jobs, copy, named_in=named_in, threads=self._threads):
            if isinstance(result, DataError):
                for key in pending[name]:
                    found.pop(key)
                    self._bad(key, result)
                continue
            self._archives.alias(name, self._file)
            for key in pending[name]:
                found[key] = found[key]._replace(path=name, offset=result)

    def _cut(self, location: Location, value: str, named_in: str, key: str) -> Location:
        """Copy the rows and columns of a location to the scratch file."""
        scratch = self._scratch_file()
        self._archives.resize(self._file, scratch.size)
        index, matrix = self._archives.open(location.path, named_in=named_in, key=key), self._matrix
        self._archives.open_matrix(index, location.offset, matrix, key=key)
        rows = rows_in_range(location, matrix.rows, file=named_in, key=key)
        cols = columns_in_range(location, matrix.cols, file=named_in, key=key)
        block = ffi.new("km_block *", (location.first_row, rows, location.first_col, cols))
        values = np.empty((rows, cols), dtype=np.float32)
        self._archives.block(index, matrix, block, values, key=key)
        offset = add_full(scratch, values, file=value, key=key, offset=location.offset)
        self._archives.alias(value, self._file)
        return Location(value, offset)

    def archive(self, rxfilename: str, *, permissive: bool) -> None:
        """Go through an archive; on disk its binary objects stay where they are."""
        location = parse_location(rxfilename, file=self._name, key=None)
        block = PIPE_BLOCK if location.is_command else SCAN_BLOCK
        with InputStream(location.path, offset=location.offset, block=block) as stream:
            try:
                with stream.status_first():
                    while (key := self._next_key(stream)) is not None:
                        self._entry(stream, key)
                stream.check_status()
            except DataError as error:
                # Where the next entry would start cannot be known: what follows is lost.
                if not permissive:
                    raise
                logger.warning("%s: what follows is not read, for the rspecifier is permissive: %s", self._name, error)

    def _next_key(self, stream: InputStream) -> str | None:
        while stream.peek(1).isspace():
            stream.read(1)
        if stream.at_end():
            return None
        start, count = stream.at, 64
        while (match := _KEY.match(head := stream.peek(count))) is None:
            if len(head) < count or count > LONGEST_KEY:
                raise DataError("not an archive, or truncated in a key", file=self._name, offset=start)
            count *= 2
        raw = match.group()
        try:
            key = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("a key that is not UTF-8: not an archive?", file=self._name, offset=start) from error
        if not key.isprintable():
            raise DataError(f"{key!a} is not a key: not an archive?", file=self._name, offset=start)
        stream.read(len(raw) + (head[len(raw) : len(raw) + 1] in (b" ", b"\t")))
        if key in self._seen:
            raise DataError("the key comes twice", file=self._name, key=key, offset=start)
        self._seen.add(key)
        self.table.keys.append(key)
        return key

    def _entry(self, stream: InputStream, key: str) -> None:
        """Take the object behind a key."""
        wanted = self._wanted is None or key in self._wanted
        if wanted and (stream.size is None or stream.peek(2) != b"\0B"):
            offset = copy_object(stream, self._scratch_file(), key=key, doubles=self._doubles)
            self._archives.alias(self._name, self._file)
            self.table.locations[key] = Location(self._name, offset)
            return
        start = stream.at
        skip_object(stream, key=key)
        if wanted:
            self.table.locations[key] = Location(stream.name, start)
