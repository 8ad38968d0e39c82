"""Examples on disk as a source of minibatches: an egs directory, its archives, and the chunks in them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import read_number
from kaldi_mpi.loader.chunks import ChunkShape
from kaldi_mpi.loader.egs_index import EgsIndex, identity_of, key_before, load_index, make_index, save_index
from kaldi_mpi.loader.native import Archives, borrow, ffi, lib, new_error, raise_data_error
from kaldi_mpi.log import logger

# Archives that are read at a time when the index is made.
THREADS = 2

_ARCHIVE = re.compile(r"(c?egs)\.([0-9]+)\.ark")
_MULTITASK = re.compile(r"(cegs\.[0-9]+|valid_diagnostic)\.scp")
_INFO = (
    "feat_dim",
    "ivector_dim",
    "left_context",
    "right_context",
    "left_context_initial",
    "right_context_final",
    "num_archives",
    "num_pdfs",
)


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass
class EgsInfo:
    """Files of ``info/`` that hold a number; those that are absent are not in it.

    Attributes:
        directory: ``info`` itself.
        values: name and number.
    """

    directory: Path
    values: dict[str, int] = field(default_factory=dict)

    def check(self, name: str, found: int) -> None:
        """Raise DataError if ``info/name`` is there and says another number."""
        if self.values.get(name, found) != found:
            raise DataError(f"says {self.values[name]}, and the examples have {found}", file=str(self.directory / name))

    def check_context(self, shape: ChunkShape) -> None:
        """Raise DataError if ``info`` knows the contexts and no chunk can have those of `shape`.

        The first chunk of an utterance may have another left context and the last one another right context,
        where ``left_context_initial`` and ``right_context_final`` are not negative.
        """
        for name, edge, found in (
            ("left_context", "left_context_initial", shape.left),
            # Kaldi counts it from the end of the chunk, in which the last label stands for several frames.
            ("right_context", "right_context_final", shape.right - (shape.subsampling - 1)),
        ):
            allowed = {self.values[key] for key in (name, edge) if self.values.get(key, -1) >= 0}
            if name in self.values and found not in allowed:
                raise DataError(
                    f"says {' or '.join(map(str, sorted(allowed)))}, and there are examples with {found}",
                    file=str(self.directory / name),
                )


def find_archives(source: Paths, *, chain: bool = False) -> tuple[list[str], EgsInfo | None]:
    """The archives that `source` means, and the directory's ``info`` where it means a directory that has one.

    Args:
        source: a directory with ``egs.1.ark``, ``egs.2.ark``, ...; one archive (``combine.egs``); or a list of
            archives.
        chain: of chain examples: ``cegs.1.ark``, ...

    Raises:
        DataError: there is no archive, one is missing, or ``info/num_archives`` says another number; or the
            examples are of several tasks, with tables in place of archives.
    """
    if not isinstance(source, str | os.PathLike):
        paths = [os.fspath(path) for path in source]
        if not paths:
            raise DataError("no archive of examples is named")
        return paths, None
    path = Path(source)
    if not path.is_dir():
        return [os.fspath(source)], None
    info = _read_info(path / "info")
    stem = "cegs" if chain else "egs"
    numbers: dict[int, str] = {}
    others, names = False, _names_in(path)
    for entry in names:
        match = _ARCHIVE.fullmatch(entry)
        if match is None:
            continue
        if match.group(1) != stem:
            others = True
        elif (number := int(match.group(2))) in numbers:
            raise DataError(f"there is {numbers[number]} beside it", file=str(path / entry))
        else:
            numbers[number] = entry
    tables = [entry for entry in names if _MULTITASK.fullmatch(entry)]
    if chain and tables and (not numbers or "valid_diagnostic.cegs" not in names):
        cause = "examples of several tasks: a table (.scp) in place of an archive cannot be trained on here"
        raise DataError(cause, file=str(path / tables[-1]))
    if not numbers:
        kinds = ("examples with labels (egs.*.ark)", "chain examples (cegs.*.ark)")
        cause = (
            f"it has {kinds[not chain]}, and {kinds[chain]} are expected"
            if others
            else f"no {stem}.*.ark in this directory"
        )
        raise DataError(cause, file=str(path))
    last = max(numbers)
    count = info.values.get("num_archives", last) if info is not None else last
    for number in range(1, max(count, last) + 1):
        if number not in numbers:
            raise DataError(f"missing: there must be {max(count, last)} archives", file=f"{path}/{stem}.{number}.ark")
        if number > count:
            raise DataError(f"info/num_archives says {count}", file=str(path / numbers[number]))
    return [str(path / numbers[number]) for number in sorted(numbers) if number > 0], info


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=str(directory)) from error


def _read_info(directory: Path) -> EgsInfo | None:
    if not directory.is_dir():
        return None
    info = EgsInfo(directory)
    for name in _INFO:
        if (directory / name).exists():
            info.values[name] = read_number(directory / name)
    return info


@dataclass
class OpenedEgs:
    """Archives of examples, opened, with their index.

    Attributes:
        archives: keeps them open.
        index: of all of them.
        paths: theirs.
        files: C array of ``km_file``, one for each.
        info: of the directory, where there is one.
        named_in: what named them; for messages.
    """

    archives: Archives
    index: EgsIndex
    paths: list[str]
    files: Any
    info: EgsInfo | None
    named_in: str

    @classmethod
    def open(
        cls,
        source: Paths,
        output: str,
        index_cache: str | os.PathLike[str] | None,
        threads: int,
        skip_bad: int,
        *,
        chain: bool = False,
    ) -> OpenedEgs:
        """Open archives, and find what is in them by one pass over them, or from a file; see `Examples.open`."""
        if not output or any(c <= " " for c in output) or output in ("input", "ivector"):
            raise ConfigError(f"'{output}' cannot be the name of an output")
        if threads < 1:
            raise ConfigError(f"number of threads is {threads}, and must be at least 1")
        if skip_bad < 0:
            raise ConfigError(f"number of bad examples to skip is {skip_bad}, and must be at least 0")
        paths, info = find_archives(source, chain=chain)
        archives = Archives()
        named_in = os.fspath(source) if isinstance(source, str | os.PathLike) else "the list of archives"
        for number, path in enumerate(paths):
            if archives.open(path, named_in=named_in, key=os.path.basename(path)) != number:
                raise ConfigError(f"{path} is named twice")
        files = archives.table()
        identity = identity_of(paths, output, chain=chain)
        index = None if index_cache is None else load_index(index_cache, identity, skip_bad, chain=chain)
        if index is None:
            index = make_index(paths, files, output, threads, skip_bad, chain)
            if index_cache is not None:
                save_index(index, index_cache, identity)
        return cls(archives, index, paths, files, info, named_in)


@dataclass
class ExampleChunk:
    """One unit, decoded.

    Attributes:
        feats: float32 (rows, feat_dim).
        labels: int64 (width, num_targets); -1: none.
        weights: float32 like labels, 0 where there is no label; None where every weight is 1.
        ivector: float32 (ivector_dim,), or None.
    """

    feats: NDArray[np.float32]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32] | None
    ivector: NDArray[np.float32] | None


class Examples:
    """The chunks of an egs directory, which stay on disk. Make one with `Examples.open`.

    A unit is one chunk: an example, or one n of a merged example.

    Attributes:
        num_units: how many there are.
        shapes: the different shapes of chunks.
        shape_of: int32 array, the shape of each unit: an index into `shapes`.
        num_frames: int32 array, labelled frames of each unit, at least 1.
        total_frames: their sum.
        file_of: int32 array, the archive of each unit: an index into `paths`.
        paths: the archives.
        begin: int64 array, byte offset of each unit's example in its archive (of its ``\\0B``).
        end: int64 array, byte offset behind it.
        unit_bytes: int64 array, their difference; 0 for a unit of a merged example that is not its first.
        n: int32 array, the n of each unit's Index.
        feat_dim: columns of ``input``.
        ivector_dim: columns of ``ivector``; 0: there is none.
        num_pdfs: columns of the output.
        num_targets: the most pairs (pdf, weight) of any output row.
        has_weights: whether a weight other than 1 occurs.
        num_without_labels: chunks that were left out because no row of their output has an entry.
        num_bad: examples that were left out because they are malformed.
        c_examples: the C library's km_examples.
    """

    shapes: list[ChunkShape]
    paths: list[str]
    _archives: Archives

    @classmethod
    def open(
        cls,
        source: Paths,
        *,
        output: str = "output",
        index_cache: str | os.PathLike[str] | None = None,
        threads: int = THREADS,
        skip_bad: int = 0,
    ) -> Examples:
        """Open archives of examples, and find all chunks by one pass over them, or from a file with the index.

        Args:
            source: a directory as ``steps/nnet3/get_egs.sh`` leaves it (``egs.1.ark``, ...), of which ``info``
                is checked as well; one archive (``combine.egs``, ``valid_diagnostic.egs``); or a list of them.
            output: name of the output whose rows are the labels; other outputs are passed over.
            index_cache: where the index is kept; made if it is not there, and made anew if an archive's size or
                time of modification is another. Its directory must exist.
            threads: archives that are read at a time when the index is made.
            skip_bad: so many malformed examples may be left out, with a warning each; reading goes on where the
                next example begins. (What is wrong with values that are only decoded later, say an infinite one
                in a full matrix, is found by the reader.)

        Raises:
            DataError: an archive is missing or malformed, or does not fit the others or ``info``; names archive,
                key and byte offset.
            ConfigError: `output` is no possible name, or `threads` or `skip_bad` no possible number.
        """
        opened = OpenedEgs.open(source, output, index_cache, threads, skip_bad)
        examples = cls()
        examples._archives = opened.archives
        examples._use(opened.index, opened.paths, opened.files, output)
        if opened.info is not None:
            examples._check_info(opened.info)
        if examples.num_without_labels:
            count, named_in = examples.num_without_labels, opened.named_in
            logger.warning("%d chunks of %s have no label and are left out", count, named_in)
        return examples

    def _use(self, index: EgsIndex, paths: list[str], files: Any, output: str) -> None:
        """Keep the index, and build the C view of it."""
        self.paths = paths
        self.num_units = len(index.begin)
        self.shapes = [ChunkShape(*map(int, shape[:3])) for shape in index.shapes]
        self.file_of, self.begin, self.end, self.n = index.file_of, index.begin, index.end, index.n
        self.num_frames, self.shape_of = index.frames, index.shape_of
        self.unit_bytes = self.end - self.begin
        shared = (self.begin[1:] == self.begin[:-1]) & (self.file_of[1:] == self.file_of[:-1])
        self.unit_bytes[1:][shared] = 0
        self.total_frames = int(self.num_frames.sum(dtype=np.int64))
        self.feat_dim, self.ivector_dim, self.num_pdfs = index.feat_dim, index.ivector_dim, index.num_pdfs
        self.num_targets, self.has_weights = index.num_targets, index.has_weights
        self.num_without_labels, self.num_bad = index.num_without_labels, index.num_bad
        # Lent to C for as long as this object lives.
        self._lent = {
            "output": ffi.new("char[]", output.encode()),
            "files": files,
            "file_of": borrow(self.file_of, "int32_t", np.int32),
            "begin": borrow(self.begin, "int64_t", np.int64),
            "end": borrow(self.end, "int64_t", np.int64),
            "n": borrow(self.n, "int32_t", np.int32),
        }
        sizes = {name: getattr(self, name) for name in ("num_units", "feat_dim", "ivector_dim", "num_pdfs")}
        self.c_examples = ffi.new("km_examples *", {**self._lent, **sizes, "num_targets": self.num_targets})
        for array in (self.file_of, self.begin, self.end, self.n, self.num_frames, self.shape_of, self.unit_bytes):
            array.flags.writeable = False

    def _check_info(self, info: EgsInfo) -> None:
        info.check("feat_dim", self.feat_dim)
        info.check("ivector_dim", self.ivector_dim)
        for shape in self.shapes:
            info.check_context(shape)

    def location_of(self, unit: int) -> tuple[str, str]:
        """The archive and the key of a unit's example; for messages (the key is read from the archive)."""
        path = self.paths[int(self.file_of[unit])]
        return path, key_before(path, int(self.begin[unit]))

    def chunk(self, unit: int) -> ExampleChunk:
        """Decode one unit, 0 <= unit < num_units.

        Raises:
            DataError: the archive cannot be read, or has changed since the index was made.
            IndexError: no such unit.
        """
        if not 0 <= unit < self.num_units:
            raise IndexError(f"unit {unit} of {self.num_units}")
        shape = self.shapes[int(self.shape_of[unit])]
        targets = (shape.width, self.num_targets)
        chunk = ExampleChunk(
            np.empty((shape.rows, self.feat_dim), dtype=np.float32),
            np.empty(targets, dtype=np.int64),
            np.empty(targets, dtype=np.float32) if self.has_weights else None,
            np.empty(self.ivector_dim, dtype=np.float32) if self.ivector_dim else None,
        )
        out = ffi.new("km_out *")
        out.feats = feats = borrow(chunk.feats.reshape(-1), "float", np.float32)
        out.labels = labels = borrow(chunk.labels.reshape(-1), "int64_t", np.int64)
        lent = [feats, labels]
        if chunk.weights is not None:
            lent.append(borrow(chunk.weights.reshape(-1), "float", np.float32))
            out.weights = lent[-1]
        if chunk.ivector is not None:
            lent.append(borrow(chunk.ivector, "float", np.float32))
            out.ivector = lent[-1]
        c_shape, error = ffi.new("km_shape *", shape.fields()), new_error()
        if lib.km_examples_read(self.c_examples, c_shape, unit, out, error) != lib.KM_OK:
            file, key = self.location_of(unit)
            raise_data_error(error, file=file, key=key)
        return chunk
