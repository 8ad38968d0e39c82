"""Features: the MFCC values, the files of a data directory, CMVN and deltas; against Kaldi where it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kaldi_mpi.embedded.cmvn import SpeakerCmvn, apply_cmvn, cmvn_stats, make_cmvn, read_cmvn_opts, speaker_cmvn
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.features import add_deltas, read_double_matrix, read_features
from kaldi_mpi.embedded.jobs import split_jobs
from kaldi_mpi.embedded.mfcc import MfccConfig, compute_mfcc, make_mfcc
from kaldi_mpi.embedded.wave import read_utterances, read_wave
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.cmvn_options import CmvnOptions, format_cmvn_opts, parse_cmvn_opts
from kaldi_mpi.loader import Corpus
from tests.paths import REPO, golden, kaldi_root
from tests.speech import digit_strings, tone, tone_dir

CONF = REPO / "egs" / "digits" / "s5" / "conf"
CONFIGS = [CONF / "mfcc.conf", CONF / "mfcc_hires.conf"]


def mfcc_by_formula(samples: NDArray[np.int16], config: MfccConfig) -> NDArray[np.float64]:
    """MFCCs in float64 from their definition, for --use-energy=false and snipped edges."""
    rate, size = config.sample_frequency, int(config.sample_frequency * config.frame_length / 1000)
    shift, padded = int(rate * config.frame_shift / 1000), 1 << (size - 1).bit_length()
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(float), size)[::shift]
    frames = frames - frames.mean(axis=1, keepdims=True)
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = (frames - config.preemphasis_coefficient * before) * np.hanning(size) ** 0.85
    power = np.abs(np.fft.rfft(frames, padded)) ** 2

    def mel(hertz: NDArray[np.float64] | float) -> NDArray[np.float64]:
        return np.asarray(1127.0 * np.log1p(np.asarray(hertz) / 700.0))

    high = config.high_freq if config.high_freq > 0 else rate / 2 + config.high_freq
    edges = np.linspace(mel(config.low_freq), mel(high), config.num_mel_bins + 2)
    position = mel(np.arange(padded // 2) * rate / padded)
    rising = (position[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - position[:, None]) / (edges[2:] - edges[1:-1])
    bank = np.maximum(0, np.minimum(rising, falling))
    log_mel = np.log(np.maximum(power[:, : padded // 2] @ bank, np.finfo(np.float32).eps))
    bins, order = config.num_mel_bins, np.arange(config.num_ceps)
    dct = np.cos(np.pi / bins * (np.arange(bins)[:, None] + 0.5) * order) * np.sqrt(2 / bins)
    dct[:, 0] = np.sqrt(1 / bins)
    lifter = 1 + 0.5 * config.cepstral_lifter * np.sin(np.pi * order / config.cepstral_lifter)
    return np.asarray(log_mel @ dct * lifter)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_mfccs_are_what_their_definition_says(path: Path) -> None:
    config = MfccConfig.read(path)
    samples = np.concatenate([tone(0.5, 440), tone(0.3, 1900)])
    feats = compute_mfcc(samples, 8000, config)
    assert feats.dtype == np.float32 and feats.shape == (78, config.num_ceps)
    np.testing.assert_allclose(feats, mfcc_by_formula(samples, config), atol=0.01)


def test_configurations_of_the_recipe() -> None:
    gmm, hires = (MfccConfig.read(path) for path in CONFIGS)
    assert (gmm.sample_frequency, gmm.num_ceps, gmm.num_mel_bins, gmm.use_energy) == (8000, 13, 23, False)
    assert (hires.num_ceps, hires.num_mel_bins, hires.low_freq, hires.high_freq) == (40, 40, 40, -200)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num-cepstra=13", "line 2: unknown option --num-cepstra"),
        ("--num-ceps=many", "line 2: --num-ceps needs a whole number, got 'many'"),
        ("--num-ceps", "line 2: --num-ceps needs a whole number, got ''"),
        ("--use-energy=maybe", "line 2: --use-energy needs true or false, got 'maybe'"),
        ("--low-freq=nan", "line 2: --low-freq needs a number, got 'nan'"),
        ("num_ceps=13", "line 2: expected an option of the form --name=value, got 'num_ceps=13'"),
        ("--vtln-map=ark:x", "line 2: --vtln-map is not supported"),
        ("--num-ceps=24", "--num-ceps=24 does not fit --num-mel-bins=23"),
        ("--high-freq=5000", "mel bins from 20 to 5000 Hz do not fit below a Nyquist of 4000 Hz"),
        ("--window-type=hann", "--window-type=hann is none of povey, hamming"),
    ],
)
def test_a_bad_configuration_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "mfcc.conf"
    path.write_text(f"--sample-frequency=8000 # Hz\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        MfccConfig.read(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_configuration_lines_as_kaldi_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "mfcc.conf"
    path.write_text("# all\n\n  --Use_Energy   # a comment\n--snip-edges=f\n--sample-frequency = 8e3\n")
    config = MfccConfig.read(path)
    assert config.use_energy and not config.snip_edges and config.sample_frequency == 8000


def test_another_sampling_rate_is_refused_or_resampled_as_configured() -> None:
    config = MfccConfig(sample_frequency=8000, use_energy=False)
    with pytest.raises(DataError, match=r"wav.scp, key u: the audio has 16000 Hz.*8000 Hz \(--allow-downsample"):
        compute_mfcc(tone(0.5, 440, 16000), 16000, config, file="wav.scp", key="u")
    allowed = MfccConfig(sample_frequency=8000, use_energy=False, allow_downsample=True)
    assert compute_mfcc(tone(0.5, 440, 16000), 16000, allowed).shape == (48, 13)
    with pytest.raises(DataError, match=r"key u: the audio \(0.020 s\) is shorter than one frame"):
        compute_mfcc(tone(0.02, 440), 8000, config, key="u")


def test_files_of_a_data_directory(tmp_path: Path) -> None:
    data_dir = tone_dir(tmp_path)
    for jobs in (1, 3):
        make_mfcc(data_dir, CONFIGS[1], nj=jobs, mfcc_dir=tmp_path / f"mfcc{jobs}")
        make_cmvn(data_dir, cmvn_dir=tmp_path / f"mfcc{jobs}")
        data = DataDir(data_dir)
        data.validate(feats=True)
        assert data.utt2num_frames == {f"spk{i // 2}-0{i}": 38 + 10 * i for i in range(4)}
        assert data.utt2dur == pytest.approx({f"spk{i // 2}-0{i}": 0.4 + 0.1 * i for i in range(4)})
        assert (data_dir / "frame_shift").read_text() == "0.01\n"
        assert (data_dir / "conf" / "mfcc.conf").read_bytes() == CONFIGS[1].read_bytes()
        assert (data_dir / "log" / f"make_mfcc_data.{jobs}.log").read_text().startswith("LOG Done")
        archives = [f"{tmp_path}/mfcc{jobs}/raw_mfcc_data.{job + 1}.ark" for job in range(jobs)]
        assert sorted({place.rsplit(":", 1)[0] for place in data.feats_scp.values()}) == archives
    one, three = (b"".join(p.read_bytes() for p in sorted(tmp_path.glob(f"mfcc{n}/raw*.ark"))) for n in (1, 3))
    assert one == three
    for key, feats in read_features(data_dir / "feats.scp"):
        config, entry = MfccConfig.read(CONFIGS[1]), data.wav_scp[key]
        plain = compute_mfcc(read_wave(entry).channel(-1), 8000, config)
        assert np.abs(feats - plain).max() < np.ptp(plain, axis=0).max() / 63  # the coarsest compression step


def test_a_failing_command_stops_the_extraction(tmp_path: Path) -> None:
    data_dir = tone_dir(tmp_path)
    scp = (data_dir / "wav.scp").read_text().splitlines()
    scp[2] = "spk1-02 echo no such tape >&2; false |"
    (data_dir / "wav.scp").write_text("\n".join(scp) + "\n")
    with pytest.raises(DataError) as caught:
        make_mfcc(data_dir, CONFIGS[0], nj=2)
    assert str(caught.value) == (
        f"{data_dir}/wav.scp, key spk1-02: the command failed with status 1: echo no such tape >&2; false: no such tape"
    )
    assert not (data_dir / "feats.scp").exists()
    assert "key spk1-02" in (data_dir / "log" / "make_mfcc_data.2.log").read_text()
    with pytest.raises(ConfigError, match="--nj 9: there are 4 utterances to share out"):
        make_mfcc(data_dir, CONFIGS[0], nj=9)


def test_an_archive_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    data_dir = tone_dir(tmp_path)
    (data_dir / "data").write_text("in the way\n")
    with pytest.raises(DataError, match="data/data: cannot make the directory: File exists"):
        make_mfcc(data_dir, CONFIGS[0], nj=1)
    # A limit on the size of files fails as a full disk does.
    script = (
        "import resource, sys; from kaldi_mpi.embedded.mfcc import make_mfcc\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "make_mfcc(sys.argv[1], sys.argv[2], nj=1, mfcc_dir=sys.argv[3])\n"
    )
    command = [sys.executable, "-c", script, str(data_dir), str(CONFIGS[0]), str(tmp_path / "mfcc")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (data_dir / "feats.scp").exists()
    assert done.stderr.endswith(
        f"DataError: {tmp_path}/mfcc/raw_mfcc_data.1.ark: cannot write the archive (disk full, or not allowed)\n"
    )


@given(st.integers(1, 40), st.integers(1, 12))
def test_jobs_share_the_utterances_evenly(count: int, jobs: int) -> None:
    keys = [f"u{index:02d}" for index in range(count)]
    if jobs > count:
        with pytest.raises(ConfigError):
            split_jobs(keys, jobs)
        return
    parts = split_jobs(keys, jobs)
    assert [key for part in parts for key in part] == keys
    assert {len(part) for part in parts} <= {count // jobs, count // jobs + 1}


def deltas_by_loops(feats: NDArray[np.float32], window: int, order: int) -> NDArray[np.float64]:
    """Deltas straight from Kaldi's definition: filters composed, then frames clamped to the utterance."""
    frames, dim = feats.shape
    scales, parts = {0: 1.0}, [feats.astype(np.float64)]
    for _ in range(order):
        composed: dict[int, float] = {}
        norm = sum(j * j for j in range(-window, window + 1))
        for j in range(-window, window + 1):
            for k, scale in scales.items():
                composed[j + k] = composed.get(j + k, 0.0) + j * scale / norm
        scales = composed
        part = np.zeros((frames, dim))
        for t in range(frames):
            for lag, scale in scales.items():
                part[t] += scale * feats[min(max(t + lag, 0), frames - 1)]
        parts.append(part)
    return np.concatenate(parts, axis=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_deltas(frames: int, dim: int, window: int, order: int) -> None:
    feats = np.random.default_rng(frames).normal(size=(frames, dim)).astype(np.float32)
    result = add_deltas(feats, window=window, order=order)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, deltas_by_loops(feats, window, order), atol=1e-5)


