"""The spool: a temporary file for matrices that cannot be read at random where they come from.

What a command prints and what is written in text is read once, when a corpus is opened, and lies in the
spool from then on as binary Kaldi objects, so that the C library reads it like any archive.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable

from kaldi_mpi.errors import DataError


class Spool:
    """An unlinked temporary file, which the operating system removes with the last descriptor of it.

    Objects may be added by several threads at a time; their regions never overlap.

    Args:
        directory: where to put the file; by default TMPDIR, or what Python's tempfile takes without it.

    Attributes:
        directory: where it is.
        size: bytes in it.

    Raises:
        DataError: no file can be made there.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.size = 0
        self._lock = threading.Lock()
        try:
            self.directory = os.fspath(directory) if directory is not None else tempfile.gettempdir()
            self._fd, name = tempfile.mkstemp(prefix="kaldi_mpi-spool-", dir=self.directory)
            os.unlink(name)
        except OSError as error:
            raise DataError(
                f"cannot make the temporary file for commands and text: {error.strerror or error}",
                file=os.fspath(directory) if directory is not None else None,
            ) from error

    def add(self, parts: Iterable[bytes], size: int, *, file: str, key: str, offset: int) -> int:
        """Write an object of `size` bytes; returns its byte offset.

        Args:
            parts: its bytes.
            size: how many they are.
            file: where they come from, for messages.
            key: whose they are, for messages.
            offset: byte offset of the object in `file`, for messages.

        Raises:
            DataError: the disk is full, or fails; or the parts are shorter: the object is truncated.
        """
        start = self._reserve(size)
        done = 0
        for part in parts:
            self._write(start + done, part, file=file, key=key)
            done += len(part)
        if done != size:
            self._give_back(start, size)
            cause = f"truncated: the matrix has {size} bytes, and {done} of them are there"
            raise DataError(cause, file=file, key=key, offset=offset)
        return start

    def _reserve(self, size: int) -> int:
        with self._lock:
            start = self.size
            self.size += size
        return start

    def _give_back(self, start: int, size: int) -> None:
        """Forget a region, if it is still the last one; else it stays as a hole, which takes no space."""
        with self._lock:
            if self.size == start + size:
                self.size = start

    def _write(self, at: int, data: bytes, *, file: str, key: str) -> None:
        view = memoryview(data)
        try:
            while len(view):
                done = os.pwrite(self._fd, view, at)
                view, at = view[done:], at + done
        except OSError as error:
            raise DataError(
                f"cannot write to the temporary file in {self.directory}, which is for {self.size} bytes of "
                f"commands' output and text: {error.strerror or error}; set TMPDIR to a directory with more space",
                file=file,
                key=key,
            ) from error

    def descriptor(self) -> int:
        """A descriptor of the file for the caller to own."""
        return os.dup(self._fd)

    def close(self) -> None:
        """Close this object's own descriptor; those given away stay open."""
        os.close(self._fd)
