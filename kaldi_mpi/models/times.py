"""Which frames of a network's nodes can be computed, and which are needed: sets of times as masks.

A mask is a bool array over an `Axis`, a run of times that is long enough for all that a request can reach. The rules
are those of nnet3's computation graph: a row can be computed where all that it requires can; an optional input
(IfDefined, an optional time of a component) is taken where it can be computed; only what an output depends on is
computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.models.descriptor import Descriptor

Mask = NDArray[np.bool_]
Times = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Axis:
    """The times first .. last."""

    first: int
    last: int

    @property
    def times(self) -> Times:
        return np.arange(self.first, self.last + 1)

    def mask(self, times: Iterable[int]) -> Mask:
        """True at `times`, all of which are on the axis."""
        mask = self.empty()
        mask[np.fromiter(times, np.int64) - self.first] = True
        return mask

    def empty(self) -> Mask:
        return np.zeros(self.last - self.first + 1, np.bool_)

    def full(self) -> Mask:
        return np.ones(self.last - self.first + 1, np.bool_)

    def of(self, mask: Mask) -> Times:
        """The times at which a mask is True."""
        return np.flatnonzero(mask) + self.first

    def look(self, mask: Mask, at: Times) -> Mask:
        """The mask's value at the times `at`; False beyond the axis."""
        inside = (at >= self.first) & (at <= self.last)
        found = np.zeros(len(at), np.bool_)
        found[inside] = mask[at[inside] - self.first]
        return found

    def put(self, mask: Mask, at: Times) -> None:
        """Make the mask True at the times `at` that are on the axis."""
        inside = (at >= self.first) & (at <= self.last)
        mask[at[inside] - self.first] = True


def moved(descriptor: Descriptor, times: Times) -> Times:
    """The times of its child that Offset, Round or ReplaceIndex takes for its own `times`."""
    if descriptor.op == "Offset":
        return times + descriptor.integer(1)
    if descriptor.op == "Round":
        modulus = descriptor.integer(1)
        return np.floor_divide(times, modulus) * modulus
    assert descriptor.op == "ReplaceIndex"
    return np.full_like(times, descriptor.integer(2))


MOVES = ("Offset", "Round", "ReplaceIndex")


def defined(descriptor: Descriptor, axis: Axis, at: Times, nodes: Mapping[str, Mask]) -> Mask:
    """At which of the times `at` a descriptor has a value, given the masks of nodes."""
    op, parts = descriptor.op, descriptor.children
    if not op:
        return axis.look(nodes[descriptor.name], at)
    if op in ("IfDefined", "Const"):
        return np.ones(len(at), np.bool_)
    if op in MOVES:
        return defined(parts[0], axis, moved(descriptor, at), nodes)
    masks = [defined(part, axis, at, nodes) for part in parts]
    if op == "Failover":
        return masks[0] | masks[1]
    if op == "Switch":
        return np.choose(np.mod(at, len(parts)), masks)
    found = masks[0]
    for mask in masks[1:]:
        found = found & mask
    return found


def demand(
    descriptor: Descriptor, axis: Axis, at: Times, computable: Mapping[str, Mask], wanted: dict[str, Mask]
) -> None:
    """Mark in `wanted` the frames of nodes that a descriptor takes at the times `at`."""
    op, parts = descriptor.op, descriptor.children
    if not len(at) or op == "Const":
        return
    if not op:
        if descriptor.name not in wanted:
            wanted[descriptor.name] = axis.empty()
        axis.put(wanted[descriptor.name], at)
    elif op in MOVES:
        demand(parts[0], axis, moved(descriptor, at), computable, wanted)
    elif op == "IfDefined":
        demand(parts[0], axis, at[defined(parts[0], axis, at, computable)], computable, wanted)
    elif op == "Failover":
        first = defined(parts[0], axis, at, computable)
        demand(parts[0], axis, at[first], computable, wanted)
        demand(parts[1], axis, at[~first], computable, wanted)
    elif op == "Switch":
        for number, part in enumerate(parts):
            demand(part, axis, at[np.mod(at, len(parts)) == number], computable, wanted)
    else:
        for part in parts:
            demand(part, axis, at, computable, wanted)


def reach(descriptor: Descriptor) -> int:
    """How far from a time a descriptor can look at most."""
    own = 0
    if descriptor.op == "Offset":
        own = abs(descriptor.integer(1))
    elif descriptor.op == "Round":
        own = descriptor.integer(1)
    elif descriptor.op == "ReplaceIndex":
        own = abs(descriptor.integer(2))
    return own + max((reach(part) for part in descriptor.children), default=0)


def offsets_of(descriptor: Descriptor, name: str, so_far: int = 0) -> Iterator[int]:
    """The offsets at which a descriptor takes node `name`; Round and ReplaceIndex count as none."""
    if not descriptor.op:
        if descriptor.name == name:
            yield so_far
        return
    own = descriptor.integer(1) if descriptor.op == "Offset" else 0
    for part in descriptor.children:
        yield from offsets_of(part, name, so_far + own)


def moduli(descriptor: Descriptor) -> Iterator[int]:
    """The periods of a descriptor: shifting all times by their multiples changes nothing else."""
    if descriptor.op == "Round":
        yield descriptor.integer(1)
    if descriptor.op == "Switch":
        yield len(descriptor.children)
    for part in descriptor.children:
        yield from moduli(part)
