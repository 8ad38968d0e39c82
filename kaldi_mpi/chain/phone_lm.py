"""The phone language model of chain training, as Kaldi's chain-est-phone-lm estimates it.

An n-gram model without smoothing (Povey et al. 2016, section 2.2): what was not seen costs infinitely much, so
that the denominator graph stays small. A state is a history of at most ngram_order - 1 phones; states that are
longer than no_prune_ngram_order - 1 may be merged into their back-off states, the cheapest in likelihood first,
until num_extra_lm_states are left beyond those that are never pruned.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.fst import Fst, build_fst

_BOUNDARY = 0  # begins the first history, and is counted at the end of a sentence
_STAGES = 4  # pruning starts again with exact changes so many times
_SAME = 0.001  # a change that differs relatively by more than this when it is taken again waits for its turn
_EMPTY_BACKOFF_CHANGE = -1e-15  # per count: moving counts to an empty state changes nothing; fewer counts first


@dataclass(frozen=True)
class PhoneLmOptions:
    """Options of chain-est-phone-lm, with its defaults.

    Raises:
        ConfigError: an order below 2, or no order that is not pruned.
    """

    ngram_order: int = 4
    no_prune_ngram_order: int = 3
    num_extra_lm_states: int = 1000

    def __post_init__(self) -> None:
        if self.ngram_order < 2 or self.no_prune_ngram_order < 1 or self.num_extra_lm_states < 0:
            raise ConfigError(
                f"--ngram-order={self.ngram_order} must be at least 2, --no-prune-ngram-order="
                f"{self.no_prune_ngram_order} at least 1, --num-extra-lm-states={self.num_extra_lm_states} at least 0"
            )


@dataclass
class _State:
    """A history and what came after it.

    Attributes:
        history: phones, the last one last.
        backoff: number of the state without the leftmost phone; -1 if this one is never pruned.
        counts: by phone, 0 for the end of a sentence.
        total: of the counts.
        with_parents: total, and those of all states that back off to this one, directly or not.
        log_likelihood: of the counts.
    """

    history: tuple[int, ...]
    backoff: int = -1
    counts: dict[int, int] = field(default_factory=dict)
    total: int = 0
    with_parents: int = 0
    log_likelihood: np.float32 = field(default_factory=lambda: np.float32(0.0))


def estimate_phone_lm(sequences: Iterable[tuple[str, Sequence[int]]], options: PhoneLmOptions | None = None) -> Fst:
    """Estimate a model from the phones of utterances.

    Args:
        sequences: (key, phones) of each utterance; phones are > 0.
        options: Kaldi's defaults if None.

    Returns:
        An acceptor of phones without epsilons, its arcs sorted by label, equal to Kaldi's to the last bit. The
        probabilities of a state's arcs and end sum to 1.

    Raises:
        DataError: a phone is not above 0 (names the key), or there is no utterance at all.
    """
    model = _Model(options or PhoneLmOptions())
    for key, phones in sequences:
        if min(phones, default=1) <= _BOUNDARY:
            raise DataError(f"phone {min(phones)} cannot be in a phone sequence", key=key)
        model.add(phones)
    if not model.states:
        raise DataError("there are no phone sequences to estimate a phone language model from")
    model.prune()
    return model.to_fst()


class _Model:
    def __init__(self, options: PhoneLmOptions) -> None:
        self.options = options
        self.states: list[_State] = []
        self.number_of: dict[tuple[int, ...], int] = {}
        self._next: list[dict[int, int]] = []  # by state: the state after a phone, where it was seen

    def add(self, phones: Sequence[int]) -> None:
        """Count one sentence."""
        state = self._find((_BOUNDARY,))
        for phone in phones:
            counts = self.states[state].counts
            counts[phone] = counts.get(phone, 0) + 1
            following = self._next[state].get(phone)
            if following is None:
                following = self._find(self._extended(self.states[state].history, phone))
                self._next[state][phone] = following
            state = following
        counts = self.states[state].counts
        counts[_BOUNDARY] = counts.get(_BOUNDARY, 0) + 1

    def _extended(self, history: tuple[int, ...], phone: int) -> tuple[int, ...]:
        return (*history, phone)[-(self.options.ngram_order - 1) :]

    def _find(self, history: tuple[int, ...]) -> int:
        """The number of a history, which it gets, with those that it backs off to, when it is first met."""
        number = self.number_of.get(history)
        if number is None:
            number = len(self.states)
            self.number_of[history] = number
            self.states.append(_State(history))
            self._next.append({})
            if len(history) >= self.options.no_prune_ngram_order:
                self.states[number].backoff = self._find(history[1:])
        return number

    def prune(self) -> None:
        """Merge states into those that they back off to."""
        for state in self.states:
            state.total = sum(state.counts.values())
            state.log_likelihood = _log_likelihood(state.counts, state.total)
        for state in self.states:
            state.with_parents += state.total
            backoff = state.backoff
            while backoff >= 0:
                self.states[backoff].with_parents += state.total
                backoff = self.states[backoff].backoff
        active = first = sum(state.total > 0 for state in self.states)
        basic = sum(len(state.history) == self.options.no_prune_ngram_order - 1 for state in self.states)
        target = basic + self.options.num_extra_lm_states
        if target >= first:
            return
        for stage in range(1, _STAGES + 1):
            active = self._prune_to(first - (first - target) * stage // _STAGES, active)

    def _prune_to(self, goal: int, active: int) -> int:
        queue = [(-self._change(number), -number) for number in range(len(self.states)) if self._may_back_off(number)]
        heapq.heapify(queue)
        while active > goal and queue:
            negated, negated_number = heapq.heappop(queue)
            number, old = -negated_number, -negated
            new = self._change(number)
            if abs(old - new) > _SAME * (abs(old) + abs(new)):
                heapq.heappush(queue, (-new, negated_number))
                continue
            state = self.states[number]
            could_back_off = self._may_back_off(state.backoff)
            active -= self._merge(state)
            if not could_back_off and self._may_back_off(state.backoff):
                heapq.heappush(queue, (-self._change(state.backoff), -state.backoff))
        return active

    def _merge(self, state: _State) -> int:
        """Move a state's counts to the one that it backs off to; by how much the number of states falls."""
        backoff = self.states[state.backoff]
        fewer = int(backoff.total > 0)  # else the other one becomes a state in its place
        for phone, count in state.counts.items():
            backoff.counts[phone] = backoff.counts.get(phone, 0) + count
        backoff.total += state.total
        backoff.log_likelihood = _log_likelihood(backoff.counts, backoff.total)
        state.counts, state.total, state.with_parents = {}, 0, 0
        return fewer

    def _change(self, number: int) -> float:
        """What backing off changes in the log likelihood of the data, at most 0."""
        state = self.states[number]
        backoff = self.states[state.backoff]
        if not backoff.total:
            return float(np.float32(_EMPTY_BACKOFF_CHANGE * state.total))
        counts = dict(backoff.counts)
        for phone, count in state.counts.items():
            counts[phone] = counts.get(phone, 0) + count
        merged = _log_likelihood(counts, state.total + backoff.total)
        return min(0.0, float(merged - state.log_likelihood - backoff.log_likelihood))

    def _may_back_off(self, number: int) -> bool:
        """Whether nothing backs off to this state, or leads on from it to a longer history, any more."""
        state = self.states[number]
        if state.backoff < 0 or state.total != state.with_parents or not state.total:
            return False
        if len(state.history) == self.options.ngram_order - 1:
            return True
        longer = (self.number_of.get((*state.history, phone)) for phone in state.counts if phone != _BOUNDARY)
        return all(following is None or not self.states[following].with_parents for following in longer)

    def to_fst(self) -> Fst:
        """The states that have counts, in their order."""
        kept = [state for state in self.states if state.total]
        number_of = {state.history: number for number, state in enumerate(kept)}
        arcs: list[tuple[int, int, int, float, int]] = []
        finals: dict[int, float] = {}
        for number, state in enumerate(kept):
            for phone, count in sorted(state.counts.items()):
                cost = -math.log(count / state.total)
                if phone == _BOUNDARY:
                    finals[number] = cost
                    continue
                history = self._extended(state.history, phone)
                while history not in number_of:
                    history = history[1:]
                arcs.append((number, phone, phone, cost, number_of[history]))
        # A sentence begins where the first history went, if that was pruned.
        start: tuple[int, ...] = (_BOUNDARY,)
        return build_fst(number_of[start] if start in number_of else number_of[()], len(kept), arcs, finals)


def _log_likelihood(counts: dict[int, int], total: int) -> np.float32:
    return np.float32(math.fsum(count * math.log(count / total) for count in counts.values()))
