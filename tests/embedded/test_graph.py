"""Decoding graphs: FST files that kaldifst cannot read, and HCLG against what the HMMs should give."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.embedded import wheels
from kaldi_mpi.embedded.fst import const_to_vector, read_fst, write_fst
from kaldi_mpi.embedded.gmm_model import read_hmm
from kaldi_mpi.embedded.graph import make_graph
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import read_header
from kaldi_mpi.formats.symbols import SymbolTable
from tests.paths import golden, kaldi_root
from tests.toy_hmm import toy_system


def arcs_of(fst: object) -> list[tuple[int, int, int, float, int]]:
    kaldifst = wheels.load().kaldifst
    return [
        (state, arc.ilabel, arc.olabel, arc.weight.value, arc.nextstate)
        for state in kaldifst.StateIterator(fst)
        for arc in kaldifst.ArcIterator(fst, state)
    ]


def test_const_fsts_are_read(tmp_path: Path) -> None:
    """A const FST made by hand, with and without alignment of its parts, against the vector FST it stands for."""
    kaldifst = wheels.load().kaldifst
    vector = kaldifst.compile("0 1 5 6 0.5\n0 2 7 0 1.5\n1 2 8 9 0.25\n2 0.125\n")
    arcs = [(5, 6, 0.5, 1), (7, 0, 1.5, 2), (8, 9, 0.25, 2)]
    states = [(np.inf, 0, 2, 0, 1), (np.inf, 2, 1, 0, 0), (0.125, 3, 0, 0, 0)]
    for aligned in (False, True):
        head = struct.pack("<i", 2125659606)
        for name in (b"const", b"standard"):
            head += struct.pack("<i", len(name)) + name
        head += struct.pack("<iiQqqq", 1 if aligned else 2, 4 if aligned else 0, 1, 0, 3, 3)
        parts = [head, b"".join(struct.pack("<fIIII", *s) for s in states)]
        data = b""
        for part in [*parts, b"".join(struct.pack("<iifi", *a) for a in arcs)]:
            if aligned and data:
                data += b"\0" * (-len(data) % 16)
            data += part
        (tmp_path / "const.fst").write_bytes(data)
        fst = read_fst(tmp_path / "const.fst")
        assert arcs_of(fst) == arcs_of(vector)
        assert [float(fst.final(state).value) for state in range(3)] == [np.inf, np.inf, 0.125]
        with pytest.raises(DataError, match=rf"const\.fst, byte offset {len(data) - 4}: truncated"):
            (tmp_path / "const.fst").write_bytes(data[:-4])
            read_fst(tmp_path / "const.fst")


def test_kaldis_graph_is_read() -> None:
    data = golden("HCLG.fst").read_bytes()
    header = read_header(data, file="HCLG.fst")
    assert (header.fst_type, header.arc_type) == ("const", "standard")
    fst = read_fst(golden("HCLG.fst"))
    assert fst.num_states == header.num_states
    assert len(arcs_of(fst)) == header.num_arcs
    assert read_header(const_to_vector(data, file="x"), file="x").num_states == header.num_states


def test_files_that_are_no_fsts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.fst: cannot read: No such file"):
        read_fst(tmp_path / "none.fst")
    (tmp_path / "text.fst").write_text("0 1 2 3\n" * 20)
    with pytest.raises(DataError, match=r"text\.fst, byte offset 0: not an OpenFst file"):
        read_fst(tmp_path / "text.fst")
    (tmp_path / "short.fst").write_bytes(golden("HCLG.fst").read_bytes()[:30])
    with pytest.raises(DataError, match=r"short\.fst, byte offset 0: the file ends inside an FST header"):
        read_fst(tmp_path / "short.fst")
    write_fst(wheels.load().kaldifst.make_linear_acceptor([1, 2, 3]), tmp_path / "good.fst")
    (tmp_path / "cut.fst").write_bytes((tmp_path / "good.fst").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.fst: truncated or damaged FST"):
        read_fst(tmp_path / "cut.fst")
    with pytest.raises(DataError, match=r"good\.fst: cannot write the FST"):
        write_fst(read_fst(tmp_path / "good.fst"), tmp_path / "nowhere" / "good.fst")


def test_graph_directory() -> None:
    system = toy_system()
    graph = system / "mono" / "graph"
    assert (graph / "num_pdfs").read_text() == "22\n"
    assert (graph / "phones" / "silence.csl").read_text() == "1:2\n"
    for name in ("words.txt", "phones.txt", "phones/disambig.int", "phones/align_lexicon.int"):
        assert (graph / name).read_bytes() == (system / "lang" / name).read_bytes()
    assert len((graph / "disambig_tid.int").read_text().split()) == 2  # #1 and #2; G has no #0


def test_paths_of_the_graph_cost_what_the_model_says() -> None:
    """The cheapest HMM path of "BET": -log of grammar x lexicon x transitions, self-loops not taken."""
    system = toy_system()
    loaded = wheels.load()
    fst = read_fst(system / "mono" / "graph" / "HCLG.fst")
    words = SymbolTable.read(system / "lang" / "words.txt")
    loaded.kaldifst.arcsort(fst, sort_type="olabel")
    one = loaded.kaldifst.compose(fst, loaded.kaldifst.make_linear_acceptor([words.id("BET")]))
    best = loaded.kaldifst.shortest_path(one)
    _, tids, _, weight = loaded.kaldifst.get_linear_symbol_sequence(best)

    hmm = read_hmm(system / "mono" / "tree", system / "mono" / "final.mdl")
    _, transitions = hmm.build()
    assert [transitions.transition_id_to_phone(tid) for tid in tids] == [4] * 3 + [3] * 3  # B A
    assert not any(transitions.is_self_loop(tid) for tid in tids)
    cost = 2 * np.log(6) + 2 * np.log(2)  # one word and the end of six; no silence before nor after
    for tid in tids:
        # make-h-transducer takes the transitions as if there were no self-loops; add-self-loops gives a
        # state's way out 0.1 times log(1 - p(self-loop)).
        state_loop = transitions.non_self_loop_log_probs[transitions.id2state[tid]]
        cost -= hmm.log_probs[tid] - state_loop + 0.1 * state_loop
    assert weight.value == pytest.approx(cost, abs=0.02)


def test_bad_input(tmp_path: Path) -> None:
    system = toy_system()
    model = system / "mono"
    lang = tmp_path / "lang"
    shutil.copytree(system / "lang", lang)
    (lang / "G.fst").unlink()
    with pytest.raises(DataError, match=r"G\.fst: cannot read: No such file"):
        make_graph(lang, model, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()
    with pytest.raises(DataError, match=r"final\.mdl: cannot read"):
        make_graph(system / "lang", tmp_path, tmp_path / "graph")
    # A grammar over other words: nothing is left.
    kaldifst = wheels.load().kaldifst
    write_fst(kaldifst.make_linear_acceptor([10_000]), lang / "G.fst")
    with pytest.raises(DataError, match=r"G\.fst: the graph is empty"):
        make_graph(lang, model, tmp_path / "graph")
    # The golden model knows 86 phones, this lexicon others of them; the other way round some are unknown.
    (tmp_path / "small").mkdir()
    shutil.copy(model / "tree", tmp_path / "small")
    shutil.copy(golden("trans.mdl"), tmp_path / "small" / "final.mdl")
    with pytest.raises(DataError, match="transition-ids but the model has"):
        make_graph(system / "lang", tmp_path / "small", tmp_path / "graph")


@pytest.mark.kaldi
def test_equivalent_to_mkgraph(tmp_path: Path) -> None:
    system, root = toy_system(), kaldi_root()
    folders = [root / "src" / name for name in ("bin", "fstbin", "gmmbin")]
    folders += [root / "tools" / "openfst" / "bin", root / "egs" / "wsj" / "s5" / "utils"]
    environment = os.environ | {"PATH": ":".join(map(str, folders)) + ":" + os.environ["PATH"], "LC_ALL": "C"}

    def run(command: str) -> None:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    shutil.copytree(system / "lang", tmp_path / "lang")
    shutil.copytree(system / "mono", tmp_path / "mono", ignore=shutil.ignore_patterns("graph"))
    (tmp_path / "path.sh").write_text("")
    run("mkgraph.sh lang mono mono/graph")
    ours, theirs = system / "mono" / "graph", tmp_path / "mono" / "graph"
    names = sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(ours)) for path in ours.rglob("*") if path.is_file())
    for name in names:
        if name != "HCLG.fst":
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    # Minimisation rounds weights to 1/1024: over a long path the sums may differ by more than a little.
    run(
        "fstconvert --fst_type=vector mono/graph/HCLG.fst theirs.fst && "
        f"fstequivalent --random --npath=200 --max_length=100 --delta=0.05 {ours}/HCLG.fst theirs.fst"
    )
