"""Files of graphs, supervision, trees and phone lattices: Kaldi's come back as they were, damaged ones are told."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import (
    Fst,
    build_fst,
    compact_acceptor_bytes,
    fst_text,
    parse_fst,
    parse_fst_text,
    read_fst,
    vector_bytes,
    write_fst,
)
from kaldi_mpi.formats.lattice import parse_compact_lattice
from kaldi_mpi.formats.supervision import parse_supervision, supervision_bytes
from kaldi_mpi.formats.tree import read_tree
from tests.chain.graph_data import archive, golden_fst, phone_lattices
from tests.paths import golden

GRAPHS = ["den", "normalization", *(f"lm/lm.{name}" for name in ("2.1.5", "3.2.30", "4.3.0", "4.3.50", "5.3.100"))]
ARCHIVES = [
    *(f"cegs/{name}" for name in ("cegs", "two", "merged", "first_merged", "shift1", "weighted", "context")),
    *(f"sup/{name}" for name in ("sup_lat", "sup_tid", "egs", "egs_overlap", "egs_unconstrained", "egs_unnormalised")),
]


def equal(one: Fst, other: Fst) -> bool:
    fields = ("finals", "first_arc", "ilabels", "olabels", "costs", "nexts")
    return one.start == other.start and all(np.array_equal(getattr(one, f), getattr(other, f)) for f in fields)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    """To the byte in binary, to the letter in text, and from the text to the same graph but for rounding."""
    fst, text = golden_fst(f"{name}.fst"), golden(f"chain/{name}.txt").read_text()
    write_fst(tmp_path / "copy.fst", fst)
    assert (tmp_path / "copy.fst").read_bytes() == golden(f"chain/{name}.fst").read_bytes()
    assert fst_text(fst) == text
    again = parse_fst_text(text, file=name)
    # Rounded to nine digits, a float is what it was; a line for each arc, and those of the start first.
    assert equal(again, replace(fst, properties=0))


@pytest.mark.parametrize("name", ARCHIVES)
def test_supervision_comes_back_as_it_was(name: str) -> None:
    data, at, number = golden(f"chain/{name}.ark").read_bytes(), 0, 0
    while (at := data.find(b"<Supervision> ", at)) >= 0:
        found, end = parse_supervision(data, at, file=name)
        assert supervision_bytes(found) == data[at:end]
        assert parse_supervision(memoryview(data), at, file=name)[1] == end
        assert len(found.fsts) == (found.num_sequences if found.end2end else 1)
        at, number = end, number + 1
    assert number == len(archive(golden(f"chain/{name}.ark")))


def test_text_of_supervision_is_kaldis() -> None:
    """Seven digits, as Kaldi writes examples in text."""
    text = golden("chain/cegs/two.txt").read_text()
    bodies = re.findall(r"<End2End> F *\n(.*?)\n\n</Supervision>", text, re.S)
    assert len(bodies) == 2
    for body, supervision in zip(bodies, archive(golden("chain/cegs/two.ark")).values(), strict=True):
        assert fst_text(supervision.fsts[0], digits=7) == body + "\n"


def test_const_and_unknown_numbers_of_states() -> None:
    """A const FST as mkgraph.sh writes it; and a vector FST from a pipe, whose header says -1 states."""
    graph = read_fst(golden("HCLG.fst"))
    assert graph.num_states and graph.num_arcs and not np.array_equal(graph.ilabels, graph.olabels)
    data = bytearray(vector_bytes(graph))
    again, end = parse_fst(bytes(data), file="x")
    assert equal(again, graph) and end == len(data)
    struct.pack_into("<q", data, 4 + 4 + 6 + 4 + 8 + 4 + 4 + 8 + 8, -1)
    unknown, end = parse_fst(bytes(data), file="x")
    assert equal(unknown, graph) and end == len(data)


def test_odd_graphs_in_both_forms() -> None:
    """An empty one; a state with nothing; infinite and zero costs; a start that is not state 0."""
    empty = build_fst(-1, 0, [], {})
    odd = build_fst(2, 4, [(2, 1, 2, 0.0, 0), (0, 3, 0, np.inf, 2), (0, 1, 1, -1.5, 1)], {0: 0.0})
    for fst in (empty, odd):
        assert equal(parse_fst(vector_bytes(fst), file="x", whole=True)[0], fst)
        assert equal(parse_fst_text(fst_text(fst), file="x"), fst)
    assert fst_text(odd).splitlines() == [
        "2\t0\t1\t2",
        "0\t2\t3\t0\tInfinity",
        "0\t1\t1\t1\t-1.5",
        "0",
        "1\tInfinity",
        "3\tInfinity",
    ]
    acceptor = replace(odd, olabels=odd.ilabels)
    assert equal(parse_fst(compact_acceptor_bytes(acceptor), file="x", whole=True)[0], acceptor)


@pytest.mark.parametrize(
    "text", ["0 1 2", "0 1 2 3 4 5", "0 x 1 1", "0 1 -1 1", "0 1 1 1 nan", "0 123456789 1 1", "-1", "0 1 1 3000000000"]
)
def test_text_that_is_no_graph(text: str) -> None:
    with pytest.raises(DataError, match=r"den\.txt: line 2 is no arc or final cost: "):
        parse_fst_text("0 1 1 1\n" + text, file="den.txt")


# What is read, and by which parser; each says where in the data it stands.
Parse = Callable[[bytes], Any]


def cases() -> dict[str, tuple[bytes, Parse]]:
    cegs, end2end = (golden(f"chain/{name}.ark").read_bytes() for name in ("cegs/two", "sup/egs_unconstrained"))
    begin, other = cegs.index(b"<Supervision>"), end2end.index(b"<Supervision>")
    lattices = golden("chain/sup/phone_lat.ark").read_bytes()
    space = lattices.index(b" ") + 1
    return {
        "den": (golden("chain/den.fst").read_bytes(), lambda data: parse_fst(data, file="f")),
        "const": (golden("HCLG.fst").read_bytes()[:], lambda data: parse_fst(data, file="f")),
        "constrained": (
            cegs[begin : cegs.index(b"<DW2>")],
            lambda data: parse_supervision(data, file="f"),
        ),
        "end2end": (
            end2end[other : end2end.index(b"<DW2>")],
            lambda data: parse_supervision(data, file="f"),
        ),
        "tree": (golden("chain/model/tree").read_bytes(), lambda data: read_tree("f", data)),
        "tree.txt": (golden("chain/model/tree.txt").read_bytes(), lambda data: read_tree("f", data)),
        "lattice": (
            lattices[space : parse_compact_lattice(lattices, space, file="f")[1]],
            lambda data: parse_compact_lattice(data, file="f"),
        ),
    }


@pytest.mark.parametrize("name", ["den", "const", "constrained", "end2end", "tree", "lattice"])
def test_truncated_anywhere(name: str) -> None:
    """One line that names the file and a place in it, wherever the data end."""
    data, parse = cases()[name]
    parse(data)
    for size in sorted({*range(0, len(data), 1 + len(data) // 1500), *range(min(80, len(data))), len(data) - 1}):
        with pytest.raises(DataError) as caught:
            parse(data[:size])
        message = str(caught.value)
        assert message.startswith("f, byte offset ") and "\n" not in message
        assert caught.value.offset is not None and 0 <= caught.value.offset <= size


@pytest.mark.parametrize("name", ["den", "const", "constrained", "end2end", "tree", "tree.txt", "lattice"])
def test_damaged_bytes_are_told_or_harmless(name: str) -> None:
    """Random bytes in random places: an error of one line, or what is read can be written."""
    data, parse = cases()[name]
    rng, told = np.random.default_rng(8), 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            # Headers and counts are where damage does most.
            where = int(rng.integers(min(100, len(data)) if rng.random() < 0.4 else len(data)))
            damaged[where] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
        try:
            found = parse(bytes(damaged))
        except DataError as error:
            told += 1
            assert str(error).startswith("f") and "\n" not in str(error)
        else:
            if name in ("den", "const"):
                fst = found[0]
                assert fst.num_arcs == 0 or 0 <= fst.nexts.min() <= fst.nexts.max() < fst.num_states
                assert not np.isnan(fst.costs).any() and not np.isnan(fst.finals).any()
                parse_fst(vector_bytes(fst), file="f", whole=True)
            elif name in ("constrained", "end2end"):
                supervision_bytes(found[0])
    assert told > 10


def header(
    kind: bytes = b"vector", version: int = 2, flags: int = 0, start: int = 0, states: int = 1, arcs: int = 0
) -> bytes:
    names = b"".join(struct.pack("<i", len(word)) + word for word in (kind, b"standard"))
    return struct.pack("<i", 2125659606) + names + struct.pack("<iiQqqq", version, flags, 0, start, states, arcs)


COMPACT = header(b"compact_acceptor", states=2, arcs=1)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "offset 0: the file ends inside an FST header"),
        (b"FST " * 30, "offset 0: not an OpenFst file"),
        (header(b"edit"), "offset 0: cannot read an FST of type edit, standard"),
        (header(version=1), "offset 0: cannot read version 1 of FST type vector"),
        (header(flags=1), "offset 0: symbol tables inside an FST"),
        (header(states=-2), "an FST of -2 states"),
        (header(states=2**40), "truncated: 66 bytes"),
        (header(start=3) + struct.pack("<fq", 0, 0), "the FST starts in state 3 of 1"),
        (header() + struct.pack("<fq", 0, -1), "offset 70: state 0 has -1 arcs"),
        (header() + struct.pack("<fq", 0, 2**60), "truncated"),
        (header() + struct.pack("<fq", np.nan, 0), "the final cost of state 0 is nan"),
        (header() + struct.pack("<fqiifi", 0, 1, 1, 1, 0, 1), "offset 78: an arc leads to state 1 of 1"),
        (header() + struct.pack("<fqiifi", 0, 1, -1, 1, 0, 0), "offset 78: an arc has labels -1, 1"),
        (header() + struct.pack("<fqiifi", 0, 1, 1, 1, np.nan, 0), "offset 78: an arc costs nan"),
        (header() + struct.pack("<fqx", 0, 0), "offset 78: 1 bytes too many after the FST"),
        (header(b"const", states=-1), "an FST of -1 states, 0 arcs"),
        (header(b"const", states=1, arcs=1) + struct.pack("<fIIIIiifi", 0, 1, 1, 0, 0, 1, 1, 0, 0), "do not add up"),
        (COMPACT + struct.pack("<III", 1, 1, 2), "the arcs of state 0 begin before"),
        (COMPACT + struct.pack("<III", 0, 2, 1), "the arcs of state 1 begin before|the arcs of state 2 begin before"),
        (COMPACT + struct.pack("<IIIifiifi", 0, 1, 2, 1, 0, 1, -1, 0, 0), "a final cost that is not the first"),
        (COMPACT + struct.pack("<IIIifiifi", 0, 2, 2, 1, 0, 1, -1, 0, -1), "a final cost that is not the first"),
        (COMPACT + struct.pack("<IIIifi", 0, 0, 1, -1, 0, -1), "0 arcs, and the header says 1"),
        (COMPACT + struct.pack("<IIIifiifi", 0, 1, 2, 1, 0, 2, -1, 0, -1), "an arc leads to state 2 of 2"),
    ],
)  # fmt: skip
def test_graphs_that_are_wrong(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"den\.fst, key utt, byte .*{message}"):
        parse_fst(data, file="den.fst", key="utt", whole=True)


def test_supervision_that_is_wrong() -> None:
    good = next(iter(archive(golden("chain/cegs/two.ark")).values()))
    data = supervision_bytes(good)
    empty = build_fst(-1, 0, [], {})
    for change, message in (
        ({"num_sequences": 0}, "0 sequences"),
        ({"frames_per_sequence": -3}, "-3 frames a sequence"),
        ({"label_dim": 20}, r"the FST has label \d+, beyond 20"),
        ({"weight": float("nan")}, "the weight is nan"),
        ({"fsts": (empty,)}, "the FST is empty"),
    ):
        changes: dict[str, Any] = {**change}
        with pytest.raises(DataError, match=rf"cegs\.1\.ark, key utt, byte offset \d+: {message}"):
            parse_supervision(supervision_bytes(replace(good, **changes)), file="cegs.1.ark", key="utt")
    for wrong, message in (
        (data.replace(b"<LabelDim> ", b"<LabelDam> "), "<LabelDim> expected, found b'<LabelDam> '"),
        (data.replace(b"<End2End> F", b"<End2End> X"), "T or F expected, found b'X'"),
        (data.replace(b"<FramesPerSeq> \4", b"<FramesPerSeq> \10"), "a number of 4 bytes expected, found size byte 8"),
        (data.replace(b"</Supervision> ", b"<AlignmentPdfs> \4\xff\xff\xff\xff"), "a vector of -1 elements"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            parse_supervision(wrong, file="cegs.1.ark")


def test_trees_in_both_forms(tmp_path: Path) -> None:
    binary, text = read_tree(golden("chain/model/tree")), read_tree(golden("chain/model/tree.txt"))
    assert binary.root == text.root
    assert (binary.context_width, binary.central_position) == (2, 1)
    assert binary.pdfs() == set(range(56))
    # Pdfs of phones without a left neighbour, as the transition model lists them.
    assert (binary.pdf((0, 1), 0), binary.pdf((0, 1), 1)) == (0, 21)
    with pytest.raises(DataError, match=r"none: cannot read: No such file"):
        read_tree(tmp_path / "none")


def test_tables_of_trees() -> None:
    """What monophone trees are: a table by phone, and there is none for phone 0."""
    body = b"TE -1 2 ( CE 3 CE 4 ) "
    tree = read_tree("tree", b"ContextDependency 1 0 ToPdf TE 0 3 ( NULL " + body + body + b") EndContextDependency ")
    assert (tree.pdf((1,), 0), tree.pdf((2,), 1)) == (3, 4)
    for phones, pdf_class in (((0,), 0), ((3,), 0), ((1,), 2)):
        with pytest.raises(
            DataError, match=rf"tree: the tree has no pdf for phones {phones[0]}, pdf class {pdf_class}"
        ):
            tree.pdf(phones, pdf_class)
    number = b"\4\0\0\0\0"
    binary = (
        b"\0BContextDependency \4\1\0\0\0"
        + number
        + b"ToPdf TE "
        + number
        + b"\xfc\2\0\0\0( NULL CE \4\7\0\0\0) EndContextDependency "
    )
    assert read_tree("tree", binary).pdf((1,), 0) == 7
    for wrong, message in (
        (binary.replace(b"\xfc", b"\4"), "a table's size expected"),
        (binary.replace(b"\xfc\2", b"\xfc\xff"), "a table of 255 entries"),
        (binary.replace(b"CE \4\7\0\0\0", b"CE \4\xff\xff\xff\xff"), "pdf-id -1"),
        (b"ContextDependency 2 2 ToPdf CE 1 EndContextDependency ", "context of 2 phones with the central one at 2"),
        (b"ContextDependency 1 0 ToPdf SE 1 [ 1 ] { CE 1 CE 2 } EndContextDependency ", "about position 1 of 1"),
        (b"ContextDependency 1 0 ToPdf NULL EndContextDependency ", "the tree is empty"),
        (b"ContextDependency 1 0 ToPdf " + b"SE 0 [ 1 ] { " * 500, "the tree has more than 400 levels"),
    ):
        with pytest.raises(DataError, match=message):
            read_tree("tree", wrong)


def test_phone_lattices_are_read() -> None:
    """Against the text form: labels, graph costs and numbers of transition-ids of each arc."""
    for part in golden("chain/sup/phone_lat.txt").read_text().split("\n\n"):
        if not part.strip():
            continue
        key, *lines = part.split("\n")
        lattice = phone_lattices()[key.strip()]
        arcs = [line.split() for line in lines if len(line.split()) > 3]
        assert lattice.num_states == 1 + max(int(f[1]) for f in arcs)
        got = sorted(
            zip(*(c.tolist() for c in (lattice.sources, lattice.nexts, lattice.labels, lattice.frames)), strict=True)
        )
        fields = [(int(f[0]), int(f[1]), int(f[2]), f[3].split(",")) for f in arcs]
        expected = [(source, to, label, len(costs[2].split("_"))) for source, to, label, costs in fields]
        final = (lattice.num_states - 1, lattice.num_states, 0, 0)
        assert got == sorted([*expected, final])
        assert sorted(np.round(lattice.graph.astype(float), 4)) == pytest.approx(
            sorted([0.0, *(float(costs[0]) for *_, costs in fields)]), abs=1e-4
        )
