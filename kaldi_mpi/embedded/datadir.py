"""Kaldi data directories: reading, checking, and taking a user's own into the recipe.

The layout is Kaldi's (https://kaldi-asr.org/doc/data_prep.html): text files of lines ``key value``, in
the C locale's order of keys. Python compares strings by code point, which for UTF-8 is that same order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats import scp
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

PathLike = str | os.PathLike[str]

# Symbols that Kaldi's language directories keep for themselves (utils/validate_data_dir.sh refuses them).
_RESERVED_WORDS = ("<s>", "</s>", "#0")


def read_table(path: PathLike, *, allow_empty_value: bool = False) -> dict[str, str]:
    """Read a Kaldi text table that is not empty: one ``key value`` a line, the value being the rest of the line.

    Args:
        path: the file.
        allow_empty_value: whether a line may hold a key alone (an empty transcript in ``text``).

    Returns:
        key -> value (stripped), in the C locale's order whatever the order in the file.

    Raises:
        DataError: no such file, an empty file, a blank line, a key without value, a key twice.
    """
    table = scp.read_table(path, allow_empty_value=allow_empty_value)
    if not table:
        raise DataError("the file is empty", file=str(path))
    return dict(sorted(table.items()))


def write_table(path: PathLike, table: Mapping[str, str]) -> None:
    """Write ``key value`` lines in the C locale's order of keys (atomically)."""
    with atomic_write(path, "w") as stream:
        stream.writelines(f"{key} {value}".rstrip() + "\n" for key, value in sorted(table.items()))


def spk2utt_of(utt2spk: Mapping[str, str]) -> dict[str, list[str]]:
    """Invert `utt2spk`: speaker -> its utterances, both sorted."""
    speakers: dict[str, list[str]] = {}
    for utterance, speaker in sorted(utt2spk.items()):
        speakers.setdefault(speaker, []).append(utterance)
    return dict(sorted(speakers.items()))


