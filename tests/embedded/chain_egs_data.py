"""A data directory, alignments and phone lattices of the three golden utterances, for the tests of chain examples."""

from __future__ import annotations

import gzip
import itertools
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.formats.transition import TransitionModel, read_transition_model
from tests.chain.graph_data import alignments
from tests.paths import golden

UTTERANCES = ("george-train00066", "jackson-train00001", "lucas-train00038")


def gmm() -> TransitionModel:
    """The model of the golden alignments."""
    return read_transition_model(golden("chain/sup/gmm.trans_mdl"))


def alignment_of(
    segments: list[tuple[int, int]], model: TransitionModel, rng: np.random.Generator, *, loops_last: bool = True
) -> NDArray[np.int32]:
    """Transition-ids of phones with their frames: each by its shortest way through the topology, then some states for
    longer; self-loops after the state's other transition, as Kaldi's graphs have them, or before it."""
    first_id, of_state, at = [], {}, 1
    for number, (phone, state, _, _) in enumerate(model.tuples):
        first_id.append(at)
        of_state[phone, state] = number  # whichever comes last: an alignment's pdfs play no part
        at += len(model.entries[model.phone_to_entry[phone]][state].transitions)
    tids: list[int] = []
    for phone, frames in segments:
        entry = model.entries[model.phone_to_entry[phone]]
        ways = [[0]]
        for way in ways:
            if not entry[way[-1]].transitions:
                break
            ways += [[*way, to] for to, _ in entry[way[-1]].transitions if to not in way]
        way = next(way for way in ways if not entry[way[-1]].transitions)
        loops = [state for state in way[:-1] if any(to == state for to, _ in entry[state].transitions)]
        stays = rng.choice(loops, frames - len(way) + 1).tolist()
        for state, to in itertools.pairwise(way):
            targets = [target for target, _ in entry[state].transitions]
            first = first_id[of_state[phone, state]]
            moves = [first + targets.index(to)]
            more = [first + targets.index(state)] * stays.count(state) if state in stays else []
            tids += moves + more if loops_last else more + moves
    return np.array(tids, np.int32)


def make_dirs(folder: Path) -> tuple[Path, Path, Path, Path]:
    """data, chain, ali and lat directories; two jobs each."""
    data, chain, ali, lat = (folder / name for name in ("data", "chain", "ali", "lat"))
    for path in (data, chain, ali, lat):
        path.mkdir(parents=True)
    archive = golden("chain/sup/feats.ark").read_bytes()
    lines = [
        f"{key} {golden('chain/sup/feats.ark')}:{archive.index(f'{key} '.encode()) + len(key) + 1}\n"
        for key in UTTERANCES
    ]
    (data / "feats.scp").write_text("".join(lines))
    (data / "utt2spk").write_text("".join(f"{key} {key.split('-')[0]}\n" for key in UTTERANCES))
    for name in ("model/tree", "model/0.trans_mdl", "normalization.fst"):
        shutil.copy(golden(f"chain/{name}"), chain)
    for path in (ali, lat):
        shutil.copy(golden("chain/sup/gmm.trans_mdl"), path / "final.mdl")
        (path / "num_jobs").write_text("2\n")
    model, rng = gmm(), np.random.default_rng(2)
    text = [f"{key} {' '.join(map(str, alignment_of(alignments()[key], model, rng)))}\n" for key in UTTERANCES]
    lattices = golden("chain/sup/phone_lat.ark").read_bytes()
    third = lattices.index(UTTERANCES[2].encode())
    for job, (some, part) in enumerate(((text[:2], lattices[:third]), (text[2:], lattices[third:])), 1):
        with gzip.open(ali / f"ali.{job}.gz", "wt") as stream:
            stream.writelines(some)
        with gzip.open(lat / f"lat.{job}.gz", "wb") as binary:
            binary.write(part)
    return data, chain, ali, lat


def entries(path: Path) -> dict[str, tuple[bytes, bytes, bytes]]:
    """Of each example of an archive, by its key: what is before its supervision (without the key), it, and the rest."""
    data, found, at = path.read_bytes(), {}, 0
    while at < len(data):
        begin = data.index(b"<Supervision>", at)
        middle = data.index(b"<DW2>", begin)
        end = data.index(b"</Nnet3ChainEg> ", middle) + 16
        key, _, head = data[at:begin].partition(b" ")
        found[key.decode()] = head, data[begin:middle], data[middle:end]
        at = end
    return found
