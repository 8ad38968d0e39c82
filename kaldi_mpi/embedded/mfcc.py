"""MFCC extraction into compressed archives: what steps/make_mfcc.sh does, without Kaldi.

``kaldi-mpi make-mfcc --nj 2 --mfcc-config conf/mfcc_hires.conf DATA_DIR [LOG_DIR [MFCC_DIR]]`` writes
MFCC_DIR/raw_mfcc_NAME.JOB.{ark,scp} and, in DATA_DIR, feats.scp, utt2num_frames, utt2dur, frame_shift and
conf/mfcc.conf, where steps/make_mfcc.sh puts them and with equal values.

A configuration file holds ``--name=value`` lines with the names and defaults of Kaldi's compute-mfcc-feats, but
for `dither`, which is 0 here: the same audio gives the same features.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded.datadir import DataDir, PathLike, make_directories, write_table
from kaldi_mpi.embedded.features import archive_writer
from kaldi_mpi.embedded.jobs import split_jobs
from kaldi_mpi.embedded.wave import read_utterances, resample
from kaldi_mpi.errors import ConfigError, DataError, KaldiMpiError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

_WINDOWS = ("povey", "hamming", "hanning", "rectangular", "sine", "blackman")
# Options that change no feature.
_WITHOUT_EFFECT = ("debug-mel", "max-feature-vectors", "verbose", "print-args")
# Options of Kaldi's program that its recipes never put into such a file, and that nothing here reads.
_NOT_SUPPORTED = (
    "vtln-map",
    "vtln-warp",
    "utt2spk",
    "subtract-mean",
    "min-duration",
    "output-format",
    "write-utt2dur",
    "config",
)


@dataclass(frozen=True)
class MfccConfig:
    """Settings of the MFCC extraction; frequencies in Hz, times in milliseconds.

    `channel` -1 means mono is expected; audio of another rate than `sample_frequency` is refused unless
    `allow_downsample` or `allow_upsample` lets it be resampled.
    """

    sample_frequency: float = 16000.0
    frame_length: float = 25.0
    frame_shift: float = 10.0
    preemphasis_coefficient: float = 0.97
    remove_dc_offset: bool = True
    dither: float = 0.0
    window_type: str = "povey"
    blackman_coeff: float = 0.42
    round_to_power_of_two: bool = True
    snip_edges: bool = True
    num_mel_bins: int = 23
    low_freq: float = 20.0
    high_freq: float = 0.0
    vtln_low: float = 100.0
    vtln_high: float = -500.0
    num_ceps: int = 13
    use_energy: bool = True
    energy_floor: float = 0.0
    raw_energy: bool = True
    cepstral_lifter: float = 22.0
    htk_compat: bool = False
    channel: int = -1
    allow_downsample: bool = False
    allow_upsample: bool = False

    @classmethod
    def read(cls, path: PathLike) -> MfccConfig:
        """Read a configuration file.

        Raises:
            ConfigError: a line that is no option, an unknown option, a value that does not fit; the
                message names the file and the line.
            DataError: no such file.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror}", file=str(path)) from error
        values: dict[str, Any] = {}
        for number, line in enumerate(lines, start=1):
            text = line.split("#", 1)[0].strip()
            if text:
                try:
                    values.update(_parse_option(text))
                except ValueError as error:
                    raise ConfigError(f"{path}, line {number}: {error}") from None
        try:
            config = cls(**values)
            config._check()
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
        if config.dither:
            logger.warning("%s: --dither=%g is not applied; features are computed without", path, config.dither)
        return config

    def _check(self) -> None:
        nyquist = self.sample_frequency / 2
        high = self.high_freq if self.high_freq > 0 else nyquist + self.high_freq
        if not 0 <= self.low_freq < high <= nyquist:
            raise ValueError(
                f"mel bins from {self.low_freq:g} to {high:g} Hz do not fit below a Nyquist of {nyquist:g} Hz"
            )
        if not 1 <= self.num_ceps <= self.num_mel_bins:
            raise ValueError(f"--num-ceps={self.num_ceps} does not fit --num-mel-bins={self.num_mel_bins}")
        if self.frame_shift <= 0 or self.frame_length < self.frame_shift / 10:
            raise ValueError("frame length and shift must be positive")
        if self.num_mel_bins < 3:
            raise ValueError("at least 3 mel bins are needed")
        if self.window_type not in _WINDOWS:
            raise ValueError(f"--window-type={self.window_type} is none of {', '.join(_WINDOWS)}")

    def options(self) -> Any:
        """The same settings as ``kaldi_native_fbank.MfccOptions``."""
        import kaldi_native_fbank

        options = kaldi_native_fbank.MfccOptions()
        frame, mel = options.frame_opts, options.mel_opts
        frame.samp_freq = self.sample_frequency
        frame.frame_shift_ms, frame.frame_length_ms = self.frame_shift, self.frame_length
        frame.dither, frame.preemph_coeff = 0.0, self.preemphasis_coefficient
        frame.remove_dc_offset, frame.window_type = self.remove_dc_offset, self.window_type
        frame.round_to_power_of_two, frame.blackman_coeff = self.round_to_power_of_two, self.blackman_coeff
        frame.snip_edges = self.snip_edges
        mel.num_bins, mel.low_freq, mel.high_freq = self.num_mel_bins, self.low_freq, self.high_freq
        options.num_ceps, options.use_energy = self.num_ceps, self.use_energy
        options.energy_floor, options.raw_energy = self.energy_floor, self.raw_energy
        options.cepstral_lifter, options.htk_compat = self.cepstral_lifter, self.htk_compat
        return options


