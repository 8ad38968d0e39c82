"""The synthetic corpus: reproducible, with test speakers of its own."""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.wave import read_wave
from kaldi_mpi.errors import ConfigError
from tests.paths import REPO

# A script of the recipe; on the path, so that its processes can import it too.
sys.path.append(str(REPO / "egs" / "digits" / "s5" / "local"))
synth: Any = importlib.import_module("synth")


def contents(corpus: Path) -> dict[str, str]:
    """Digest of every file; wav.scp, which holds absolute paths, with the corpus's own path removed."""
    digests = {}
    for path in sorted(corpus.rglob("*")):
        if path.is_file():
            data = path.read_bytes().replace(str(corpus).encode(), b"")
            digests[str(path.relative_to(corpus))] = hashlib.sha256(data).hexdigest()
    return digests


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("espeakng_loader", reason="needs the wheel espeakng-loader")
    made = {}
    for name, seed, nj in (("one", 5, 1), ("two", 5, 2), ("other", 6, 2)):
        made[name] = tmp_path_factory.mktemp(name)
        synth.make_corpus(made[name], hours=0.01, test_hours=0.004, seed=seed, nj=nj)
    return made


def test_same_seed_same_bytes_whatever_the_number_of_processes(corpora: dict[str, Path]) -> None:
    one, two, other = (contents(corpora[name]) for name in ("one", "two", "other"))
    assert len([name for name in one if name.endswith(".wav")]) > 10
    assert one == two
    assert one["train/text"] != other["train/text"]
    assert not {digest for name, digest in one.items() if name.endswith(".wav")} & set(other.values())


def test_data_directories_are_valid_and_speech_is_there(corpora: dict[str, Path]) -> None:
    for part, seconds in (("train", 36.0), ("test", 14.4)):
        data = DataDir(corpora["one"] / part)
        data.validate()
        total = 0.0
        for utterance, entry in data.wav_scp.items():
            wave = read_wave(entry)
            words = data.text[utterance]
            assert wave.rate == 8000 and wave.samples.shape[0] == 1
            assert 1 <= len(words) <= 7 and set(words) <= set(synth.WORDS)
            # A word takes 0.15 to 1 s, beside at most 0.9 s of silence.
            assert 0.3 + 0.15 * len(words) < wave.duration < 1.9 + 1.0 * len(words)
            samples = wave.samples[0].astype(float)
            edge, loudest = samples[:1000].std(), max(block.std() for block in np.array_split(samples, 20))
            assert edge < loudest / 2 and loudest > 100 and np.abs(samples).max() <= 32767
            total += wave.duration
        assert seconds <= total < seconds + 2 * 8


def test_a_longer_corpus_begins_with_the_shorter_one(corpora: dict[str, Path]) -> None:
    speaker = synth.speakers("train", 1, seed=5)[0]
    assert synth.speakers("train", 48, seed=5)[0] == speaker
    data = DataDir(corpora["one"] / "train")
    last = data.spk2utt[speaker.name][-1]
    again = synth.make_utterance(synth.Synthesiser(), speaker, int(last[-4:]), seed=5)
    assert again.name == last and list(again.words) == data.text[last]
    np.testing.assert_array_equal(again.samples, read_wave(data.wav_scp[last]).samples[0])


def test_test_speakers_and_their_voices_are_new() -> None:
    train, test = synth.speakers("train", 60, seed=1), synth.speakers("test", 20, seed=1)
    assert len({speaker.name for speaker in train + test}) == 80
    assert len({speaker.voice for speaker in train}) == 60 and len({speaker.voice for speaker in test}) == 20

    def variants(people: list[Any]) -> set[str]:
        return {speaker.voice.split("+")[1] for speaker in people}

    assert not variants(train) & variants(test)


def test_impossible_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="hours and the number of jobs must be positive"):
        synth.make_corpus(tmp_path, hours=0)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ConfigError, match=r"needs the package espeakng-loader \(pip install"):
        synth.Synthesiser()
