"""The recipe's shell scripts around GMM and decoding: what they write, and what they say of bad input."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.recipe import copy_recipe, recipe_environment
from tests.toy_hmm import toy_system


def run(s5: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f". ./path.sh && {command}"],
        cwd=s5, env=recipe_environment(False), capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def s5(tmp_path: Path) -> Path:
    return copy_recipe(tmp_path)


def test_dictionary_of_digits(s5: Path) -> None:
    (s5 / "data" / "train").mkdir(parents=True)
    (s5 / "data" / "train" / "text").write_text("a ONE NINE ZERO\nb OH UM\n")
    done = run(s5, "local/prepare_dict.sh")
    assert done.returncode == 0
    assert "1 of 5 words in data/train/text are not in the dictionary: UM" in done.stderr
    dictionary = s5 / "data" / "local" / "dict"
    phones = (dictionary / "nonsilence_phones.txt").read_text().split()
    assert len(phones) == 19 and phones == sorted(phones)
    lexicon = [line.split() for line in (dictionary / "lexicon.txt").read_text().splitlines()]
    assert {phone for _, *pron in lexicon for phone in pron} == {*phones, "SIL", "SPN"}
    arpa = (s5 / "data" / "local" / "lm" / "digits.arpa").read_text()
    assert "ngram 1=13\n" in arpa  # eleven words, <s> and </s>
    assert "-1.0791812 OH\n" in arpa and "-1.0791812 </s>\n" in arpa
    (s5 / "data" / "train" / "text").write_text("a ONE NINE ZERO\n")
    assert run(s5, "local/prepare_dict.sh").returncode == 0
    arpa = (s5 / "data" / "local" / "lm" / "digits.arpa").read_text()
    assert "ngram 1=12\n" in arpa and " OH\n" not in arpa and " TWO\n" in arpa


def test_transcripts_of_other_words_end_the_recipe(s5: Path) -> None:
    (s5 / "data" / "train").mkdir(parents=True)
    (s5 / "data" / "train" / "text").write_text("a one two\nb ONE\n")
    done = run(s5, "local/prepare_dict.sh")
    assert done.returncode == 1
    assert "2 of 3 words in data/train/text are not in the dictionary:" in done.stderr
    assert "this recipe is for the words ZERO, OH, ONE ... NINE in capitals" in done.stderr


def test_decode_and_score(s5: Path) -> None:
    system = toy_system()
    (s5 / "exp").mkdir()
    (s5 / "exp" / "mono").symlink_to(system / "mono")
    done = run(s5, f"decode.sh --nj 2 exp/mono/graph {system}/test exp/mono/decode_sh")
    assert done.returncode == 0, done.stderr
    decode = system / "mono" / "decode_sh"
    assert {path.name for path in decode.glob("lat.*")} == {"lat.1.gz", "lat.2.gz"}
    assert "Done " in (decode / "log" / "decode.2.log").read_text()
    assert (decode / "scoring_kaldi" / "best_wer").read_text().startswith("%WER ")
    # Fewer jobs than before leave no lattices of the old ones.
    done = run(s5, f"decode.sh --nj 1 --skip-scoring true exp/mono/graph {system}/test exp/mono/decode_sh")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in decode.glob("lat.*")} == {"lat.1.gz"}


def test_decoding_what_is_not_there(s5: Path) -> None:
    done = run(s5, "decode.sh exp/mono/graph data/test exp/mono/decode_test")
    assert done.returncode == 1
    assert done.stderr.endswith("decode.sh: no such file exp/mono/graph/HCLG.fst\n")
    done = run(s5, "decode.sh exp/mono/graph data/test")
    assert done.returncode == 1
    assert done.stderr.startswith("Usage: ")
    (s5 / "empty").mkdir()
    done = run(s5, "local/score.sh --cmd run.py empty empty empty")
    assert done.returncode == 1
    assert "ERROR (kaldi-mpi-score" in done.stderr and "not a Kaldi data directory" in done.stderr


def test_failing_jobs_show_their_error(s5: Path) -> None:
    system = toy_system()
    (s5 / "exp" / "gmm").mkdir(parents=True)
    (s5 / "exp" / "gmm" / "final.mdl").write_bytes((system / "mono" / "final.mdl").read_bytes()[:2000])
    done = run(s5, f"decode.sh --nj 2 {system}/mono/graph {system}/test exp/gmm/decode_test")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1
    assert "exp/gmm/final.mdl, byte offset" in errors[0]
