"""The seed corpus: small valid inputs of each fuzz target, and some that are nearly valid."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tests.cegs_data import loops, random_chain
from tests.egs_data import encode_indexes, example, int32, nnet_io, sparse_matrix
from tests.loader_data import KINDS, full_matrix, int_vector, percentiles, random_matrix

Inputs = dict[str, bytes]


def matrices() -> Inputs:
    """All kinds, with and without full tiles of 16 rows and 8 columns."""
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (4, 2), (9, 8), (17, 11), (40, 16)]
    return {f"{kind}_{rows}x{cols}": random_matrix(rng, kind, rows, cols)[0] for kind in KINDS for rows, cols in sizes}


def columns() -> Inputs:
    """For fuzz_columns: two sizes, min and range, percentiles, codes."""
    rng = np.random.default_rng(1)
    inputs = {}
    for rows, cols, low, spread in ((5, 3, -1.0, 2.0), (16, 8, -30.0, 90.0), (33, 21, 0.0, 1e-38), (9, 9, 1e30, 1e37)):
        head = struct.pack("<BBff", rows - 1, cols - 1, low, spread)
        inputs[f"{rows}x{cols}"] = head + percentiles(cols).tobytes() + rng.bytes(rows * cols)
    return inputs


def int_archives() -> Inputs:
    """Binary, text, mixed, empty vectors."""
    vectors = [np.array(values, np.int32) for values in ([], [5], [0, -1, 2**31 - 1, -(2**31)], list(range(40)))]
    binary = b"".join(b"key-%d " % i + int_vector(vector) for i, vector in enumerate(vectors))
    text = b"a 1 2 3\nb\nc -7\t8 \r\nd 2147483647\n"
    return {"binary": binary, "text": text, "mixed": text + binary + text}


def posterior(frames: list[list[tuple[int, float]]], *, double: bool = False) -> bytes:
    """A binary posterior's object."""
    data = b"\0B" + int32(len(frames))
    for frame in frames:
        data += int32(len(frame))
        for identity, weight in frame:
            data += int32(identity) + (
                b"\x08" + struct.pack("<d", weight) if double else b"\x04" + struct.pack("<f", weight)
            )
    return data


def posteriors() -> Inputs:
    """Binary (floats and doubles), text, mixed."""
    frames = [[(3, 1.0)], [], [(1, 0.25), (2, 0.75)], [(0, -1.5)]]
    binary = b"u1 " + posterior(frames) + b"u2 " + posterior(frames[::-1], double=True) + b"u3 " + posterior([])
    text = b"u1 [ 3 1 ] [ ] [ 1 0.25 2 0.75 ]\nu2 [ 7 1e-3 ]\n"
    return {"binary": binary, "text": text, "mixed": text + binary}


def text_matrices() -> Inputs:
    """Numbers in all forms that are written."""
    return {
        "rows": b"\n  1 2 3\n  -4.5 5e-3 +6\n",
        "semicolons": b" 1 2; 3 4 ; 5 6",
        "long": b" 0.000000000000000000000000000000000000000000012345 1234567890123456789012345678901234567890\n",
        "limits": b" 3.4028234e38 -1.17549e-38 1e-45 .5 5.\n",
        "names": b" inf nan -inf 0x1p3 1e400\n",
    }


def _example(kind: str, *, ivector: bool, full: bool, merged: int = 1) -> bytes:
    """As get_egs.sh writes them: 4 + 2 input rows around 3 output rows, for each n."""
    rng = np.random.default_rng(2)
    inputs = [(n, t, 0) for n in range(merged) for t in range(-4, 5)]
    outputs = [(n, t, 0) for n in range(merged) for t in range(3)]
    feats = random_matrix(rng, kind, len(inputs), 8)[0][2:]
    ios = [nnet_io("input", inputs, feats, full=full)]
    if ivector:
        ios.append(nnet_io("ivector", [(n, 0, 0) for n in range(merged)], random_matrix(rng, "CM2", merged, 5)[0][2:]))
    pairs = [[(i % 6, 1.0)] if i % 2 else [(0, 0.5), (i % 5 + 1, 0.5)] for i in range(len(outputs))]
    target = (
        sparse_matrix(pairs, 6)
        if kind != "FM"
        else full_matrix(np.eye(6)[[i % 6 for i in range(len(outputs))]], "FM")[2:]
    )
    return example(*ios, nnet_io("output", outputs, target, full=full))


