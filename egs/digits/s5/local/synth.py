#!/usr/bin/env python3
"""A synthetic corpus of connected digits, spoken by espeak-ng from its PyPI wheel.

    local/synth.py --nj 2 --seed 1 --hours 1.5 OUT

writes OUT/{train,test}/{wav.scp,text,utt2spk,spk2utt} and OUT/wav/*.wav, 8 kHz, 16 bit, mono. A speaker is
an accent, a voice variant, a pitch and a length of the vocal tract; the variants of the test set do not
occur in training. Each utterance has its own rate, gain, spectral tilt, and white or pink noise.

The same seed gives the same bytes, however many processes work: an utterance's choices are drawn from a
generator seeded by (seed, utterance), and espeak-ng, whose synthesis depends on what it spoke before, speaks
each utterance in a forked copy of one fresh state, with its own random generator seeded too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi import cli
from kaldi_mpi.embedded.datadir import PathLike, make_directories, write_data_dir
from kaldi_mpi.embedded.wave import Samples, encode_wave, resample
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

RATE = 8000
WORDS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")

# espeak-ng's names of English accents, and how speakers' names abbreviate them.
_ACCENTS = {
    "us": "en-us",
    "gb": "en",
    "rp": "en-GB-x-rp",
    "sc": "en-GB-scotland",
    "ny": "en-US-nyc",
    "la": "en-GB-x-gbclan",
    "ca": "en-029",
}
# Voice variants that sound like people; no variant speaks in both sets.
_TRAIN_VARIANTS = (
    "m1 f1 m3 f3 m4 Alicia m5 f5 m7 Andrea Alex Annie Gene belinda Mario Michael steph Andy Mike grandma "
    "Denis boris shelby Marco quincy rob Lee travis max"
)
_TEST_VARIANTS = "m2 f2 m6 linda ed f4 m8 aunty john robert Hugo"
_TRAIN_SPEAKERS_PER_HOUR, _TEST_SPEAKERS_PER_HOUR = 64, 50
# A shorter vocal tract speaks with higher formants, as a tape played faster does. Steps of 250 Hz keep the
# filters of the resampling short.
_SAMPLING_RATES = range(19500, 24501, 250)


@dataclass(frozen=True)
class Speaker:
    """Who speaks: the name, espeak-ng's voice, and settings in its units (0 to 100, rate in words/min).

    espeak-ng's audio is taken to have `sampling_rate` Hz, which scales all frequencies of the voice.
    """

    name: str
    voice: str
    pitch: int
    pitch_range: int
    rate: int
    sampling_rate: int


@dataclass(frozen=True)
class Utterance:
    """One spoken string: `words`, and `samples` (n,) int16 at 8 kHz."""

    name: str
    words: tuple[str, ...]
    samples: Samples


def speakers(part: str, count: int, seed: int) -> list[Speaker]:
    """The first `count` speakers of ``train`` or ``test``; a longer list begins with the shorter one."""
    variants = (_TRAIN_VARIANTS if part == "train" else _TEST_VARIANTS).split()
    accents = list(_ACCENTS)
    chosen: list[Speaker] = []
    for index in range(count):
        # 7 accents against 29 and 11 variants: all pairs come before one repeats.
        accent, variant = accents[index % len(accents)], variants[index % len(variants)]
        rng = _generator(seed, f"{part} speaker {index}")
        pitch = int(rng.integers(25, 76))
        chosen.append(
            Speaker(
                name=f"{accent}-{variant.lower()}-p{pitch}-{index:03d}",
                voice=f"{_ACCENTS[accent]}+{variant}",
                pitch=pitch,
                pitch_range=int(rng.integers(20, 81)),
                rate=int(rng.integers(115, 176)),
                sampling_rate=int(rng.choice(_SAMPLING_RATES)),
            )
        )
    return chosen


class Synthesiser:
    """espeak-ng in a state that is fresh for each utterance.

    Raises:
        ConfigError: the wheel ``espeakng-loader`` is not installed or its library does not load.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ConfigError(
                "the synthetic corpus needs the package espeakng-loader (pip install 'kaldi-mpi[synth]')"
            ) from error
        try:
            self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
            self._libc = ctypes.CDLL(None)
            seed_function = self._lib.espeak_ng_SetRandSeed
        except (OSError, AttributeError) as error:
            raise ConfigError(f"the espeak-ng library of espeakng-loader does not load: {error}") from error
        seed_function.argtypes = [ctypes.c_long]
        synchronous = 2  # AUDIO_OUTPUT_SYNCHRONOUS: espeak_Synth returns when all was spoken
        rate = int(self._lib.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0))
        if rate <= 0:
            raise ConfigError("espeak-ng cannot read its voice data")

    def speak(self, text: str, speaker: Speaker, rate: int, seed: int) -> Samples:
        """Speak `text` at `rate` words a minute; returns samples (n,) int16 (at 22050 Hz).

        Raises:
            DataError: espeak-ng refused the voice or died.
        """
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            # Only this copy of the library speaks; it leaves by _exit, so that nothing of the parent's
            # (buffers, exit handlers) is run twice.
            status = 1
            try:
                os.close(receiver)
                self._speak_into(sender, text, speaker, rate, seed)
                status = 0
            finally:
                os._exit(status)
        os.close(sender)
        with os.fdopen(receiver, "rb") as stream:
            data = stream.read()
        _, status = os.waitpid(child, 0)
        if status or not data:
            raise DataError(f"espeak-ng does not speak with voice {speaker.voice}", key=speaker.name)
        return np.frombuffer(data, dtype=np.int16)

    def _speak_into(self, sender: int, text: str, speaker: Speaker, rate: int, seed: int) -> None:
        pieces: list[bytes] = []

        def collect(samples: int | None, count: int, _events: int | None) -> int:
            if samples and count > 0:
                pieces.append(ctypes.string_at(samples, 2 * count))
            return 0

        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        callback = callback_type(collect)
        self._lib.espeak_SetSynthCallback(callback)
        self._lib.espeak_ng_SetRandSeed(seed)
        self._libc.srand(seed)
        if self._lib.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
            raise ValueError(speaker.voice)
        # espeak_PARAMETER: 1 rate, 3 pitch, 4 pitch range
        for parameter, value in ((1, rate), (3, speaker.pitch), (4, speaker.pitch_range)):
            self._lib.espeak_SetParameter(parameter, value, 0)
        encoded, utf8 = text.encode(), 1
        self._lib.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, utf8, None, None)
        self._lib.espeak_Synchronize()
        with os.fdopen(sender, "wb") as stream:
            stream.write(b"".join(pieces))


