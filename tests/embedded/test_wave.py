"""Audio entries of wav.scp: RIFF variants, commands, segments, resampling; and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.wave import Wave, encode_wave, read_utterances, read_wave, resample
from kaldi_mpi.errors import DataError
from kaldi_mpi.log import logger
from tests.speech import tone, tone_dir

SAMPLES = np.array([0, 1, -1, 32767, -32768, 1234], dtype=np.int16)


def riff(
    samples: bytes, *, form: int = 1, channels: int = 1, bits: int = 16, order: str = "<", size: int | None = None
) -> bytes:
    """A RIFF file by struct, independent of encode_wave."""
    block = channels * bits // 8
    fmt = struct.pack(order + "HHIIHH", form, channels, 8000, 8000 * block, block, bits)
    if form == 0xFFFE:
        guid = bytes.fromhex("0100000000001000800000aa00389b71")
        fmt += struct.pack("<HHI", 22, bits, 4) + guid
    size = len(samples) if size is None else size
    body = b"WAVE" + b"LIST" + struct.pack(order + "I", 4) + b"junk"
    body += b"fmt " + struct.pack(order + "I", len(fmt)) + fmt + b"data" + struct.pack(order + "I", size) + samples
    return (b"RIFF" if order == "<" else b"RIFX") + struct.pack(order + "I", len(body)) + body


def read(path: Path, data: bytes) -> Wave:
    """What `read_wave` makes of a file of these bytes; it must make the same of a command's output."""
    path.write_bytes(data)
    wave = read_wave(str(path), key="utt")
    np.testing.assert_array_equal(read_wave(f"cat '{path}' |").samples, wave.samples)
    return wave


@settings(max_examples=30)
@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50), st.sampled_from([8000, 16000, 44100]))
def test_what_is_encoded_is_decoded(tmp_path_factory: pytest.TempPathFactory, values: list[int], rate: int) -> None:
    samples = np.array(values, dtype=np.int16)
    path = tmp_path_factory.mktemp("wave") / "a.wav"
    path.write_bytes(encode_wave(samples, rate))
    wave = read_wave(str(path))
    assert wave.rate == rate and wave.samples.dtype == np.int16
    np.testing.assert_array_equal(wave.samples, samples[None, :])


def test_variants_of_riff(tmp_path: Path) -> None:
    little, big = SAMPLES.astype("<i2").tobytes(), SAMPLES.astype(">i2").tobytes()
    for data in (
        riff(little),
        riff(big, order=">"),
        riff(little, form=0xFFFE),
        riff(little, size=0xFFFFFFFF),
        riff(little, size=0x7FFFF000),
        riff(little, size=0),
    ):
        np.testing.assert_array_equal(read(tmp_path / "a.wav", data).samples, SAMPLES[None, :])
    stereo = read(tmp_path / "a.wav", riff(little, channels=2))
    np.testing.assert_array_equal(stereo.channel(1), SAMPLES[1::2])
    with pytest.raises(DataError, match="the audio has 2 channels; choose one"):
        stereo.channel(-1)
    with pytest.raises(DataError, match="no channel 2: the audio has 2"):
        stereo.channel(2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no audio at all"),
        (b"NIST_1A\n   1024\n", "not a RIFF WAVE file of 16-bit linear PCM: expected RIFF or RIFX, got NIST"),
        (riff(SAMPLES.tobytes(), bits=8), "not a RIFF .* 16-bit linear PCM: unsupported bits_per_sample = 8"),
        (riff(SAMPLES.tobytes(), form=7), "not a RIFF .* PCM: can read only PCM data, format id in file is: 7"),
        (riff(b""), "not a RIFF .*: empty file"),
        (riff(SAMPLES.tobytes())[:30], "not a RIFF .*: unexpected end of file"),
    ],
)
def test_unusable_audio_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.wav, key utt.*: {message}"):
        read_wave(f"{tmp_path}/a.wav", scp="wav.scp", key="utt")
    with pytest.raises(DataError, match=rf"^wav\.scp, key utt.*: {message}"):
        read_wave(f"cat {tmp_path}/a.wav |", scp="wav.scp", key="utt")


def test_truncated_audio_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("WARNING", logger="kaldi_mpi"):
        wave = read(tmp_path / "a.wav", riff(SAMPLES.tobytes(), size=100))
    np.testing.assert_array_equal(wave.samples, SAMPLES[None, :])
    assert "a.wav, key utt: the header announces 100 bytes of samples, there are 12" in caplog.text


