"""Phones and their durations in an alignment of transition-ids, of any topology: what ali-to-phones tells."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.transition import TransitionModel


class PhoneTimes:
    """Cuts alignments at the ends of phones.

    In Kaldi's graphs a state's self-loops come after the transition that leaves it (``--reorder=true``), in others
    before it: which of the two an alignment has, is seen where its states change. Where nothing tells, it is the
    first.

    Args:
        transitions: the model that the alignments are of.
        file: where the alignments come from, for messages.
    """

    def __init__(self, transitions: TransitionModel, file: str) -> None:
        self._file, self._phones = file, transitions.tid_to_phone
        rows = [(-1, -1, -1, False)]
        for number, (phone, state, _, _) in enumerate(transitions.tuples):
            entry = transitions.entries[transitions.phone_to_entry[phone]]
            rows += [(number, state, to, not entry[to].transitions) for to, _ in entry[state].transitions]
        # By transition-id: the state with its pdfs, its number in the topology and the next one's, a phone's end.
        self._states, self._numbers, self._nexts, lasts = np.array(rows).T
        self._loops, self._lasts = self._numbers == self._nexts, lasts.astype(bool)
        self._loops[0] = False

    def of(self, key: str, tids: NDArray[np.int32]) -> list[tuple[int, int]]:
        """The (phone, frames) pairs of an alignment.

        Raises:
            DataError: it is empty, of another model, or does not begin and end with a phone's.
        """
        if not len(tids) or not 1 <= tids.min() <= tids.max() < len(self._states):
            raise DataError(
                f"an alignment of transition-ids from 1 to {len(self._states) - 1} is expected: is it of this model?",
                file=self._file,
                key=key,
            )
        loops, states, lasts = self._loops[tids], self._states[tids], self._lasts[tids]
        if _loops_first(loops, states):
            # From behind the self-loops come last, and a phone begins with the transition that leaves it.
            moves = self._moves(key, loops[::-1], states[::-1])
            leaves = lasts[::-1][moves]
            whole, starts = leaves[0], np.append(0, len(tids) - moves[leaves][:0:-1])
        else:
            moves = self._moves(key, loops, states)
            leaves = lasts[moves]
            whole, starts = leaves[-1], moves[np.append(True, leaves[:-1])]
        durations = np.diff(np.append(starts, len(tids)))
        phones = self._phones[tids[starts]]
        ways = tids[~loops]
        after = np.where(self._lasts[ways], 0, self._nexts[ways])
        whole &= self._numbers[ways[0]] == 0 and np.array_equal(after[:-1], self._numbers[ways[1:]])
        if not whole or not np.array_equal(np.repeat(phones, durations), self._phones[tids]):
            raise self._broken(key)
        return list(zip(phones.tolist(), durations.tolist(), strict=True))

    def _moves(self, key: str, loops: NDArray[np.bool_], states: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where there is no self-loop, in an alignment whose self-loops follow their state's other transition."""
        stays = np.flatnonzero(loops)
        if loops[0] or (states[stays] != states[stays - 1]).any():
            raise self._broken(key)
        return np.flatnonzero(~loops)

    def _broken(self, key: str) -> DataError:
        return DataError("the alignment is no sequence of whole phones of this model", file=self._file, key=key)


def _loops_first(loops: NDArray[np.bool_], states: NDArray[np.int64]) -> bool:
    if loops[0] or loops[-1]:
        return bool(loops[0])
    changes = np.flatnonzero(np.diff(states))
    return bool(loops[changes + 1].any())
