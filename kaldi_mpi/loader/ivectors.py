"""Online i-vectors: one vector for every few frames of an utterance, as extract_ivectors_online.sh writes them."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import read_number
from kaldi_mpi.formats.scp import rows_in_range
from kaldi_mpi.loader.native import Archives, borrow, byte_ranges, ffi, struct_dtype
from kaldi_mpi.loader.tables import OnBad, locate

# By so many frames the features and the i-vectors may differ in length: nnet3-get-egs' default.
LENGTH_TOLERANCE = 100


class Ivectors:
    """Where the i-vectors of each utterance are; they stay on disk, and are read ahead with the features.

    Each chunk gets one i-vector: that of one of its labelled frames, which is drawn by (seed, epoch, utterance,
    chunk) and so changes from epoch to epoch. This is what nnet3-get-egs means to do; but what it draws from is
    the chunk's start and the length of the whole *utterance*, so that its i-vector often comes from far behind
    the chunk, or, being clipped, from the utterance's end: from more audio of the speaker than there is at
    this point in decoding.

    Args:
        directory: with ``ivector_online.scp`` and ``ivector_period``.
        num_utterances: how many there are.
        wanted: keys of those to look for.
        on_bad: called with a key and its error, instead of raising, where the script file's value is at fault.

    Attributes:
        dim: elements of an i-vector.
        period: frames for each.
        begin: int64 array, per utterance the byte offset of the first value; after `finish`, as is end.
        end: behind the last one.

    Raises:
        DataError: a file is missing or malformed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        num_utterances: int,
        *,
        wanted: Collection[str],
        on_bad: OnBad | None = None,
    ) -> None:
        self._scp = os.path.join(os.fspath(directory), "ivector_online.scp")
        self.period = read_number(Path(directory) / "ivector_period", what="a number of frames", low=1, high=2**31 - 1)
        self.dim = 0
        self.begin = self.end = np.zeros(0, dtype=np.int64)
        self._archives = Archives()
        self._locations = locate(self._scp, self._archives, wanted=wanted, on_bad=on_bad).locations
        count = num_utterances
        self._file_of, self._first_row, self._num_rows = (np.zeros(count, dtype=np.int32) for _ in range(3))
        self._matrices = np.zeros(count, dtype=struct_dtype("km_matrix"))
        self._header = ffi.new("km_matrix *")

    def add(self, i: int, key: str, frames: int) -> None:
        """Read the header of the i-vectors of utterance `i`, which has so many frames.

        Raises:
            DataError: there are none, of another dimension than the others', too many or too few.
        """
        if key not in self._locations:
            raise DataError("the utterance has no i-vectors", file=self._scp, key=key)
        location, header = self._locations[key], self._header
        self._file_of[i] = index = self._archives.open(location.path, named_in=self._scp, key=key)
        self._archives.open_matrix(index, location.offset, header, key=key)
        rows = rows_in_range(location, header.rows, file=self._scp, key=key)
        if self.dim not in (0, header.cols):
            raise DataError(
                f"the i-vectors have dimension {header.cols}, and those before have {self.dim}",
                file=location.path,
                key=key,
                offset=location.offset,
            )
        if abs(rows * self.period - frames) > LENGTH_TOLERANCE:
            raise DataError(
                f"{rows} i-vectors for {self.period} frames each, and the utterance has {frames} frames",
                file=location.path,
                key=key,
                offset=location.offset,
            )
        self.dim = int(header.cols)
        self._matrices[i : i + 1] = np.frombuffer(ffi.buffer(header), dtype=self._matrices.dtype)
        self._first_row[i], self._num_rows[i] = location.first_row, rows

    def finish(self, kept: NDArray[np.intp]) -> None:
        """Forget all utterances but those at the indices `kept`."""
        self._locations = {}
        self._matrices = self._matrices[kept]
        self._file_of, self._first_row, self._num_rows = (
            array[kept] for array in (self._file_of, self._first_row, self._num_rows)
        )
        self.begin, self.end = byte_ranges(self._matrices, self._first_row, self._num_rows)

    def path_of(self, i: int) -> str:
        """The archive of utterance `i`'s i-vectors; for messages."""
        return self._archives.paths[self._file_of[i]]

    def lend(self) -> tuple[dict[str, Any], list[Any]]:
        """The fields of the C library's ``km_ivectors``, and what must be kept for as long as they are used."""
        fields = {
            "dim": self.dim,
            "period": self.period,
            "files": self._archives.table(),
            "file_of": borrow(self._file_of, "int32_t", np.int32),
            "matrices": ffi.from_buffer("km_matrix[]", self._matrices),
            "begin": borrow(self.begin, "int64_t", np.int64),
            "end": borrow(self.end, "int64_t", np.int64),
            "first_row": borrow(self._first_row, "int32_t", np.int32),
            "num_rows": borrow(self._num_rows, "int32_t", np.int32),
        }
        return fields, [self._archives, *fields.values()]
