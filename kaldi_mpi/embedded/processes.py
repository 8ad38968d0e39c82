"""Workers that keep their data between calls: one process per job, driven from here.

Training a GMM visits the same features some forty times; each worker reads its part once.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from kaldi_mpi import log
from kaldi_mpi.errors import KaldiMpiError


class WorkerPool:
    """Processes that each hold ``factory(task)`` and run its methods; a context manager.

    The processes are spawned, not forked: the wheels start no threads of their own, but numpy and torch in
    the parent may have.

    Args:
        factory: a top-level callable that makes a worker's object out of its task.
        tasks: one picklable task per worker.
    """

    def __init__(self, factory: Callable[[Any], Any], tasks: Sequence[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for job, task in enumerate(tasks, 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, factory, task), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append((job, process))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in self._connections:
            connection.close()  # a worker that waits for work ends when its connection does
        for _, process in self._processes:
            if kind is not None:
                process.terminate()
            process.join()

    def call(self, method: str, *arguments: Any, each: Sequence[Any] | None = None) -> list[Any]:
        """Run a method in all workers at once.

        Args:
            method: name of the method.
            arguments: the same for all workers; pickled.
            each: one more argument, of its own for each worker.

        Returns:
            the results in the order of the tasks.

        Raises:
            KaldiMpiError: what a worker raised, or a worker ended without an answer.
        """
        for index, connection in enumerate(self._connections):
            own = () if each is None else (each[index],)
            try:
                connection.send((method, arguments + own))
            except OSError:  # it has ended already: recv tells more
                continue
        results = []
        for connection, (job, process) in zip(self._connections, self._processes, strict=True):
            try:
                answer, value = connection.recv()
            except (EOFError, OSError):
                process.join()
                raise KaldiMpiError(
                    f"worker {job} ended while running {method} (exit status {process.exitcode})"
                ) from None
            if answer == "error":
                raise value
            results.append(value)
        return results


def _serve(connection: Connection, factory: Callable[[Any], Any], task: Any) -> None:
    log.set_up(factory.__module__.rsplit(".", 1)[-1])
    worker: Any = None
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if worker is None:
                worker = factory(task)
            result = ("result", getattr(worker, method)(*arguments))
        except KaldiMpiError as error:
            result = ("error", KaldiMpiError(str(error)))
        except Exception:  # noqa: BLE001 - whatever it is, the caller must hear of it and not wait for ever
            result = ("error", KaldiMpiError(f"a worker failed:\n{traceback.format_exc()}"))
        connection.send(result)
