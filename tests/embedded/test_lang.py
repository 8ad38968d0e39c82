"""data/lang: the files, the FSTs' words, bad dictionaries; and equality with prepare_lang.sh where Kaldi is."""

from __future__ import annotations

import filecmp
import os
import subprocess
from pathlib import Path

import pytest

from kaldi_mpi.embedded import wheels
from kaldi_mpi.embedded.fst import read_fst
from kaldi_mpi.embedded.lang import main, make_grammar, prepare_lang, topology
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import read_header
from kaldi_mpi.formats.symbols import SymbolTable
from tests.paths import kaldi_root
from tests.toy_hmm import WORDS, write_arpa, write_dict


@pytest.fixture(scope="module")
def lang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lang")
    prepare_lang(write_dict(folder / "dict"), "<UNK>", folder / "lang")
    make_grammar(write_arpa(folder / "lm.arpa", WORDS), folder / "lang")
    return folder / "lang"


def test_symbol_tables(lang: Path) -> None:
    assert (lang / "phones.txt").read_text().split("\n") == [
        # ALPHA's A L A begins no other pronunciation, but L A B begins LABEL's: #1; #2 marks silence.
        *["<eps> 0", "SIL 1", "SPN 2", "A 3", "B 4", "G 5", "L 6", "#0 7", "#1 8", "#2 9", ""],
    ]
    words = ["<eps>", "!SIL", "<UNK>", *WORDS, "#0", "<s>", "</s>"]
    assert (lang / "words.txt").read_text() == "".join(f"{w} {n}\n" for n, w in enumerate(words))
    assert (lang / "oov.int").read_text() == "2\n"


def test_phone_files(lang: Path) -> None:
    expected = {
        "silence.txt": "SIL\nSPN\n",
        "silence.csl": "1:2\n",
        "nonsilence.int": "3\n4\n5\n6\n",
        "optional_silence.csl": "1\n",
        "context_indep.int": "1\n2\n",
        "disambig.int": "7\n8\n9\n",
        "sets.int": "1\n2\n3\n4\n5\n6\n",
        "roots.txt": "".join(f"shared split {phone}\n" for phone in ["SIL", "SPN", *"ABGL"]),
        "extra_questions.int": "1 2\n",
        "wdisambig_words.int": "8\n",
        "wdisambig_phones.int": "7\n",
    }
    assert {name: (lang / "phones" / name).read_text() for name in expected} == expected
    assert "LAB LAB L A B\n" in (lang / "phones" / "align_lexicon.txt").read_text()
    assert "6 6 6 3 4\n" in (lang / "phones" / "align_lexicon.int").read_text()


def test_topology() -> None:
    text = topology(3, 5, [3, 4], [1, 2])
    assert (
        "<ForPhones>\n3 4\n</ForPhones>\n<State> 0 <PdfClass> 0 <Transition> 0 0.75 <Transition> 1 0.25 </State>"
        in text
    )
    # Silence: no way back into the first state, none past the last.
    assert "<State> 1 <PdfClass> 1 " + " ".join(f"<Transition> {n} 0.25" for n in range(1, 5)) in text
    khg = wheels.load().khg
    parsed = khg.HmmTopology()
    parsed.read(text)
    assert (parsed.min_length(1), parsed.min_length(3)) == (3, 3)
    single = khg.HmmTopology()
    single.read(topology(1, 1, [2], [1]))
    assert single.min_length(1) == single.min_length(2) == 1


def phone_cost(lang: Path, name: str, phones: list[str], words: list[str]) -> float | None:
    """Cost of a pronunciation of some words in a lexicon FST; None if it is not accepted."""
    kaldifst = wheels.load().kaldifst
    table, word_table = SymbolTable.read(lang / "phones.txt"), SymbolTable.read(lang / "words.txt")
    fst = kaldifst.compose(kaldifst.make_linear_acceptor(table.ids(phones)), read_fst(lang / name))
    kaldifst.arcsort(fst, sort_type="olabel")
    fst = kaldifst.compose(fst, kaldifst.make_linear_acceptor(word_table.ids(words)))
    if fst.num_states == 0:
        return None
    best = kaldifst.shortest_path(fst)
    return float(kaldifst.get_linear_symbol_sequence(best)[3].value)


def test_lexicon_maps_phones_to_words(lang: Path) -> None:
    half = 0.693147
    # One choice of silence or none before the first word and one after each word.
    assert phone_cost(lang, "L.fst", ["B", "A"], ["BET"]) == pytest.approx(2 * half, abs=1e-4)
    assert phone_cost(lang, "L.fst", ["SIL", "B", "A", "SIL", "G", "B", "A"], ["BET", "GAMMA"]) == (
        pytest.approx(3 * half, abs=1e-4)
    )
    assert phone_cost(lang, "L.fst", ["B", "A"], ["GAMMA"]) is None
    assert phone_cost(lang, "L_disambig.fst", ["L", "A", "B"], ["LAB"]) is None
    assert phone_cost(lang, "L_disambig.fst", ["L", "A", "B", "#1"], ["LAB"]) is not None
    assert phone_cost(lang, "L_disambig.fst", ["SIL", "#2", "B", "A", "#0"], ["BET", "#0"]) is not None


