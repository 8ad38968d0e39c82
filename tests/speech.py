"""Speech for tests: small data directories of tones or of real digit strings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from kaldi_mpi.embedded.datadir import write_data_dir
from kaldi_mpi.embedded.wave import Samples, encode_wave
from tests.paths import fsdd


def tone(seconds: float, frequency: float, rate: int = 8000) -> Samples:
    """A tone with a little noise, (n,) int16."""
    times = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(int(frequency)).normal(size=len(times))
    return np.rint(3000 * np.sin(2 * np.pi * frequency * times) + 100 * noise).astype(np.int16)


def tone_dir(folder: Path, utterances: int = 4, rate: int = 8000) -> Path:
    """A data directory of `utterances` tones by two speakers; its audio lies beside it in ``wav``."""
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    names = [f"spk{2 * index // utterances}-{index:02d}" for index in range(utterances)]
    for index, name in enumerate(names):
        samples = tone(0.4 + 0.1 * index, 300 + 100 * index, rate)
        (folder / "wav" / f"{name}.wav").write_bytes(encode_wave(samples, rate))
    write_data_dir(
        folder / "data",
        wav_scp={name: str(folder / "wav" / f"{name}.wav") for name in names},
        text=dict.fromkeys(names, "ONE TWO"),
        utt2spk={name: name.split("-")[0] for name in names},
    )
    return folder / "data"


def digit_strings(folder: Path, train: int = 12, test: int = 6) -> Path:
    """Real digit strings, as shared/fsdd/make_strings.py makes them; returns the folder of train and test."""
    root = fsdd()
    subprocess.run(
        [
            *[sys.executable, str(root / "make_strings.py"), str(root / "recordings"), str(folder)],
            *["--train-strings", str(train), "--test-strings", str(test)],
        ],
        check=True,
        capture_output=True,
    )
    return folder
