"""Commands, and other streams, read once each by a few threads."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.scp import Location
from kaldi_mpi.formats.stream import InputStream
from kaldi_mpi.log import logger

MOST_THREADS = 8
PATIENCE = 60.0  # seconds after which the log says what is waited for


def run_commands(
    jobs: Mapping[str, tuple[Location, str]],
    read: Callable[[InputStream, str], int],
    *,
    named_in: str,
    threads: int | None = None,
) -> Iterator[tuple[str, int | DataError]]:
    """Read one object of each of some streams, several at a time.

    A command that prints more than the object is ended, as Kaldi ends it by closing the pipe. Where Kaldi
    only warns of a command that fails behind a whole object, it is an error here: gunzip tells of a wrong
    checksum in this way.

    Args:
        jobs: name -> (where to read, the key that needs it).
        read: takes the object from the stream; called by the threads, with stream and key.
        named_in: the script file, for messages.
        threads: how many; by default as many as there are cores, at most `MOST_THREADS`.

    Returns:
        (name, what `read` returned, or the error), in the order of the jobs. When the iteration is abandoned,
        the commands that still run are ended.
    """
    running = _Running(read, named_in)
    pool = ThreadPoolExecutor(threads or min(MOST_THREADS, len(os.sched_getaffinity(0))), "kaldi_mpi-commands")
    try:
        futures = {name: pool.submit(running.one, *job) for name, job in jobs.items()}
        for name, future in futures.items():
            yield name, _result(future, name)
    finally:
        running.abort()
        pool.shutdown(cancel_futures=True)


def _result(future: Future[int], name: str) -> int | DataError:
    while True:
        try:
            return future.result(timeout=PATIENCE)
        except DataError as error:
            return error
        except concurrent.futures.TimeoutError:
            logger.info("still waiting for '%s'", name)


class _Running:
    """The streams that are being read, so that they can be ended all at once."""

    def __init__(self, read: Callable[[InputStream, str], int], named_in: str) -> None:
        self._read, self._named_in = read, named_in
        self._lock = threading.Lock()
        self._streams: set[InputStream] = set()
        self._aborted = False

    def one(self, location: Location, key: str) -> int:
        try:
            with InputStream(location.path, offset=location.offset, key=key) as stream:
                with self._lock:
                    self._streams.add(stream)
                    if self._aborted:
                        stream.abort()
                try:
                    return self._object(stream, key)
                finally:
                    with self._lock:
                        self._streams.remove(stream)
        except DataError as error:
            cause = f"{error.cause} (named in {self._named_in})"
            raise DataError(cause, file=error.file, key=key, offset=error.offset) from error

    def _object(self, stream: InputStream, key: str) -> int:
        with stream.status_first():
            value = self._read(stream, key)
        if not stream.is_command:
            return value
        if stream.at_end():
            stream.check_status()
        else:
            logger.warning("%s, key %s: the command prints more than a matrix; the rest is not read", stream.name, key)
        return value

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            for stream in self._streams:
                stream.abort()