def make_utterance(synthesiser: Synthesiser, speaker: Speaker, index: int, seed: int) -> Utterance:
    """Speak a speaker's utterance number `index`; the result depends on the arguments alone."""
    name = f"{speaker.name}-{index:04d}"
    rng = _generator(seed, name)
    words = tuple(WORDS[digit] for digit in rng.integers(0, len(WORDS), size=rng.integers(1, 8)))
    # A comma makes espeak-ng pause and end a phrase: now and then, as in dictated numbers.
    text = words[0].lower() + "".join((", " if rng.random() < 0.25 else " ") + word.lower() for word in words[1:])
    rate = int(speaker.rate * rng.uniform(0.9, 1.1))
    speech = synthesiser.speak(text, speaker, rate, seed=int(rng.integers(1, 2**31)))
    return Utterance(name, words, _record(speech, speaker.sampling_rate, rng))


def _record(speech: Samples, sampling_rate: int, rng: np.random.Generator) -> Samples:
    """What a telephone would hear: 8 kHz, silence around, a tilted spectrum, noise, some level."""
    clean = resample(speech, sampling_rate, RATE)
    level = np.sqrt(np.mean(clean[np.abs(clean) > 0.02 * np.abs(clean).max()] ** 2))
    before, after = rng.integers(int(0.15 * RATE), int(0.45 * RATE), size=2)
    signal = np.pad(clean / level, (int(before), int(after)))
    signal[1:] -= rng.uniform(0.0, 0.3) * signal[:-1]
    pink, decibels = rng.random() < 0.5, rng.uniform(15.0, 35.0)
    signal += _noise(len(signal), pink, rng) * 10.0 ** (-decibels / 20)
    target = 32768 * 10.0 ** (rng.uniform(-32.0, -20.0) / 20)  # dB below full scale, of the speech
    samples: Samples = np.clip(np.rint(signal * target), -32768, 32767).astype(np.int16)
    return samples


