"""How the loader keeps up, as the log tells it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from kaldi_mpi.learner.batches import Feed
from kaldi_mpi.log import logger


@dataclasses.dataclass
class _Figures:
    waited: float = 0.0  # seconds that the learner waited
    readers_waited: float = 0.0  # seconds that the readers waited for space, or for a request
    bytes_read: int = 0
    frames: int = 0
    seconds: float = 0.0  # in which feeds were open

    def __add__(self, other: _Figures) -> _Figures:
        return _Figures(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __sub__(self, other: _Figures) -> _Figures:
        return _Figures(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


class LoaderReport:
    """Figures of one learner's feeds of training data, of one phase after the other; rank 0 logs them."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._past = _Figures()  # of feeds that are closed
        self._told = _Figures()
        self._feed: Feed | None = None
        self._opened = 0.0

    @contextlib.contextmanager
    def watch(self, feed: Feed) -> Iterator[Feed]:
        """Count `feed` while the block runs, and close it at the end."""
        with feed:
            self._feed, self._opened = feed, time.monotonic()
            if self._rank == 0:
                memory = feed.counters().memory / 1e6
                logger.info("the loader begins with %.3g MB of memory: its buffers and the order of the data", memory)
            try:
                yield feed
            finally:
                self._past, self._feed = self._now(), None

    def _now(self) -> _Figures:
        if self._feed is None:
            return self._past
        counters = self._feed.counters()
        return self._past + _Figures(
            self._feed.waited,
            counters.readers_waited,
            counters.bytes_read,
            counters.frames,
            time.monotonic() - self._opened,
        )

    @property
    def waited(self) -> float:
        """Seconds that the learner waited for data, in all."""
        return self._now().waited

    def totals(self) -> dict[str, float]:
        """All of it, for a summary."""
        now = self._now()
        return {
            "seconds_waited_for_data": now.waited,
            "seconds_readers_waited": now.readers_waited,
            "bytes_read": now.bytes_read,
        }

    def log(self, iteration: int) -> None:
        """Log what was read since the last call, in `iteration`."""
        if self._rank != 0:
            return
        now = self._now()
        new, self._told = now - self._told, now
        memory = 0 if self._feed is None else self._feed.counters().memory
        logger.info(
            "iteration %d: rank 0 took %.0f frames/s; it waited %.2f s for data, its readers %.2f s for space; "
            "%.3g MB read, %.3g MB of memory",
            iteration, new.frames / max(new.seconds, 1e-9), new.waited, new.readers_waited, new.bytes_read / 1e6,
            memory / 1e6,
        )  # fmt: skip
