"""Phones and durations of alignments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.embedded.phone_times import PhoneTimes
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.transition import TransitionModel, read_transition_model
from tests.chain.graph_data import alignments
from tests.embedded.chain_egs_data import UTTERANCES, alignment_of, gmm
from tests.paths import golden, kaldi_root


def chain() -> TransitionModel:
    """Phones of one state, in which a phone may follow itself without a change of state."""
    return read_transition_model(golden("chain/model/0.trans_mdl"))


@pytest.mark.parametrize("loops_last", [True, False])
@pytest.mark.parametrize("model", [gmm, chain])
def test_phones_of_alignments(model: object, loops_last: bool) -> None:
    """What an alignment was made from, of both orders of self-loops and topologies of one, three and five states."""
    transitions, rng = (gmm if model is gmm else chain)(), np.random.default_rng(1)
    times = PhoneTimes(transitions, "ali.1.gz")
    for segments in alignments().values():
        twice = [segment for segment in segments for _ in range(2)]  # a phone after itself
        for wanted in (segments, twice):
            tids = alignment_of(wanted, transitions, rng, loops_last=loops_last)
            assert times.of("utt", tids) == wanted


def test_phones_of_shortest_length() -> None:
    """Nothing tells where self-loops come: both orders are the same."""
    wanted = [(47, 3), (47, 3), (21, 3)]
    assert PhoneTimes(gmm(), "").of("utt", alignment_of(wanted, gmm(), np.random.default_rng(0))) == wanted


def test_alignments_of_no_use() -> None:
    model, rng = gmm(), np.random.default_rng(1)
    times = PhoneTimes(model, "ali.1.gz")
    whole = {last: alignment_of([(1, 9), (47, 9), (21, 9)], model, rng, loops_last=last) for last in (True, False)}
    for tids in whole.values():
        for broken in (tids[4:], tids[:-7], np.concatenate([tids[:9], tids[15:]]), tids[::-1]):
            with pytest.raises(DataError, match=r"ali\.1\.gz, key utt: .*no sequence of whole phones"):
                times.of("utt", broken)
    for tids in (np.zeros(0, np.int32), np.array([0], np.int32), np.array([model.num_transition_ids + 1], np.int32)):
        with pytest.raises(DataError, match=r"ali\.1\.gz, key utt: .*is it of this model\?"):
            times.of("utt", tids)


@pytest.mark.kaldi
def test_ali_to_phones_says_the_same(tmp_path: Path) -> None:
    """Of the alignments that the tests of examples are made from."""
    program = kaldi_root() / "src" / "bin" / "ali-to-phones"
    model, rng = gmm(), np.random.default_rng(2)
    tids = {key: alignment_of(alignments()[key], model, rng) for key in UTTERANCES}
    (tmp_path / "ali").write_text("".join(f"{key} {' '.join(map(str, ids))}\n" for key, ids in tids.items()))
    done = subprocess.run(
        [program, "--write-lengths=true", golden("chain/sup/gmm.trans_mdl"), "ark:ali", "ark,t:phones"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    times = PhoneTimes(model, "ali")
    for line in (tmp_path / "phones").read_text().splitlines():
        key, pairs = line.split(maxsplit=1)
        assert times.of(key, tids[key]) == [tuple(map(int, pair.split())) for pair in pairs.split(";")]