def _number(value: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _truth(value: str) -> bool:
    # What Kaldi's ParseOptions takes; an option without '=' is true.
    lower = value.lower()
    if lower in ("true", "t", "1", ""):
        return True
    if lower in ("false", "f", "0"):
        return False
    raise ValueError(value)


_CONVERTERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "bool": (_truth, "true or false"),
    "int": (int, "a whole number"),
    "float": (_number, "a number"),
    "str": (str, "a word"),
}


def _parse_option(text: str) -> dict[str, Any]:
    if not text.startswith("--"):
        raise ValueError(f"expected an option of the form --name=value, got {text!r}")
    name, equals, value = text[2:].partition("=")
    name, value = name.strip().lower().replace("_", "-"), value.strip()
    if name in _WITHOUT_EFFECT:
        return {}
    if name in _NOT_SUPPORTED:
        raise ValueError(f"--{name} is not supported in a feature configuration")
    kinds = {field.name: str(field.type) for field in fields(MfccConfig)}
    attribute = name.replace("-", "_")
    if attribute not in kinds:
        raise ValueError(f"unknown option --{name}")
    convert, expected = _CONVERTERS[kinds[attribute]]
    try:
        if not equals and kinds[attribute] != "bool":
            raise ValueError
        return {attribute: convert(value)}
    except ValueError:
        raise ValueError(f"--{name} needs {expected}, got {value!r}") from None


def compute_mfcc(
    samples: NDArray[Any],
    rate: int,
    config: MfccConfig,
    *,
    file: str | None = None,
    key: str | None = None,
) -> NDArray[np.float32]:
    """MFCCs of one utterance, equal to compute-mfcc-feats --dither=0 within float32 rounding.

    Args:
        samples: (n,) audio in the scale of 16-bit integers.
        rate: sampling rate in Hz.
        config: the settings.
        file: what to name in errors.
        key: the utterance, for errors.

    Returns:
        (T, config.num_ceps) float32.

    Raises:
        DataError: a sampling rate that is not the configured one (and may not be changed), or audio
            shorter than one frame.
    """
    import kaldi_native_fbank

    wanted = int(config.sample_frequency)
    if rate != wanted:
        allowed = config.allow_downsample if rate > wanted else config.allow_upsample
        if not allowed:
            option = "--allow-downsample" if rate > wanted else "--allow-upsample"
            raise DataError(
                f"the audio has {rate} Hz, the features are configured for {wanted} Hz ({option}=true in "
                "the feature configuration lets it be resampled)",
                file=file,
                key=key,
            )
        samples = resample(samples, rate, wanted)
    extractor = kaldi_native_fbank.OnlineMfcc(config.options())
    extractor.accept_waveform(wanted, np.asarray(samples, dtype=np.float32))
    extractor.input_finished()
    if not extractor.num_frames_ready:
        raise DataError(f"the audio ({len(samples) / wanted:.3f} s) is shorter than one frame", file=file, key=key)
    return np.stack([extractor.get_frame(frame) for frame in range(extractor.num_frames_ready)])


@dataclass(frozen=True)
class _Job:
    data: str
    utterances: list[str]
    config: MfccConfig
    archive: str  # without the extension
    log: str


