"""Alignments: one int32 vector (transition-ids, or pdf-ids) per utterance."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error

_JOB_FILE = re.compile(r"ali\.(\d+)(\.gz)?")
_GZIP_MAGIC = b"\x1f\x8b"


def read_alignments(ali_dir: str | os.PathLike[str]) -> dict[str, NDArray[np.int32]]:
    """Read ``ali.*.gz`` of an alignment directory (also without ``.gz``), or one archive.

    Args:
        ali_dir: a directory as ``steps/align_si.sh`` leaves it; where it has a file ``num_jobs``, there must
            be that many archives. Or an archive itself. Archives may be binary or text, gzipped or not.

    Returns:
        For each utterance its int32 vector, in the order of the jobs.

    Raises:
        DataError: nothing to read, a job's archive missing, an utterance that comes twice, or a malformed
            archive; names file, key and byte offset (in the decompressed data).
    """
    path = Path(ali_dir)
    alignments: dict[str, NDArray[np.int32]] = {}
    for file in _job_files(path) if path.is_dir() else [path]:
        for key, values in read_int_vectors(file):
            if key in alignments:
                raise DataError("the utterance is aligned twice", file=str(file), key=key)
            alignments[key] = values
    if not alignments:
        raise DataError("no alignment in it", file=str(path))
    return alignments


def _job_files(directory: Path) -> list[Path]:
    jobs: dict[int, Path] = {}
    for file in sorted(directory.iterdir()):
        match = _JOB_FILE.fullmatch(file.name)
        if match is None:
            continue
        job = int(match.group(1))
        if job in jobs:
            raise DataError(f"there is {jobs[job].name} beside it: which one is meant?", file=str(file))
        jobs[job] = file
    if not jobs:
        raise DataError("no ali.*.gz in this directory", file=str(directory))
    wanted = _num_jobs(directory / "num_jobs")
    if wanted is not None:
        for job in range(1, wanted + 1):
            if job not in jobs:
                raise DataError(f"missing, and num_jobs says {wanted}", file=str(directory / f"ali.{job}.gz"))
    return [jobs[job] for job in sorted(jobs)]


def _num_jobs(path: Path) -> int | None:
    if not path.exists():
        return None
    text = path.read_text("utf-8", "replace").strip()
    if not (text.isascii() and text.isdecimal()):
        raise DataError(f"a number of jobs is expected, not '{text[:20]}'", file=str(path))
    return int(text)


def read_int_vectors(path: str | os.PathLike[str]) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Go through an archive of int32 vectors: binary or text, gzipped or not.

    Raises:
        DataError: it cannot be read or is malformed; names file, key and byte offset (in the decompressed
            data).
    """
    name = os.fspath(path)
    data = _decompressed(name)
    buffer = ffi.from_buffer("unsigned char[]", data)
    entry, error, at = ffi.new("km_int_entry *"), new_error(), 0
    while at < len(data):
        if lib.km_int_archive_entry(buffer, len(data), at, entry, error) != lib.KM_OK:
            raise_data_error(error, file=name, key=_key(data, at))
        values = np.empty(entry.count, dtype=np.int32)
        lib.km_int_archive_values(buffer, entry, borrow(values, "int32_t", np.int32))
        yield data[at : at + entry.key_length].decode("utf-8", "replace"), values
        at = entry.next


def _key(data: bytes, at: int) -> str | None:
    """The key at the start of a malformed entry, where it has one that can be shown."""
    match = re.compile(rb"[!-~\x80-\xff]{1,200}(?=\s)").match(data, at)
    return match.group().decode("utf-8", "replace") if match else None


def _decompressed(name: str) -> bytes:
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=name) from error
    if not data.startswith(_GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise DataError("truncated: the gzip data ends early", file=name, offset=len(data)) from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"corrupt gzip data: {error}", file=name) from error


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
    pdfs: dict[str, NDArray[np.int32]] = {}
    for key, tids in alignments.items():
        bad = np.flatnonzero((tids < 1) | (tids >= len(table)))
        if bad.size:
            raise DataError(
                f"transition-id {tids[bad[0]]} at frame {bad[0]}: the model has 1 to {len(table) - 1}",
                file=source,
                key=key,
            )
        pdfs[key] = table[tids]
    return pdfs