class DataDir:
    """A Kaldi data directory; each file is read when first asked for, and remembered.

    Args:
        path: the directory.

    Raises:
        DataError: it is no directory, or holds neither ``wav.scp`` nor ``feats.scp``.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError("no such directory", file=str(path))
        if not self.has("wav.scp") and not self.has("feats.scp"):
            raise DataError("not a Kaldi data directory: it has no wav.scp and no feats.scp", file=str(path))

    def has(self, name: str) -> bool:
        """Whether the file `name` is there."""
        return (self.path / name).is_file()

    def file(self, name: str) -> str:
        """The path of the file `name`, as messages show it."""
        return str(self.path / name)

    @cached_property
    def wav_scp(self) -> dict[str, str]:
        """Utterance (recording, where there are segments) -> path or command ending in ``|``."""
        return read_table(self.path / "wav.scp")

    @cached_property
    def segments(self) -> dict[str, tuple[str, float, float]]:
        """Utterance -> (recording, start, end) in seconds; empty without a ``segments`` file."""
        if not self.has("segments"):
            return {}
        parsed = {}
        for utterance, value in read_table(self.path / "segments").items():
            fields = value.split()
            try:
                recording, start, end = fields[0], float(fields[1]), float(fields[2])
                valid = len(fields) == 3 and 0 <= start < end
            except (IndexError, ValueError):
                valid = False
            if not valid:
                raise DataError(
                    f"expected 'RECORDING START END' with 0 <= START < END, got {value!r}",
                    file=self.file("segments"),
                    key=utterance,
                )
            parsed[utterance] = (recording, start, end)
        return parsed

    @cached_property
    def text(self) -> dict[str, list[str]]:
        """Utterance -> its words (possibly none)."""
        table = read_table(self.path / "text", allow_empty_value=True)
        return {utterance: words.split() for utterance, words in table.items()}

    @cached_property
    def utt2spk(self) -> dict[str, str]:
        """Utterance -> speaker."""
        table = read_table(self.path / "utt2spk")
        for utterance, speaker in table.items():
            if len(speaker.split()) != 1:
                raise DataError(f"expected one speaker, got {speaker!r}", file=self.file("utt2spk"), key=utterance)
        return table

    @cached_property
    def spk2utt(self) -> dict[str, list[str]]:
        """Speaker -> utterances: of the file ``spk2utt``, or made from utt2spk where there is none."""
        if not self.has("spk2utt"):
            return spk2utt_of(self.utt2spk)
        return {speaker: value.split() for speaker, value in read_table(self.path / "spk2utt").items()}

    @cached_property
    def feats_scp(self) -> dict[str, str]:
        """Utterance -> archive position (rxfilename) of its features."""
        return read_table(self.path / "feats.scp")

    @cached_property
    def cmvn_scp(self) -> dict[str, str]:
        """Speaker -> archive position (rxfilename) of its CMVN statistics."""
        return read_table(self.path / "cmvn.scp")

    @cached_property
    def utt2num_frames(self) -> dict[str, int]:
        """Utterance -> number of feature frames."""
        return {key: int(value) for key, value in self._numbers("utt2num_frames", r"[1-9][0-9]*").items()}

    @cached_property
    def utt2dur(self) -> dict[str, float]:
        """Utterance -> duration in seconds."""
        pattern = r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?|[0-9]+\."
        return {key: float(value) for key, value in self._numbers("utt2dur", pattern).items()}

    @property
    def utterances(self) -> list[str]:
        """All utterances (the keys of ``utt2spk``) in the C locale's order."""
        return list(self.utt2spk)

    def validate(self, *, wav: bool = True, text: bool = True, feats: bool = False) -> None:
        """Check that the files agree with one another, as utils/validate_data_dir.sh does.

        Files that are there are checked whether required or not.

        Args:
            wav: ``wav.scp`` is required.
            text: ``text`` is required.
            feats: ``feats.scp`` and ``cmvn.scp`` are required.

        Raises:
            DataError: names the file, the key and the cause: a file missing, a key that one file has and
                another lacks, lines out of order, speakers and utterances sorted differently, a reserved
                word in the text.
        """
        required = {"utt2spk": True, "wav.scp": wav, "text": text, "feats.scp": feats, "cmvn.scp": feats}
        for name, needed in required.items():
            if needed and not self.has(name):
                raise DataError("no such file", file=self.file(name))
        self._check_utterance_keys()
        self._check_speakers()
        for name in sorted(path.name for path in self.path.iterdir()):
            if name in _TABLES:
                self._check_order(name)
        if self.has("text"):
            for utterance, words in self.text.items():
                for word in words:
                    if word in _RESERVED_WORDS:
                        raise DataError(
                            f"the text holds the reserved word {word}", file=self.file("text"), key=utterance
                        )

    def _numbers(self, name: str, pattern: str) -> dict[str, str]:
        table = read_table(self.path / name)
        for key, value in table.items():
            if not re.fullmatch(pattern, value) or float(value) <= 0:
                raise DataError(f"expected a positive number, got {value!r}", file=self.file(name), key=key)
        return table

    def _check_utterance_keys(self) -> None:
        tables: dict[str, Iterable[str]] = {}
        if self.has("wav.scp"):
            if self.has("segments"):
                tables["segments"] = self.segments
                recordings = [segment[0] for segment in self.segments.values()]
                self._same_keys("wav.scp", self.wav_scp, "segments", recordings, "recording")
            else:
                tables["wav.scp"] = self.wav_scp
        for name in ("text", "feats.scp", "utt2num_frames", "utt2dur"):
            if self.has(name):
                tables[name] = getattr(self, name.replace(".", "_"))
        for name, keys in tables.items():
            self._same_keys("utt2spk", self.utt2spk, name, keys, "utterance")

    def _check_speakers(self) -> None:
        expected = spk2utt_of(self.utt2spk)
        self._same_keys("utt2spk", expected, "spk2utt", self.spk2utt, "speaker")
        for speaker, utterances in expected.items():
            if self.spk2utt[speaker] != utterances:
                raise DataError(
                    "the speaker's utterances are not those of utt2spk",
                    file=self.file("spk2utt"),
                    key=speaker,
                )
        if self.has("cmvn.scp"):
            self._same_keys("utt2spk", expected, "cmvn.scp", self.cmvn_scp, "speaker")
        previous_utterance, previous = "", ""
        for utterance, speaker in self.utt2spk.items():
            if speaker < previous:
                raise DataError(
                    f"sorted by utterance, speaker {speaker} comes after speaker {previous} of "
                    f"{previous_utterance}; Kaldi needs one order for both (make each speaker's name the "
                    "start of its utterances' names, followed by '-')",
                    file=self.file("utt2spk"),
                    key=utterance,
                )
            previous_utterance, previous = utterance, speaker

    def _same_keys(self, name1: str, keys1: Iterable[str], name2: str, keys2: Iterable[str], what: str) -> None:
        set1, set2 = set(keys1), set(keys2)
        for have, have_name, lack_name in ((set1 - set2, name1, name2), (set2 - set1, name2, name1)):
            if have:
                raise DataError(
                    f"the {what} is in {have_name} but not here"
                    + (f" ({len(have)} such {what}s)" if len(have) > 1 else ""),
                    file=self.file(lack_name),
                    key=min(have),
                )

    def _check_order(self, name: str) -> None:
        previous = ""
        for line in _lines(self.path / name):
            key = line.split(maxsplit=1)[0]
            if key < previous:
                raise DataError(
                    f"not in the C locale's order: it comes after {previous} (sort with LC_ALL=C)",
                    file=self.file(name),
                    key=key,
                )
            previous = key


