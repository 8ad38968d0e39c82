"""Descriptors: the expressions that say where a node of an nnet3 network takes its input from.

The grammar is nnet3's (``Append``, ``Sum``, ``Offset``, ...); the xconfig shorthands (``-3``, ``lstm1@-3``,
``[-1]``) are understood when names of earlier layers are given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_SPLIT = re.compile(r"\s*([(),@]|[^\s(),@]+)")
_NAME = re.compile(r"^[A-Za-z_][-A-Za-z_0-9.]*$")
_INTEGER = re.compile(r"^[-+]?\d+$")
_DEEPEST = 50
_BRACKET = re.compile(r"\[\s*(-?\w*)\s*\]")

# What stands between the parentheses: d = a descriptor, d* = one or more, i = integer, f = number, v = t or x.
_ARGUMENTS = {
    "Append": "d*",
    "Sum": "d*",
    "Switch": "d*",
    "Failover": "dd",
    "IfDefined": "d",
    "Offset": "di",  # and an optional third: the offset of nnet3's x index
    "Round": "di",
    "ReplaceIndex": "dvi",
    "Scale": "fd",
    "Const": "fi",
}


class DescriptorError(ValueError):
    """A descriptor that cannot be parsed; the caller adds the file and the line."""


@dataclass(frozen=True)
class Descriptor:
    """One node of a descriptor's tree.

    `op` is empty for a bare node name (then `arguments` is that one name), else nnet3's name of the
    operator; arguments are descriptors, or strings for numbers, kept as they were written.
    """

    op: str
    arguments: tuple[Descriptor | str, ...]

    def __str__(self) -> str:
        inner = ", ".join(map(str, self.arguments))
        return f"{self.op}({inner})" if self.op else inner

    @property
    def name(self) -> str:
        """The node's name, of a bare name."""
        assert not self.op
        return str(self.arguments[0])

    @property
    def children(self) -> tuple[Descriptor, ...]:
        return tuple(part for part in self.arguments if isinstance(part, Descriptor))

    def integer(self, index: int) -> int:
        return int(str(self.arguments[index]))

    def names(self) -> Iterator[str]:
        """All node names, in order of appearance."""
        if not self.op:
            yield self.name
        for part in self.children:
            yield from part.names()

    def replace(self, rename: Callable[[str], str]) -> Descriptor:
        """The same tree with every node name replaced."""
        if not self.op:
            return Descriptor("", (rename(self.name),))
        return Descriptor(
            self.op,
            tuple(part.replace(rename) if isinstance(part, Descriptor) else part for part in self.arguments),
        )

    def normalized(self) -> Descriptor:
        """The form that Kaldi writes.

        No Append in an Append or alone, sums of two terms, Offset merged and next to the names, Scale inside of all
        that moves in time, numbers in six digits.
        """
        if not self.op:
            return self
        if self.op == "Const":
            return Descriptor("Const", (_digits(self.arguments[0]), self.arguments[1]))
        parts = [part.normalized() if isinstance(part, Descriptor) else part for part in self.arguments]
        if self.op == "Append":
            flat: list[Descriptor | str] = []
            for part in parts:
                flat.extend(part.arguments if isinstance(part, Descriptor) and part.op == "Append" else [part])
            return Descriptor("Append", tuple(flat)) if len(flat) > 1 else self.children[0].normalized()
        if self.op == "Sum":
            return _nested_sum(tuple(part for part in parts if isinstance(part, Descriptor)))
        if self.op == "Scale" and isinstance(parts[1], Descriptor):
            return _scaled(float(str(parts[0])), parts[1])
        if self.op == "Offset" and len(parts) == 2 and isinstance(parts[0], Descriptor):
            inner, offset = parts[0], self.integer(1)
            if inner.op in ("Append", "Sum"):
                shifted = (Descriptor("Offset", (part, parts[1])).normalized() for part in inner.children)
                return Descriptor(inner.op, tuple(shifted))
            if inner.op == "Offset" and len(inner.arguments) == 2:
                offset, inner = offset + inner.integer(1), inner.children[0]
            return Descriptor("Offset", (inner, str(offset))) if offset else inner
        return Descriptor(self.op, tuple(parts))

    def dim(self, dim_of: Callable[[str], int]) -> int:
        """Number of columns; `dim_of` gives that of a node.

        Raises:
            DescriptorError: terms that must agree in dimension do not.
        """
        if not self.op:
            return dim_of(self.name)
        if self.op == "Const":
            return self.integer(1)
        dims = [part.dim(dim_of) for part in self.children]
        if self.op == "Append":
            return sum(dims)
        if any(dim != dims[0] for dim in dims):
            raise DescriptorError(f"terms of different dimensions {dims} in {self}")
        return dims[0]


