"""Errors that a user can act on: one line, naming the file, the key and the cause."""

from __future__ import annotations


class KaldiMpiError(Exception):
    """A problem with the user's input or environment; its text is one clear line.

    Command lines print it after ``ERROR`` and exit with status 1, without a traceback.
    """


class DataError(KaldiMpiError):
    """A file that is missing, malformed or does not fit the others.

    Args:
        cause: what is wrong, in a few words.
        file: the file (or rxfilename) at fault.
        key: the utterance, speaker or component, where one is known.
        offset: byte offset in the file (of the decompressed data for ``.gz``), where one is known.
    """

    def __init__(
        self, cause: str, *, file: str | None = None, key: str | None = None, offset: int | None = None
    ) -> None:
        self.cause, self.file, self.key, self.offset = cause, file, key, offset
        where = [str(file)] if file is not None else []
        if key is not None:
            where.append(f"key {key}")
        if offset is not None:
            where.append(f"byte offset {offset}")
        super().__init__(f"{', '.join(where)}: {cause}" if where else cause)


class ConfigError(KaldiMpiError):
    """An option or configuration line that cannot be used."""
