"""Describes the C extensions ``kaldi_mpi.{loader,models,chain}._csrc`` to cffi; setup.py builds them.

What Python sees is what stands between ``/* python: begin */`` and ``/* python: end */`` in the headers, so
that a declaration is written once. With ``KALDI_MPI_WERROR=1`` in the environment the compiler's warnings are
errors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).resolve().parent
# The passes over activations, which know nothing of data.
MODEL_HEADERS = ["passes.h"]
MODEL_SOURCES = ["passes.c"]
# The objective of chain training; of the loader it has the errors and the graphs of a supervision, which stand in a
# header that says nothing else to Python.
CHAIN_HEADERS = ["error.h", "supervision.h", "lanes.h", "denominator.h", "numerator.h"]
CHAIN_SOURCES = ["denominator.c", "numerator.c"]
# In order of dependence: a header may use what the ones before it declare.
LOADER_HEADERS = [
    "error.h",
    "file.h",
    "decode.h",
    "matrix.h",
    "block.h",
    "text_matrix.h",
    "int_archive.h",
    "posterior.h",
    "random.h",
    "transform.h",
    "corpus.h",
    "cursor.h",
    "example.h",
    "examples.h",
    "supervision.h",
    "chain_examples.h",
    "egs_index.h",
    "egs_scan.h",
    "split.h",
    "plan.h",
    "cache.h",
    "queue.h",
]
SOURCES = sorted(path.name for path in CSRC.glob("*.c"))
LOADER_SOURCES = [name for name in SOURCES if name not in MODEL_SOURCES + CHAIN_SOURCES]
# Sums and products are never fused: what is decoded must be the same float on every machine.
STANDARD = ["-std=c11", "-O3", "-ffp-contract=off"]
# The file that cffi generates is compiled with these flags too, and is not clean under -Wpedantic and
# -Wconversion: check.py compiles our own files alone with the full set.
WARNINGS = ["-Wall", "-Wextra", "-Wshadow"]
STRICT_WARNINGS = [*WARNINGS, "-Wpedantic", "-Wconversion"]


def declarations(headers: list[str]) -> str:
    """The parts of headers that are meant for Python."""
    part = re.compile(r"/\* python: begin \*/\n(.*?)/\* python: end \*/", re.DOTALL)
    return "\n".join(text for name in headers for text in part.findall((CSRC / name).read_text("utf-8")))


def make_ffibuilder(module: str, headers: list[str], sources: list[str]) -> FFI:
    """The description of an extension, with paths relative to the repository as setuptools wants them."""
    flags = STANDARD + WARNINGS + (["-Werror"] if os.environ.get("KALDI_MPI_WERROR") == "1" else [])
    builder = FFI()
    builder.cdef(declarations(headers))
    builder.set_source(
        module,
        "\n".join(f'#include "{name}"' for name in headers),
        sources=[f"csrc/{name}" for name in sources],
        depends=[f"csrc/{name}" for name in headers],
        include_dirs=["csrc"],
        libraries=["pthread", "m"],
        extra_compile_args=flags,
    )
    return builder


loader = make_ffibuilder("kaldi_mpi.loader._csrc", LOADER_HEADERS, LOADER_SOURCES)
models = make_ffibuilder("kaldi_mpi.models._csrc", MODEL_HEADERS, MODEL_SOURCES)
chain = make_ffibuilder("kaldi_mpi.chain._csrc", CHAIN_HEADERS, [*CHAIN_SOURCES, "error.c"])
