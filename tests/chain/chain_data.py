"""Golden chain files as the tests of the objective need them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.chain.denominator_graph import DenominatorGraph, denominator_graph
from kaldi_mpi.formats.fst import read_fst
from kaldi_mpi.formats.supervision import Supervision, parse_supervision
from tests.paths import golden

NUM_PDFS = 56


def supervisions(name: str) -> dict[str, Supervision]:
    """Of each example of an archive."""
    path = golden(f"chain/{name}")
    data, found, at = path.read_bytes(), {}, 0
    while at < len(data):
        key = data[at : data.index(b" ", at)].decode()
        begin = data.index(b"<Supervision> ", at)
        found[key], end = parse_supervision(data, begin, file=str(path), key=key)
        at = data.index(b"</Nnet3ChainEg> ", end) + 16
    return found


def matrices(name: str) -> dict[str, NDArray[np.float32]]:
    from kaldi_native_io import SequentialFloatMatrixReader

    with SequentialFloatMatrixReader(f"ark:{golden(f'chain/{name}')}") as reader:
        return {key: np.array(value) for key, value in reader}


def golden_graph() -> DenominatorGraph:
    return denominator_graph(read_fst(golden("chain/den.fst")), NUM_PDFS)


@dataclass(frozen=True)
class Case:
    """One of golden/chain/objf: what Kaldi computed of each example; matrices as (B, T, P)."""

    options: dict[str, str]
    table: dict[str, dict[str, float]]
    supervisions: dict[str, Supervision]
    matrices: dict[str, Tensor]

    def number(self, name: str) -> float:
        return float(self.options.get(name, "0"))


def case(name: str) -> Case:
    options = dict(field.split("=", 1) for field in golden(f"chain/objf/{name}.opts").read_text().split())
    columns, *lines = golden(f"chain/objf/{name}.txt").read_text().splitlines()
    names = columns.removeprefix("#").split()[1:]
    table = {
        fields[0]: dict(zip(names, map(float, fields[1:]), strict=True)) for fields in map(str.split, lines)
    }  # fmt: skip
    of_key = supervisions(options["egs"])
    found = {}
    for key, values in matrices(f"objf/{name}.ark").items():
        if key == "initial-probs":
            found[key] = torch.from_numpy(values)
            continue
        sequences = of_key[key.rsplit("-", 1)[0]].num_sequences
        rows = torch.from_numpy(values)
        found[key] = rows.view(-1, sequences, rows.shape[1]).transpose(0, 1).contiguous()
    return Case(options, table, of_key, found)