def test_entries_are_paths_places_in_archives_and_commands(tmp_path: Path) -> None:
    path = tmp_path / "a b.wav"
    path.write_bytes(encode_wave(SAMPLES, 8000))
    (tmp_path / "wav.ark").write_bytes(b"key " + path.read_bytes())
    for entry in (str(path), f"{tmp_path}/wav.ark:4", f"cat '{path}' |", f"cat '{path}' | tee /dev/null |"):
        np.testing.assert_array_equal(read_wave(entry).samples, SAMPLES[None, :])
    with pytest.raises(DataError, match=r"wav\.ark:999, key u, byte offset 0: no audio at all"):
        read_wave(f"{tmp_path}/wav.ark:999", key="u")


def test_an_archive_of_audio_is_read_once_and_not_once_an_utterance(tmp_path: Path) -> None:
    """Each utterance's bytes are read and not the rest of the archive: 200 utterances would be a hundred times it."""
    data_dir = tone_dir(tmp_path, utterances=4)
    samples = tone(1.0, 440)
    wave, keys = encode_wave(samples, 8000), [f"spk0-{number:03d}" for number in range(200)]
    archive = tmp_path / "wav.ark"
    archive.write_bytes(b"".join(key.encode() + b" " + wave for key in keys))
    size, item = archive.stat().st_size, len(keys[0]) + 1
    places = {key: f"{archive}:{number * (item + len(wave)) + item}" for number, key in enumerate(keys)}
    (data_dir / "wav.scp").write_text("".join(f"{key} {place}\n" for key, place in places.items()))
    data = DataDir(data_dir)
    assert len(data.wav_scp) == 200

    def bytes_read() -> int:
        """By all of this process's calls of read()."""
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = bytes_read()
    for _, read_samples, _ in read_utterances(data, keys):
        np.testing.assert_array_equal(read_samples, samples)
    assert 0.9 * size < bytes_read() - before < 1.1 * size


def test_a_failing_command_is_named_with_its_status_and_its_words() -> None:
    with pytest.raises(DataError) as caught:
        read_wave("echo too bad >&2; exit 3 |", scp="data/wav.scp", key="utt-1")
    assert str(caught.value) == (
        "data/wav.scp, key utt-1: the command failed with status 3: echo too bad >&2; exit 3: too bad"
    )
    with pytest.raises(DataError, match=r"wav.scp, key u, byte offset 0: no audio at all"):
        read_wave("true |", scp="wav.scp", key="u")
    with pytest.raises(DataError, match=r"wav.scp, key u: cannot read /nowhere.wav: No such file"):
        read_wave("/nowhere.wav", scp="wav.scp", key="u")


def test_segments_cut_the_recordings(tmp_path: Path) -> None:
    directory = tone_dir(tmp_path)
    (directory / "segments").write_text("a-1 spk0-00 0.05 0.25007\na-2 spk0-00 0.2 0.6\n")
    data = DataDir(directory)
    whole = tone(0.4, 300)
    cut = {name: samples for name, samples, _ in read_utterances(data, ["a-1", "a-2"])}
    np.testing.assert_array_equal(cut["a-1"], whole[400:2001])
    np.testing.assert_array_equal(cut["a-2"], whole[1600:])
    for line, message in (
        ("a-1 spk0-00 0.1 0.95\n", "the segment 0.1 to 0.95 s lies outside spk0-00, which has 0.40 s"),
        ("a-1 spk0-00 0.1 0.15\n", "the segment is shorter than 0.1 s"),
    ):
        (directory / "segments").write_text(line)
        with pytest.raises(DataError, match=f"segments, key a-1: {message}"):
            list(read_utterances(DataDir(directory), ["a-1"]))


@settings(max_examples=20)
@given(st.sampled_from([(22050, 8000), (16000, 8000), (8000, 16000), (44100, 16000)]), st.integers(500, 3000))
def test_resampling_keeps_a_tone(rates: tuple[int, int], length: int) -> None:
    rate_in, rate_out = rates
    frequency = 700.0
    result = resample(np.sin(2 * np.pi * frequency * np.arange(length) / rate_in), rate_in, rate_out)
    expected = np.sin(2 * np.pi * frequency * np.arange(len(result)) / rate_out)
    assert len(result) == -(-length * rate_out // rate_in)
    inner = slice(20, len(result) - 20)  # the filter's width at the ends
    assert np.abs(result[inner] - expected[inner]).max() < 0.02


def test_resampling_removes_what_would_alias() -> None:
    high = np.sin(2 * np.pi * 5500 * np.arange(22050) / 22050)
    assert np.abs(resample(high, 22050, 8000)[50:-50]).max() < 0.02
