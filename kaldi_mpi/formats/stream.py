"""Bytes of a file or of what a command prints, read from front to back."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from types import TracebackType

from kaldi_mpi.errors import DataError

PIPE_BLOCK = 1 << 16  # bytes; what a pipe holds


class InputStream:
    """An input stream with a place; a context manager, which ends the command if it still runs.

    Args:
        rxfilename: a path, or a command ending in ``|``. A command is run by ``sh -c``, as in Kaldi, so that
            its status is that of the last program of a pipe; its standard input is empty, and its standard
            error is ours.
        offset: byte offset in the file to start at.
        block: bytes to read at once.
        key: for messages.

    Attributes:
        name: the rxfilename.
        at: byte offset of the next byte.

    Raises:
        DataError: the file cannot be opened, or the command not be started; names it and the key.
    """

    def __init__(self, rxfilename: str, *, offset: int = 0, block: int = PIPE_BLOCK, key: str | None = None) -> None:
        self.name, self.at = rxfilename, offset
        self._key, self._block, self._buffer, self._ended = key, block, b"", False
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if rxfilename.endswith("|"):
                # A session of its own, so that the whole pipe of programs can be ended.
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", rxfilename[:-1]],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,
                )
                assert self._process.stdout is not None
                self._fd = self._process.stdout.fileno()
            else:
                self._fd = os.open(rxfilename, os.O_RDONLY | os.O_CLOEXEC)
                if offset:
                    os.lseek(self._fd, offset, os.SEEK_SET)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            raise self._error("cannot start" if rxfilename.endswith("|") else "cannot read", error) from error

    def _error(self, what: str, error: Exception) -> DataError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return DataError(f"{what}: {reason}", file=self.name, key=self._key)

    def peek(self, count: int) -> bytes:
        """The next `count` bytes without taking them; fewer only where the stream ends."""
        if len(self._buffer) < count and not self._ended:
            self._fill(count)
        return self._buffer[:count]

    def _fill(self, count: int) -> None:
        parts, have = [self._buffer], len(self._buffer)
        while have < count and not self._ended:
            parts.append(self._read_some())
            have += len(parts[-1])
        self._buffer = b"".join(parts)

    def _read_some(self) -> bytes:
        try:
            data = os.read(self._fd, self._block)
        except OSError as error:
            raise self._error("cannot read", error) from error
        self._ended = not data
        return data

    def read(self, count: int) -> bytes:
        """Take `count` bytes, or what is left of them."""
        data = self.peek(count)
        self._buffer = self._buffer[len(data) :]
        self.at += len(data)
        return data

    def put_back(self, data: bytes) -> None:
        """Have bytes that were taken come again."""
        self._buffer = data + self._buffer
        self.at -= len(data)

    def blocks(self, count: int) -> Iterator[bytes]:
        """Take `count` bytes in blocks; they end early where the stream does."""
        while count > 0:
            data = self.read(min(count, self._block))
            if not data:
                return
            count -= len(data)
            yield data

    def rest(self) -> bytes:
        """Take all that is left."""
        parts = [self._buffer]
        while not self._ended:
            parts.append(self._read_some())
        self._buffer = b""
        data = b"".join(parts)
        self.at += len(data)
        return data

    def until(self, end: bytes, limit: int) -> bytes | None:
        """Take everything before the byte `end`, and that byte; None if it does not come in `limit` bytes."""
        parts, size = [], 0
        while (found := self._buffer.find(end)) < 0:
            parts.append(self._buffer)
            size += len(self._buffer)
            self._buffer = b"" if self._ended or size > limit else self._read_some()
            if not self._buffer:
                return None
        parts.append(self._buffer[:found])
        self._buffer = self._buffer[found + 1 :]
        self.at += size + found + 1
        return b"".join(parts)

    def skip(self, count: int) -> None:
        """Go on by `count` bytes of a file, perhaps beyond its end."""
        ahead = count - len(self._buffer)
        self._buffer = self._buffer[count:]
        self.at += count
        if ahead > 0:
            os.lseek(self._fd, ahead, os.SEEK_CUR)

    @property
    def size(self) -> int | None:
        """Bytes of the file; None for a command and what else cannot be read at random."""
        status = os.fstat(self._fd)
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def at_end(self) -> bool:
        """Whether all has been taken; waits for a command to print more or to end."""
        return not self.peek(1)

    @property
    def ended(self) -> bool:
        """Whether all has been taken, as far as is known without waiting."""
        return self._ended and not self._buffer

    @property
    def is_command(self) -> bool:
        """Whether it is what a command prints."""
        return self._process is not None

    def check_status(self) -> None:
        """Wait for the command to end, when all that it prints has been taken.

        Raises:
            DataError: it failed; names it.
        """
        status = self._process.wait() if self._process is not None else 0
        if status:
            raise DataError(f"the command {_ending(status)}", file=self.name, key=self._key, offset=self.at)

    @contextlib.contextmanager
    def status_first(self) -> Iterator[None]:
        """Where reading fails because the command has, the error says so before it says what is missing."""
        try:
            yield
        except DataError as error:
            if self.ended:
                try:
                    self.check_status()
                except DataError as failed:
                    cause = f"{failed.cause}: {error.cause}"
                    raise DataError(cause, file=self.name, key=error.key, offset=error.offset) from error
            raise

    def abort(self) -> None:
        """End the command, if it still runs; may be called from another thread."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the stream; a command that would print more is ended."""
        if self._process is None:
            os.close(self._fd)
            return
        self.abort()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> InputStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _ending(status: int) -> str:
    if status > 0:
        return f"failed with exit status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"
