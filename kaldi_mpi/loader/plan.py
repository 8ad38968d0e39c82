"""Which chunks there are, and which of them make up each step: known without reading any data."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error

ENDLESS = 2**62  # steps


def check_range(what: str, value: int, least: int, limit: int) -> None:
    """Raise ConfigError unless `value` is at least `least` and below `limit`."""
    if not least <= value < limit:
        raise ConfigError(f"{what} is {value}, and must be at least {least} and below {limit}")


class ChunkPlan:
    """The chunks of a corpus in the order of each epoch, shared out in global steps; the same on all ranks.

    Args:
        num_frames: (utterances,) int32, frames of each.
        width: labelled frames of a chunk.
        chunks_per_minibatch: chunks that one rank takes at a step.
        size: number of ranks.
        seed: of the order, 0 .. 2**64-1.
        shuffle: False leaves the chunks in the order of the corpus, in every epoch.

    Raises:
        ConfigError: an argument out of its range.
        DataError: memory cannot be had.

    Attributes:
        steps_per_epoch: global steps.
        num_chunks: chunks of an epoch, over all ranks.
        c_plan: the C library's km_plan.
    """

    def __init__(
        self,
        num_frames: NDArray[np.int32],
        width: int,
        chunks_per_minibatch: int,
        *,
        size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        check_range("chunks per minibatch", chunks_per_minibatch, 1, 2**24)
        check_range("seed", seed, 0, 2**64)
        check_range("number of ranks", size, 1, 2**24)
        error = new_error()
        # Lent to the plan for as long as it lives.
        self._frames = borrow(num_frames, "int32_t", np.int32)
        plan = lib.km_plan_new(
            self._frames, len(self._frames), width, chunks_per_minibatch, size, seed, shuffle, error
        )  # fmt: skip
        if plan == ffi.NULL:
            raise_data_error(error)
        self.c_plan = ffi.gc(plan, lib.km_plan_free)
        self.steps_per_epoch = int(lib.km_plan_steps_per_epoch(plan))
        self.num_chunks = int(lib.km_plan_num_chunks(plan))
        self._chunks_per_step = chunks_per_minibatch * size

    def frames_of_step(self, step: int) -> int:
        """Labelled frames of a global step over all ranks.

        Steps of the same epoch are cheap one after the other; another epoch's order is drawn first.
        """
        check_range("step", step, 0, ENDLESS)
        error = new_error()
        frames = int(lib.km_plan_frames_of_step(self.c_plan, step, error))
        if frames < 0:
            raise_data_error(error)
        return frames

    def chunks_of_step(self, step: int) -> int:
        """Chunks of a global step over all ranks: those of a whole step, or what an epoch's last step has left."""
        check_range("step", step, 0, ENDLESS)
        return min(self._chunks_per_step, self.num_chunks - step % self.steps_per_epoch * self._chunks_per_step)
