"""What a training leaves behind: an nnet3 model directory that Kaldi's scripts use as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.cmvn_options import CmvnOptions, format_cmvn_opts
from kaldi_mpi.formats.tokens import Writer
from kaldi_mpi.formats.transition import TransitionModel
from kaldi_mpi.learner.options import DataOptions
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.nnet3 import make_am, write_am


def write_cmvn_opts(folder: Path, cmvn: CmvnOptions) -> None:
    """DIR/cmvn_opts: always written, since Kaldi's scripts disagree on what its absence means."""
    with atomic_write(folder / "cmvn_opts", "w") as stream:
        stream.write(f"{format_cmvn_opts(cmvn)}\n")


def write_subsampling(folder: Path, factor: int) -> None:
    """DIR/frame_subsampling_factor: decoding computes outputs at so many frames from each other."""
    with atomic_write(folder / "frame_subsampling_factor", "w") as stream:
        stream.write(f"{factor}\n")


def write_num_iterations(folder: Path, number: int) -> None:
    """DIR/num_iters, which chain/train.py leaves."""
    with atomic_write(folder / "num_iters", "w") as stream:
        stream.write(f"{number}\n")


def copy_alignment_files(folder: Path, ali_dir: Path) -> None:
    """The files of the alignment directory that a model directory needs too: tree, phones.txt, num_jobs."""
    for name in ("tree", "phones.txt", "num_jobs"):
        if name == "phones.txt" and not (ali_dir / name).exists():
            continue  # optional in Kaldi's align dirs as well
        _copy(ali_dir / name, folder / name)


def copy_data_properties(folder: Path, options: DataOptions) -> None:
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
            _copy(source, folder / name)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as original, atomic_write(target) as copy:
        shutil.copyfileobj(original, copy)


def write_final_model(
    path: Path, model: AcousticModel, transitions: TransitionModel, priors: NDArray[np.float64], binary: bool
) -> None:
    """final.mdl: transitions trained on the alignments, the trained network, the priors of its pdf-ids.

    Raises:
        DataError: it could not be written; an earlier final.mdl is then still whole.
    """
    write_am(make_am(model, transitions, priors.astype(np.float32)), path, binary=binary)
    logger.info("wrote %s", path)


def write_average_output(path: Path, average: NDArray[np.float64]) -> None:
    """post.final.vec: the mean of a raw network's outputs, as probabilities, (K,)."""
    with atomic_write(path) as stream:
        Writer(stream, binary=True).vector(average.astype(np.float32))
    logger.info("wrote %s", path)