def _noise(length: int, pink: bool, rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise of unit power, white or with a power density of 1/f."""
    white = rng.standard_normal(length)
    if not pink:
        return white
    spectrum = np.fft.rfft(white)
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1.0))
    coloured = np.fft.irfft(spectrum, length)
    return np.asarray(coloured / np.sqrt(np.mean(coloured**2)))


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


_synthesiser: Synthesiser | None = None  # one a process, made at the first use


def _speak_share(speaker: Speaker, seconds: float, seed: int, folder: str) -> list[tuple[str, str, float]]:
    """Write utterances of one speaker until they last `seconds`; returns (utterance, text, seconds)."""
    global _synthesiser
    if _synthesiser is None:
        _synthesiser = Synthesiser()
    done: list[tuple[str, str, float]] = []
    total = 0.0
    while total < seconds:
        utterance = make_utterance(_synthesiser, speaker, len(done), seed)
        (Path(folder) / f"{utterance.name}.wav").write_bytes(encode_wave(utterance.samples, RATE))
        length = len(utterance.samples) / RATE
        done.append((utterance.name, " ".join(utterance.words), length))
        total += length
    return done


def make_corpus(
    out: PathLike, *, hours: float = 1.5, test_hours: float = 0.3, seed: int = 1, nj: int = 2
) -> dict[str, float]:
    """Write the corpus; see the module's text.

    Args:
        out: the directory to write, made if need be.
        hours: about how much training speech.
        test_hours: about how much test speech.
        seed: decides everything.
        nj: number of processes; changes nothing in the result.

    Returns:
        ``{"train": hours, "test": hours}`` as they came out.

    Raises:
        ConfigError: impossible sizes; espeak-ng is not there.
        DataError: a file cannot be written.
    """
    if hours <= 0 or test_hours <= 0 or nj < 1:
        raise ConfigError("hours and the number of jobs must be positive")
    folder = Path(out).resolve() / "wav"
    make_directories(folder)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # for the processes below: they fork, so they have no threads
    lengths = {}
    with ProcessPoolExecutor(nj, mp_context=get_context("spawn")) as pool:
        for part, part_hours, density in (
            ("train", hours, _TRAIN_SPEAKERS_PER_HOUR),
            ("test", test_hours, _TEST_SPEAKERS_PER_HOUR),
        ):
            people = speakers(part, max(2, round(part_hours * density)), seed)
            share = part_hours * 3600 / len(people)
            futures = [pool.submit(_speak_share, who, share, seed, str(folder)) for who in people]
            try:
                spoken = [future.result() for future in futures]
            except BrokenProcessPool as error:
                raise DataError("a process of the speech synthesis died", file=str(out)) from error
            except OSError as error:
                raise DataError(f"cannot write audio: {error.strerror}", file=str(folder)) from error
            finally:
                for future in futures:
                    future.cancel()
            rows = [(who, *row) for who, rows in zip(people, spoken, strict=True) for row in rows]
            write_data_dir(
                Path(out) / part,
                wav_scp={name: str(folder / f"{name}.wav") for _, name, _, _ in rows},
                text={name: text for _, name, text, _ in rows},
                utt2spk={name: who.name for who, name, _, _ in rows},
            )
            lengths[part] = sum(length for *_, length in rows) / 3600
            logger.info("%s: %d utterances of %d speakers, %.2f h", part, len(rows), len(people), lengths[part])
    return lengths


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = Parser(prog="synth.py", description="synthetic connected digits by espeak-ng")
    parser.add_argument("out")
    parser.add_argument("--nj", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--hours", type=float, default=1.5, help="training speech (default: %(default)s)")
    parser.add_argument("--test-hours", type=float, default=0.3, help="test speech (default: %(default)s)")
    options = parser.parse_args(arguments)
    make_corpus(options.out, hours=options.hours, test_hours=options.test_hours, seed=options.seed, nj=options.nj)


if __name__ == "__main__":
    sys.exit(cli.run("synth", main, sys.argv[1:]))
