"""A pronunciation dictionary directory (``data/local/dict``), read and checked.

The files are those that Kaldi's ``utils/prepare_lang.sh`` takes: ``lexicon.txt`` (or ``lexiconp.txt``, which
is preferred as there), ``silence_phones.txt``, ``nonsilence_phones.txt``, ``optional_silence.txt`` and, if
there is one, ``extra_questions.txt``.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path

from kaldi_mpi.errors import DataError

_RESERVED_WORDS = {"<eps>", "<s>", "</s>", "#0"}


@dataclass(frozen=True)
class Pronunciation:
    """One line of the lexicon: a word, the probability of this pronunciation and its phones."""

    word: str
    probability: float
    phones: tuple[str, ...]


@dataclass(frozen=True)
class Dictionary:
    """A checked dictionary; each element of the phone lists is one line, the variants of one base phone."""

    lexicon: list[Pronunciation]
    silence: list[tuple[str, ...]]
    nonsilence: list[tuple[str, ...]]
    optional_silence: str
    extra_questions: list[tuple[str, ...]]

    @property
    def words(self) -> list[str]:
        """The words, each once, in the order of their bytes (``LC_ALL=C sort -u``)."""
        return sorted({entry.word for entry in self.lexicon}, key=str.encode)


def read_dictionary(directory: str | Path) -> Dictionary:
    """Read and check a dictionary directory.

    Raises:
        DataError: a file is missing or malformed; a phone of the lexicon is in neither phone list, one is in
            a list twice; the optional silence is not a silence phone; a reserved word is in the lexicon.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise DataError("not a directory", file=str(folder))
    silence = _phone_lists(folder / "silence_phones.txt")
    nonsilence = _phone_lists(folder / "nonsilence_phones.txt")
    counts = collections.Counter(phone for line in silence + nonsilence for phone in line)
    for phone, count in counts.items():
        if count > 1:
            raise DataError(f"phone {phone} is listed {count} times", file=str(folder / "silence_phones.txt"))
    optional = _phone_lists(folder / "optional_silence.txt")
    if len(optional) != 1 or len(optional[0]) != 1:
        raise DataError("must hold exactly one phone", file=str(folder / "optional_silence.txt"))
    if optional[0][0] not in {phone for line in silence for phone in line}:
        raise DataError(f"{optional[0][0]} is not in silence_phones.txt", file=str(folder / "optional_silence.txt"))
    questions = folder / "extra_questions.txt"
    extra = _lines(questions) if questions.exists() else []
    lexicon = _lexicon(folder, set(counts))
    return Dictionary(lexicon, silence, nonsilence, optional[0][0], [tuple(line.split()) for line in extra])


def with_disambiguation(lexicon: list[Pronunciation]) -> tuple[list[Pronunciation], int]:
    """Add ``#1``, ``#2``, ... where pronunciations are equal or one is the beginning of another.

    Without these symbols the composition with a grammar could not be determinized.

    Returns:
        the lexicon with such symbols at the end of the pronunciations that need one, and the highest number
        used (0 if none was needed).
    """
    counts = collections.Counter(entry.phones for entry in lexicon)
    prefixes = {entry.phones[:length] for entry in lexicon for length in range(len(entry.phones))}
    used: dict[tuple[str, ...], int] = {}
    result = []
    for entry in lexicon:
        if counts[entry.phones] > 1 or entry.phones in prefixes:
            used[entry.phones] = used.get(entry.phones, 0) + 1
            entry = Pronunciation(entry.word, entry.probability, (*entry.phones, f"#{used[entry.phones]}"))
        result.append(entry)
    return result, max(used.values(), default=0)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError("no such file; it is part of a dictionary directory", file=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read: {error}", file=str(path)) from error
    return [line for line in text.splitlines() if line.strip()]


def _phone_lists(path: Path) -> list[tuple[str, ...]]:
    lists = [tuple(line.split()) for line in _lines(path)]
    if not lists:
        raise DataError("is empty", file=str(path))
    for phone in (phone for line in lists for phone in line):
        if phone == "<eps>" or phone.startswith("#"):
            raise DataError(f"{phone} cannot be a phone", file=str(path))
    return lists


def _lexicon(folder: Path, phones: set[str]) -> list[Pronunciation]:
    with_probabilities = (folder / "lexiconp.txt").exists()
    path = folder / ("lexiconp.txt" if with_probabilities else "lexicon.txt")
    entries = []
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        probability = 1.0
        if with_probabilities:
            try:
                probability = float(fields.pop(1))
            except (IndexError, ValueError):
                probability = 0.0
            if not 0.0 < probability <= 1.0:
                raise DataError(f"line {number}: no probability in the second field", file=str(path))
        word, pronunciation = fields[0], tuple(fields[1:])
        if not pronunciation:
            raise DataError(f"line {number}: word {word} has no phones", file=str(path))
        if word in _RESERVED_WORDS:
            raise DataError(f"line {number}: {word} cannot be a word", file=str(path))
        for phone in pronunciation:
            if phone not in phones:
                raise DataError(
                    f"line {number}: phone {phone} of word {word} is in neither silence_phones.txt nor "
                    "nonsilence_phones.txt",
                    file=str(path),
                )
        entries.append(Pronunciation(word, probability, pronunciation))
    if not entries:
        raise DataError("is empty", file=str(path))
    return entries
