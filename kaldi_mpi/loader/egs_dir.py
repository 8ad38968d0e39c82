"""Which archives make up a directory of examples, and what its ``info`` says about them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kaldi_mpi.errors import DataError
from kaldi_mpi.loader.chunking import ChunkShape

_ARCHIVE = re.compile(r"egs\.([0-9]+)\.ark")
_CHAIN = re.compile(r"cegs\.[0-9]+\.ark")


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
            ("right_context", "right_context_final", shape.right),
        ):
            allowed = {self.values[key] for key in (name, edge) if self.values.get(key, -1) >= 0}
            if name in self.values and found not in allowed:
                raise DataError(
                    f"says {' or '.join(map(str, sorted(allowed)))}, and there are examples with {found}",
                    file=str(self.directory / name),
                )


_INFO = (
    "feat_dim",
    "ivector_dim",
    "left_context",
    "right_context",
    "left_context_initial",
    "right_context_final",
    "num_archives",
)


def find_archives(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> tuple[list[str], EgsInfo | None]:
    """The archives that `source` means, and the directory's ``info`` where it means a directory that has one.

    Args:
        source: a directory with ``egs.1.ark``, ``egs.2.ark``, ...; one archive (``combine.egs``); or a list of
            archives.

    Raises:
        DataError: there is no archive, one is missing, or ``info/num_archives`` says another number.
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
    numbers: dict[int, str] = {}
    others = False
    try:
        for entry in sorted(os.listdir(path)):
            match = _ARCHIVE.fullmatch(entry)
            others = others or _CHAIN.fullmatch(entry) is not None
            if match is not None:
                if (number := int(match.group(1))) in numbers:
                    raise DataError(f"there is {numbers[number]} beside it", file=str(path / entry))
                numbers[number] = entry
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=str(path)) from error
    if not numbers:
        cause = "it has chain examples (cegs.*.ark), which cannot be trained on here" if others else None
        raise DataError(cause or "no egs.*.ark in this directory", file=str(path))
    last = max(numbers)
    count = info.values.get("num_archives", last) if info is not None else last
    for number in range(1, max(count, last) + 1):
        if number not in numbers:
            raise DataError(f"missing: there must be {max(count, last)} archives", file=f"{path}/egs.{number}.ark")
        if number > count:
            raise DataError(f"info/num_archives says {count}", file=str(path / numbers[number]))
    return [str(path / numbers[number]) for number in sorted(numbers) if number > 0], info


def _read_info(directory: Path) -> EgsInfo | None:
    if not directory.is_dir():
        return None
    info = EgsInfo(directory)
    for name in _INFO:
        file = directory / name
        if not file.exists():
            continue
        try:
            text = file.read_text("utf-8", "replace").strip()
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=str(file)) from error
        if not re.fullmatch(r"-?[0-9]{1,9}", text):
            raise DataError(f"a number is expected, not '{text[:20]}'", file=str(file))
        info.values[name] = int(text)
    return info
