"""Kaldi's MFCC configuration files (``--name=value`` lines), for kaldi-native-fbank.

The names and defaults are those of Kaldi's compute-mfcc-feats, but for `dither`, which is 0 here: the
same audio gives the same features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kaldi_mpi.embedded.datadir import PathLike
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.log import logger

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
