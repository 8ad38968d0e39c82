"""GMM acoustic models in Kaldi's binary form: a transition model followed by the GMMs of all pdfs.

The transition model is the same at the head of every ``.mdl``, so that of a neural network's model is read
here too, where decoding graphs need topology and transition probabilities.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.atomic import atomic_write
from kaldi_mpi.errors import DataError
from kaldi_mpi.kaldi.gmm import Gmms
from kaldi_mpi.kaldi.hmm import Hmm


@dataclass(frozen=True)
class GmmModel:
    """A GMM-HMM acoustic model."""

    hmm: Hmm
    gmms: Gmms


def read_hmm(tree: str | Path, model: str | Path) -> Hmm:
    """Read a tree and the transition model of any binary ``.mdl``.

    Raises:
        DataError: a file is missing, not binary, truncated or damaged.
    """
    reader = _Reader(model)
    topology, log_probs = _read_transition_model(reader)
    return Hmm(_read_bytes(tree), topology, log_probs)


def read_gmm_model(tree: str | Path, model: str | Path) -> GmmModel:
    """Read a tree and a binary GMM model.

    Raises:
        DataError: see `read_hmm`; or the model holds no diagonal GMMs (a neural network, for example).
    """
    reader = _Reader(model)
    topology, log_probs = _read_transition_model(reader)
    reader.expect("<DIMENSION>")
    dim = reader.int32()
    reader.expect("<NUMPDFS>")
    num_pdfs = reader.int32()
    weights, means, variances = [], [], []
    for _ in range(num_pdfs):
        # DiagGMMBegin is what old versions wrote.
        if reader.token() not in ("<DiagGMM>", "<DiagGMMBegin>"):
            raise reader.error("no diagonal GMM here")
        if reader.peek_token() == "<GCONSTS>":
            reader.token()
            reader.vector()  # follows from the others
        reader.expect("<WEIGHTS>")
        weights.append(reader.vector())
        reader.expect("<MEANS_INVVARS>")
        means.append(reader.matrix())
        reader.expect("<INV_VARS>")
        variances.append(reader.matrix())
        reader.token()
        if not means[-1].shape == variances[-1].shape == (len(weights[-1]), dim):
            raise reader.error("a GMM whose parts differ in size")
    first = np.concatenate([[0], np.cumsum([len(w) for w in weights])]).astype(np.int64)
    gmms = Gmms(first, np.concatenate(weights), np.concatenate(means), np.concatenate(variances))
    return GmmModel(Hmm(_read_bytes(tree), topology, log_probs), gmms)


def write_gmm_model(path: str | Path, hmm: Hmm, gmms: Gmms) -> None:
    """Write a binary GMM model that Kaldi's programs read.

    Raises:
        DataError: the file cannot be written.
    """
    pieces = [b"\0B", _transition_model_bytes(hmm), b"<DIMENSION> ", _int32(gmms.dim)]
    pieces += [b"<NUMPDFS> ", _int32(gmms.num_pdfs)]
    for pdf in range(gmms.num_pdfs):
        own = slice(int(gmms.first[pdf]), int(gmms.first[pdf + 1]))
        pieces += [b"<DiagGMM> <GCONSTS> ", _vector(gmms.gconsts[own])]
        pieces += [b"<WEIGHTS> ", _vector(gmms.weights[own])]
        pieces += [b"<MEANS_INVVARS> ", _matrix(gmms.means_invvars[own])]
        pieces += [b"<INV_VARS> ", _matrix(gmms.inv_vars[own]), b"</DiagGMM> "]
    with atomic_write(path) as stream:
        stream.write(b"".join(pieces))


def _transition_model_bytes(hmm: Hmm) -> bytes:
    _, transitions = hmm.build()
    topology = transitions.topo
    phones, phone_to_index, entries = topology.__getstate__()
    pieces = [b"<TransitionModel> <Topology> ", _int32s(phones), _int32s(phone_to_index), _int32(len(entries))]
    for entry in entries:
        pieces.append(_int32(len(entry)))
        for state in entry:
            pieces += [_int32(state.forward_pdf_class), _int32(len(state.transitions))]
            pieces += [_int32(target) + _float(prob) for target, prob in state.transitions]
    triples = _triples(transitions)
    pieces += [b"</Topology> <Triples> ", _int32(len(triples))]
    pieces += [_int32(value) for triple in triples for value in triple]
    pieces += [b"</Triples> <LogProbs> ", _vector(hmm.log_probs), b"</LogProbs> </TransitionModel> "]
    return b"".join(pieces)


def _triples(transitions: Any) -> list[tuple[int, int, int]]:
    """(phone, HMM state, pdf) of each transition-state; the wheel shows them in its text form only."""
    text = str(transitions)
    body = text[text.index("<Triples>") : text.index("</Triples>")].split()[2:]
    values = [int(field) for field in body]
    return list(zip(values[::3], values[1::3], values[2::3], strict=True))


def _read_transition_model(reader: _Reader) -> tuple[str, NDArray[np.float32]]:
    """The topology as the text of a ``topo`` file, and the log-probabilities."""
    reader.expect("<TransitionModel>")
    reader.expect("<Topology>")
    phones = reader.int32s()
    phone_to_index = reader.int32s()
    num_entries = reader.int32()
    if num_entries == -1:
        raise reader.error("self-loops with pdfs of their own are not supported")
    entries = []
    for _ in range(num_entries):
        states = []
        for state in range(reader.int32()):
            pdf_class = reader.int32()
            arcs = [(reader.int32(), reader.float32()) for _ in range(reader.int32())]
            emitting = f"<PdfClass> {pdf_class} " if pdf_class >= 0 else ""
            text = "".join(f"<Transition> {target} {prob:.9g} " for target, prob in arcs)
            states.append(f"<State> {state} {emitting}{text}</State>\n")
        entries.append("".join(states))
    lines = ["<Topology>\n"]
    for index, entry in enumerate(entries):
        own = " ".join(str(phone) for phone in phones if phone_to_index[phone] == index)
        lines.append(f"<TopologyEntry>\n<ForPhones>\n{own}\n</ForPhones>\n{entry}</TopologyEntry>\n")
    lines.append("</Topology>\n")
    reader.expect("</Topology>")
    kind = reader.token()
    if kind not in ("<Triples>", "<Tuples>"):
        raise reader.error(f"expected <Triples>, found {kind}")
    for _ in range(reader.int32() * (3 if kind == "<Triples>" else 4)):
        reader.int32()  # they follow from the tree and the topology
    reader.token()
    reader.expect("<LogProbs>")
    log_probs = reader.vector()
    reader.expect("</LogProbs>")
    reader.expect("</TransitionModel>")
    return "".join(lines), log_probs


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", file=str(path)) from error


class _Reader:
    """Kaldi's basic binary types, read one after the other."""

    def __init__(self, path: str | Path) -> None:
        self._file, self._data, self._at = str(path), _read_bytes(path), 2
        if not self._data.startswith(b"\0B"):
            raise DataError("not a binary Kaldi model", file=self._file)

    def error(self, cause: str) -> DataError:
        return DataError(cause, file=self._file, offset=self._at)

    def token(self) -> str:
        end = self._data.find(b" ", self._at, self._at + 64)
        if end < 0:
            raise self.error("expected a token")
        token, self._at = self._data[self._at : end], end + 1
        return token.decode("ascii", "replace")

    def peek_token(self) -> str:
        before, token = self._at, self.token()
        self._at = before
        return token

    def expect(self, token: str) -> None:
        before, found = self._at, self.token()
        if found != token:
            self._at = before
            raise self.error(f"expected {token}, found {found}")

    def int32(self) -> int:
        return int(self._sized("<i"))

    def float32(self) -> float:
        return float(self._sized("<f"))

    def int32s(self) -> list[int]:
        if self._take(1) != b"\x04":
            raise self.error("expected a vector of int32")
        (count,) = struct.unpack("<i", self._take(4))
        return [int(value) for value in np.frombuffer(self._take(4 * count), "<i4")]

    def vector(self) -> NDArray[np.float32]:
        self.expect("FV")
        return np.frombuffer(self._take(4 * self.int32()), "<f4").astype(np.float32)

    def matrix(self) -> NDArray[np.float32]:
        self.expect("FM")
        rows, columns = self.int32(), self.int32()
        values = np.frombuffer(self._take(4 * rows * columns), "<f4")
        return values.reshape(rows, columns).astype(np.float32)

    def _sized(self, code: str) -> Any:
        if self._take(1) != b"\x04":
            raise self.error("expected a number of four bytes")
        return struct.unpack(code, self._take(4))[0]

    def _take(self, count: int) -> bytes:
        if count < 0 or self._at + count > len(self._data):
            raise self.error("the file is truncated or damaged")
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece


def _int32(value: int) -> bytes:
    return struct.pack("<Bi", 4, value)


def _float(value: float) -> bytes:
    return struct.pack("<Bf", 4, value)


def _int32s(values: list[int]) -> bytes:
    return struct.pack("<Bi", 4, len(values)) + np.array(values, dtype="<i4").tobytes()


def _vector(values: NDArray[np.float32]) -> bytes:
    return b"FV " + _int32(len(values)) + values.astype("<f4").tobytes()


def _matrix(values: NDArray[np.float32]) -> bytes:
    rows, columns = values.shape
    return b"FM " + _int32(rows) + _int32(columns) + values.astype("<f4").tobytes()
