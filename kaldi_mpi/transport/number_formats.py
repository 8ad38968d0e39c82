"""The types in which numbers travel: float32, float16, or bfloat16 (kept as uint16).

Sums are taken in float64 and results are float32, whatever the type that the contributions travelled in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Wire = NDArray[Any]  # numbers as they travel

WIRE_TYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
# Numbers handled at a time, so that what is computed in between stays in a core's cache: a mixing then takes
# half the time, which other ranks on the same cores have for their steps.
_BLOCK = 2**18


def blocks(size: int) -> Iterator[slice]:
    """Cut 0..size into runs that a core's cache holds."""
    return (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))


def to_wire(values: NDArray[np.float32], out: Wire) -> None:
    """Round float32 `values` into `out` (same length), whose dtype says how: to nearest, ties to even."""
    if out.dtype == np.uint16:  # bfloat16: the upper half of a float32
        for block in blocks(values.size):
            bits = values[block].view(np.uint32)
            up = bits >> np.uint32(16)
            up &= np.uint32(1)
            up += np.uint32(0x7FFF)
            up += bits
            np.right_shift(up, np.uint32(16), out=out[block], casting="unsafe")
    else:
        out[...] = values


def from_wire(wire: Wire) -> NDArray[np.float32]:
    """The float32 values of `wire`; float32 itself comes back without a copy."""
    if wire.dtype == np.uint16:
        return (wire.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wire.astype(np.float32, copy=False)


def quantized(values: NDArray[np.float32], wire: str) -> Wire:
    """A new array of `values` as they travel in the type called `wire`."""
    out = np.empty(values.size, WIRE_TYPES[wire])
    to_wire(values, out)
    return out


def rounded(values: NDArray[np.float32], wire: str) -> NDArray[np.float32]:
    """`values` as they are after travelling in the type called `wire`; always a new float32 array."""
    return from_wire(quantized(values, wire))
