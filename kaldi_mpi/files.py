"""Small files: written whole or not at all; read with errors that name them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kaldi_mpi.errors import DataError

_LARGEST = 10**9 - 1  # that a file of one number may hold, unless its reader says otherwise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb", sync: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`, and rename it to `path` when the block ends without error.

    The data is synced before the rename, so that a full disk or a kill never leaves half a file under
    the final name; on any error the temporary file is removed and `path` is as it was.

    Args:
        path: the final name; its directory must exist.
        mode: ``"wb"`` or ``"w"`` (UTF-8 text).
        sync: wait until the data is on the disk; False for small files that are rewritten all the time.

    Raises:
        DataError: the operating system refused (disk full, no permission); names the file and the cause.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.tmp{os.getpid()}")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, final)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise DataError(f"cannot write: {error.strerror or error}", file=str(final)) from error
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def read_text(path: str | os.PathLike[str], default: str | None = None, *, errors: str = "strict") -> str:
    """The text of a small file, without white space at its ends.

    Args:
        default: what to return where there is no such file.
        errors: what to do about bytes that are not UTF-8, as for `open`.

    Raises:
        DataError: it cannot be read; names it.
    """
    if default is not None and not os.path.exists(path):
        return default
    try:
        return Path(path).read_text(encoding="utf-8", errors=errors).strip()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=os.fspath(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read: {error}", file=os.fspath(path)) from error


def read_number(
    path: str | os.PathLike[str],
    default: int | None = None,
    *,
    what: str = "a number",
    low: int = -_LARGEST,
    high: int = _LARGEST,
) -> int:
    """The whole number that a file consists of, such as Kaldi's ``num_jobs``.

    Args:
        default: what to return where there is no such file.
        what: that is expected, for messages.
        low, high: the range that it must be in, both included.

    Raises:
        DataError: it cannot be read, or is no such number; names it.
    """
    text = read_text(path, None if default is None else str(default), errors="replace")
    if not (re.fullmatch(r"-?[0-9]{1,10}", text) and low <= int(text) <= high):
        raise DataError(f"{what} is expected, not '{text[:20]}'", file=os.fspath(path))
    return int(text)