def test_cmvn_normalises() -> None:
    rng = np.random.default_rng(3)
    utterances = [rng.normal(5, 3, size=(n, 6)).astype(np.float32) for n in (30, 50)]
    stats = cmvn_stats(utterances)
    assert stats.shape == (2, 7) and stats[0, 6] == 80 and stats[1, 6] == 0
    normalised = np.concatenate([apply_cmvn(feats, stats, CmvnOptions(norm_vars=True)) for feats in utterances])
    np.testing.assert_allclose(normalised.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(normalised.std(axis=0), 1, atol=1e-5)
    centred = np.concatenate([apply_cmvn(feats, stats, CmvnOptions()) for feats in utterances])
    np.testing.assert_allclose(centred.mean(axis=0), 0, atol=1e-5)
    assert apply_cmvn(utterances[0], stats, CmvnOptions(norm_means=False)) is utterances[0]


def test_cmvn_refuses_what_does_not_fit() -> None:
    feats, stats = np.zeros((4, 6), np.float32), np.zeros((2, 7))
    with pytest.raises(DataError, match="key u: CMVN statistics of too few frames"):
        apply_cmvn(feats, stats, CmvnOptions(), key="u")
    with pytest.raises(DataError, match=r"CMVN statistics of shape \(2, 6\) for features of dimension 6"):
        apply_cmvn(feats, stats[:, 1:], CmvnOptions())
    with pytest.raises(DataError, match="features of dimension 5 after some of 6"):
        cmvn_stats([feats, feats[:, 1:]])
    with pytest.raises(ConfigError, match="--skip-dims has 6, and the features have columns 0 to 5"):
        apply_cmvn(feats, stats, CmvnOptions(skip_dims=(2, 6)))
    with pytest.raises(DataError, match="variances cannot be normalised without the means"):
        apply_cmvn(feats, stats, CmvnOptions(norm_means=False, norm_vars=True))


def test_cmvn_options_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cmvn_opts"
    assert read_cmvn_opts(path, CmvnOptions(norm_means=False)) == CmvnOptions(norm_means=False)
    path.write_text("\n")
    assert read_cmvn_opts(path, CmvnOptions(norm_means=False)) == CmvnOptions()
    for options in (CmvnOptions(), CmvnOptions(norm_vars=True, skip_dims=(13, 14))):
        path.write_text(f"{format_cmvn_opts(options)}\n")
        assert read_cmvn_opts(path, CmvnOptions(norm_means=False)) == options
    assert path.read_text() == "--norm-means=true --norm-vars=true --skip-dims=13:14\n"
    path.write_text("--norm-means=maybe\n")
    with pytest.raises(ConfigError, match="cmvn_opts: --norm-means: expected true or false, got 'maybe'"):
        read_cmvn_opts(path, CmvnOptions())


@pytest.mark.parametrize("norm_vars", [False, True])
def test_cmvn_is_the_loaders(tmp_path: Path, norm_vars: bool) -> None:
    """A model that was trained with --skip-dims is decoded with it: both sides normalise alike."""
    data_dir = tone_dir(tmp_path)
    make_mfcc(data_dir, CONFIGS[0], nj=1)
    make_cmvn(data_dir)
    data, options = DataDir(data_dir), CmvnOptions(norm_vars=norm_vars, skip_dims=(0, 11))
    raw = dict(read_features(data.file("feats.scp")))
    labels = {key: np.zeros(len(feats), np.int32) for key, feats in raw.items()}
    corpus = Corpus.open(
        data.file("feats.scp"), labels, cmvn_scp=data.file("cmvn.scp"), utt2spk=data.utt2spk, **options._asdict()
    )
    (tmp_path / "cmvn_opts").write_text(format_cmvn_opts(options))
    normalise = speaker_cmvn(data, read_cmvn_opts(tmp_path / "cmvn_opts", CmvnOptions()))
    for key, feats in raw.items():
        got = normalise(key, feats)
        np.testing.assert_allclose(got, corpus.features(key), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got[:, [0, 11]], feats[:, [0, 11]])
        assert np.abs(got[:, 1] - feats[:, 1]).max() > 0.1


@pytest.mark.parametrize("kind", ["fm", "c2", "c3", "c5"])
def test_reads_what_kaldi_wrote(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scp, text = golden(f"feats_{kind}.scp"), golden(f"feats_{kind}.txt")
    monkeypatch.chdir(scp.parent)
    matrices = dict(read_features(scp.name))
    for block in text.read_text().split("]")[:-1]:
        key, rows = block.split("[")
        expected = np.array([row.split() for row in rows.strip().split("\n")], dtype=np.float32)
        np.testing.assert_allclose(matrices.pop(key.strip()), expected, rtol=1e-6, atol=1e-6)
    assert not matrices


def test_reading_errors_name_file_and_key(tmp_path: Path) -> None:
    data_dir = tone_dir(tmp_path)
    make_mfcc(data_dir, CONFIGS[0], nj=1)
    make_cmvn(data_dir)
    scp = data_dir / "feats.scp"
    with pytest.raises(DataError, match=r"feats.scp, key other: no features for the utterance"):
        list(read_features(scp, ["other"]))
    archive = data_dir / "data" / "raw_mfcc_data.1.ark"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"feats.scp, key spk1-03: cannot read a matrix at .*raw_mfcc_data.1.ark:"):
        list(read_features(scp))
    archive.unlink()
    with pytest.raises(DataError, match=r"feats.scp, key spk0-00: no such file: .*raw_mfcc_data.1.ark"):
        list(read_features(scp))
    with pytest.raises(DataError, match=r"cmvn.scp, key spk9: no CMVN statistics for the speaker"):
        SpeakerCmvn(data_dir / "cmvn.scp", {"u": "spk9"}, CmvnOptions())("u", np.zeros((3, 13), np.float32))


@pytest.fixture(scope="module")
def kaldi_digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Strings of real digits with our 13 MFCCs and CMVN, and an environment with Kaldi's programs."""
    bins = kaldi_root() / "src" / "featbin"
    folder = tmp_path_factory.mktemp("kaldi")
    data = digit_strings(folder, train=6, test=3) / "train"
    make_mfcc(data, CONFIGS[0], nj=1)
    make_cmvn(data)
    yield data, os.environ | {"PATH": f"{bins}:{os.environ['PATH']}", "LC_ALL": "C"}


def run_kaldi(command: str, environment: dict[str, str], out: Path) -> dict[str, NDArray[np.float32]]:
    full = f"set -o pipefail; {command} ark,scp:{out}.ark,{out}.scp"
    done = subprocess.run(["bash", "-c", full], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(read_features(f"{out}.scp"))


@pytest.mark.kaldi
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_equal_to_kaldis_mfccs(path: Path, kaldi_digits: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    data, environment = kaldi_digits
    theirs = run_kaldi(f"compute-mfcc-feats --config={path} scp:{data}/wav.scp", environment, tmp_path / "k")
    config = MfccConfig.read(path)
    for key, entry in DataDir(data).wav_scp.items():
        wave = read_wave(entry)
        np.testing.assert_allclose(compute_mfcc(wave.channel(-1), wave.rate, config), theirs[key], atol=2e-3)


@pytest.mark.kaldi
@pytest.mark.parametrize(
    "options",
    [
        "--snip-edges=false",
        "--use-energy=true --energy-floor=0.1",
        "--use-energy=true --raw-energy=false",
        "--window-type=hamming --cepstral-lifter=0 --num-mel-bins=15 --frame-length=20",
        "--sample-frequency=6000 --allow-downsample=true --high-freq=-100",
        "--sample-frequency=16000 --allow-upsample=true --htk-compat=true",
        "--round-to-power-of-two=false --remove-dc-offset=false --preemphasis-coefficient=0.9",
    ],
)
def test_options_mean_what_they_mean_in_kaldi(
    options: str, kaldi_digits: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    data, environment = kaldi_digits
    conf = tmp_path / "mfcc.conf"
    conf.write_text("--sample-frequency=8000\n--dither=0\n" + options.replace(" ", "\n") + "\n")
    theirs = run_kaldi(f"compute-mfcc-feats --config={conf} scp:{data}/wav.scp", environment, tmp_path / "k")
    config = MfccConfig.read(conf)
    for key, entry in DataDir(data).wav_scp.items():
        wave = read_wave(entry)
        np.testing.assert_allclose(compute_mfcc(wave.channel(-1), wave.rate, config), theirs[key], atol=1e-2)


@pytest.mark.kaldi
def test_segments_are_cut_as_kaldi_cuts_them(kaldi_digits: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    data, environment = kaldi_digits
    corpus = DataDir(data)
    recording = corpus.utterances[0]
    length = corpus.utt2dur[recording]
    segments = {"a": (0.0, 0.5), "b": (0.12345, 1.0), "c": (length - 0.5, length + 0.3)}
    (tmp_path / "segments").write_text("".join(f"{k} {recording} {s} {e}\n" for k, (s, e) in segments.items()))
    (tmp_path / "wav.scp").write_text((data / "wav.scp").read_text())
    command = (
        f"extract-segments scp:{tmp_path}/wav.scp {tmp_path}/segments ark:- |"
        f" compute-mfcc-feats --config={CONFIGS[0]} ark:-"
    )
    theirs = run_kaldi(command, environment, tmp_path / "k")
    config = MfccConfig.read(CONFIGS[0])
    for key, samples, rate in read_utterances(DataDir(tmp_path), list(segments)):
        np.testing.assert_allclose(compute_mfcc(samples, rate, config), theirs[key], atol=2e-3)


@pytest.mark.kaldi
def test_equal_to_kaldis_cmvn_and_deltas(kaldi_digits: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    data, environment = kaldi_digits
    ours = DataDir(data)
    stats = f"compute-cmvn-stats --spk2utt=ark:{data}/spk2utt scp:{data}/feats.scp"
    run_kaldi(stats, environment, tmp_path / "cmvn")
    for speaker, place in DataDir(data).cmvn_scp.items():
        theirs = next(
            read_double_matrix(line.split()[1])
            for line in (tmp_path / "cmvn.scp").read_text().splitlines()
            if line.split()[0] == speaker
        )
        np.testing.assert_allclose(read_double_matrix(place), theirs, rtol=1e-12)
    for options in ("", "--norm-vars=true", "--norm-vars=true --skip-dims=0:11"):
        command = (
            f"apply-cmvn {options} --utt2spk=ark:{data}/utt2spk scp:{data}/cmvn.scp scp:{data}/feats.scp ark:- |"
            " add-deltas ark:-"
        )
        theirs_by_key = run_kaldi(command, environment, tmp_path / "d")
        cmvn = SpeakerCmvn(data / "cmvn.scp", ours.utt2spk, parse_cmvn_opts(options))
        for key, feats in read_features(data / "feats.scp"):
            np.testing.assert_allclose(add_deltas(cmvn(key, feats)), theirs_by_key[key], atol=1e-4)
