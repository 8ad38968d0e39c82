"""Features of a GMM system: CMVN by speaker with the options stored in ``cmvn_opts``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.feature_io import SpeakerCmvn
from kaldi_mpi.errors import DataError

Normalise = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class CmvnOptions:
    """apply-cmvn's options, with its defaults."""

    norm_means: bool = True
    norm_vars: bool = False

    @classmethod
    def parse(cls, text: str, *, file: str) -> CmvnOptions:
        """Read the contents of a ``cmvn_opts`` file (an empty one means the defaults).

        Raises:
            DataError: another option, or a value that is neither true nor false.
        """
        values = {"norm-means": True, "norm-vars": False}
        for option in text.split():
            name, _, value = option.removeprefix("--").partition("=")
            if not option.startswith("--") or name not in values or value not in ("true", "false"):
                raise DataError(f"cannot use the CMVN option {option}", file=file)
            values[name] = value == "true"
        return cls(values["norm-means"], values["norm-vars"])

    @classmethod
    def read(cls, path: str | Path, default: CmvnOptions) -> CmvnOptions:
        """Read a ``cmvn_opts`` file; `default` where there is none."""
        path = Path(path)
        return cls.parse(path.read_text(encoding="utf-8"), file=str(path)) if path.exists() else default


def speaker_cmvn(data: DataDir, options: CmvnOptions) -> Normalise:
    """A function that normalises an utterance's features; see `SpeakerCmvn`.

    ``cmvn.scp`` is needed only where something is to be normalised.
    """
    if not options.norm_means and not options.norm_vars:
        return lambda utterance, feats: feats
    return SpeakerCmvn(data.file("cmvn.scp"), data.utt2spk, norm_means=options.norm_means, norm_vars=options.norm_vars)
