"""How a training cuts its data into minibatches, and how they are read."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from kaldi_mpi.learner.batches import Feed, page_locked, streams_of
from kaldi_mpi.loader import Chunking, ChunkPlan, ChunkShape, MinibatchReader, MinibatchRule, Source, new_buffers

# A pass in the data's own order gains nothing from more memory than reading ahead needs.
_UNSHUFFLED_MEMORY = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Reading:
    """The same for all of a training's sources, on all ranks.

    Attributes:
        chunking: of features; None: examples, which have their own shapes.
        minibatch: chunks a learner and step.
        seed: of the order.
        threads: reading threads.
        memory: bytes of data in memory at a time, of which chunks are shuffled.
        skip_bad: utterances or examples of a source that may be unreadable, those found at opening included.
    """

    chunking: ChunkShape | Chunking | None
    minibatch: MinibatchRule
    seed: int
    threads: int = 1
    memory: int = 128 * 2**20
    skip_bad: int = 0

    def plan(self, source: Source, size: int) -> ChunkPlan:
        """The steps of training on `source` with `size` ranks."""
        return ChunkPlan(source, self.chunking, self.minibatch, size=size, seed=self.seed, memory=self.memory)

    def usual_minibatch(self, source: Source, plan: ChunkPlan) -> int:
        """Chunks of a learner's minibatch of the principal width; of examples, of the shape that most of them have."""
        shape_of = getattr(source, "shape_of", None)
        usual = 0 if shape_of is None else int(np.bincount(shape_of).argmax())
        return self.minibatch.largest(plan.shapes[usual].rows)

    def feed(
        self,
        source: Source,
        device: torch.device,
        *,
        rank: int,
        size: int,
        seed: int | None = None,
        shuffle: bool = True,
        first_step: int = 0,
        num_epochs: int | None = None,
        on_request: bool = False,
        depth: int = 4,
    ) -> Feed:
        """Minibatches of `source` on `device`; see `MinibatchReader` for the arguments.

        Raises:
            DataError: memory or threads cannot be had.
        """
        streams = streams_of(device)
        buffers = None
        if streams is not None:
            buffers = new_buffers(source, self.chunking, self.minibatch, depth, page_locked(streams))
        reader = MinibatchReader(
            source,
            self.chunking,
            self.minibatch,
            seed=self.seed if seed is None else seed,
            rank=rank,
            size=size,
            threads=self.threads,
            depth=depth,
            shuffle=shuffle,
            first_step=first_step,
            num_epochs=num_epochs,
            on_request=on_request,
            buffers=buffers,
            memory=self.memory if shuffle else min(self.memory, _UNSHUFFLED_MEMORY),
            skip_bad=max(0, self.skip_bad - getattr(source, "num_bad", 0)),
        )
        return Feed(reader, streams)
