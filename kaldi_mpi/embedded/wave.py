"""Audio as Kaldi's ``wav.scp`` names it: files, places in archives, and commands ending in ``|``.

Samples are 16-bit integers throughout; feature extraction takes them in that scale, as Kaldi does.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

import kaldi_native_io
import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.features import cause_of
from kaldi_mpi.errors import DataError
from kaldi_mpi.log import logger

Samples = NDArray[np.int16]

# kaldi_native_io's count of bytes where a header holds none, for its writer did not know the length yet.
_STREAMED = 1 << 32


@dataclass(frozen=True)
class Wave:
    """Decoded audio: `samples` (channels, samples) int16, `rate` in Hz."""

    samples: Samples
    rate: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return float(self.samples.shape[1] / self.rate)

    def channel(self, channel: int, *, file: str | None = None, key: str | None = None) -> Samples:
        """One channel (n,) int16; -1 means the only one.

        Raises:
            DataError: no such channel, or -1 and more than one (Kaldi would take the first one silently).
        """
        count = len(self.samples)
        if channel == -1 and count > 1:
            raise DataError(
                f"the audio has {count} channels; choose one (--channel=0 in the feature configuration)",
                file=file,
                key=key,
            )
        if channel >= count:
            raise DataError(f"no channel {channel}: the audio has {count}", file=file, key=key)
        chosen: Samples = self.samples[max(channel, 0)]
        return chosen


def read_wave(entry: str, *, scp: str | None = None, key: str | None = None) -> Wave:
    """Read what one entry of a ``wav.scp`` names: RIFF (or RIFX) of 16-bit linear PCM, as Kaldi reads it.

    Args:
        entry: a path, ``path:byte offset``, or a command ending in ``|``, which the shell runs.
        scp: the ``wav.scp``, named in errors.
        key: the utterance or recording, named in errors.

    Raises:
        DataError: the file cannot be read, the command's status is not zero, or the audio is unusable.
    """
    if not entry.endswith("|"):
        return _read(entry, entry, scp, key)
    # Not as a pipe, of which kaldi_native_io would take the output of a failed command.
    with tempfile.NamedTemporaryFile(suffix=".wav") as stream:
        _run(entry[:-1].strip(), stream, scp, key)
        return _read(stream.name, scp, scp, key)


def _read(place: str, file: str | None, scp: str | None, key: str | None) -> Wave:
    """Read `place` (``path`` or ``path:offset``); `file` is named where the audio is unusable."""
    match = re.fullmatch(r"(.+):(\d+)", place)
    path, offset = (match[1], int(match[2])) if match else (place, 0)
    try:
        wave = kaldi_native_io.read_wave(place)
        announced = 0 if match else kaldi_native_io.read_wave_info(place).data_bytes
    except RuntimeError as error:
        try:
            with open(path, "rb") as stream:
                empty = stream.seek(0, os.SEEK_END) <= offset
        except OSError as cause:
            raise DataError(f"cannot read {place}: {cause.strerror}", file=scp, key=key) from error
        if empty:
            raise DataError("no audio at all (0 bytes)", file=file, key=key, offset=0) from error
        cause_ = cause_of(error).removeprefix("WaveData: ")
        raise DataError(f"not a RIFF WAVE file of 16-bit linear PCM: {cause_}", file=file, key=key) from error
    samples = np.array(wave.data).astype(np.int16)  # whole numbers, which Kaldi keeps as floats
    size = 2 * samples.size
    if size < announced < _STREAMED:  # of an archive's end kaldi_native_io warns too, without the key
        logger.warning("%s, key %s: the header announces %d bytes of samples, there are %d", file, key, announced, size)
    return Wave(samples, int(wave.sample_freq))


def _run(command: str, output: IO[bytes], scp: str | None, key: str | None) -> None:
    done = subprocess.run(command, shell=True, stdout=output, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        how = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        last = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1]
        raise DataError(f"the command failed with {how}: {command}" + (f": {last}" if last else ""), file=scp, key=key)


def read_utterances(data: DataDir, utterances: list[str], *, channel: int = -1) -> Iterator[tuple[str, Samples, int]]:
    """Yield (utterance, samples (n,) int16, rate in Hz) of a data directory, cutting out its segments.

    Args:
        data: the data directory.
        utterances: which ones, in this order; neighbours of one recording share its reading.
        channel: the channel to take, -1 for the only one.

    Raises:
        DataError: see `read_wave`; a segment more than half a second beyond its recording's end (what
            Kaldi's extract-segments tolerates) or shorter than 0.1 s.
    """
    scp = data.file("wav.scp")
    if not data.segments:
        for utterance in utterances:
            wave = read_wave(data.wav_scp[utterance], scp=scp, key=utterance)
            yield utterance, wave.channel(channel, file=scp, key=utterance), wave.rate
        return
    latest: tuple[str, Wave] | None = None
    for utterance in utterances:
        recording, start, end = data.segments[utterance]
        if latest is None or recording != latest[0]:
            latest = recording, read_wave(data.wav_scp[recording], scp=scp, key=recording)
        wave = latest[1]
        samples = wave.channel(channel, file=scp, key=recording)
        if start > wave.duration or end > wave.duration + 0.5:
            raise DataError(
                f"the segment {start} to {end} s lies outside {recording}, which has {wave.duration:.2f} s",
                file=data.file("segments"),
                key=utterance,
            )
        end = min(end, wave.duration)
        if end - start < 0.1:
            raise DataError("the segment is shorter than 0.1 s", file=data.file("segments"), key=utterance)
        # Rounded as extract-segments rounds.
        yield utterance, samples[int(start * wave.rate + 0.5) : int(end * wave.rate + 0.5)], wave.rate


def encode_wave(samples: Samples, rate: int) -> bytes:
    """A RIFF file of one channel of 16-bit samples at `rate` Hz."""
    body = np.ascontiguousarray(samples, dtype="<i2").tobytes()
    header = bytearray(b"RIFF")
    header += (36 + len(body)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    pcm, channels = 1, 1
    for value, size in ((pcm, 2), (channels, 2), (rate, 4), (2 * rate, 4), (2, 2), (16, 2)):
        header += value.to_bytes(size, "little")
    header += b"data" + len(body).to_bytes(4, "little")
    return bytes(header) + body


def resample(samples: NDArray[Any], rate_in: int, rate_out: int, *, num_zeros: int = 6) -> NDArray[np.float64]:
    """Change the sampling rate with a Hann-windowed sinc, the filter that Kaldi's LinearResample defines.

    Args:
        samples: (n,) any real type.
        rate_in: sampling rate of `samples` in Hz.
        rate_out: wanted sampling rate in Hz.
        num_zeros: zero crossings of the sinc on either side; more make the cut-off sharper.

    Returns:
        (m,) float64, with m = ceil(n * rate_out / rate_in); beyond its ends the signal counts as zero.
    """
    if rate_in == rate_out:
        return np.asarray(samples, dtype=np.float64)
    first, block, matrix = _resampling_matrix(rate_in, rate_out, num_zeros)
    out_per_block = matrix.shape[1]
    length = -(-len(samples) * rate_out // rate_in)
    blocks = -(-length // out_per_block)
    padded = np.zeros((blocks - 1) * block + matrix.shape[0])
    usable = min(len(samples), len(padded) + first)
    padded[-first : -first + usable] = samples[:usable]
    windows = np.lib.stride_tricks.sliding_window_view(padded, matrix.shape[0])[::block]
    result: NDArray[np.float64] = (windows @ matrix).reshape(-1)[:length]
    return result


@lru_cache(maxsize=32)
def _resampling_matrix(rate_in: int, rate_out: int, num_zeros: int) -> tuple[int, int, NDArray[np.float64]]:
    """One period of the polyphase filter.

    Both rates repeat their relation every `block` input and `block * rate_out / rate_in` output samples.
    Returns (input index where the first output's window starts (<= 0), block, matrix (inputs, outputs)).
    """
    common = math.gcd(rate_in, rate_out)
    block, outputs = rate_in // common, rate_out // common
    cutoff = 0.99 * 0.5 * min(rate_in, rate_out)  # Kaldi's margin below the lower Nyquist frequency
    width = num_zeros / (2 * cutoff)
    first = math.ceil(-width * rate_in)
    last = math.floor((block - block / outputs) + width * rate_in)
    offsets = np.arange(first, last + 1)[:, None] / rate_in - np.arange(outputs)[None, :] / rate_out
    window = np.where(np.abs(offsets) < width, 0.5 * (1 + np.cos(2 * np.pi * cutoff / num_zeros * offsets)), 0.0)
    matrix = window * np.sinc(2 * cutoff * offsets) * 2 * cutoff / rate_in
    return first, block, matrix