def examples() -> Inputs:
    """One example each, all kinds of matrices and encodings of indexes."""
    inputs = {kind: _example(kind, ivector=False, full=kind == "DM") for kind in KINDS}
    inputs["ivector"] = _example("CM", ivector=True, full=False)
    inputs["merged"] = _example("CM", ivector=True, full=False, merged=3)
    inputs["far"] = example(
        nnet_io("input", [(0, 10**6, 0), (2**31 - 1, -(2**31), -1)], full_matrix(np.ones((2, 2)), "FM")[2:])
    )
    inputs["indexes"] = encode_indexes([(0, 0, 0), (0, 124, 0), (1, 0, 5)])
    return inputs


def egs() -> Inputs:
    """Archives of examples."""
    by_kind = examples()
    archive = b"".join(f"u-{name} ".encode() + by_kind[name] for name in ("CM", "DM", "CM2", "CM3", "FM"))
    merged = b"merged-1 " + by_kind["merged"] + b"u-2 " + by_kind["ivector"]
    one = {f"one_{name}": b"u " + data for name, data in by_kind.items()}
    return {"archive": archive, "merged": merged, **one}


def cegs() -> Inputs:
    """Archives of chain examples: constrained, end-to-end, merged, of all kinds of matrices."""
    rng = np.random.default_rng(3)
    of_kinds = [random_chain(rng, kind=kind, frames=2 + i, dim=4) for i, kind in enumerate(KINDS)]
    of_kinds[1].deriv_weights, of_kinds[2].alignment = np.array([[0.5, 1.0, 0.25]], np.float32), True
    merged = random_chain(rng, sequences=2, ivector=2, frames=3, deriv_weights=np.full((2, 3), 0.2, np.float32))
    merged.old_weights, merged.more = True, [merged.output("output-2")]
    ends = [loops(rng, frames=2), loops(rng, frames=2, sequences=3)]
    archives = {"kinds": of_kinds, "merged": [merged], "end2end": ends}
    archives |= {f"one_{kind}": [one] for kind, one in zip(KINDS, of_kinds, strict=True)}
    return {
        name: b"".join(b"u-%d " % i + one.encoded() for i, one in enumerate(examples))
        for name, examples in archives.items()
    }


# Of each target: its inputs, and the words that are worth inserting.
TARGETS = {
    "matrix": (matrices, [b"\0BFM ", b"\0BDM ", b"\0BCM ", b"\0BCM2 ", b"\0BCM3 ", b"\4"]),
    "columns": (columns, []),
    "int_archive": (int_archives, [b" \0B\4", b"\4\1\0\0\0", b"\n", b"-2147483648"]),
    "posterior": (posteriors, [b" \0B\4", b"[ ", b"] ", b"\n", b"\x08", b"1e-3"]),
    "text_matrix": (text_matrices, [b"\n", b";", b"e-", b"1e38", b"inf", b"nan", b"."]),
    "example": (
        examples,
        [
            b"<Nnet3Eg> ",
            b"<NumIo> ",
            b"<NnetIo> ",
            b"</NnetIo> ",
            b"</Nnet3Eg> ",
            b"<I1V> ",
            b"input ",
            b"output ",
            b"ivector ",
            b"SM ",
            b"SV ",
            b"FM ",
            b"DM ",
            b"CM ",
            b"CM2 ",
            b"CM3 ",
            b"\x7f\4",
            b"\4",
            b"\x08",
        ],
    ),
    "egs": (
        egs,
        [b" \0B<Nnet3Eg> ", b"<NnetIo> ", b"</NnetIo> ", b"</Nnet3Eg> ", b"<I1V> ", b"SM ", b"SV ", b"CM ", b"\x7f\4"],
    ),
    "cegs": (
        cegs,
        [
            b" \0B<Nnet3ChainEg> ",
            b"</Nnet3ChainEg> ",
            b"<NnetChainSup> ",
            b"</NnetChainSup> ",
            b"<Supervision> ",
            b"</Supervision> ",
            b"<End2End> T<Fsts> ",
            b"</Fsts> ",
            b"<AlignmentPdfs> \4",
            b"<DW> \1",
            b"<DW2> FV \4",
            b"\xff\xff\xff\xff",
            b"\1\0\0\0\0\0\0\0",
            b"\x7f\4",
        ],
    ),
}


def write(directory: Path, target: str) -> tuple[list[Path], Path]:
    """Write a target's seed corpus and its dictionary; returns the seeds' files and the dictionary's."""
    inputs, words = TARGETS[target]
    corpus = directory / f"corpus_{target}"
    corpus.mkdir(parents=True, exist_ok=True)
    files = []
    for name, data in inputs().items():
        (corpus / f"seed_{name}").write_bytes(data)
        files.append(corpus / f"seed_{name}")
    dictionary = directory / f"{target}.dict"
    dictionary.write_text("".join('"' + "".join(f"\\x{b:02x}" for b in word) + '"\n' for word in words), "ascii")
    return files, dictionary
