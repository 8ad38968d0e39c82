"""Chunks of an utterance's supervision, multiplied with normalization.fst, as nnet3-chain-get-egs makes them.

Constrained: each pdf keeps to the time that the supervision gives it, and the numerator is the best path of a string.
Unconstrained: within the chunk only the order of phones counts (Hadian et al. 2018), and so do all paths.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.chain.acceptor import (
    EPSILON,
    Acceptor,
    LabelIndex,
    compose,
    connect,
    determinise,
    minimise,
    remove_epsilons,
)
from kaldi_mpi.chain.phone_hmm import PhoneHmm, PhoneHmms
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.fst import Fst
from kaldi_mpi.formats.supervision import Supervision


class ChunkCutter:
    """Cuts chunks out of the supervision of an utterance.

    Args:
        supervision: of `make_supervision`, or read from an archive of chain-get-supervision.
        file, key: for messages.

    Raises:
        DataError: it is of several sequences or end to end, or a state can be reached after different numbers of
            frames.
    """

    def __init__(self, supervision: Supervision, *, file: str | None = None, key: str | None = None) -> None:
        if supervision.num_sequences != 1 or supervision.end2end:
            raise DataError("only the supervision of one utterance can be cut into chunks", file=file, key=key)
        self._supervision = supervision
        self._acceptor = connect(Acceptor.from_fst(supervision.fsts[0]))
        self._times = [0] * self._acceptor.num_states
        self._states_at: list[list[int]] = [[] for _ in range(supervision.frames_per_sequence + 1)]
        known = {0}
        for state, arcs in enumerate(self._acceptor.arcs):  # in the order of a breadth-first search
            time = self._times[state]
            if time > supervision.frames_per_sequence or (
                self._acceptor.finals[state] != math.inf and time != supervision.frames_per_sequence
            ):
                raise DataError("the supervision has a path of another length", file=file, key=key)
            self._states_at[time].append(state)
            for label, _, to in arcs:
                if label == EPSILON or (self._times[to] != time + 1 and to in known):
                    raise DataError("the supervision has states without a time of their own", file=file, key=key)
                known.add(to)
                self._times[to] = time + 1

    def cut(self, first: int, frames: int) -> Supervision:
        """The chunk of the output frames first .. first + frames - 1, not normalised.

        Returns:
            What the utterance may have there; it may begin and end in the middle of a phone. Costs outside do not
            count.

        Raises:
            ValueError: the utterance has no such frames.
        """
        total = self._supervision.frames_per_sequence
        if frames < 1 or not 0 <= first <= total - frames:
            raise ValueError(f"frames {first} .. {first + frames - 1} of {total}")
        end = first + frames
        begins = self._states_at[first]
        states = [state for time in range(first, end + 1) for state in self._states_at[time]]
        shift = 1 if len(begins) > 1 else 0
        number = {state: place + shift for place, state in enumerate(states)}
        chunk = Acceptor()
        if shift:
            chunk.add_state()
            chunk.arcs[0] = [(EPSILON, 0.0, number[state]) for state in begins]
        for state in states:
            is_end = self._times[state] == end
            final = self._acceptor.finals[state] if end == total else 0.0
            place = chunk.add_state(final if is_end else math.inf)
            if not is_end:
                chunk.arcs[place] = [(label, cost, number[to]) for label, cost, to in self._acceptor.arcs[state]]
        return replace(self._supervision, frames_per_sequence=frames, fsts=(remove_epsilons(chunk).to_fst(),))


class Normaliser:
    """Multiplies chunks with normalization.fst.

    Args:
        normalization_fst: of `make_normalization_fst`, or read from normalization.fst.
        scale: of its costs (--normalization-fst-scale).
    """

    def __init__(self, normalization_fst: Fst, scale: float = 1.0) -> None:
        with np.errstate(invalid="ignore"):  # inf * 0
            finals = np.where(normalization_fst.finals == np.inf, np.inf, normalization_fst.finals * scale)
        scaled = replace(normalization_fst, costs=normalization_fst.costs * np.float32(scale), finals=finals)
        self._index = LabelIndex(Acceptor.from_fst(scaled))

    def constrained(self, chunk: Supervision) -> Supervision | None:
        """A chunk whose strings cost what their best path in normalization.fst does.

        Args:
            chunk: of `ChunkCutter.cut`, labels pdf-id + 1.

        Returns:
            One deterministic FST, states in the order of time; None if normalization.fst has no string of the chunk,
            so that it cannot be trained on.
        """
        strings = minimise(determinise(Acceptor.from_fst(chunk.fsts[0])))
        product = minimise(determinise(compose(strings, self._index)))
        if not product.num_states:
            return None
        return replace(chunk, fsts=(product.to_fst(),))

    def unconstrained(
        self, chunk: Supervision, hmms: PhoneHmms, rng: np.random.Generator | None = None
    ) -> Supervision | None:
        """A chunk in which phones keep their order, not their times.

        Args:
            chunk: of `ChunkCutter.cut`, labels transition-ids.
            hmms: those that it was made with.
            rng: draws the path of `alignment_pdfs`; None: there are none.

        Returns:
            One cyclic FST of all paths, end2end; None as in `constrained`.

        Raises:
            DataError: the labels are no transition-ids, or another model's.
        """
        hmm_of = hmms.by_id()
        timed = Acceptor.from_fst(chunk.fsts[0])
        if chunk.label_dim != hmms.num_transition_ids or not hmm_of.keys() >= {*chunk.fsts[0].ilabels.tolist()}:
            raise DataError("the supervision's labels are not the transition-ids of this model")
        strings = minimise(determinise(_with_loops(_phones_in_order(timed, hmm_of), hmm_of)))
        product = compose(strings, self._index)
        if not product.num_states or not _has_length(product, chunk.frames_per_sequence):
            return None
        pdfs = None if rng is None else _path_pdfs(timed, hmm_of, rng)
        return replace(chunk, label_dim=hmms.num_pdfs, end2end=True, fsts=(product.to_fst(),), alignment_pdfs=pdfs)


def _phones_in_order(timed: Acceptor, hmm_of: dict[int, PhoneHmm]) -> Acceptor:
    """Without self-loops, but for those of the first frame: they are what is left of a phone that began earlier."""
    without = Acceptor(
        [
            [
                (label if not state or label == hmm_of[label].forward_id else EPSILON, cost, to)
                for label, cost, to in out
            ]
            for state, out in enumerate(timed.arcs)
        ],
        timed.finals,
    )
    return minimise(determinise(remove_epsilons(without)))


def _with_loops(phones: Acceptor, hmm_of: dict[int, PhoneHmm]) -> Acceptor:
    """Labels become pdfs + 1, and after each of them its phone may go on."""
    result = Acceptor()
    number_of: dict[tuple[int, PhoneHmm | None], int] = {}
    left: list[tuple[int, PhoneHmm | None]] = []

    def number(state: int, hmm: PhoneHmm | None) -> int:
        found = number_of.setdefault((state, hmm), len(left))
        if found == len(left):
            left.append((state, hmm))
            result.add_state(phones.finals[state])
        return found

    if phones.num_states:
        number(0, None)
    for current, (state, hmm) in enumerate(left):
        if hmm is not None:
            result.arcs[current].append((hmm.loop_pdf + 1, 0.0, current))
        for label, cost, to in phones.arcs[state]:
            following = hmm_of[label]
            result.arcs[current].append((_pdf(following, label) + 1, cost, number(to, following)))
    return result


def _pdf(hmm: PhoneHmm, transition_id: int) -> int:
    return hmm.forward_pdf if transition_id == hmm.forward_id else hmm.loop_pdf


def _has_length(acceptor: Acceptor, frames: int) -> bool:
    """Whether there is a path of so many arcs."""
    states = {0}
    for _ in range(frames):
        states = {to for state in states for _, _, to in acceptor.arcs[state]}
    return any(acceptor.finals[state] != math.inf for state in states)


def _path_pdfs(timed: Acceptor, hmm_of: dict[int, PhoneHmm], rng: np.random.Generator) -> NDArray[np.int32]:
    """The pdf-ids of a random path, from which statistics for LDA are taken."""
    pdfs, state = [], 0
    while timed.arcs[state]:
        label, _, state = timed.arcs[state][int(rng.integers(len(timed.arcs[state])))]
        pdfs.append(_pdf(hmm_of[label], label))
    return np.array(pdfs, np.int32)
