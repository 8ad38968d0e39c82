"""What a training leaves behind: an nnet3 model directory that Kaldi's scripts use as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.transition import TransitionModel
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.nnet3 import make_am, write_am


def write_cmvn_opts(options: TrainOptions) -> None:
    """DIR/cmvn_opts: always written, since Kaldi's scripts disagree on what its absence means."""
    with atomic_write(Path(options.dir) / "cmvn_opts", "w") as stream:
        means, variances = (str(flag).lower() for flag in (options.cmvn.norm_means, options.cmvn.norm_vars))
        skip = f" --skip-dims={':'.join(map(str, options.cmvn.skip_dims))}" if options.cmvn.skip_dims else ""
        stream.write(f"--norm-means={means} --norm-vars={variances}{skip}\n")


def copy_alignment_files(options: TrainOptions) -> None:
    """The files of the alignment directory that a model directory needs too: tree, phones.txt, num_jobs."""
    for name in ("tree", "phones.txt", "num_jobs"):
        source = Path(options.ali_dir) / name
        if name == "phones.txt" and not source.exists():
            continue  # optional in Kaldi's align dirs as well
        with open(source, "rb") as original, atomic_write(Path(options.dir) / name) as copy:
            shutil.copyfileobj(original, copy)


def copy_data_properties(options: TrainOptions) -> None:
    """What decoding must know of the data: the i-vectors' extractor, or all that an egs directory says.

    The files are those that train_rnn.py copies in copy_egs_properties_to_exp_dir.
    """
    found: dict[str, Path] = {}
    if options.egs_dir is not None:
        egs = Path(options.egs_dir)
        names = ("cmvn_opts", "splice_opts", "info/final.ie.id", "final.mat", "global_cmvn.stats", "online_cmvn")
        found = {Path(name).name: egs / name for name in names}
    elif options.online_ivector_dir is not None:
        found = {"final.ie.id": Path(options.online_ivector_dir) / "final.ie.id"}
    for name, source in found.items():
        if source.is_file():
            with open(source, "rb") as original, atomic_write(Path(options.dir) / name) as copy:
                shutil.copyfileobj(original, copy)


def write_final_model(
    options: TrainOptions, model: AcousticModel, transitions: TransitionModel, priors: NDArray[np.float64]
) -> Path:
    """DIR/final.mdl: the alignment model's transitions, the trained network, the priors of its pdf-ids.

    Raises:
        DataError: it could not be written; an earlier final.mdl is then still whole.
    """
    path = Path(options.dir) / "final.mdl"
    write_am(make_am(model, transitions, priors.astype(np.float32)), path, binary=options.binary)
    logger.info("wrote %s", path)
    return path