def _run_job(job: _Job) -> list[tuple[str, int, float]]:
    """Extract one part; returns (utterance, frames, seconds) and leaves the archive, its scp and a log."""
    import kaldi_native_io

    data, done = DataDir(job.data), []
    with open(job.log, "w", encoding="utf-8") as log:
        try:
            with archive_writer(kaldi_native_io.CompressedMatrixWriter, job.archive) as writer:
                for utterance, samples, rate in read_utterances(data, job.utterances, channel=job.config.channel):
                    feats = compute_mfcc(samples, rate, job.config, file=data.file("wav.scp"), key=utterance)
                    writer.write(utterance, feats, kaldi_native_io.CompressionMethod.kSpeechFeature)
                    done.append((utterance, len(feats), len(samples) / rate))
        except KaldiMpiError as error:
            log.write(f"ERROR {error}\n")
            raise
        log.write(f"LOG Done {len(done)} out of {len(job.utterances)} utterances.\n")
    return done


def make_mfcc(
    data_dir: PathLike,
    config_file: PathLike,
    *,
    nj: int = 2,
    log_dir: PathLike | None = None,
    mfcc_dir: PathLike | None = None,
) -> None:
    """Extract the MFCCs of a data directory in `nj` processes; see the module's text for the files.

    The values do not depend on `nj`. ``feats.scp`` is written last: where it is, all is there.

    Args:
        data_dir: the data directory; needs wav.scp and utt2spk.
        config_file: an MFCC configuration in Kaldi's form.
        nj: number of processes, and of archives.
        log_dir: where the jobs' logs go, DATA_DIR/log by default.
        mfcc_dir: where the archives go, DATA_DIR/data by default.

    Raises:
        DataError: bad data or audio (see `read_utterances` and `compute_mfcc`).
        ConfigError: a bad configuration file, or fewer utterances than jobs.
    """
    data = DataDir(data_dir)
    data.validate(text=False)
    config = MfccConfig.read(config_file)
    logs, archives = Path(log_dir or data.path / "log"), Path(mfcc_dir or data.path / "data").resolve()
    make_directories(logs, archives)
    for stale in ("feats.scp", "cmvn.scp", "utt2num_frames", "utt2dur"):
        (data.path / stale).unlink(missing_ok=True)

    name = data.path.resolve().name
    work = [
        _Job(
            data=str(data.path),
            utterances=part,
            config=config,
            archive=str(archives / f"raw_mfcc_{name}.{number}"),
            log=str(logs / f"make_mfcc_{name}.{number}.log"),
        )
        for number, part in enumerate(split_jobs(data.utterances, nj), start=1)
    ]
    done = _run_all(work)

    scp = "".join(Path(f"{job.archive}.scp").read_text(encoding="utf-8") for job in work)
    write_table(data.path / "utt2num_frames", {utterance: str(frames) for utterance, frames, _ in done})
    write_table(data.path / "utt2dur", {utterance: f"{seconds:.7g}" for utterance, _, seconds in done})
    with atomic_write(data.path / "frame_shift", "w") as stream:
        stream.write(f"{config.frame_shift / 1000:.3g}\n")
    (data.path / "conf").mkdir(exist_ok=True)
    shutil.copyfile(config_file, data.path / "conf" / "mfcc.conf")
    with atomic_write(data.path / "feats.scp", "w") as stream:
        stream.write(scp)
    hours = sum(seconds for _, _, seconds in done) / 3600
    logger.info("%s: MFCCs of %d utterances, %.2f h", data.path, len(done), hours)


def _run_all(work: list[_Job]) -> list[tuple[str, int, float]]:
    if len(work) == 1:
        return _run_job(work[0])
    # Fresh processes, not forked ones: the caller may hold threads and MPI.
    with ProcessPoolExecutor(len(work), mp_context=get_context("spawn")) as pool:
        try:
            return [line for part in pool.map(_run_job, work) for line in part]
        except BrokenProcessPool as error:
            raise DataError(
                "a process of the feature extraction died (killed, or out of memory)", file=work[0].data
            ) from error


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi make-mfcc``; takes the options and arguments of steps/make_mfcc.sh."""
    parser = Parser(prog="kaldi-mpi make-mfcc", description="MFCCs of a Kaldi data directory")
    parser.add_argument("data_dir")
    parser.add_argument("log_dir", nargs="?", help="default: DATA_DIR/log")
    parser.add_argument("mfcc_dir", nargs="?", help="default: DATA_DIR/data")
    parser.add_argument("--nj", type=int, default=4, help="number of processes (default: %(default)s)")
    parser.add_argument("--mfcc-config", default="conf/mfcc.conf", help="default: %(default)s")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes are the parallelism
    make_mfcc(options.data_dir, options.mfcc_config, nj=options.nj, log_dir=options.log_dir, mfcc_dir=options.mfcc_dir)
