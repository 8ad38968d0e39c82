"""The phone language model against Kaldi's, and against counts."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from kaldi_mpi.chain.phone_lm import PhoneLmOptions, estimate_phone_lm
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.fst import Fst, read_fst
from tests.paths import golden


def sequences() -> list[tuple[str, list[int]]]:
    lines = golden("chain/lm/phone_seqs.txt").read_text().splitlines()
    return [(line.split()[0], [int(phone) for phone in line.split()[1:]]) for line in lines]


@pytest.mark.parametrize(
    "name", ["lm.2.1.5", "lm.3.2.30", "lm.4.3.0", "lm.4.3.20", "lm.4.3.50", "lm.4.3.2000", "lm.5.3.100"]
)
def test_equals_kaldis(name: str) -> None:
    """States, arcs, order and weights, to the last bit."""
    theirs = read_fst(golden(f"chain/lm/{name}.fst"))
    ours = estimate_phone_lm(sequences(), PhoneLmOptions(*map(int, name.split(".")[1:])))
    assert ours.start == theirs.start
    for field in ("finals", "first_arc", "ilabels", "olabels", "costs", "nexts"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)


def log_prob(fst: Fst, phones: list[int]) -> float:
    state, total = fst.start, 0.0
    for phone in phones:
        (arc,) = (a for a in range(*fst.first_arc[state : state + 2]) if fst.ilabels[a] == phone)
        total -= float(fst.costs[arc])
        state = int(fst.nexts[arc])
    return total - float(fst.finals[state])


def test_without_pruning_it_is_relative_frequencies() -> None:
    """Trigrams of random sentences, by counting."""
    rng = np.random.default_rng(7)
    data = [(f"u{n}", rng.integers(1, 4, size=int(rng.integers(0, 9))).tolist()) for n in range(60)]
    model = estimate_phone_lm(data, PhoneLmOptions(3, 3, 0))
    grams: Counter[tuple[int, ...]] = Counter()
    for _, phones in data:
        padded = [0, *phones, 0]
        for end in range(1, len(padded)):
            history = tuple(padded[max(0, end - 2) : end])
            grams[history] += 1
            gram = (*history, -1, padded[end])
            grams[gram] += 1
    for _, phones in data:
        padded = [0, *phones, 0]
        expected = 0.0
        for end in range(1, len(padded)):
            history = tuple(padded[max(0, end - 2) : end])
            gram = (*history, -1, padded[end])
            expected += math.log(grams[gram] / grams[history])
        assert log_prob(model, phones) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [(2, 1, 0), (2, 1, 3), (3, 1, 2), (5, 2, 4), (6, 3, 1)])
def test_any_pruning_leaves_probabilities(options: tuple[int, int, int]) -> None:
    """Each state's sum to 1, every sentence has a path, and no more states are left than may be."""
    rng = np.random.default_rng(11)
    data = [(f"u{n}", rng.integers(1, 5, size=int(rng.integers(1, 9))).tolist()) for n in range(80)]
    model = estimate_phone_lm(data, PhoneLmOptions(*options))
    sums = np.bincount(model.sources(), np.exp(-model.costs), model.num_states) + np.exp(-model.finals)
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)
    assert all(math.isfinite(log_prob(model, phones)) for _, phones in data)
    unpruned = estimate_phone_lm(data, PhoneLmOptions(options[0], options[0], 0))
    assert model.num_states < unpruned.num_states


def test_what_is_no_phone_sequence() -> None:
    with pytest.raises(DataError, match=r"key b: phone 0 cannot be in a phone sequence"):
        estimate_phone_lm([("a", [1, 2]), ("b", [1, 0, 2])])
    with pytest.raises(DataError, match="no phone sequences"):
        estimate_phone_lm([])
    with pytest.raises(ConfigError, match="--ngram-order=1 must be at least 2"):
        PhoneLmOptions(ngram_order=1)
    assert estimate_phone_lm([("empty", [])]).finals.tolist() == [0.0]
