"""Cepstral mean and variance normalisation by speaker: from cmvn.scp to offsets and scales."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.scp import read_table
from kaldi_mpi.loader.archives import Archives
from kaldi_mpi.loader.native import borrow, ffi, lib, new_error, raise_data_error
from kaldi_mpi.loader.tables import locate


def speakers_of(utterances: Sequence[str], utt2spk: str | os.PathLike[str] | Mapping[str, str] | None) -> list[str]:
    """The speaker of each utterance; without `utt2spk` each utterance is its own, as in apply-cmvn.

    Raises:
        DataError: an utterance has no speaker; names the file and the utterance.
    """
    if utt2spk is None:
        return list(utterances)
    table: Mapping[str, str] = utt2spk if isinstance(utt2spk, Mapping) else read_table(utt2spk)
    name = "utt2spk" if isinstance(utt2spk, Mapping) else os.fspath(utt2spk)
    for utterance in utterances:
        if utterance not in table:
            raise DataError("the utterance has no speaker", file=name, key=utterance)
    return [table[utterance] for utterance in utterances]


def read_norms(
    cmvn_scp: str | os.PathLike[str],
    speakers: Sequence[str],
    dim: int,
    *,
    norm_vars: bool,
    skip_dims: Sequence[int] = (),
) -> NDArray[np.float32]:
    """Offsets and scales of some speakers: normalised = x * scale + offset.

    Args:
        cmvn_scp: script file (or rspecifier, see `tables.locate`) of matrices 2 x (dim + 1) as
            compute-cmvn-stats writes them: sums and count, sums of squares.
        speakers: the keys wanted.
        dim: the features' dimension.
        norm_vars: scale to unit variance too; without it all scales are 1.
        skip_dims: columns that are left as they are: offset 0, scale 1.

    Returns:
        Array (speakers, 2, dim): row 0 offsets, row 1 scales; in the arithmetic of Kaldi's apply-cmvn.

    Raises:
        DataError: a speaker without statistics, of another dimension, or with a count below 1.
        ConfigError: a column to skip that the features do not have.
    """
    for column in skip_dims:
        if not 0 <= column < dim:
            raise ConfigError(f"--skip-dims has {column}, and the features have columns 0 to {dim - 1}")
    name = os.fspath(cmvn_scp)
    archives = Archives()
    locations = locate(name, archives, wanted=set(speakers), doubles=True).locations
    norms = np.empty((len(speakers), 2, dim), dtype=np.float32)
    matrix = ffi.new("km_matrix *")
    for speaker, norm in zip(speakers, norms, strict=True):
        if speaker not in locations:
            raise DataError("no normalisation statistics for this speaker", file=name, key=speaker)
        location = locations[speaker]
        index = archives.open(location.path, named_in=name, key=speaker)
        archives.open_matrix(index, location.offset, matrix, key=speaker)
        if matrix.cols != dim + 1 or matrix.rows != 2:
            raise DataError(
                f"normalisation statistics are {matrix.rows} x {matrix.cols}, and features of "
                f"dimension {dim} need 2 x {dim + 1}",
                file=location.path,
                key=speaker,
                offset=location.offset,
            )
        stats = archives.doubles(index, matrix, key=speaker)
        if skip_dims:  # as Kaldi does it: statistics of mean 0 and variance 1
            stats[:, list(skip_dims)] = np.array([[0.0], [stats[0, dim]]])
        error = new_error()
        if lib.km_cmvn_norms(
            borrow(stats, "double", np.float64), dim, norm_vars, borrow(norm, "float", np.float32), error
        ):
            error.offset = location.offset
            raise_data_error(error, file=location.path, key=speaker)
    return norms
