"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kaldi_mpi.errors import DataError


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
