"""Checkpoints: what a training that was killed, or stopped, goes on from.

DIR/checkpoint/ holds one file a rank, ``learner.RANK.STEP.pt``, of each of the last checkpoints, and ``current.json``:
their steps, newest first, with each file's SHA-256, and all that decides how the training goes. It is written last,
when all files have been read back, so a kill at any moment leaves a whole checkpoint. A training that ends well removes
the directory.

A learner gives a copy of its state and goes on; a thread writes it, and says so to rank 0. So learners that do not meet
save each in its own time, and one that is lost meanwhile is not waited for: a later run gives it another's state.

A run goes on from the newest checkpoint whose files all are what was written, and says so if that is not the newest. It
does not where anything differs that decides how the training goes: it names what, and leaves the checkpoint alone. But
for the number of learners, where all had one model.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import pickle
import queue
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.learner.facts import RANKS, Facts, difference, digest_of
from kaldi_mpi.log import logger
from kaldi_mpi.transport.messages import Channel
from kaldi_mpi.transport.status import fewer_than_before
from kaldi_mpi.transport.world import World

_ARRAY = "numpy array"  # marks a tensor that was a NumPy array
_MOST_NAMED = 8  # differences in a message
_REMOVE = "remove {} or give --resume=false to begin anew"


class _Pending:
    """A checkpoint of which not all ranks have written their file, on rank 0."""

    def __init__(self, expected: set[int]) -> None:
        self.expected = expected
        self.begun = False  # by rank 0 itself
        self.tickets: Callable[[], Any] = lambda: None
        self.digests: dict[int, tuple[str, str]] = {}  # of each rank: of its file, and of its parameters


class Checkpoints:
    """Those of one training; all ranks make the same calls.

    Attributes:
        step: of the one that was loaded.
        tickets: what was loaded with it, see `save`.
        num_ranks: that had written it.

    Args:
        folder: the training's directory.
        world: all ranks, each of which has a state.
        facts: of the training; needed on rank 0 alone.
        kept: how many are kept.
        failed: told on another thread that a file could not be written; None: `wait` and the next `save` raise it.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        facts: Facts | None,
        kept: int = 2,
        failed: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.place = folder / "checkpoint"
        self._world, self._facts, self._kept, self._failed = world, facts, kept, failed
        self._messages = world.messages
        # Not the world's, which may have fewer ranks at the end.
        self._rank, self._size = self._messages.rank, self._messages.size
        self._gone: set[int] = set()
        self._there: list[dict[str, Any]] = []  # what current.json has; on rank 0
        self.step: int | None = None
        self.tickets: Any = None
        self.num_ranks = self._size
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._pending: dict[int, _Pending] = {}  # by step
        self._committed = -1  # the step of the last that this run has written

    def _file(self, step: int, rank: int) -> Path:
        return self.place / f"learner.{rank}.{step}.pt"

    # Writing.

    def save(self, step: int, state: Mapping[str, Any], tickets: Callable[[], Any] | None = None) -> None:
        """Have all ranks' states written and read back, made the newest checkpoint, and the oldest dropped.

        Args:
            step: that all ranks have come to.
            state: this rank's; it is written later, and must not change.
            tickets: asked on rank 0's communication thread when all have written: what a run that goes on from here
                is to be told besides, for JSON.

        Raises:
            DataError: of the checkpoint before: see `wait`.
        """
        self._written_here()  # a second copy would take as much memory again
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
            self._thread.start()
        if self._rank == 0:
            self._messages.post(functools.partial(self._begin, step, tickets or (lambda: None)))
        self._jobs.put(functools.partial(self._write, step, state))

    def wait(self) -> None:
        """Return, on all ranks together, when the last checkpoint is there.

        Raises:
            DataError: the disk refused, or did not keep what it was given; the checkpoint before is still whole.
        """
        self._written_here()
        if self._rank == 0:
            self._messages.wait(lambda: not self._pending)
            self._written_here()
        self._world.barrier()

    def announce(self, step: int) -> None:
        """On rank 0's communication thread: all that are there now, and no others, are told to save `step`."""
        self._of_step(step)

    def lost(self, rank: int) -> None:
        """On rank 0's communication thread: `rank` will write nothing for now."""
        self._gone.add(rank)
        for step, pending in list(self._pending.items()):
            pending.expected.discard(rank)
            self._commit_if_whole(step)

    def back(self, rank: int) -> None:
        """On rank 0's communication thread: from the next one on, `rank` writes its part again."""
        self._gone.discard(rank)

    def _written_here(self) -> None:
        self._jobs.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised on the learner's thread, or ends the run at once
                self._failure = error
                if self._failed is not None:
                    self._failed(error)
            finally:
                self._jobs.task_done()

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        path = self._file(step, self._rank)
        with _named(self.place):
            self.place.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"rank": self._rank, "step": step, "state": _to_tensors(state)}, buffer)
        with atomic_write(path) as stream:
            stream.write(buffer.getbuffer())
        digest = digest_of(io.BytesIO(buffer.getvalue()))
        with open(path, "rb") as stream:
            if digest_of(stream) != digest:
                raise DataError("what was read back is not what was written", file=str(path))
        said = np.frombuffer(f"{digest} {_digest_of_model(state)}".encode(), np.uint8)
        send = functools.partial(self._messages.send, Channel.CHECKPOINTS, 0, (step,), said)
        self._messages.post(send)

    # On rank 0's communication thread.

    def _begin(self, step: int, tickets: Callable[[], Any]) -> None:
        pending = self._of_step(step)
        pending.begun, pending.tickets = True, tickets
        # Only now, and only until it is there: whoever listens looks for messages all the time.
        self._messages.on_message(Channel.CHECKPOINTS, self._written)
        self._commit_if_whole(step)

    def _of_step(self, step: int) -> _Pending:
        return self._pending.setdefault(step, _Pending(set(range(self._size)) - self._gone))

    def _written(self, source: int, numbers: tuple[int, ...], payload: NDArray[np.uint8]) -> None:
        if numbers[0] <= self._committed and numbers[0] not in self._pending:
            return  # of a rank that was lost, and not waited for
        file, _, model = payload.tobytes().decode().partition(" ")
        self._of_step(numbers[0]).digests[source] = file, model
        self._commit_if_whole(numbers[0])

    def _commit_if_whole(self, step: int) -> None:
        pending = self._pending[step]
        if not pending.begun or not pending.expected <= set(pending.digests):
            return
        del self._pending[step]
        self._committed = step
        if not self._pending:
            self._messages.on_message(Channel.CHECKPOINTS, None)
        files = [pending.digests.get(rank, (None, ""))[0] for rank in range(self._size)]
        models = {model for _, model in pending.digests.values()} - {""}
        one = {"step": step, "files": files, "shared": len(models) == 1, "tickets": pending.tickets()}
        self._jobs.put(functools.partial(self._commit, one))

    def _commit(self, one: dict[str, Any]) -> None:
        """Make a checkpoint, all of whose files are there, the newest."""
        before = [c["step"] for c in self._there]
        self._there = [c for c in self._there if c["step"] != one["step"]]
        self._there = [one, *self._there][: max(1, self._kept)]
        with atomic_write(self.place / "current.json", "w") as stream:
            said = {"step": one["step"], "checkpoints": self._there, "facts": self._facts}
            json.dump(said, stream, indent=1)
        for step in set(before) - {c["step"] for c in self._there}:  # no others: some may be of the next one
            for old in self.place.glob(f"learner.*.{step}.pt"):
                old.unlink()

    # Reading.

    def load(self) -> Any:
        """This rank's state in the newest checkpoint that is whole; None where there is no checkpoint.

        A rank that had been lost, or was not there, gets another's.

        Raises:
            ConfigError: it is of another training; says in what.
            DataError: none is whole; says why, file by file.
        """
        if self._rank == 0:
            self._there = self._read()
        there: list[dict[str, Any]] = self._world.broadcast(self._there)
        complaints: list[str] = []
        for number, one in enumerate(there):
            whose = _donor(one["files"], self._rank)
            state, complaint = self._read_state(one["step"], whose, one["files"][whose])
            found = sorted({each for each in self._world.gather(complaint) if each})
            if not found:
                if complaints and self._rank == 0:
                    logger.warning("going on from the checkpoint before, of step %d", one["step"])
                if whose != self._rank and len(one["files"]) == self._size:
                    logger.warning("learner rank %d was lost: it goes on with the model of %d", self._rank, whose)
                self._there, self.step = there[number:], one["step"]
                if self._rank == 0:
                    self._sweep({f".{each['step']}" for each in there})
                self.tickets, self.num_ranks = one["tickets"], len(one["files"])
                return _to_arrays(state)
            complaints += found
            if self._rank == 0:
                for line in found:
                    logger.warning("damaged checkpoint: %s", line)
        if complaints:
            raise DataError("\n".join([f"damaged checkpoint; {_REMOVE.format(self.place)}", *complaints]))
        return None

    def _read(self) -> list[dict[str, Any]]:
        """The checkpoints that current.json has, if they are of this training; half-written files go."""
        for path in (*self.place.parent.glob(".*.tmp*"), *self.place.glob(".*.tmp*")):
            if re.fullmatch(r"\..+\.tmp[0-9]+", path.name):
                logger.info("removed %s, left by a run that was killed", path)
                path.unlink(missing_ok=True)
        current = self.place / "current.json"
        if not self.place.exists():
            return []
        if not self.place.is_dir():
            raise DataError("a file where the directory of checkpoints should be; remove it", file=str(self.place))
        if not current.exists():  # a run that was killed before it had its first checkpoint
            return []
        try:
            said = json.loads(current.read_text(encoding="utf-8"))
            there, saved = list(said["checkpoints"]), dict(said["facts"])
            ranks = {len(one["files"]) for one in there}
            assert there and all(isinstance(one["step"], int) and any(one["files"]) for one in there)
            shared = [bool(one["shared"]) and one["tickets"] is None for one in there]
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            why = f"it is not what a checkpoint has ({type(error).__name__}); {_REMOVE.format(self.place)}"
            raise DataError(why, file=str(current)) from error
        own = self._facts or {}
        other = [name for name in sorted(own | saved) if own.get(name) != saved.get(name)]
        if ranks != {self._size} and RANKS not in other:
            other.append(RANKS)
        if other == [RANKS] and "'dedicated_server': True" not in own.get("--settings", ""):
            if shared[0]:
                return there[: 1 if False in shared else shared.count(True)]
            if fewer_than_before() and self._size < min(ranks):  # those that are left go on, each with its own model
                return there
            other[0] = f"{RANKS}, whose models differ at step {there[0]['step']},"
            own, saved = own | {other[0]: own.get(RANKS, "")}, saved | {other[0]: saved.get(RANKS, "")}
        if other:
            lines = [difference(name, saved.get(name), own.get(name)) for name in other[:_MOST_NAMED]]
            more = f" and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
            raise ConfigError(
                f"{self.place} is of another training ({'; '.join(lines)}{more}): go on as it began, or give another "
                "--dir, or --resume=false, which begins anew and removes it"
            )
        return there

    def _sweep(self, steps: set[str]) -> None:
        """Remove the files of other checkpoints: a run was killed before all of these were there."""
        for path in self.place.glob("learner.*.pt"):
            if path.suffixes[-2] not in steps:
                path.unlink()

    def _read_state(self, step: int, rank: int, digest: str) -> tuple[Any, str]:
        """A rank's state, and what is wrong with it, or ""."""
        path = self._file(step, rank)
        try:
            content = path.read_bytes()
            if digest_of(io.BytesIO(content)) != digest:
                return None, f"{path}: its bytes ({len(content)}) are not those that were written"
            saved = torch.load(io.BytesIO(content), weights_only=True)
            if (saved["rank"], saved["step"]) != (rank, step):
                return None, f"{path}: it is of rank {saved['rank']}, step {saved['step']}"
            return saved["state"], ""
        except OSError as error:
            return None, f"{path}: {error.strerror or error}"
        except (ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            return None, f"{path}: {type(error).__name__}: {str(error).splitlines()[0]}"

    def begin_anew(self) -> None:
        """Forget those that are there, on rank 0."""
        if self._rank == 0 and self.place.exists():
            logger.warning("--resume=false: removing %s", self.place)
            self.remove()

    def remove(self) -> None:
        """Forget the checkpoints of a training that has ended; on rank 0."""
        if self.place.is_dir():
            shutil.rmtree(self.place, ignore_errors=True)
        else:
            self.place.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write: {error.strerror or error}", file=str(path)) from error


def _donor(files: list[str | None], rank: int) -> int:
    """Whose file a rank goes on from: its own, or else that of one who has one, all of them in turn."""
    if rank < len(files) and files[rank]:
        return rank
    there = [number for number, file in enumerate(files) if file]
    return there[rank % len(there)]


def _digest_of_model(state: Mapping[str, Any]) -> str:
    """By which ranks are known to have one model; "": this rank has none (a dedicated server)."""
    if "state" not in state:
        return ""
    parameters = state["state"]["parameters"]
    return hashlib.sha256(np.ascontiguousarray(np.asarray(parameters)).data).hexdigest()


def _to_tensors(state: Any) -> Any:
    """The same state with marked tensors for NumPy's arrays, which PyTorch's safe loading does not take."""
    if isinstance(state, np.ndarray):
        return {_ARRAY: torch.from_numpy(np.ascontiguousarray(state))}
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, dict):
        return {key: _to_tensors(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_to_tensors(value) for value in state]
    return state


def _to_arrays(state: Any) -> Any:
    """The inverse of `_to_tensors`."""
    if isinstance(state, dict):
        return state[_ARRAY].numpy() if _ARRAY in state else {key: _to_arrays(value) for key, value in state.items()}
    return [_to_arrays(value) for value in state] if isinstance(state, list) else state
