"""Transition models: topology, (phone, state, pdf) tuples and transition probabilities of an HMM system."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.formats.tokens import FloatArray, Reader, Writer

_NO_PDF = -1
_LARGEST_PHONE = 1_000_000  # a corrupt file must not make a table of 2^31 phones


@dataclass(frozen=True)
class HmmState:
    """A state of a topology: its pdf classes (-1: not emitting) and (destination, probability) pairs."""

    pdf_class: int
    self_loop_pdf_class: int
    transitions: tuple[tuple[int, float], ...]


@dataclass
class TransitionModel:
    """Kaldi's TransitionModel.

    Attributes:
        phones: sorted.
        phone_to_entry: index of a phone's topology in `entries`, by phone; -1 where there is none.
        entries: topologies, lists of states.
        tuples: (phone, hmm state, forward pdf, self-loop pdf), sorted, one for each transition-state.
        log_probs: by transition-id; element 0 is unused.
        num_pdfs, num_transition_ids: derived.
        tid_to_pdf, tid_to_phone: int32 by transition-id; element 0 is -1.
    """

    phones: list[int]
    phone_to_entry: list[int]
    entries: list[list[HmmState]]
    tuples: list[tuple[int, int, int, int]]
    log_probs: FloatArray
    num_pdfs: int = field(init=False, default=0)
    num_transition_ids: int = field(init=False, default=0)
    tid_to_pdf: NDArray[np.int32] = field(init=False, repr=False)
    tid_to_phone: NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pdfs, phones = [-1], [-1]
        for phone, number, forward, loop in self.tuples:
            if not 0 <= phone < len(self.phone_to_entry) or self.phone_to_entry[phone] < 0:
                raise ValueError(f"phone {phone} has no topology")
            states = self.entries[self.phone_to_entry[phone]]
            if not 0 <= number < len(states) or min(forward, loop) < 0:
                raise ValueError(f"phone {phone} has no state {number} with pdfs {forward}, {loop}")
            for destination, _ in states[number].transitions:
                pdfs.append(loop if destination == number else forward)
                phones.append(phone)
        self.tid_to_pdf = np.array(pdfs, dtype=np.int32)
        self.tid_to_phone = np.array(phones, dtype=np.int32)
        self.num_transition_ids = len(pdfs) - 1
        self.num_pdfs = 1 + max((max(entry[2:]) for entry in self.tuples), default=-1)
        if len(self.log_probs) != self.num_transition_ids + 1:
            raise ValueError(f"{len(self.log_probs)} log probabilities for {self.num_transition_ids} transition-ids")

    @property
    def is_hmm(self) -> bool:
        """Whether each state has one pdf, for its self-loop too."""
        return all(state.pdf_class == state.self_loop_pdf_class for entry in self.entries for state in entry)


def read_transition_model(path: str | os.PathLike[str]) -> TransitionModel:
    """The transition model of any .mdl file: it comes first, before a GMM or a network. Binary or text.

    Raises:
        DataError: names the file and the byte offset.
    """
    return read_transitions(Reader(path))


def parse_transition_model(text: str, source: str = "transition model") -> TransitionModel:
    """The same from Kaldi's text form; `source` is named in messages."""
    return read_transitions(Reader(source, text.encode("utf-8")))


def read_transitions(reader: Reader) -> TransitionModel:
    """Read from where `reader` stands."""
    begin = reader.position
    reader.expect("<TransitionModel>")
    reader.expect("<Topology>")
    phones, phone_to_entry, entries = _binary_topology(reader) if reader.binary else _text_topology(reader)
    before = reader.position
    extended = reader.expect("<Triples>", "<Tuples>") == "<Tuples>"
    tuples: list[tuple[int, int, int, int]] = []
    for _ in range(_count(reader, reader.integer(), before)):
        phone, state, pdf = reader.integer(), reader.integer(), reader.integer()
        tuples.append((phone, state, pdf, reader.integer() if extended else pdf))
    reader.expect("</Tuples>" if extended else "</Triples>")
    reader.expect("<LogProbs>")
    log_probs = reader.vector()
    reader.expect("</LogProbs>")
    reader.expect("</TransitionModel>")
    try:
        return TransitionModel(phones, phone_to_entry, entries, tuples, log_probs)
    except ValueError as error:
        raise reader.error(f"inconsistent transition model: {error}", begin) from error


def _count(reader: Reader, count: int, before: int) -> int:
    """A count that the rest of the file has room for (each item takes two bytes or more)."""
    if not 0 <= count <= (len(reader.data) - reader.position) // 2:
        raise reader.error(f"impossible count {count}", before)
    return count


_Topology = tuple[list[int], list[int], list[list[HmmState]]]