def test_grammar_gives_every_word_its_probability(lang: Path) -> None:
    kaldifst = wheels.load().kaldifst
    ids = SymbolTable.read(lang / "words.txt").ids(["LAB", "BET"])
    fst = kaldifst.compose(kaldifst.make_linear_acceptor(ids), read_fst(lang / "G.fst"))
    cost = kaldifst.get_linear_symbol_sequence(kaldifst.shortest_path(fst))[3].value
    assert cost == pytest.approx(3 * 1.791759, abs=1e-3)  # two words and the end, each one of six


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("lexicon.txt", "<UNK> SPN\nX A Q\n", "lexicon.txt: line 2: phone Q of word X is in neither"),
        ("lexicon.txt", "<UNK> SPN\nX\n", "lexicon.txt: line 2: word X has no phones"),
        ("lexicon.txt", "<s> SPN\n", "lexicon.txt: line 1: <s> cannot be a word"),
        ("lexicon.txt", "BET B A\n", "the word for unknown words, <UNK>, is not in the lexicon"),
        ("lexicon.txt", "", "lexicon.txt: is empty"),
        ("lexiconp.txt", "<UNK> 1.5 SPN\n", "lexiconp.txt: line 1: no probability in the second field"),
        ("nonsilence_phones.txt", "A\nSIL\n", "silence_phones.txt: phone SIL is listed 2 times"),
        ("nonsilence_phones.txt", "A\n#1\n", "nonsilence_phones.txt: #1 cannot be a phone"),
        ("optional_silence.txt", "A\n", "optional_silence.txt: A is not in silence_phones.txt"),
        ("optional_silence.txt", "SIL SPN\n", "optional_silence.txt: must hold exactly one phone"),
    ],
)
def test_bad_dictionaries(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = write_dict(tmp_path / "dict")
    (folder / file).write_text(content)
    with pytest.raises(DataError) as caught:
        prepare_lang(folder, "<UNK>", tmp_path / "lang")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: not a directory"):
        prepare_lang(tmp_path / "nowhere", "<UNK>", tmp_path / "lang")
    folder = write_dict(tmp_path / "dict")
    (folder / "silence_phones.txt").unlink()
    with pytest.raises(DataError, match=r"silence_phones\.txt: no such file; it is part of a dictionary"):
        prepare_lang(folder, "<UNK>", tmp_path / "lang")


def test_bad_language_models(lang: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.arpa: no such language model"):
        make_grammar(tmp_path / "none.arpa", lang)
    (tmp_path / "bad.arpa").write_text("this is no language model\n")
    with pytest.raises(DataError, match=r"bad\.arpa: not an ARPA language model: .*data.* section missing"):
        make_grammar(tmp_path / "bad.arpa", lang)
    arpa = write_arpa(tmp_path / "worse.arpa", WORDS)
    arpa.write_text(arpa.read_text().replace("-0.778151 BET", "much BET"))
    with pytest.raises(DataError, match=r"worse\.arpa: not an ARPA language model: line \d+ \[much BET\]"):
        make_grammar(arpa, lang)


@pytest.mark.kaldi
def test_same_as_prepare_lang(tmp_path: Path) -> None:
    scripts = kaldi_root() / "egs" / "wsj" / "s5"
    (tmp_path / "utils").symlink_to(scripts / "utils")
    root = kaldi_root()
    programs = [root / "src" / name for name in ("bin", "fstbin", "lmbin")]
    paths = [scripts / "utils", root / "tools" / "openfst" / "bin", *programs]
    environment = os.environ | {"PATH": ":".join(map(str, paths)) + ":" + os.environ["PATH"], "LC_ALL": "C"}

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    (tmp_path / "path.sh").write_text("")  # the scripts source it
    write_dict(tmp_path / "dict")
    write_arpa(tmp_path / "lm.arpa", WORDS)
    main(
        [
            *("--arpa", str(tmp_path / "lm.arpa")),
            *(str(tmp_path / n) for n in ("dict",)),
            "<UNK>",
            "x",
            str(tmp_path / "ours"),
        ]
    )
    run("utils/prepare_lang.sh", "--position-dependent-phones", "false", "dict", "<UNK>", "tmp", "theirs")
    run("arpa2fst", "--disambig-symbol=#0", "--read-symbol-table=theirs/words.txt", "lm.arpa", "theirs/G.fst")
    for folder in (".", "phones"):
        ours, theirs = tmp_path / "ours" / folder, tmp_path / "theirs" / folder
        names = sorted(path.name for path in theirs.iterdir() if path.is_file())
        assert names == sorted(path.name for path in ours.iterdir() if path.is_file())
        compared = [name for name in names if name != "G.fst"]
        assert filecmp.cmpfiles(ours, theirs, compared, shallow=False) == (compared, [], [])
    # Only what the header says of known properties differs.
    grammars = [(tmp_path / which / "G.fst").read_bytes() for which in ("ours", "theirs")]
    begin = read_header(grammars[0], file="G.fst").end
    assert grammars[0][begin:] == grammars[1][begin:]
