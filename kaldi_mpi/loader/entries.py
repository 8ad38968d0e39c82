"""Entries of archives of small objects (alignments, posteriors), gone through in bounded memory."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import read_number
from kaldi_mpi.formats.scp import Rspecifier, check_sorted, parse_location, parse_rspecifier, read_script
from kaldi_mpi.formats.stream import InputStream
from kaldi_mpi.loader.native import ffi, lib, new_error, raise_data_error
from kaldi_mpi.log import logger

T = TypeVar("T")

BLOCK = 1 << 18  # bytes of an archive in memory at a time, or twice as many as its longest entry
_GZIP_MAGIC = b"\x1f\x8b"
_KEY = re.compile(rb"[!-~\x80-\xff]{1,200}(?=\s)")


@dataclass(frozen=True)
class Format(Generic[T]):
    """How the C library reads one kind of entry.

    Attributes:
        what: the kind's plural, for messages.
        entry: C type that describes an entry; it has key_length, next and incomplete.
        find: C function that fills it in: (data, size, at, entry, error) -> status.
        value: the entry's value, from data and entry.
    """

    what: str
    entry: str
    find: Callable[[Any, int, int, Any, Any], int]
    value: Callable[[Any, Any], T]


def job_files(source: str | os.PathLike[str], prefix: str) -> list[str]:
    """The archives of a directory, ``PREFIX.1.gz`` and so on; anything else is a source by itself.

    Raises:
        DataError: there is none in the directory, there are two of a job, or there are fewer than its file
            ``num_jobs`` says.
    """
    name = os.fspath(source)
    if parse_rspecifier(name) is not None or not os.path.isdir(name):
        return [name]
    directory = Path(name)
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)(\.gz)?")
    jobs: dict[int, Path] = {}
    for file in sorted(directory.iterdir()):
        match = pattern.fullmatch(file.name)
        if match is None:
            continue
        job = int(match.group(1))
        if job in jobs:
            raise DataError(f"there is {jobs[job].name} beside it: which one is meant?", file=str(file))
        jobs[job] = file
    if not jobs:
        raise DataError(f"no {prefix}.*.gz in this directory", file=name)
    wanted = read_number(directory / "num_jobs", 0, what="a number of jobs", low=0)
    for job in range(1, wanted + 1):
        if job not in jobs:
            raise DataError(f"missing, and num_jobs says {wanted}", file=str(directory / f"{prefix}.{job}.gz"))
    return [str(jobs[job]) for job in sorted(jobs)]


def read_entries(
    source: str | os.PathLike[str], form: Format[T], wanted: Collection[str] | None = None
) -> Iterator[tuple[str, T | None]]:
    """Go through a table: an archive (binary or text, gzipped or not), or an rspecifier.

    Args:
        source: a path, or ``ark:...`` or ``scp:...``, also of commands.
        form: what is in it.
        wanted: take the values of these keys only; by default of all.

    Returns:
        (key, value) of every entry; None in place of the values that are not wanted.

    Raises:
        DataError: it cannot be read or is malformed; names file (or command), key and byte offset (in the
            decompressed data).
    """
    name = os.fspath(source)
    table = parse_rspecifier(name) or Rspecifier("ark", name)
    keys: list[str] = []
    try:
        for key, value in (_archive if table.kind == "ark" else _script)(table.rxfilename, form, wanted):
            keys.append(key)
            yield key, value
    except DataError as error:
        if not table.permissive:
            raise
        logger.warning("%s: what follows is not read, for the rspecifier is permissive: %s", name, error)
    if table.sorted:
        check_sorted(keys, name)


def read_job_entries(
    source: str | os.PathLike[str],
    kind: str,
    form: Format[T],
    wanted: Collection[str] | None = None,
    *,
    twice: str,
    nothing: str,
) -> Iterator[tuple[str, T | None]]:
    """Go through the archives of all jobs of a directory (see `job_files`), or through one table.

    Args:
        source, kind: as for `job_files`.
        form, wanted: as for `read_entries`.
        twice: what to say of an utterance that comes twice.
        nothing: what to say where there is no utterance at all.

    Returns:
        As `read_entries`.

    Raises:
        DataError: as `job_files` and `read_entries` do, and for these two reasons.
    """
    seen: set[str] = set()
    for file in job_files(source, kind):
        for key, value in read_entries(file, form, wanted):
            if key in seen:
                raise DataError(twice, file=file, key=key)
            seen.add(key)
            yield key, value
    if not seen:
        raise DataError(nothing, file=os.fspath(source))


def _archive(rxfilename: str, form: Format[T], wanted: Collection[str] | None) -> Iterator[tuple[str, T | None]]:
    location = parse_location(rxfilename, file=rxfilename or "-", key=None)
    with InputStream(location.path, offset=location.offset) as stream:
        with stream.status_first():
            yield from _Parser(stream, form, b"").entries(wanted)
        stream.check_status()


def _script(rxfilename: str, form: Format[T], wanted: Collection[str] | None) -> Iterator[tuple[str, T | None]]:
    for key, value in read_script(rxfilename).items():
        if wanted is not None and key not in wanted:
            yield key, None
            continue
        location = parse_location(value, file=rxfilename, key=key)
        if value.endswith("]"):
            raise DataError(f"'{value}': no ranges of {form.what} can be read", file=rxfilename, key=key)
        with InputStream(location.path, offset=location.offset, key=key) as stream:
            with stream.status_first():
                # The object has no key in front of it, which makes an entry of it.
                _, taken = next(_Parser(stream, form, b"- ", key).entries(None))
            if stream.is_command and stream.at_end():
                stream.check_status()
        yield key, taken


class _Parser(Generic[T]):
    """The entries of one stream.

    Args:
        stream: where they come from.
        form: what they are.
        before: bytes put before the stream's own.
        key: where it is known, for messages.
    """

    def __init__(self, stream: InputStream, form: Format[T], before: bytes, key: str | None = None) -> None:
        self._name, self._form, self._key = stream.name, form, key
        self._data, self._at = before, 0  # what is in memory, and the next entry in it
        self._base = stream.at - len(before)  # byte offset of the data in the (decompressed) stream
        self._blocks, self._ended = _decompressed(stream), False

    def entries(self, wanted: Collection[str] | None) -> Iterator[tuple[str, T | None]]:
        form, entry, error = self._form, ffi.new(f"{self._form.entry} *"), new_error()
        data = ffi.from_buffer("unsigned char[]", self._data)
        while True:
            if self._at == len(self._data):
                if self._ended:
                    return
            elif form.find(data, len(self._data), self._at, entry, error) == lib.KM_OK:
                key = self._data[self._at : self._at + entry.key_length].decode("utf-8", "replace")
                self._at = entry.next
                yield key, form.value(data, entry) if wanted is None or key in wanted else None
                continue
            elif self._ended or not entry.incomplete:
                if error.offset >= 0:
                    error.offset += self._base
                raise_data_error(error, file=self._name, key=self._key or self._next_key())
            self._read_on()
            data = ffi.from_buffer("unsigned char[]", self._data)

    def _read_on(self) -> None:
        """Have at least twice as much of the next entry in memory."""
        parts = [self._data[self._at :]]
        missing = max(BLOCK, len(parts[0]))
        self._base += self._at
        self._at = 0
        try:
            while missing > 0 and not self._ended:
                block = next(self._blocks, b"")
                self._ended = not block
                parts.append(block)
                missing -= len(block)
        except _DecompressionError as error:
            self._data = b"".join(parts)
            at = self._base + len(self._data)
            raise DataError(str(error), file=self._name, key=self._key or self._next_key(), offset=at) from error
        self._data = b"".join(parts)

    def _next_key(self) -> str | None:
        """The key at the start of a malformed entry, where it has one that can be shown."""
        match = _KEY.match(self._data, self._at)
        return match.group().decode("utf-8", "replace") if match else None


class _DecompressionError(Exception):
    """The data is not what gzip writes, or not all of it."""


def _decompressed(stream: InputStream) -> Iterator[bytes]:
    """The stream's bytes in blocks; decompressed if it is gzipped, also in several members."""
    if stream.peek(2) != _GZIP_MAGIC:
        while data := stream.read(BLOCK):
            yield data
        return
    while data := stream.read(BLOCK).lstrip(b"\0"):  # tapes leave zeros behind the data
        inflate = zlib.decompressobj(wbits=31)
        while not inflate.eof:
            try:
                block = inflate.decompress(data, BLOCK)
            except zlib.error as error:
                raise _DecompressionError(f"corrupt gzip data: {str(error).rpartition(': ')[2]}") from error
            data = inflate.unconsumed_tail
            if block:
                yield block
            elif not inflate.eof and not (data := stream.read(BLOCK)):
                raise _DecompressionError("truncated: the gzip data ends early")
        stream.put_back(inflate.unused_data)
