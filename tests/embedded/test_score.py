"""Best paths of lattices against enumeration, lattice archives, and the files of scoring."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.embedded.best_path import best_paths
from kaldi_mpi.embedded.lattice import Lattice, read_lattices
from kaldi_mpi.embedded.score import ErrorCounter, ErrorCounts, ScoreOptions, best_wer, best_wer_main, score
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.fst import vector_header
from tests.paths import golden, kaldi_root

SCALES = np.array([0.1, 1 / 7, 1.0])
PENALTIES = np.array([0.0, 1.0, 0.5])


@st.composite
def lattices(draw: st.DrawFn) -> Lattice:
    """Acyclic, state numbers in no order, every state on some path from start to end."""
    count = draw(st.integers(2, 6))
    order = draw(st.permutations(range(count)))
    backbone = [(order[i], order[i + 1]) for i in range(count - 1)]
    extra = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=8))
    arcs = backbone + [(order[min(p)], order[max(p)]) for p in extra if p[0] != p[1]]
    arcs += [(order[-1], count)] + [(order[i], count) for i in draw(st.sets(st.integers(0, count - 2)))]
    cost = st.integers(-40, 40).map(lambda n: n / 4)  # sums are exact, so that ties are ties
    rows = [(draw(st.integers(0, 3)) if b < count else 0, draw(cost), draw(cost)) for _, b in arcs]
    words, graph, acoustic = zip(*rows, strict=True)
    source, target, word = (np.array(column, dtype=np.int32) for column in (*zip(*arcs, strict=True), words))
    costs = (np.array(column, dtype=np.float32) for column in (graph, acoustic))
    return Lattice(order[0], count, source, target, word, *costs)


def all_paths(lattice: Lattice) -> list[list[int]]:
    """Every path from start to end, as lists of arcs."""

    def walk(state: int) -> list[list[int]]:
        if state == lattice.num_states:
            return [[]]
        return [[int(a), *p] for a in np.flatnonzero(lattice.source == state) for p in walk(int(lattice.target[a]))]

    return walk(lattice.start)


@settings(deadline=None, max_examples=60)
@given(st.lists(lattices(), min_size=1, max_size=4))
def test_best_paths_are_the_cheapest_of_all(some: list[Lattice]) -> None:
    answers = best_paths(some, SCALES, PENALTIES)
    assert len(answers) == len(some)
    for lattice, answer in zip(some, answers, strict=True):
        paths = all_paths(lattice)
        for setting, (scale, penalty) in enumerate(zip(SCALES, PENALTIES, strict=True)):
            costs: dict[tuple[int, ...], float] = {}
            for path in paths:
                words = tuple(int(w) for w in lattice.word[path] if w)
                cost = (
                    float(lattice.graph[path].sum())
                    + scale * float(lattice.acoustic[path].sum())
                    + penalty * len(words)
                )
                costs[words] = min(cost, costs.get(words, np.inf))
            assert costs[answer[setting]] == pytest.approx(min(costs.values()), abs=1e-9)


def test_many_lattices_are_swept_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, one), (_, two) = read_lattices(golden("lat.ark"))
    together = best_paths([one, two, one], SCALES, PENALTIES)
    monkeypatch.setattr("kaldi_mpi.embedded.best_path._MAX_ARCS", 1)
    assert best_paths([one, two, one], SCALES, PENALTIES) == together


def test_lattices_without_complete_path() -> None:
    source, target, word = (np.array(values, dtype=np.int32) for values in ([0, 1], [1, 0], [1, 2]))
    costs = np.zeros(2, dtype=np.float32)
    with pytest.raises(DataError, match="a cycle or no complete path"):
        best_paths([Lattice(0, 2, source, target, word, costs, costs)], SCALES, PENALTIES)


def test_kaldis_lattices() -> None:
    expected = {line.split()[0]: tuple(map(int, line.split()[1:])) for line in golden("words_best.txt").open()}
    entries = dict(read_lattices(golden("lat.ark")))
    answers = best_paths(list(entries.values()), np.array([0.1]), np.array([0.0]))
    assert {key: answer[0] for key, answer in zip(entries, answers, strict=True)} == expected
    # Arcs and costs as lattice-copy printed them.
    shown: dict[str, list[tuple[int, float, float]]] = {}
    for line in golden("lat.txt").read_text().splitlines():
        fields = line.split()
        if line[:1].isalpha():
            key = fields[0]
            shown[key] = []
        elif len(fields) >= 3:
            graph, acoustic = fields[3].split(",")[:2] if len(fields) > 3 else ("0", "0")
            shown[key].append((int(fields[2]), float(graph), float(acoustic)))
    for key, lattice in entries.items():
        inner = lattice.target < lattice.num_states
        columns = (lattice.word[inner].tolist(), lattice.graph[inner].tolist(), lattice.acoustic[inner].tolist())
        rows = sorted(zip(*columns, strict=True))
        assert len(rows) == len(shown[key])
        np.testing.assert_allclose(rows, sorted(shown[key]), rtol=1e-4, atol=1e-3)


def raw_archive(entries: dict[str, list[tuple[int, float, float]]]) -> bytes:
    """An archive of linear raw lattices, one (word, graph cost, acoustic cost) per arc."""
    data = b""
    for key, arcs in entries.items():
        data += key.encode() + b" " + vector_header("lattice4", 3, 0, len(arcs) + 1)
        for state, (word, graph, acoustic) in enumerate(arcs):
            data += struct.pack("<ffq", np.inf, np.inf, 1)
            data += struct.pack("<iiffi", 7, word, graph, acoustic, state + 1)
        data += struct.pack("<ffq", 0.0, 0.0, 0)
    return data


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """data, graph and decode: "b" is right, "a" lacks a word, "c" was not decoded; in "d" weights decide."""
    for folder in ("data", "graph", "decode"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "wav.scp").write_text("".join(f"{key} x\n" for key in "abcd"))
    (tmp_path / "data" / "text").write_text("a ONE TWO\nb TWO\nc ONE\nd ONE\n")
    (tmp_path / "graph" / "words.txt").write_text("<eps> 0\nONE 1\nTWO 2\n#0 3\n<s> 4\n</s> 5\n")
    first = {"a": [(0, 0.0, 1.0), (2, 0.5, 2.0)], "b": [(2, 1.0, 1.0)]}
    data = raw_archive(first) + b"d " + vector_header("lattice4", 3, 0, 2)
    data += struct.pack("<ffq", np.inf, np.inf, 2)
    # ONE: graph 2, acoustics 0; TWO: graph 1, acoustics 10. TWO is cheaper where 10 / weight < 1.
    data += struct.pack("<iiffi", 7, 1, 2.0, 0.0, 1) + struct.pack("<iiffi", 7, 2, 1.0, 10.0, 1)
    data += struct.pack("<ffq", 0.0, 0.0, 0)
    with gzip.open(tmp_path / "decode" / "lat.1.gz", "wb") as stream:
        stream.write(data)
    return tmp_path


def test_files_of_scoring(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decode = scored / "decode"
    (decode / "wer_7_9.9").write_text("%WER 0.00 [ an older one ]\n")
    line = score(scored / "data", scored / "graph", decode)
    names = {path.name for path in decode.glob("wer_*")}
    assert names == {f"wer_{lmwt}_{wip}" for lmwt in range(7, 18) for wip in ("0.0", "0.5", "1.0")}
    assert (decode / "wer_7_0.0").read_text() == (
        "%WER 25.00 [ 1 / 4, 0 ins, 1 del, 0 sub ] [PARTIAL]\n"
        "%SER 33.33 [ 1 / 3 ]\n"
        "Scored 3 sentences, 1 not present in hyp.\n"
    )
    assert (decode / "wer_11_0.0").read_text().startswith("%WER 50.00 [ 2 / 4, 0 ins, 1 del, 1 sub ]")
    assert (decode / "scoring_kaldi" / "penalty_0.0" / "7.txt").read_text() == "a TWO\nb TWO\nd ONE\n"
    assert (decode / "scoring_kaldi" / "penalty_0.5" / "17.txt").read_text() == "a TWO\nb TWO\nd TWO\n"
    assert (decode / "scoring_kaldi" / "test_filt.txt").read_text() == (scored / "data" / "text").read_text()
    assert (decode / "scoring_kaldi" / "wer_details" / "lmwt").read_text() == "7\n"
    assert (decode / "scoring_kaldi" / "wer_details" / "wip").read_text() == "0.0\n"
    expected = f"%WER 25.00 [ 1 / 4, 0 ins, 1 del, 0 sub ] [PARTIAL] {decode}/wer_7_0.0"
    assert line == expected
    assert (decode / "scoring_kaldi" / "best_wer").read_text() == expected + "\n"
    best_wer_main([str(decode)])
    assert capsys.readouterr().out.startswith("%WER 25.00 [ 1 / 4, 0 ins, 1 del, 0 sub ]")


def test_options_of_scoring(scored: Path) -> None:
    options = ScoreOptions(min_lmwt=3, max_lmwt=4, word_ins_penalty=("0.0", "-0.5"))
    score(scored / "data", scored / "graph", scored / "decode", options)
    names = {path.name for path in (scored / "decode").glob("wer_*")}
    assert names == {"wer_3_0.0", "wer_4_0.0", "wer_3_-0.5", "wer_4_-0.5"}
    for bad, message in (
        (ScoreOptions(min_lmwt=0), "language-model weights from 0 to 17"),
        (ScoreOptions(min_lmwt=9, max_lmwt=8), "from 9 to 8"),
        (ScoreOptions(word_ins_penalty=("0", "much")), "the word insertion penalty 'much' is not a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            score(scored / "data", scored / "graph", scored / "decode", bad)


def test_bad_input_of_scoring(scored: Path) -> None:
    decode = scored / "decode"
    data = gzip.decompress((decode / "lat.1.gz").read_bytes())

    def problem(content: bytes) -> str:
        (decode / "lat.1.gz").write_bytes(content)
        with pytest.raises(DataError) as caught:
            score(scored / "data", scored / "graph", decode)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "lat.1.gz, key d" in problem(gzip.compress(data[:-10]))
    assert "truncated or damaged" in problem(gzip.compress(data[:-10]))
    assert "lat.1.gz: cannot read" in problem(gzip.compress(data)[:-10])
    assert "lat.1.gz: cannot read" in problem(b"no gzip at all")
    assert "byte offset 0: no key of a lattice here" in problem(gzip.compress(b" " * 100))
    assert "not an OpenFst file" in problem(gzip.compress(b"key " + b"x" * 100))
    other = data.replace(b"lattice4", b"standard", 1)
    assert "not a lattice but vector, standard" in problem(gzip.compress(other))
    unknown = raw_archive({"a": [(99, 0.0, 0.0)]})
    assert "words.txt: number 99 is not in the table" in problem(gzip.compress(unknown))
    stranger = raw_archive({"zz": [(1, 0.0, 0.0)]})
    assert "text: no utterance of it has a lattice" in problem(gzip.compress(stranger))
    (decode / "lat.1.gz").unlink()
    with pytest.raises(DataError, match=r"decode: it has no lat\.\*\.gz: was it decoded\?"):
        score(scored / "data", scored / "graph", decode)
    with pytest.raises(DataError, match=r"decode: it has no wer_\* files: was it scored\?"):
        best_wer_main([str(decode)])
    (decode / "wer_1_0").write_text("nothing\n")
    with pytest.raises(DataError, match="no wer_"):
        best_wer([decode / "wer_1_0"])


def test_word_errors() -> None:
    counter = ErrorCounter()
    counts = counter.count(
        {"a": ["A", "B", "C"], "b": ["A"], "c": ["D"], "e": []},
        {"a": ["A", "X", "C", "D"], "b": ["A"], "c": [], "e": ["A"]},
    )
    assert counts == ErrorCounts(2, 1, 1, words=5, sentences=4, wrong_sentences=3, absent=0)
    assert counts.report().splitlines()[0] == "%WER 80.00 [ 4 / 5, 2 ins, 1 del, 1 sub ]"
    assert ErrorCounts().report().startswith("%WER nan [ 0 / 0,")


def in_kaldi(folder: Path, command: str) -> str:
    root = kaldi_root()
    folders = [root / "src" / name for name in ("bin", "latbin")] + [root / "egs" / "wsj" / "s5" / "utils"]
    environment = os.environ | {"PATH": ":".join(map(str, folders)) + ":" + os.environ["PATH"], "LC_ALL": "C"}
    done = subprocess.run(
        ["bash", "-c", f"set -e -o pipefail; {command}"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.kaldi
def test_kaldis_programs_score_the_same(scored: Path) -> None:
    decode = scored / "decode"
    line = score(scored / "data", scored / "graph", decode)
    for lmwt, penalty in itertools.product((7, 11), ("0.0", "1.0")):
        output = in_kaldi(
            decode,
            f"lattice-scale --inv-acoustic-scale={lmwt} 'ark:gunzip -c lat.1.gz|' ark:- "
            f"| lattice-add-penalty --word-ins-penalty={penalty} ark:- ark:- "
            f"| lattice-best-path ark:- ark,t:- | int2sym.pl -f 2- ../graph/words.txt > hyp; "
            "compute-wer --text --mode=present ark:../data/text ark,p:hyp",
        )
        assert output == (decode / f"wer_{lmwt}_{penalty}").read_text()
    best = in_kaldi(scored, f"grep WER {decode}/wer_* | best_wer.sh")
    assert best.split()[:2] == line.split()[:2]


@pytest.mark.kaldi
def test_error_counts_are_those_of_compute_wer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    references = {f"u{n:03}": [f"W{w}" for w in rng.integers(4, size=rng.integers(1, 9))] for n in range(200)}
    hypotheses = {key: [f"W{w}" for w in rng.integers(4, size=rng.integers(0, 9))] for key in references}
    for name, table in (("ref", references), ("hyp", hypotheses)):
        (tmp_path / name).write_text("".join(f"{key} {' '.join(words)}\n" for key, words in table.items()))
    output = in_kaldi(tmp_path, "compute-wer --text --mode=present ark:ref ark,p:hyp")
    ours = ErrorCounter().count(references, hypotheses)
    # Which of equally short alignments is counted may differ, not their length.
    fields = output.splitlines()[0].split()
    assert fields[:6] == ours.report().splitlines()[0].split()[:6]
    assert output.splitlines()[1:] == ours.report().splitlines()[1:]
