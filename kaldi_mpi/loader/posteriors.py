"""Posteriors: for every frame of an utterance some ids (transition-ids, or pdf-ids), each with a weight."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.entries import Format, read_job_entries
from kaldi_mpi.loader.native import borrow, lib


@dataclass(frozen=True, eq=False)
class Posterior:
    """The pairs (id, weight) of one utterance, in flat arrays.

    Attributes:
        row_offsets: (T + 1,) int64: frame t has the pairs row_offsets[t] .. row_offsets[t + 1] - 1.
        ids: (pairs,) int32.
        weights: (pairs,) float32, finite.
    """

    row_offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]

    @property
    def num_frames(self) -> int:
        """Frames of the utterance; also those without any pair count."""
        return len(self.row_offsets) - 1


def _value(data: Any, entry: Any) -> Posterior:
    offsets = np.empty(entry.frames + 1, dtype=np.int64)
    ids, weights = np.empty(entry.pairs, dtype=np.int32), np.empty(entry.pairs, dtype=np.float32)
    lib.km_posterior_values(
        data,
        entry,
        borrow(offsets, "int64_t", np.int64),
        borrow(ids, "int32_t", np.int32),
        borrow(weights, "float", np.float32),
    )
    return Posterior(offsets, ids, weights)


_POSTERIORS = Format("posteriors", "km_posterior_entry", lib.km_posterior_find, _value)


def read_posteriors(source: str | os.PathLike[str], wanted: Collection[str] | None = None) -> dict[str, Posterior]:
    """Read ``post.*.gz`` of a directory (also without ``.gz``), one archive, or an rspecifier.

    Args:
        source: a directory; or an archive as ali-to-post writes it, binary or text, gzipped or not; or
            ``ark:gunzip -c post.*.gz |`` and the like.
        wanted: keep only these utterances.

    Returns:
        For each utterance its posteriors, in the order of the archives.

    Raises:
        DataError: nothing to read, an utterance that comes twice, or a malformed archive; names file, key and
            byte offset (in the decompressed data).
    """
    entries = read_job_entries(
        source, "post", _POSTERIORS, wanted, twice="the utterance has posteriors twice", nothing="no posteriors in it"
    )
    return {key: posterior for key, posterior in entries if posterior is not None}


def to_pdf_posteriors(
    posteriors: Mapping[str, Posterior], tid_to_pdf: NDArray[np.int32], *, source: str | None = None
) -> dict[str, Posterior]:
    """Map transition-ids to pdf-ids, as post-to-pdf-post does.

    Weights of the same pdf in a frame are added up, and pdfs whose weights sum to zero are left out. The pdfs
    of a frame come in ascending order (in Kaldi, in that of a hash table).

    Args:
        posteriors: of transition-ids.
        tid_to_pdf: int32 table indexed by transition-id; element 0 is unused (ids start at 1).
        source: the posteriors' file or directory, for messages.

    Raises:
        DataError: a transition-id that the table does not have; names the utterance.
    """
    table = np.asarray(tid_to_pdf, dtype=np.int32)
    mapped: dict[str, Posterior] = {}
    for key, posterior in posteriors.items():
        frames = np.repeat(np.arange(posterior.num_frames), np.diff(posterior.row_offsets))
        tids = posterior.ids
        bad = np.flatnonzero((tids < 1) | (tids >= len(table)))
        if bad.size:
            raise DataError(
                f"transition-id {tids[bad[0]]} at frame {frames[bad[0]]}: the model has 1 to {len(table) - 1}",
                file=source,
                key=key,
            )
        mapped[key] = _summed(frames, table[tids], posterior)
    return mapped


def _summed(frames: NDArray[np.int64], pdfs: NDArray[np.int32], posterior: Posterior) -> Posterior:
    """Add up the pairs of the same frame and pdf, in the order in which they come and in float, as Kaldi does."""
    pairs, group = np.unique(frames << 32 | pdfs, return_inverse=True)
    sums = np.zeros(len(pairs), dtype=np.float32)
    np.add.at(sums, group, posterior.weights)
    pairs, sums = pairs[sums != 0.0], sums[sums != 0.0]
    offsets = np.searchsorted(pairs, np.arange(posterior.num_frames + 1) << 32)
    return Posterior(offsets.astype(np.int64), (pairs & 0xFFFFFFFF).astype(np.int32), sums)
