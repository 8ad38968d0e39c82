"""Vosk, which holds Kaldi's own nnet3 decoder, gives the words that our decoding gives, utterance by utterance."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kaldi_mpi.embedded.best_path import best_paths
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.decode import DecodeOptions, Decoder, decode_to_lattices
from kaldi_mpi.embedded.features import read_features
from kaldi_mpi.embedded.lattice import read_lattices
from kaldi_mpi.embedded.mfcc import make_mfcc
from kaldi_mpi.embedded.scorers import load_scorer
from kaldi_mpi.errors import DataError
from kaldi_mpi.formats.symbols import SymbolTable
from tests.embedded.vosk_decode import GRAPH_SCALE
from tests.embedded.vosk_dir import write_vosk_dir
from tests.paths import REPO, golden
from tests.recipe import Recipe
from tests.speech import digit_strings

CONFIG = REPO / "egs" / "digits" / "s5" / "conf" / "mfcc_hires.conf"

# Looked for, not imported: its library and the embedded back end's do not go together in one process.
needs_vosk = pytest.mark.skipif(importlib.util.find_spec("vosk") is None, reason="vosk is not installed")


def vosk_words(vosk_dir: Path, data: Path, utterances: list[str]) -> dict[str, list[str]]:
    """What Vosk recognises, in a process of its own."""
    command = [sys.executable, "-m", "tests.embedded.vosk_decode", str(vosk_dir), str(data), *utterances]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answers: dict[str, list[str]] = json.loads(done.stdout)
    return answers


def our_words(
    model: Path, graph: Path, data: Path, utterances: list[str], work: Path, acoustic_scale: float = 0.1
) -> dict[str, list[str]]:
    """Our best paths, with Vosk's scale on the graph costs."""
    scorer, tid_to_pdf = load_scorer(model, DataDir(data))
    decoder = Decoder(graph / "HCLG.fst", tid_to_pdf, DecodeOptions())
    words = SymbolTable.read(graph / "words.txt")
    scores = ((key, scorer(key, feats)) for key, feats in read_features(data / "feats.scp", utterances))
    decode_to_lattices(decoder, scores, words, work / "lat.gz")
    entries = dict(read_lattices(work / "lat.gz"))
    answers = best_paths(list(entries.values()), np.array([acoustic_scale / GRAPH_SCALE]), np.zeros(1))
    return {key: [words.symbol(word) for word in answer[0]] for key, answer in zip(entries, answers, strict=True)}


@needs_vosk
def test_kaldis_model(tmp_path: Path) -> None:
    """A weak model, whose lattices hold many near misses."""
    graph = tmp_path / "graph"
    (graph / "phones").mkdir(parents=True)
    shutil.copy(golden("HCLG.fst"), graph)
    shutil.copy(golden("words.txt"), graph)
    (graph / "phones" / "silence.csl").write_text("1:2:3:4:5:6:7:8:9:10\n")
    (tmp_path / "model").mkdir()
    shutil.copy(golden("am.mdl"), tmp_path / "model" / "final.mdl")
    write_vosk_dir(tmp_path / "model", graph, CONFIG, tmp_path / "vosk")

    data = digit_strings(tmp_path / "strings", train=6, test=6) / "test"
    make_mfcc(data, CONFIG)
    utterances = DataDir(data).utterances
    ours = our_words(tmp_path / "model" / "final.mdl", graph, data, utterances, tmp_path)
    assert vosk_words(tmp_path / "vosk", data, utterances) == ours
    assert any(ours.values())


@needs_vosk
def test_exported_model(digits: Recipe, tmp_path: Path) -> None:
    """The recipe's exported network with our own graph, and Kaldi's decoder inside Vosk."""
    s5 = digits.folder
    graph = s5 / "exp" / "mono" / "graph"
    write_vosk_dir(s5 / "exp" / "lstm", graph, s5 / "conf" / "mfcc_hires.conf", tmp_path / "vosk")
    data = s5 / "data" / "test_hires"
    utterances = DataDir(data).utterances[::4][:20]
    ours, nearly = (
        our_words(s5 / "exp" / "lstm" / "final.mdl", graph, data, utterances, tmp_path, scale) for scale in (0.1, 0.09)
    )
    theirs = vosk_words(tmp_path / "vosk", data, utterances)
    # Vosk evaluates the network in chunks, which moves the scores of a whole utterance a little: where two paths are so
    # near to each other that a tenth of the acoustic scale decides, it may take the other.
    assert all(words in (ours[key], nearly[key]) for key, words in theirs.items())
    assert sum(words != ours[key] for key, words in theirs.items()) <= 1
    assert all(ours.values())


def test_models_that_vosk_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"final\.mdl: cannot copy: No such file"):
        write_vosk_dir(tmp_path, tmp_path, CONFIG, tmp_path / "vosk")
    (tmp_path / "cmvn_opts").write_text("--norm-vars=false\n")
    with pytest.raises(DataError, match="cmvn_opts: Vosk cannot normalise features by speaker"):
        write_vosk_dir(tmp_path, tmp_path, CONFIG, tmp_path / "vosk")


@needs_vosk
def test_errors_of_the_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.embedded.vosk_decode", str(tmp_path / "none"), str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"{tmp_path}/none: Vosk cannot load the model" in done.stderr.splitlines()[-1]