def _digits(number: Descriptor | str) -> str:
    return f"{float(str(number)):g}"


def _nested_sum(terms: tuple[Descriptor, ...]) -> Descriptor:
    first, *rest = terms
    return Descriptor("Sum", (first, _nested_sum(tuple(rest)))) if rest else first


def _scaled(factor: float, inner: Descriptor) -> Descriptor:
    """Scale(factor, inner), the factor at the names."""
    if not inner.op:
        return inner if factor == 1.0 else Descriptor("Scale", (_digits(str(factor)), inner))
    if inner.op == "Scale":
        return _scaled(factor * float(str(inner.arguments[0])), inner.children[0])
    if inner.op == "Const":
        return Descriptor("Const", (_digits(str(factor * float(str(inner.arguments[0])))), inner.arguments[1]))
    scaled = (_scaled(factor, part) if isinstance(part, Descriptor) else part for part in inner.arguments)
    return Descriptor(inner.op, tuple(scaled))


def parse_descriptor(text: str, previous: Sequence[str] | None = None) -> Descriptor:
    """Parse `text`.

    Args:
        text: for example ``Append(Offset(input, -1), input)``.
        previous: names of the layers before this one, oldest first; gives meaning to xconfig's shorthands.
            None: they are errors, as in nnet3 config lines.

    Raises:
        DescriptorError: with the cause.
    """
    if previous is not None:
        text = _BRACKET.sub(lambda match: _bracket(match.group(1), previous), text)
    tokens = _SPLIT.findall(text)
    parser = _Parser(tokens, previous)
    tree = parser.descriptor()
    if parser.position != len(tokens):
        raise DescriptorError(f"unexpected {tokens[parser.position]!r} after the end of descriptor {text!r}")
    return tree


def _bracket(number: str, previous: Sequence[str]) -> str:
    if not _INTEGER.match(number) or not -len(previous) <= int(number) < 0:
        raise DescriptorError(f"[{number}] does not name an earlier layer")
    return previous[int(number)]


class _Parser:
    def __init__(self, tokens: list[str], previous: Sequence[str] | None) -> None:
        self.tokens, self.previous, self.position, self.depth = tokens, previous, 0, 0

    def next(self, wanted: str = "") -> str:
        if self.position == len(self.tokens):
            raise DescriptorError(f"descriptor ends where {wanted or 'a term'} is expected")
        token = self.tokens[self.position]
        if wanted and token != wanted:
            raise DescriptorError(f"{wanted!r} expected in descriptor, found {token!r}")
        self.position += 1
        return token

    def at(self, token: str) -> bool:
        return self.position < len(self.tokens) and self.tokens[self.position] == token

    def integer(self) -> str:
        token = self.next()
        if not _INTEGER.match(token):
            raise DescriptorError(f"integer expected in descriptor, found {token!r}")
        return str(int(token))

    def number(self) -> str:
        token = self.next()
        try:
            float(token)
        except ValueError:
            raise DescriptorError(f"number expected in descriptor, found {token!r}") from None
        return token

    def descriptor(self) -> Descriptor:
        token = self.next()
        if token in _ARGUMENTS and self.at("("):
            self.next("(")
            self.depth += 1
            if self.depth > _DEEPEST:
                raise DescriptorError("descriptor nested too deeply")
            tree = Descriptor(token, tuple(self.arguments(token)))
            self.next(")")
            self.depth -= 1
            return tree
        if _NAME.match(token):
            leaf = Descriptor("", (token,))
            if self.previous is not None and self.at("@"):
                self.next("@")
                return self.shifted(leaf, self.integer())
            return leaf
        if self.previous is not None and _INTEGER.match(token):
            if not self.previous:
                raise DescriptorError(f"{token} has no meaning: there is no layer before this one")
            return self.shifted(Descriptor("", (self.previous[-1],)), token)
        raise DescriptorError(f"node name expected in descriptor, found {token!r}")

    @staticmethod
    def shifted(leaf: Descriptor, offset: str) -> Descriptor:
        return Descriptor("Offset", (leaf, str(int(offset)))) if int(offset) else leaf

    def arguments(self, op: str) -> Iterator[Descriptor | str]:
        shape = _ARGUMENTS[op]
        if shape == "d*":
            yield self.descriptor()
            while self.at(","):
                self.next(",")
                yield self.descriptor()
            return
        for index, kind in enumerate(shape):
            if index:
                self.next(",")
            if kind == "d":
                yield self.descriptor()
            elif kind == "i":
                yield self.integer()
            elif kind == "f":
                yield self.number()
            else:
                token = self.next()
                if token not in ("t", "x"):
                    raise DescriptorError(f"t or x expected in {op}, found {token!r}")
                yield token
        if op == "Offset" and self.at(","):
            self.next(",")
            yield self.integer()
