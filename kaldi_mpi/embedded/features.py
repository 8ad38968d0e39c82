"""MFCC extraction into compressed archives: what steps/make_mfcc.sh does, without Kaldi.

    python -m kaldi_mpi.embedded.features --nj 2 --mfcc-config conf/mfcc_hires.conf DATA_DIR [LOG_DIR [MFCC_DIR]]

writes MFCC_DIR/raw_mfcc_NAME.JOB.{ark,scp} and, in DATA_DIR, feats.scp, utt2num_frames, utt2dur,
frame_shift and conf/mfcc.conf, where steps/make_mfcc.sh puts them and with equal values.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded.command import run_command
from kaldi_mpi.embedded.datadir import DataDir, PathLike, make_directories, write_table
from kaldi_mpi.embedded.feature_io import add_deltas, apply_cmvn, archive_writer, read_features
from kaldi_mpi.embedded.mfcc_config import MfccConfig
from kaldi_mpi.embedded.wave import read_utterances, resample
from kaldi_mpi.errors import ConfigError, DataError, KaldiMpiError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.log import logger

__all__ = ["add_deltas", "apply_cmvn", "compute_mfcc", "make_mfcc", "read_features", "split_jobs"]


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


def split_jobs(keys: Sequence[str], jobs: int) -> list[list[str]]:
    """Cut keys into consecutive parts as utils/split_scp.pl does; sizes differ by one at most.

    Raises:
        ConfigError: fewer keys than jobs.
    """
    if jobs < 1 or len(keys) < jobs:
        raise ConfigError(f"--nj {jobs}: there are {len(keys)} utterances to share out")
    size, larger = divmod(len(keys), jobs)
    starts = [job * size + min(job, larger) for job in range(jobs + 1)]
    return [list(keys[first:last]) for first, last in itertools.pairwise(starts)]


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
    jobs: int = 2,
    log_dir: PathLike | None = None,
    mfcc_dir: PathLike | None = None,
) -> None:
    """Extract the MFCCs of a data directory in `jobs` processes; see the module's text for the files.

    The values do not depend on `jobs`. ``feats.scp`` is written last: where it is, all is there.

    Args:
        data_dir: the data directory; needs wav.scp and utt2spk.
        config_file: an MFCC configuration in Kaldi's form.
        jobs: number of processes, and of archives.
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
        for number, part in enumerate(split_jobs(data.utterances, jobs), start=1)
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


def main() -> None:
    """Command line; takes the options and arguments of steps/make_mfcc.sh."""
    parser = argparse.ArgumentParser(
        prog="python -m kaldi_mpi.embedded.features", description="MFCCs of a Kaldi data directory"
    )
    parser.add_argument("data_dir")
    parser.add_argument("log_dir", nargs="?", help="default: DATA_DIR/log")
    parser.add_argument("mfcc_dir", nargs="?", help="default: DATA_DIR/data")
    parser.add_argument("--nj", type=int, default=4, help="number of processes (default: %(default)s)")
    parser.add_argument("--mfcc-config", default="conf/mfcc.conf", help="default: %(default)s")
    options = parser.parse_args()
    make_mfcc(
        options.data_dir,
        options.mfcc_config,
        jobs=options.nj,
        log_dir=options.log_dir,
        mfcc_dir=options.mfcc_dir,
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_command(main)
