"""``python -m tests.chain.compile_kernels 90``: the kernels to machine code of a GPU that need not be there.

Prints each kernel's name when its code is there.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from kaldi_mpi.chain import denominator_kernels, numerator_kernels

NUMBERS = {"frames", "states", "pdfs", "checked", "steps", "arcs"}
INT32 = {"bins", "rows", "long", "first", "second"}
INT64 = {"layers", "first_layer", "first_arc", "nexts", "entries", "entry_steps", "starts"}
DOUBLES = {"costs", "betas", "occupied", "shares", "found"}


def type_of(name: str, doubles: bool) -> str:
    """What `forward_backward` and `sum_paths` give for an argument."""
    if name in NUMBERS:
        return "i32"
    if name in ("leaky", "scale"):
        return "fp32"
    if name.rpartition("_")[2] in INT32:
        return "*i32"
    if name in INT64:
        return "*i64"
    return "*fp64" if doubles and name in DOUBLES else "*fp32"


def compiled(kernel: Any, capability: int, doubles: bool, warps: int, **constants: Any) -> int:
    """Bytes of machine code."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else type_of(name, doubles) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    target = GPUTarget("cuda", capability, 32)
    return len(compile(source, target=target, options={"num_warps": warps}).asm["cubin"])


def main(capability: int) -> None:
    """All four."""
    bins, tile = denominator_kernels._BINS, denominator_kernels.TILE
    for kernel in (denominator_kernels._forward, denominator_kernels._backward):
        assert compiled(kernel, capability, False, 16, BINS=bins, SIZE=tile) > 0
        print(kernel.__name__, flush=True)
    for kernel in (numerator_kernels._layered, numerator_kernels._cyclic):
        assert compiled(kernel, capability, True, 4, WANTED=True, SIZE=numerator_kernels.LANES) > 0
        print(kernel.__name__, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
