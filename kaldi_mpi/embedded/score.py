"""Word error rates of lattices over language-model weights: what ``steps/score_kaldi.sh`` does.

``kaldi-mpi score [options] DATA_DIR GRAPH_DIR DECODE_DIR`` writes ``wer_LMWT_WIP`` in
compute-wer's form, which ``utils/best_wer.sh`` reads, ``scoring_kaldi/penalty_WIP/LMWT.txt`` with the words,
and ``scoring_kaldi/best_wer``; it prints the best line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kaldi_mpi.embedded import wheels
from kaldi_mpi.embedded.best_path import best_paths
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.lattice import read_lattices
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.symbols import SymbolTable
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

_WER = re.compile(r"^%WER (\S+) \[.*", re.MULTILINE)


@dataclass(frozen=True)
class ScoreOptions:
    """score_kaldi.sh's options, with its values.

    Attributes:
        min_lmwt: smallest language-model weight (acoustic costs are divided by it).
        max_lmwt: largest, inclusive.
        word_ins_penalty: penalties per word, as written in the names of the files.
    """

    min_lmwt: int = 7
    max_lmwt: int = 17
    word_ins_penalty: tuple[str, ...] = ("0.0", "0.5", "1.0")


@dataclass
class ErrorCounts:
    """Counts over sentences, and their form in ``wer_*`` files."""

    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0
    words: int = 0
    sentences: int = 0
    wrong_sentences: int = 0
    absent: int = 0

    @property
    def errors(self) -> int:
        """Word errors."""
        return self.insertions + self.deletions + self.substitutions

    def report(self) -> str:
        """Three lines as compute-wer prints them."""
        partial = " [PARTIAL]" if self.absent else ""
        return (
            f"%WER {_percent(self.errors, self.words)} [ {self.errors} / {self.words}, "
            f"{self.insertions} ins, {self.deletions} del, {self.substitutions} sub ]{partial}\n"
            f"%SER {_percent(self.wrong_sentences, self.sentences)} "
            f"[ {self.wrong_sentences} / {self.sentences} ]\n"
            f"Scored {self.sentences} sentences, {self.absent} not present in hyp.\n"
        )


class ErrorCounter:
    """Counts errors of many hypotheses; equal pairs of sentences are compared once."""

    def __init__(self) -> None:
        self._kaldialign = wheels.load_kaldialign()
        self._known: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[int, int, int]] = {}

    def count(self, references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, Sequence[str]]) -> ErrorCounts:
        """Compare hypotheses with references; references without hypothesis are not scored (`absent`)."""
        counts = ErrorCounts()
        for key, reference in references.items():
            if key not in hypotheses:
                counts.absent += 1
                continue
            pair = (tuple(reference), tuple(hypotheses[key]))
            if pair not in self._known:
                distance = self._kaldialign.edit_distance(list(pair[0]), list(pair[1]))
                self._known[pair] = (distance["ins"], distance["del"], distance["sub"])
            insertions, deletions, substitutions = self._known[pair]
            counts.insertions += insertions
            counts.deletions += deletions
            counts.substitutions += substitutions
            counts.words += len(reference)
            counts.sentences += 1
            counts.wrong_sentences += pair[0] != pair[1]
        return counts


def score(
    data_dir: str | Path,
    graph_dir: str | Path,
    decode_dir: str | Path,
    options: ScoreOptions | None = None,
) -> str:
    """Score all lattices of a decoding directory; see the module's text.

    Args:
        data_dir: with the reference ``text``.
        graph_dir: with ``words.txt``.
        decode_dir: with ``lat.*.gz``, raw or compact.
        options: the grid.

    Returns:
        the line of ``scoring_kaldi/best_wer``.

    Raises:
        DataError: no lattices, a word-id that words.txt lacks, or no reference for any of them.
        ConfigError: an impossible grid.
    """
    chosen = options or ScoreOptions()
    directory = Path(decode_dir)
    settings = _settings(chosen)
    references = DataDir(data_dir).text
    words = SymbolTable.read(Path(graph_dir) / "words.txt")
    hypotheses = _hypotheses(directory, settings, words)
    if not references.keys() & hypotheses.keys():
        raise DataError("no utterance of it has a lattice", file=f"{data_dir}/text")

    scoring = directory / "scoring_kaldi"
    scoring.mkdir(exist_ok=True)
    for old in [*directory.glob("wer_*_*"), *scoring.glob("penalty_*/*.txt")]:
        old.unlink()
    _write_text(scoring / "test_filt.txt", references)
    counter = ErrorCounter()
    for index, (lmwt, penalty) in enumerate(settings):
        hypothesis = {key: answers[index] for key, answers in hypotheses.items()}
        folder = scoring / f"penalty_{penalty}"
        folder.mkdir(exist_ok=True)
        _write_text(folder / f"{lmwt}.txt", hypothesis)
        with atomic_write(directory / f"wer_{lmwt}_{penalty}", "w") as stream:
            stream.write(counter.count(references, hypothesis).report())
    # In this order, for the first of equally good settings wins in score_kaldi.sh too.
    best = best_wer(directory / f"wer_{lmwt}_{penalty}" for lmwt, penalty in settings)
    details = scoring / "wer_details"
    details.mkdir(exist_ok=True)
    match = re.search(r"_(\d+)_([^_]+)$", best)
    assert match is not None
    (details / "lmwt").write_text(f"{match[1]}\n", encoding="utf-8")
    (details / "wip").write_text(f"{match[2]}\n", encoding="utf-8")
    with atomic_write(scoring / "best_wer", "w") as stream:
        stream.write(f"{best}\n")
    return best


def best_wer(files: Iterable[str | Path]) -> str:
    """The ``%WER`` line of the file with the smallest rate, followed by the file's name.

    Args:
        files: ``wer_*`` files; the first of equal ones wins.

    Raises:
        DataError: a file cannot be read, none has a ``%WER`` line, or there are no files.
    """
    best: tuple[float, str] | None = None
    for file in files:
        try:
            match = _WER.search(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=str(file)) from error
        if match is not None and (best is None or float(match[1]) < best[0]):
            best = (float(match[1]), f"{match[0].strip()} {file}")
    if best is None:
        raise DataError("no wer_* file with a %WER line")
    return best[1]


def _settings(options: ScoreOptions) -> list[tuple[int, str]]:
    if not 0 < options.min_lmwt <= options.max_lmwt:
        raise ConfigError(f"language-model weights from {options.min_lmwt} to {options.max_lmwt}")
    for penalty in options.word_ins_penalty:
        try:
            float(penalty)
        except ValueError:
            raise ConfigError(f"the word insertion penalty {penalty!r} is not a number") from None
    weights = range(options.min_lmwt, options.max_lmwt + 1)
    return [(lmwt, penalty) for penalty in options.word_ins_penalty for lmwt in weights]


def _hypotheses(directory: Path, settings: Sequence[tuple[int, str]], words: SymbolTable) -> dict[str, list[list[str]]]:
    archives = sorted(directory.glob("lat.*.gz"), key=lambda path: (len(path.name), path.name))
    if not archives:
        raise DataError("it has no lat.*.gz: was it decoded?", file=str(directory))
    scale = np.array([1.0 / lmwt for lmwt, _ in settings])
    penalty = np.array([float(value) for _, value in settings])
    hypotheses: dict[str, list[list[str]]] = {}
    for archive in archives:
        entries = list(read_lattices(archive))
        try:
            answers = best_paths([lattice for _, lattice in entries], scale, penalty)
        except DataError as error:
            raise DataError(error.cause, file=str(archive)) from error
        for (key, _), answer in zip(entries, answers, strict=True):
            hypotheses[key] = [[words.symbol(word) for word in sentence] for sentence in answer]
    return hypotheses


def _write_text(path: Path, table: Mapping[str, Sequence[str]]) -> None:
    with atomic_write(path, "w") as stream:
        for key in sorted(table):
            stream.write(" ".join((key, *table[key])) + "\n")


def _percent(part: int, whole: int) -> str:
    # Kaldi computes in single precision and divides by zero where there are no words.
    value = np.float32(100.0) * np.float32(part) / np.float32(whole) if whole else math.nan
    return f"{value:.2f}"


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi score``; see the module's text."""
    defaults = ScoreOptions()
    parser = Parser(prog="kaldi-mpi score", description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("graph_dir")
    parser.add_argument("decode_dir")
    parser.add_argument("--min-lmwt", type=int, default=defaults.min_lmwt)
    parser.add_argument("--max-lmwt", type=int, default=defaults.max_lmwt)
    parser.add_argument("--word-ins-penalty", default=",".join(defaults.word_ins_penalty))
    chosen = parser.parse_args(arguments)
    options = ScoreOptions(chosen.min_lmwt, chosen.max_lmwt, tuple(str(chosen.word_ins_penalty).split(",")))
    logger.info("%s", score(chosen.data_dir, chosen.graph_dir, chosen.decode_dir, options))


def best_wer_main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi best-wer``: a line per directory, as ``grep WER DIR/wer_* | utils/best_wer.sh`` prints it."""
    parser = Parser(prog="kaldi-mpi best-wer", description="The best word error rate of decoding directories.")
    parser.add_argument("decode_dir", nargs="+")
    for directory in parser.parse_args(arguments).decode_dir:
        files = sorted(Path(directory).glob("wer_*_*"))
        if not files:
            raise DataError("it has no wer_* files: was it scored?", file=str(directory))
        print(best_wer(files))
