"""Alignments: one int32 vector (transition-ids, or pdf-ids) per utterance."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.entries import Format, read_job_entries
from kaldi_mpi.loader.native import borrow, lib


def _values(data: Any, entry: Any) -> NDArray[np.int32]:
    values = np.empty(entry.count, dtype=np.int32)
    lib.km_int_archive_values(data, entry, borrow(values, "int32_t", np.int32))
    return values


INT_VECTORS = Format("vectors", "km_int_entry", lib.km_int_archive_entry, _values)


def read_alignments(
    source: str | os.PathLike[str], wanted: Collection[str] | None = None
) -> dict[str, NDArray[np.int32]]:
    """Read ``ali.*.gz`` of an alignment directory (also without ``.gz``), one archive, or an rspecifier.

    Args:
        source: a directory as ``steps/align_si.sh`` leaves it; where it has a file ``num_jobs``, there must
            be that many archives. Or an archive itself, binary or text, gzipped or not. Or
            ``ark:gunzip -c ali.*.gz |`` and the like.
        wanted: keep only these utterances, so that a rank need not hold the alignments of all.

    Returns:
        For each utterance its int32 vector, in the order of the jobs.

    Raises:
        DataError: nothing to read, a job's archive missing, an utterance that comes twice, or a malformed
            archive; names file, key and byte offset (in the decompressed data).
    """
    return {key: values for key, values in _each_alignment(source, wanted) if values is not None}


class PdfAlignments:
    """Alignments of transition-ids as the pdf-ids that they stand for, of which one utterance is in memory at a time.

    Args:
        source: as for `read_alignments`.
        tid_to_pdf: as for `to_pdfs`.

    Attributes:
        counts: (transition-ids + 1,) float64: how often each has come by.
    """

    def __init__(self, source: str | os.PathLike[str], tid_to_pdf: NDArray[np.int32]) -> None:
        self._source, self._table = source, np.asarray(tid_to_pdf, dtype=np.int32)
        self.counts = np.zeros(len(self._table))

    def pairs(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, NDArray[np.int32]]]:
        """Key and pdf-ids of one utterance after the other; of `wanted` ones, where these are given.

        Raises:
            DataError: as `read_alignments` and `to_pdfs` do.
        """
        for key, tids in _each_alignment(self._source, wanted):
            if tids is not None:
                pdfs = _pdfs(tids, self._table, self._source, key)
                self.counts += np.bincount(tids, minlength=len(self.counts))
                yield key, pdfs


def _each_alignment(
    source: str | os.PathLike[str], wanted: Collection[str] | None
) -> Iterator[tuple[str, NDArray[np.int32] | None]]:
    """All utterances; None in place of the alignments that are not wanted."""
    return read_job_entries(
        source, "ali", INT_VECTORS, wanted, twice="the utterance is aligned twice", nothing="no alignment in it"
    )


def to_pdfs(
    alignments: Mapping[str, NDArray[np.int32]], tid_to_pdf: NDArray[np.int32], *, source: str | None = None
) -> dict[str, NDArray[np.int32]]:
    """Map transition-ids to pdf-ids.

    Args:
        alignments: transition-ids per utterance.
        tid_to_pdf: int32 table indexed by transition-id; element 0 is unused (ids start at 1).
        source: the alignment's file or directory, for messages.

    Raises:
        DataError: a transition-id that the table does not have: the alignment is of another model; names the
            utterance.
    """
    table = np.asarray(tid_to_pdf, dtype=np.int32)
    return {key: _pdfs(tids, table, source, key) for key, tids in alignments.items()}


def _pdfs(
    tids: NDArray[np.int32], table: NDArray[np.int32], source: str | os.PathLike[str] | None, key: str
) -> NDArray[np.int32]:
    bad = np.flatnonzero((tids < 1) | (tids >= len(table)))
    if bad.size:
        raise DataError(
            f"transition-id {tids[bad[0]]} at frame {bad[0]}: the model has 1 to {len(table) - 1}",
            file=None if source is None else os.fspath(source),
            key=key,
        )
    pdfs: NDArray[np.int32] = table[tids]
    return pdfs
