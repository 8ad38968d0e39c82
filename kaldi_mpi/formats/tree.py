"""Kaldi's ``tree``: which pdf a phone in its context has.

The file holds the widths of the context and one map, a tree of questions about the phones of the context and about
the pdf class (the state of the phone's topology).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.tokens import Reader

_PDF_CLASS = -1  # the key that asks for the pdf class; others are positions in the context
_UNSIGNED = b"\xfc"  # the size byte of a uint32: Kaldi writes minus the size for what has no sign
_DEEPEST = 400  # levels; trees that were grown have dozens


@dataclass(frozen=True)
class Leaf:
    """An answer."""

    pdf: int


@dataclass(frozen=True)
class Table:
    """A choice by the value at `key`; None where no context leads."""

    key: int
    children: tuple[Node | None, ...]


@dataclass(frozen=True)
class Split:
    """A question whether the value at `key` is one of `values`."""

    key: int
    values: frozenset[int]
    yes: Node
    no: Node


Node = Leaf | Table | Split


@dataclass(frozen=True)
class ContextTree:
    """A decision tree.

    Attributes:
        context_width: N, phones in a context: 1 monophones, 2 left biphones (of chain models), 3 triphones.
        central_position: P, the position of the phone itself, from 0.
        root: the first question.
        file: for messages.
    """

    context_width: int
    central_position: int
    root: Node
    file: str

    def pdf(self, phones: Sequence[int], pdf_class: int) -> int:
        """The pdf-id of a phone.

        Args:
            phones: N phones, 0 beyond the ends of an utterance.
            pdf_class: in chain topologies 0 is emitted first, 1 by the self-loop.

        Raises:
            DataError: the tree has no answer; names the phones.
        """
        node: Node | None = self.root
        while not isinstance(node, Leaf):
            if node is None:
                context = ", ".join(map(str, phones))
                raise DataError(f"the tree has no pdf for phones {context}, pdf class {pdf_class}", file=self.file)
            value = pdf_class if node.key == _PDF_CLASS else phones[node.key]
            if isinstance(node, Split):
                node = node.yes if value in node.values else node.no
            else:
                node = node.children[value] if 0 <= value < len(node.children) else None
        return node.pdf

    def pdfs(self) -> set[int]:
        """All answers."""
        found, left = set(), [self.root]
        while left:
            node = left.pop()
            if isinstance(node, Leaf):
                found.add(node.pdf)
            elif isinstance(node, Split):
                left += [node.yes, node.no]
            else:
                left += [child for child in node.children if child is not None]
        return found


def read_tree(path: str | os.PathLike[str], data: bytes | None = None) -> ContextTree:
    """Read a file, binary or text; or `data`, of which `path` is the name.

    Raises:
        DataError: no such file, truncated or damaged; names it and the byte offset.
    """
    reader = Reader(path, data)
    reader.expect("ContextDependency")
    before = reader.position
    width, position = reader.integer(), reader.integer()
    if not 0 <= position < width <= 16:
        raise reader.error(f"context of {width} phones with the central one at {position}", before)
    reader.expect("ToPdf")
    root = _node(reader, width, 0)
    reader.expect("EndContextDependency")
    if root is None:
        raise reader.error("the tree is empty", before)
    return ContextTree(width, position, root, reader.file)


def _node(reader: Reader, width: int, depth: int) -> Node | None:
    before = reader.position
    if depth > _DEEPEST:
        raise reader.error(f"the tree has more than {_DEEPEST} levels", before)
    kind = reader.expect("CE", "TE", "SE", "NULL")
    if kind == "NULL":
        return None
    if kind == "CE":
        pdf = reader.integer()
        if pdf < 0:
            raise reader.error(f"pdf-id {pdf}", before)
        return Leaf(pdf)
    key = reader.integer()
    if not _PDF_CLASS <= key < width:
        raise reader.error(f"a question about position {key} of {width}", before)
    if kind == "TE":
        size = _size(reader)
        reader.expect("(")
        children = tuple(_node(reader, width, depth + 1) for _ in range(size))
        reader.expect(")")
        return Table(key, children)
    values = frozenset(reader.integers())
    reader.expect("{")
    yes, no = _node(reader, width, depth + 1), _node(reader, width, depth + 1)
    reader.expect("}")
    if yes is None or no is None:
        raise reader.error("a question without an answer", before)
    return Split(key, values, yes, no)


def _size(reader: Reader) -> int:
    before = reader.position
    if reader.binary:
        if reader.data[before : before + 1] != _UNSIGNED:
            raise reader.error("a table's size expected", before)
        size = int.from_bytes(reader.data[before + 1 : before + 5], "little")
        reader.position += 5
    else:
        size = reader.integer()
    # Each child takes five bytes or more.
    if not 0 <= size <= (len(reader.data) - reader.position) // 5:
        raise reader.error(f"a table of {size} entries", before)
    return size