_TABLES = (
    "wav.scp",
    "segments",
    "text",
    "utt2spk",
    "spk2utt",
    "feats.scp",
    "cmvn.scp",
    "utt2num_frames",
    "utt2dur",
)


def make_directories(*paths: PathLike) -> None:
    """Make directories with their parents; a DataError where that is not possible."""
    for path in paths:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the directory: {error.strerror}", file=str(path)) from error


def write_data_dir(
    path: PathLike,
    *,
    wav_scp: Mapping[str, str],
    text: Mapping[str, str],
    utt2spk: Mapping[str, str],
    segments: Mapping[str, str] | None = None,
) -> None:
    """Write the files a corpus consists of, ``spk2utt`` included; creates the directory."""
    directory = Path(path)
    make_directories(directory)
    write_table(directory / "wav.scp", wav_scp)
    write_table(directory / "text", text)
    write_table(directory / "utt2spk", utt2spk)
    write_table(directory / "spk2utt", {spk: " ".join(utts) for spk, utts in spk2utt_of(utt2spk).items()})
    if segments:
        write_table(directory / "segments", segments)


def copy_data_dir(source: PathLike, target: PathLike) -> DataDir:
    """Take a user's data directory into a recipe: wav.scp, segments, text, utt2spk and spk2utt.

    The lines are put in order, spk2utt is made anew, and audio paths become absolute. As in Kaldi, a
    relative path in ``wav.scp`` counts from the current directory, not from the data directory.
    Features of the source are not taken over, and those of an earlier use of `target` are removed.

    Args:
        source: an existing Kaldi data directory.
        target: the directory to write.

    Returns:
        The new directory, validated.

    Raises:
        DataError: `source` is no data directory, its files do not agree, or an audio file is missing.
    """
    data = DataDir(source)
    if Path(target).exists() and Path(target).samefile(data.path):
        raise DataError(f"it is the directory to be written ({target}); keep your own data elsewhere", file=str(source))
    for name in ("wav.scp", "text", "utt2spk"):
        if not data.has(name):
            raise DataError("no such file", file=data.file(name))
    wav_scp = {key: _absolute_entry(entry, data.file("wav.scp"), key) for key, entry in data.wav_scp.items()}
    data._check_utterance_keys()
    directory = Path(target)
    make_directories(directory)
    for name in _TABLES:
        (directory / name).unlink(missing_ok=True)
    write_data_dir(
        directory,
        wav_scp=wav_scp,
        text={utterance: " ".join(words) for utterance, words in data.text.items()},
        utt2spk=data.utt2spk,
        segments=read_table(data.path / "segments") if data.has("segments") else None,
    )
    copied = DataDir(directory)
    copied.validate()
    return copied


def _absolute_entry(entry: str, scp: str, key: str) -> str:
    if entry.endswith("|"):
        return entry
    if entry.startswith("~"):
        raise DataError(f"nobody expands the tilde in {entry}; give the whole path", file=scp, key=key)
    path = os.path.abspath(entry)
    if not Path(re.sub(r":\d+$", "", path)).is_file():
        where = "" if os.path.isabs(entry) else f" (a relative path counts from {os.getcwd()})"
        raise DataError(f"no such audio file: {entry}{where}", file=scp, key=key)
    return path


def _lines(path: PathLike) -> list[str]:
    try:
        lines = Path(path).read_bytes().decode("utf-8").split("\n")  # splitlines() also splits at U+2028 etc.
        return lines if lines[-1] else lines[:-1]
    except FileNotFoundError:
        raise DataError("no such file", file=str(path)) from None
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", file=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError("the text is not UTF-8", file=str(path), offset=error.start) from None


def copy_main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi copy-data-dir SOURCE TARGET``; see `copy_data_dir`."""
    parser = Parser(prog="kaldi-mpi copy-data-dir", description="Take a Kaldi data directory into a recipe.")
    parser.add_argument("source")
    parser.add_argument("target")
    options = parser.parse_args(arguments)
    _report(copy_data_dir(options.source, options.target))


def validate_main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi validate-data-dir [--feats] DIR``; see `DataDir.validate`."""
    parser = Parser(
        prog="kaldi-mpi validate-data-dir", description="Check that the files of a Kaldi data directory agree."
    )
    parser.add_argument("directory")
    parser.add_argument("--feats", action="store_true", help="features and CMVN statistics must be there")
    options = parser.parse_args(arguments)
    data = DataDir(options.directory)
    data.validate(feats=options.feats)
    _report(data)


def _report(data: DataDir) -> None:
    logger.info("%s: %d utterances of %d speakers", data.path, len(data.utterances), len(data.spk2utt))
