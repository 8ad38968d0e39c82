"""Jobs: how the utterances of a data directory are divided among them, and processes that keep their part.

Alignments and lattices are stored by job, and Kaldi's scripts expect the utterances of ``split{N}/{JOB}`` in
``ali.JOB.gz`` and ``lat.JOB.gz``: so they are divided as Kaldi's ``utils/split_data.sh`` divides them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from kaldi_mpi import log
from kaldi_mpi.errors import ConfigError, DataError, KaldiMpiError


def split_jobs(keys: Sequence[str], nj: int) -> list[list[str]]:
    """Cut keys into consecutive parts as utils/split_scp.pl does; sizes differ by one at most.

    Raises:
        ConfigError: fewer keys than jobs.
    """
    if nj < 1 or len(keys) < nj:
        raise ConfigError(f"--nj {nj}: there are {len(keys)} utterances to share out")
    size, larger = divmod(len(keys), nj)
    starts = [job * size + min(job, larger) for job in range(nj + 1)]
    return [list(keys[first:last]) for first, last in itertools.pairwise(starts)]


def split_by_speaker(utt2spk: Mapping[str, str], nj: int) -> list[list[str]]:
    """Divide utterances without dividing a speaker, as evenly as that allows.

    Speakers stay in their order. As in split_scp.pl each job first gets equally many speakers, then
    speakers at the borders move to the neighbour as long as that evens out the numbers of utterances.
    With fewer speakers than jobs, speakers are divided (``split_data.sh --per-utt``).

    Args:
        utt2spk: utterance -> speaker, in the order of the utterances.
        nj: number of parts.

    Returns:
        `nj` lists of utterances, none of them empty.

    Raises:
        DataError: fewer utterances than jobs.
    """
    if not 1 <= nj <= len(utt2spk):
        raise DataError(f"{len(utt2spk)} utterances cannot be split into {nj} jobs")
    speakers: dict[str, list[str]] = {}
    for utterance, speaker in utt2spk.items():
        speakers.setdefault(speaker, []).append(utterance)
    if len(speakers) < nj:
        return split_jobs(list(utt2spk), nj)
    names = list(speakers)
    parts: list[list[str]] = [[] for _ in range(nj)]
    for index, speaker in enumerate(names):
        parts[index * nj // len(names)].append(speaker)
    sizes = {speaker: len(utterances) for speaker, utterances in speakers.items()}
    while any(_move_border_speaker(parts, job, sizes) for job in range(nj)):
        pass
    if not all(parts):
        return split_jobs(list(utt2spk), nj)
    return [[utterance for speaker in part for utterance in speakers[speaker]] for part in parts]


def _move_border_speaker(parts: Sequence[list[str]], job: int, sizes: Mapping[str, int]) -> bool:
    """Give the last speaker of `job` to the next part, or the first to the one before, if that is fairer."""
    moved = False
    for neighbour, position in ((job + 1, -1), (job - 1, 0)):
        if not parts[job] or not 0 <= neighbour < len(parts):
            continue
        speaker = parts[job][position]
        mine = sum(sizes[s] for s in parts[job])
        theirs = sum(sizes[s] for s in parts[neighbour])
        if abs((theirs + sizes[speaker]) - (mine - sizes[speaker])) < abs(theirs - mine):
            parts[job].pop(position)
            parts[neighbour].insert(0 if position == -1 else len(parts[neighbour]), speaker)
            moved = True
    return moved


class WorkerPool:
    """Processes that each hold ``factory(task)`` and run its methods; a context manager.

    Training a GMM visits the same features some forty times; each process reads its part once.

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
