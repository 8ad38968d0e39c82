"""The index of archives of examples: where each chunk lies and what shape it has; made once, and kept in a file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.loader.native import ffi, lib, new_error, raise_data_error
from kaldi_mpi.log import logger

MAX_KEY = 4096  # bytes of an example's key
_VERSION = 3
# A km_unit of csrc/egs_scan.h.
_UNIT = np.dtype([("begin", "i8"), ("size", "i4"), ("n", "i4"), ("frames", "i4"), ("shape", "i4")])
# A km_unit_graphs.
_GRAPHS = np.dtype([("states", "i4"), ("arcs", "i4"), ("weight", "f4")])
_COLUMNS = {"file_of": "i4", "begin": "i8", "end": "i8", "n": "i4", "frames": "i4", "shape_of": "i4"}
_CHAIN_COLUMNS = {**_COLUMNS, "states": "i4", "arcs": "i4", "weight": "f4"}
# Of a km_shape: width, left, right, subsampling, sequences.
_SHAPE = 5
_TOTALS = ("feat_dim", "ivector_dim", "num_pdfs", "num_targets", "has_weights", "end2end", "num_without_labels",
           "num_bad")  # fmt: skip

Shape = tuple[int, int, int, int, int]


@dataclass
class EgsIndex:
    """What one pass over the archives has found; see `Examples` and `ChainExamples` for the columns, of one element a
    unit.

    Attributes:
        shapes: int32 (shapes, 5): width, left, right, subsampling and sequences.
        num_pdfs: columns of the output.
        has_weights: whether a weight, or a derivative weight, other than 1 occurs.
        end2end: of chain examples, whether their FSTs are of a sequence each.
        num_without_labels: chunks without any label, which are left out.
        num_bad: examples that were left out because they are malformed.
        states, arcs: int32, of chain examples: of the FSTs of each unit.
        weight: float32, of chain examples: of the supervision of each unit.
    """

    file_of: NDArray[np.int32]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    n: NDArray[np.int32]
    frames: NDArray[np.int32]
    shape_of: NDArray[np.int32]
    shapes: NDArray[np.int32]
    feat_dim: int
    ivector_dim: int
    num_pdfs: int
    num_targets: int
    has_weights: bool
    end2end: bool
    num_without_labels: int
    num_bad: int
    states: NDArray[np.int32] | None = None
    arcs: NDArray[np.int32] | None = None
    weight: NDArray[np.float32] | None = None


@dataclass
class _Scanned:
    """The index of one archive; empty: there is no example in it."""

    units: NDArray[np.void]
    graphs: NDArray[np.void] | None
    shapes: list[Shape]
    dims: dict[str, int]
    end2end: bool
    num_targets: int
    has_weights: bool
    bad: list[DataError]


def make_index(
    paths: Sequence[str], files: Any, output: str, threads: int, skip_bad: int, chain: bool = False
) -> EgsIndex:
    """Go through all archives, once, one after the other or several at a time.

    Args:
        paths: the archives, for messages.
        files: C array of ``km_file``, one for each.
        output: name of the output whose rows are the labels.
        threads: how many archives to read at a time.
        skip_bad: so many malformed examples may be left out, with a warning each.
        chain: the examples are those of chain training.

    Raises:
        DataError: an archive cannot be read, is malformed or empty, or does not fit the others; names archive,
            key and byte offset.
    """

    def scan(i: int) -> _Scanned:
        return _scan(files + i, paths[i], output, skip_bad, chain)

    with ThreadPoolExecutor(max_workers=max(1, min(threads, len(paths)))) as pool:
        try:
            parts = list(pool.map(scan, range(len(paths))))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    bad = [error for part in parts for error in part.bad]
    if len(bad) > skip_bad:
        raise _too_many(bad[skip_bad], skip_bad)
    return _join(parts, paths, output)


def _too_many(error: DataError, allowed: int) -> DataError:
    """An error in the example that is one too many."""
    if not allowed:
        return error
    cause = f"{error.cause} (and {allowed} bad examples, which is the limit, have been left out before)"
    return DataError(cause, file=error.file, key=error.key, offset=error.offset)


def _scan(file: Any, path: str, output: str, skip_bad: int, chain: bool) -> _Scanned:
    index, error = ffi.gc(ffi.new("km_egs_index *", {"chain": chain}), lib.km_egs_index_free), new_error()
    bad: list[DataError] = []
    while lib.km_egs_scan(file, output.encode(), index, error) != lib.KM_OK:
        try:
            raise_data_error(error, file=path, key=key_at(path, index.entry))
        except DataError as cause:
            bad.append(cause)
        if len(bad) > skip_bad:
            raise _too_many(bad[-1], skip_bad)
        logger.warning("left out: %s", bad[-1])
        if lib.km_egs_skip(file, index, error) != lib.KM_OK:
            raise_data_error(error, file=path)
    try:
        units = _copy_of(index.units, index.num_units, _UNIT)
        graphs = _copy_of(index.graphs, index.num_units, _GRAPHS) if chain else None
        shapes = [
            (s.width, s.left, s.right, s.subsampling, s.sequences)
            for s in (ffi.unpack(index.shapes, index.num_shapes) if len(units) else [])
        ]
        dims = {"input": index.feat_dim, "ivector": index.ivector_dim, output: index.num_pdfs}
        totals = index.num_targets, bool(index.has_weights)
        return _Scanned(units, graphs, shapes, dims, bool(index.end2end), *totals, bad)
    finally:
        lib.km_egs_index_free(index)


def _copy_of(elements: Any, count: int, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """An array of its own of what C has allocated."""
    data = bytearray(ffi.buffer(elements, count * dtype.itemsize)) if count else b""
    return np.frombuffer(data, dtype=dtype)


def _join(parts: list[_Scanned], paths: Sequence[str], output: str) -> EgsIndex:
    """One index of all archives; `parts` is emptied on the way, so that nothing is in memory twice for long."""
    dims: dict[str, int] = {}
    of = ""
    for part, path in zip(parts, paths, strict=True):
        if not len(part.units):
            raise DataError("no example in it", file=path)
        dims, of = dims or part.dims, of or path
        for name, dim in part.dims.items():
            if dims[name] != dim:
                raise DataError(f"'{name}' has dimension {dim}, and {dims[name]} in {of}", file=path)
        if part.end2end != parts[0].end2end:
            kinds = ("of one FST", "End2End")
            cause = f"supervision is {kinds[part.end2end]}, and {kinds[parts[0].end2end]} in {paths[0]}"
            raise DataError(cause, file=path)
    labelled = [part.units["frames"] > 0 for part in parts]
    count = sum(int(mask.sum()) for mask in labelled)
    total = sum(len(part.units) for part in parts)
    if not count:
        raise DataError(f"no row of '{output}' has a label", file=paths[0])
    chain, end2end = parts[0].graphs is not None, parts[0].end2end
    wanted = _CHAIN_COLUMNS if chain else _COLUMNS
    columns: dict[str, NDArray[Any]] = {name: np.empty(count, dtype) for name, dtype in wanted.items()}
    shapes: dict[Shape, int] = {}
    most = max(part.num_targets for part in parts)
    has_weights = any(part.has_weights for part in parts)
    num_bad = sum(len(part.bad) for part in parts)
    at = 0
    for number, mask in enumerate(labelled):
        part, parts[number] = parts[number], _Scanned(np.empty(0, _UNIT), None, [], {}, False, 0, False, [])
        ids = np.array([shapes.setdefault(shape, len(shapes)) for shape in part.shapes], dtype=np.int32)
        units = part.units if mask.all() else part.units[mask]
        rows = slice(at, at + len(units))
        at += len(units)
        columns["file_of"][rows] = number
        columns["begin"][rows] = units["begin"]
        columns["end"][rows] = units["begin"] + units["size"]
        columns["n"][rows] = units["n"]
        columns["frames"][rows] = units["frames"]
        columns["shape_of"][rows] = ids[units["shape"]]
        if part.graphs is not None:
            for name in _GRAPHS.names or ():
                columns[name][rows] = part.graphs[name][mask]
    return EgsIndex(
        **columns,
        shapes=np.array(list(shapes), dtype=np.int32),
        feat_dim=dims["input"],
        ivector_dim=dims["ivector"],
        num_pdfs=dims[output],
        num_targets=most,
        has_weights=has_weights,
        end2end=end2end,
        num_without_labels=total - count,
        num_bad=num_bad,
    )


class EgsIdentity(NamedTuple):
    """What an index is of.

    Attributes:
        names: what kind of examples they are and the output's name, then the full names of the archives.
        status: int64 (archives, 2), the size and the time of modification (ns) of each.
    """

    names: NDArray[np.str_]
    status: NDArray[np.int64]


def identity_of(paths: Sequence[str], output: str, *, chain: bool = False) -> EgsIdentity:
    """The archives as they are now.

    Raises:
        DataError: one is gone.
    """
    status = []
    for path in paths:
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=path) from error
        status.append((found.st_size, found.st_mtime_ns))
    kind = f"chain {output}" if chain else output
    return EgsIdentity(np.array([kind, *map(os.path.abspath, paths)]), np.array(status, dtype=np.int64))


def save_index(index: EgsIndex, cache: str | os.PathLike[str], identity: EgsIdentity) -> None:
    """Write an index to a file, as a whole or not at all.

    Args:
        index: what was found.
        cache: the file.
        identity: of the archives, from before they were gone through.

    Raises:
        DataError: it cannot be written.
    """
    columns = _COLUMNS if index.states is None else _CHAIN_COLUMNS
    arrays: dict[str, Any] = {name: getattr(index, name) for name in (*columns, "shapes")}
    totals = np.array([_VERSION, *(int(getattr(index, name)) for name in _TOTALS)], dtype=np.int64)
    with atomic_write(cache) as stream:
        np.savez(stream, names=identity.names, status=identity.status, totals=totals, **arrays)


def load_index(
    cache: str | os.PathLike[str], identity: EgsIdentity, skip_bad: int, *, chain: bool = False
) -> EgsIndex | None:
    """Read what `save_index` wrote; None, with a line in the log, if it is of other archives or damaged.

    It is checked in full, and so is each example when it is decoded. None as well if it leaves out more than
    `skip_bad` malformed examples.
    """
    file = os.fspath(cache)
    if not os.path.exists(file):
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            same = (np.array_equal(stored[name], wanted) for name, wanted in identity._asdict().items())
            if not all(same):
                logger.info("the index %s is of other archives, or they have changed: it is made anew", file)
                return None
            index = _checked(stored, identity.status[:, 0], _CHAIN_COLUMNS if chain else _COLUMNS)
    except (OSError, ValueError, KeyError, EOFError, TypeError, IndexError, zipfile.BadZipFile, MemoryError) as error:
        logger.warning("the index %s cannot be used (%s): it is made anew", file, str(error) or type(error).__name__)
        return None
    if index.num_bad > skip_bad:
        return None  # the same archives are gone through again, and say what is wrong
    if index.num_bad:
        logger.warning("%d malformed examples are left out, as when the index %s was made", index.num_bad, file)
    return index


def _checked(stored: Any, sizes: NDArray[np.int64], types: dict[str, str]) -> EgsIndex:
    """The index in an npz file, with columns of these types; ValueError if it contradicts itself or the archives'
    sizes."""
    totals, shapes = stored["totals"], stored["shapes"]
    if totals.dtype != np.int64 or totals.shape != (1 + len(_TOTALS),) or totals[0] != _VERSION:
        raise ValueError("it was written by another version")
    values = dict(zip(_TOTALS, map(int, totals[1:]), strict=True))
    columns = {name: stored[name] for name in types}
    count = len(columns["begin"])
    right_types = all(
        array.dtype == np.dtype(types[name]) and array.shape == (count,) for name, array in columns.items()
    )
    if not right_types or shapes.dtype != np.int32 or shapes.ndim != 2 or shapes.shape[1] != _SHAPE or not count:
        raise ValueError("its arrays do not fit together")
    file_of, begin, end = columns["file_of"], columns["begin"], columns["end"]
    chain = "states" in types
    frames_of = shapes[:, 0].astype(np.int64) * shapes[:, 4]
    fits = (
        _within(file_of, 0, len(sizes))
        and _within(columns["shape_of"], 0, len(shapes))
        and _within(columns["n"], 0, 2**31)
        and _within(columns["frames"], 1, 2**31)
        and bool((columns["frames"] <= frames_of[columns["shape_of"]]).all())
        and bool(((begin >= 0) & (begin < end) & (end <= sizes[file_of]) & (end - begin <= 2**30)).all())
        and _within(shapes[:, 0], 1, 2**24)
        and _within(shapes[:, 1:3], 0, 2**24)
        and _within(shapes[:, 3:], 1, 2**24)
        and all(1 <= values[name] < 2**31 for name in ("feat_dim", "num_pdfs"))
        and all(0 <= values[name] < 2**31 for name in ("ivector_dim", "num_without_labels", "num_bad"))
        and (values["num_targets"] == 0 if chain else 1 <= values["num_targets"] <= lib.KM_MAX_TARGETS)
        and all(values[name] in (0, 1) for name in ("has_weights", "end2end"))
        and (not chain or _fit(columns, frames_of))
    )
    if not fits:
        raise ValueError("it holds values that are not possible")
    return EgsIndex(
        **columns,
        shapes=shapes,
        feat_dim=values["feat_dim"],
        ivector_dim=values["ivector_dim"],
        num_pdfs=values["num_pdfs"],
        num_targets=values["num_targets"],
        has_weights=bool(values["has_weights"]),
        end2end=bool(values["end2end"]),
        num_without_labels=values["num_without_labels"],
        num_bad=values["num_bad"],
    )


def _fit(columns: dict[str, NDArray[Any]], frames_of: NDArray[np.int64]) -> bool:
    """Whether what is known of supervision is possible: an element of an FST takes 12 bytes, a state 4."""
    states, arcs, size = columns["states"].astype(np.int64), columns["arcs"], columns["end"] - columns["begin"]
    whole = np.array_equal(columns["frames"], frames_of[columns["shape_of"]])
    within = bool(((states >= 1) & (arcs >= 0) & (4 * states + 12 * arcs.astype(np.int64) <= size)).all())
    return whole and within and bool(np.isfinite(columns["weight"]).all())


def _within(array: NDArray[Any], least: int, limit: int) -> bool:
    return bool(array.size) and int(array.min()) >= least and int(array.max()) < limit


def printable_key(head: bytes) -> str | None:
    """The key that some bytes begin with, if it is one that can be shown."""
    length = next((i for i, byte in enumerate(head) if byte <= 32 or byte == 127), len(head))
    try:
        return head[:length].decode("utf-8") or None
    except UnicodeDecodeError:
        return None


def key_at(path: str, offset: int) -> str | None:
    """The key at a byte of an archive, for messages; None where there is none to show."""
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            return printable_key(stream.read(MAX_KEY))
    except OSError:
        return None


def key_before(path: str, offset: int) -> str:
    """The key of the example whose ``\\0B`` stands at a byte of an archive, for messages."""
    start = max(0, offset - MAX_KEY)
    try:
        with open(path, "rb") as stream:
            stream.seek(start)
            words = stream.read(offset - start).split()
    except OSError:
        words = []
    return words[-1].decode("utf-8", "replace") if words else "?"
