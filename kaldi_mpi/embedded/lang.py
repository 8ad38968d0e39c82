"""``data/lang`` from a dictionary: the files of Kaldi's ``utils/prepare_lang.sh``, without Kaldi.

Phones do not depend on the position in the word (``--position-dependent-phones false``), and the numbers of
phones and words, the topology and the lexicon FSTs are those that prepare_lang.sh gives for the same
dictionary. With an ARPA language model G.fst is made too, as ``arpa2fst --disambig-symbol=#0`` makes it.

``kaldi-mpi prepare-lang [options] DICT_DIR OOV_WORD TMP_DIR LANG_DIR`` takes prepare_lang.sh's
arguments.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kaldi_mpi.embedded import wheels
from kaldi_mpi.embedded.dictionary import Dictionary, Pronunciation, read_dictionary, with_disambiguation
from kaldi_mpi.embedded.fst import read_fst, write_fst
from kaldi_mpi.errors import DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.symbols import SymbolTable
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

_ARPA_TO_FST = """
import sys
from kaldi_mpi.embedded import wheels
wheels.load().kaldilm.arpa2fst(
    input_arpa=sys.argv[1], disambig_symbol="#0", read_symbol_table=sys.argv[2], output_fst=sys.argv[3]
)
"""

_LISTS_WITH_CSL = ("silence", "nonsilence", "optional_silence", "disambig", "context_indep")


def prepare_lang(
    dict_dir: str | Path,
    oov_word: str,
    lang_dir: str | Path,
    *,
    sil_prob: float = 0.5,
    num_sil_states: int = 5,
    num_nonsil_states: int = 3,
) -> None:
    """Write a lang directory; G.fst comes from `make_grammar`.

    Args:
        dict_dir: see `kaldi_mpi.embedded.dictionary`.
        oov_word: a word of the lexicon that stands for words that are not in it.
        lang_dir: made if it does not exist; an old ``phones/`` in it is replaced.
        sil_prob: probability of the optional silence between words, in (0, 1).
        num_sil_states: HMM states of a silence phone, fully connected inside.
        num_nonsil_states: HMM states of the other phones, left to right.

    Raises:
        DataError: the dictionary is unusable, or `oov_word` is not in it.
    """
    dictionary = read_dictionary(dict_dir)
    if oov_word not in dictionary.words:
        raise DataError(f"the word for unknown words, {oov_word}, is not in the lexicon", file=str(dict_dir))
    lang = Path(lang_dir)
    shutil.rmtree(lang / "phones", ignore_errors=True)
    (lang / "phones").mkdir(parents=True)

    lexicon_disambig, last = with_disambiguation(dictionary.lexicon)
    last += 1  # one more symbol marks the end of the optional silence in L_disambig.fst
    disambig = [f"#{n}" for n in range(last + 1)]
    silence = [phone for line in dictionary.silence for phone in line]
    nonsilence = [phone for line in dictionary.nonsilence for phone in line]
    phones = SymbolTable.numbered(["<eps>", *silence, *nonsilence, *disambig])
    words = SymbolTable.numbered(["<eps>", *dictionary.words, "#0", "<s>", "</s>"])
    phones.write(lang / "phones.txt")
    words.write(lang / "words.txt")
    _write_phone_files(lang / "phones", dictionary, phones, words, disambig)
    _write(
        lang / "topo",
        topology(num_nonsil_states, num_sil_states, phones.ids(nonsilence), phones.ids(silence)),
    )
    _write(lang / "oov.txt", f"{oov_word}\n")
    _write(lang / "oov.int", f"{words.id(oov_word)}\n")

    kaldifst = wheels.load().kaldifst
    sil = dictionary.optional_silence
    fst = _lexicon_fst(dictionary.lexicon, phones, words, sil, sil_prob, None)
    kaldifst.arcsort(fst, sort_type="olabel")
    write_fst(fst, lang / "L.fst")
    fst = _lexicon_fst(lexicon_disambig, phones, words, sil, sil_prob, disambig[-1])
    # The grammar's #0 must pass through the lexicon wherever a word may begin.
    kaldifst.add_self_loops(fst, [phones.id("#0")], [words.id("#0")])
    kaldifst.arcsort(fst, sort_type="olabel")
    write_fst(fst, lang / "L_disambig.fst")
    logger.info(
        "Wrote %s: %d words, %d phones, %d disambiguation symbols",
        lang, len(dictionary.words), len(silence) + len(nonsilence), len(disambig),
    )  # fmt: skip


def make_grammar(arpa: str | Path, lang_dir: str | Path) -> None:
    """Write ``LANG_DIR/G.fst`` from an ARPA language model over the words of ``LANG_DIR/words.txt``.

    Raises:
        DataError: no such model, or one that cannot be read.
    """
    lang = Path(lang_dir)
    if not Path(arpa).is_file():
        raise DataError("no such language model", file=str(arpa))
    wheels.check_versions()
    temporary = lang / ".G.fst.tmp"
    # In a process of its own: at a malformed line kaldilm does not raise but aborts.
    done = subprocess.run(
        [sys.executable, "-c", _ARPA_TO_FST, str(arpa), str(lang / "words.txt"), str(temporary)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        if done.returncode != 0:
            cause = done.stderr.rpartition("[E] ")[2].strip().splitlines()
            raise DataError(f"not an ARPA language model: {cause[0] if cause else 'unknown'}", file=str(arpa))
        for warning in (part.splitlines()[0] for part in done.stderr.split("[W] ")[1:]):
            logger.warning("%s: %s", arpa, warning)
        if read_fst(temporary).num_states == 0:
            raise DataError("the language model accepts nothing", file=str(arpa))
        temporary.replace(lang / "G.fst")
    finally:
        temporary.unlink(missing_ok=True)


def topology(num_nonsil: int, num_sil: int, nonsilence: Sequence[int], silence: Sequence[int]) -> str:
    """The text of a ``topo`` file: phones left to right, silence with freely connected inner states.

    Args:
        num_nonsil: emitting states of each phone in `nonsilence`.
        num_sil: emitting states of each phone in `silence`: 1, or 3 and more.
        nonsilence: phone numbers.
        silence: phone numbers.
    """
    lines = ["<Topology>", "<TopologyEntry>", "<ForPhones>", " ".join(map(str, nonsilence)), "</ForPhones>"]
    lines += [_state(s, [(s, 0.75), (s + 1, 0.25)]) for s in range(num_nonsil)]
    lines += [f"<State> {num_nonsil} </State>", "</TopologyEntry>"]
    lines += ["<TopologyEntry>", "<ForPhones>", " ".join(map(str, silence)), "</ForPhones>"]
    last = num_sil - 1
    if last > 0:
        lines.append(_state(0, [(n, 1.0 / last) for n in range(last)]))
        lines += [_state(s, [(n, 1.0 / last) for n in range(1, num_sil)]) for s in range(1, last)]
    lines.append(_state(last, [(last, 0.75), (num_sil, 0.25)]))
    lines += [f"<State> {num_sil} </State>", "</TopologyEntry>", "</Topology>"]
    return "\n".join(lines) + "\n"


def _state(state: int, transitions: Sequence[tuple[int, float]]) -> str:
    arcs = " ".join(f"<Transition> {target} {prob:.15g}" for target, prob in transitions)
    return f"<State> {state} <PdfClass> {state} {arcs} </State>"


def _write(path: Path, text: str) -> None:
    with atomic_write(path, "w") as stream:
        stream.write(text)


def _write_phone_files(
    folder: Path, dictionary: Dictionary, phones: SymbolTable, words: SymbolTable, disambig: list[str]
) -> None:
    silence = [phone for line in dictionary.silence for phone in line]
    lists: dict[str, list[Sequence[str]]] = {
        "silence": [(phone,) for phone in silence],
        "nonsilence": [(phone,) for line in dictionary.nonsilence for phone in line],
        "optional_silence": [(dictionary.optional_silence,)],
        "disambig": [(symbol,) for symbol in disambig],
        "context_indep": [(phone,) for phone in silence],
        "sets": [*dictionary.silence, *dictionary.nonsilence],
        "extra_questions": list(dictionary.extra_questions),
    }
    for name, lines in lists.items():
        _write(folder / f"{name}.txt", "".join(" ".join(line) + "\n" for line in lines))
        numbers = [" ".join(map(str, phones.ids(line))) for line in lines]
        _write(folder / f"{name}.int", "".join(line + "\n" for line in numbers))
        if name in _LISTS_WITH_CSL:
            _write(folder / f"{name}.csl", ":".join(numbers) + "\n")
    sets = lists["sets"]
    _write(folder / "roots.txt", "".join(f"shared split {' '.join(line)}\n" for line in sets))
    _write(folder / "roots.int", "".join(f"shared split {' '.join(map(str, phones.ids(s)))}\n" for s in sets))
    # Which phones make which word: what lattice word alignment uses without word boundaries.
    entries = {(e.word, *e.phones) for e in dictionary.lexicon} | {("<eps>", dictionary.optional_silence)}
    aligned = sorted(f"{entry[0]} {' '.join(entry)}" for entry in entries)
    aligned.sort(key=str.encode)
    _write(folder / "align_lexicon.txt", "".join(line + "\n" for line in aligned))
    rows = [line.split() for line in aligned]
    _write(
        folder / "align_lexicon.int",
        "".join(f"{' '.join(map(str, words.ids(r[:2]) + phones.ids(r[2:])))}\n" for r in rows),
    )
    _write(folder / "wdisambig.txt", "#0\n")
    _write(folder / "wdisambig_phones.int", f"{phones.id('#0')}\n")
    _write(folder / "wdisambig_words.int", f"{words.id('#0')}\n")


def _lexicon_fst(
    lexicon: list[Pronunciation],
    phones: SymbolTable,
    words: SymbolTable,
    sil_phone: str,
    sil_prob: float,
    sil_disambig: str | None,
) -> Any:
    """The lexicon transducer: any number of words, each followed by silence with probability `sil_prob`.

    State 0 is the start, 1 the loop where words begin, 2 the state before a silence; the states' numbers and
    the arcs' order are prepare_lang.sh's, so that the FST is the same.
    """
    sil_cost, no_sil_cost = -math.log(sil_prob), -math.log(1.0 - sil_prob)
    start, loop, before_silence, following = 0, 1, 2, 3
    arcs: list[tuple[int, int, int, int, float]] = [
        (start, loop, 0, 0, no_sil_cost),
        (start, before_silence, 0, 0, sil_cost),
    ]
    if sil_disambig is None:
        arcs.append((before_silence, loop, phones.id(sil_phone), 0, 0.0))
    else:
        arcs.append((before_silence, following, phones.id(sil_phone), 0, 0.0))
        arcs.append((following, loop, phones.id(sil_disambig), 0, 0.0))
        following += 1
    for entry in lexicon:
        word, cost, state = words.id(entry.word), -math.log(entry.probability), loop
        ids = phones.ids(entry.phones)
        for phone in ids[:-1]:
            arcs.append((state, following, phone, word, cost))
            state, following, word, cost = following, following + 1, 0, 0.0
        arcs.append((state, loop, ids[-1], word, no_sil_cost + cost))
        arcs.append((state, before_silence, ids[-1], word, sil_cost + cost))
    text = "".join("\t".join(map(str, arc)) + "\n" for arc in arcs)
    return wheels.load().kaldifst.compile(f"{text}{loop}\t0.0\n")


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi prepare-lang``; see the module's text."""
    parser = Parser(prog="kaldi-mpi prepare-lang", description=__doc__)
    parser.add_argument("dict_dir")
    parser.add_argument("oov_word")
    parser.add_argument("tmp_dir", help="not used; prepare_lang.sh has it")
    parser.add_argument("lang_dir")
    parser.add_argument("--arpa", help="language model to make G.fst from")
    parser.add_argument("--sil-prob", type=float, default=0.5)
    parser.add_argument("--num-sil-states", type=int, default=5)
    parser.add_argument("--num-nonsil-states", type=int, default=3)
    options = parser.parse_args(arguments)
    prepare_lang(
        options.dict_dir,
        options.oov_word,
        options.lang_dir,
        sil_prob=options.sil_prob,
        num_sil_states=options.num_sil_states,
        num_nonsil_states=options.num_nonsil_states,
    )
    if options.arpa:
        make_grammar(options.arpa, options.lang_dir)