def _binary_topology(reader: Reader) -> _Topology:
    begin = reader.position
    phones, phone_to_entry = reader.integers(), reader.integers()
    before = reader.position
    count = reader.integer()
    extended = count == -1
    if extended:
        count = reader.integer()
    entries: list[list[HmmState]] = []
    for _ in range(_count(reader, count, before)):
        states: list[HmmState] = []
        for _ in range(_count(reader, reader.integer(), reader.position)):
            pdf = reader.integer()
            loop = reader.integer() if extended else pdf
            number = _count(reader, reader.integer(), reader.position)
            states.append(HmmState(pdf, loop, tuple((reader.integer(), reader.number()) for _ in range(number))))
        entries.append(states)
    if any(not -1 <= entry < count for entry in phone_to_entry):
        raise reader.error("a phone's topology does not exist", begin)
    reader.expect("</Topology>")
    return phones, phone_to_entry, entries


def _text_topology(reader: Reader) -> _Topology:
    entry_of: dict[int, int] = {}
    entries: list[list[HmmState]] = []
    while reader.expect("<TopologyEntry>", "</Topology>") == "<TopologyEntry>":
        reader.expect("<ForPhones>")
        while not reader.accept("</ForPhones>"):
            before, phone = reader.position, reader.integer()
            if not 0 < phone <= _LARGEST_PHONE or phone in entry_of:
                raise reader.error(f"phone {phone} is impossible or given twice", before)
            entry_of[phone] = len(entries)
        states: list[HmmState] = []
        while reader.expect("<State>", "</TopologyEntry>") == "<State>":
            before = reader.position
            if reader.integer() != len(states):
                raise reader.error(f"state {len(states)} expected", before)
            pdf = loop = _NO_PDF
            if reader.accept("<PdfClass>"):
                pdf = loop = reader.integer()
            elif reader.accept("<ForwardPdfClass>"):
                pdf = reader.integer()
                reader.expect("<SelfLoopPdfClass>")
                loop = reader.integer()
            transitions: list[tuple[int, float]] = []
            while reader.expect("<Transition>", "</State>") == "<Transition>":
                transitions.append((reader.integer(), reader.number()))
            states.append(HmmState(pdf, loop, tuple(transitions)))
        entries.append(states)
    phones = sorted(entry_of)
    return phones, [entry_of.get(phone, -1) for phone in range(max(phones, default=-1) + 1)], entries


def write_transitions(model: TransitionModel, writer: Writer) -> None:
    """Write where `writer` stands, as Kaldi does."""
    writer.token("<TransitionModel>")
    writer.newline()
    writer.token("<Topology>")
    (_write_binary_topology if writer.binary else _write_text_topology)(model, writer)
    writer.token("</Topology>")
    writer.newline()
    name = "Triples" if model.is_hmm else "Tuples"
    writer.token(f"<{name}>")
    writer.integer(len(model.tuples))
    writer.newline()
    for entry in model.tuples:
        for value in entry[: 3 if model.is_hmm else 4]:
            writer.integer(value)
        writer.newline()
    writer.token(f"</{name}>")
    writer.newline()
    writer.token("<LogProbs>")
    writer.newline()
    writer.vector(model.log_probs)
    writer.token("</LogProbs>")
    writer.newline()
    writer.token("</TransitionModel>")
    writer.newline()


def _write_binary_topology(model: TransitionModel, writer: Writer) -> None:
    writer.integers(model.phones)
    writer.integers(model.phone_to_entry)
    if not model.is_hmm:
        writer.integer(-1)
    writer.integer(len(model.entries))
    for states in model.entries:
        writer.integer(len(states))
        for state in states:
            writer.integer(state.pdf_class)
            if not model.is_hmm:
                writer.integer(state.self_loop_pdf_class)
            writer.integer(len(state.transitions))
            for destination, probability in state.transitions:
                writer.integer(destination)
                writer.number(probability)


def _write_text_topology(model: TransitionModel, writer: Writer) -> None:
    writer.newline()
    for number, states in enumerate(model.entries):
        for token in ("<TopologyEntry>", "<ForPhones>"):
            writer.token(token)
            writer.newline()
        for phone, entry in enumerate(model.phone_to_entry):
            if entry == number:
                writer.integer(phone)
        writer.newline()
        writer.token("</ForPhones>")
        writer.newline()
        for index, state in enumerate(states):
            writer.token("<State>")
            writer.integer(index)
            if state.pdf_class != _NO_PDF:
                writer.token("<PdfClass>" if model.is_hmm else "<ForwardPdfClass>")
                writer.integer(state.pdf_class)
                if not model.is_hmm:
                    writer.token("<SelfLoopPdfClass>")
                    writer.integer(state.self_loop_pdf_class)
            for destination, probability in state.transitions:
                writer.token("<Transition>")
                writer.integer(destination)
                writer.number(probability)
            writer.token("</State>")
            writer.newline()
        writer.token("</TopologyEntry>")
        writer.newline()
