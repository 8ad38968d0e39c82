"""Log-likelihoods of HMM states given the features of an utterance: what a decoder takes from a model.

A `Scorer` gives a (T, num_pdfs) float32 matrix per utterance: GMM likelihoods, or a neural network's
log-posteriors less the log-priors. Everything after that matrix is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import kaldi_native_io
import numpy as np
from numpy.typing import NDArray

from kaldi_mpi.embedded.cmvn import Normalise, read_cmvn_opts, speaker_cmvn
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.features import add_deltas
from kaldi_mpi.embedded.gmm_model import read_gmm_model
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import read_number
from kaldi_mpi.formats.cmvn_options import CmvnOptions
from kaldi_mpi.formats.tokens import Reader
from kaldi_mpi.formats.transition import read_transitions

if TYPE_CHECKING:
    import torch

    from kaldi_mpi.models import AcousticModel

FloatMatrix = NDArray[np.float32]
Scorer = Callable[[str, FloatMatrix], FloatMatrix]
IvectorOf = Callable[[int, int], "torch.Tensor"]  # of the chunk of `count` frames from `begin` on: (ivector_dim,)


@dataclass(frozen=True)
class ChunkOptions:
    """How a network is evaluated, in the terms of steps/nnet3/decode.sh.

    Attributes:
        frames_per_chunk: output frames computed at once, the recurrence starting anew in each chunk; 0 means
            the whole utterance.
        extra_left_context: input frames before a chunk, beyond what the network needs itself.
        extra_right_context: the same after a chunk.
        extra_left_context_initial: for the first chunk; negative means as for the others.
        extra_right_context_final: for the last chunk.
        online_ivector_dir: ``ivector_online.scp`` and ``ivector_period``, for networks that take i-vectors.
    """

    frames_per_chunk: int = 0
    extra_left_context: int = 0
    extra_right_context: int = 0
    extra_left_context_initial: int = -1
    extra_right_context_final: int = -1
    online_ivector_dir: str | None = None


def load_scorer(
    model: str | Path, data: DataDir, chunks: ChunkOptions | None = None
) -> tuple[Scorer, NDArray[np.int32]]:
    """A scorer for a GMM or nnet3 model, and the pdf of each transition-id.

    The model's directory may hold ``cmvn_opts``. Without, networks get features as they are and GMMs
    apply-cmvn's defaults, as in Kaldi's decoding scripts. GMMs get delta features.

    Args:
        model: a ``.mdl`` file.
        data: the data directory that is to be decoded.
        chunks: how to evaluate a network.

    Returns:
        the scorer; (num_transition_ids + 1,) int32, element 0 unused.

    Raises:
        DataError: the model cannot be read, or is of neither kind.
    """
    path = Path(model)
    reader = Reader(path)
    transitions = read_transitions(reader)
    kind = reader.peek()
    cmvn_opts = path.parent / "cmvn_opts"
    if kind == "<DIMENSION>":
        cmvn = read_cmvn_opts(cmvn_opts, CmvnOptions())
        scorer = _gmm_scorer(path, speaker_cmvn(data, cmvn))
    elif kind == "<Nnet3>":
        cmvn = read_cmvn_opts(cmvn_opts, CmvnOptions(norm_means=False))
        scorer = _nnet_scorer(path, speaker_cmvn(data, cmvn), chunks or ChunkOptions())
    else:
        raise DataError(f"neither GMMs nor an nnet3 network but {kind}", file=str(model))
    return scorer, transitions.tid_to_pdf


def _gmm_scorer(path: Path, normalise: Normalise) -> Scorer:
    if (path.parent / "final.mat").exists():
        raise DataError("systems with an LDA transform need Kaldi's own scripts", file=str(path.parent))
    gmms = read_gmm_model(path.parent / "tree", path).gmms

    def score(utterance: str, feats: FloatMatrix) -> FloatMatrix:
        spliced = add_deltas(normalise(utterance, feats))
        if spliced.shape[1] != gmms.dim:
            raise DataError(
                f"{feats.shape[1]} features and their deltas make {spliced.shape[1]} columns, the model has {gmms.dim}",
                key=utterance,
            )
        return gmms.log_likelihoods(spliced)

    return score


def _nnet_scorer(path: Path, normalise: Normalise, chunks: ChunkOptions) -> Scorer:
    import torch

    from kaldi_mpi.nnet3 import read_am, to_torch

    am = read_am(path)
    network = to_torch(am.nnet).eval()
    ivectors = _online_ivectors(path, network.ivector_dim, chunks.online_ivector_dir)
    with np.errstate(divide="ignore"):
        log_priors = np.log(am.priors) if len(am.priors) else np.zeros(1, dtype=np.float32)

    def score(utterance: str, feats: FloatMatrix) -> FloatMatrix:
        if feats.shape[1] != network.input_dim:
            raise DataError(
                f"features have {feats.shape[1]} columns, the network takes {network.input_dim}", key=utterance
            )
        rows = torch.from_numpy(np.ascontiguousarray(normalise(utterance, feats), dtype=np.float32))
        ivector = None if ivectors is None else ivectors(utterance)
        if chunks.frames_per_chunk:
            output = in_chunks(network, rows, chunks, ivector)
        else:
            output = network.whole_utterance(rows, None if ivector is None else ivector(0, len(rows)))
        return np.asarray(output.numpy() - log_priors, dtype=np.float32)

    return score


def _online_ivectors(path: Path, dim: int, folder: str | None) -> Callable[[str], IvectorOf] | None:
    """By utterance, what gives the i-vector of a chunk; None for a network without.

    Raises:
        DataError: a file is missing or malformed, or the i-vectors have another dimension than the network's.
        ConfigError: the network takes i-vectors and there are none, or takes none.
    """
    import torch

    if bool(dim) != bool(folder):
        wanted = f"takes i-vectors of dimension {dim}" if dim else "takes no i-vectors"
        raise ConfigError(
            f"{path}: the network {wanted}: --online-ivector-dir {'is needed' if dim else 'is of no use'}"
        )
    if not folder:
        return None
    scp = Path(folder) / "ivector_online.scp"
    period = read_number(Path(folder) / "ivector_period", what="a number of frames", low=1, high=2**31 - 1)
    if not scp.is_file():
        raise DataError("no such file", file=str(scp))
    reader = kaldi_native_io.RandomAccessFloatMatrixReader(f"scp:{scp}")

    def of_utterance(utterance: str) -> IvectorOf:
        if utterance not in reader:
            raise DataError("the utterance has no i-vectors", file=str(scp), key=utterance)
        rows = torch.from_numpy(np.array(reader[utterance], dtype=np.float32))
        if rows.shape[1] != dim:
            raise DataError(
                f"i-vectors of dimension {rows.shape[1]}, the network takes {dim}", file=str(scp), key=utterance
            )
        # The row in the middle of the chunk, as nnet3-latgen-faster takes it.
        return lambda begin, count: rows[min((begin + (count - 1) // 2) // period, len(rows) - 1)]

    return of_utterance


def in_chunks(
    network: AcousticModel, feats: torch.Tensor, chunks: ChunkOptions, ivector: IvectorOf | None = None
) -> torch.Tensor:
    """The network's output (T, K) for features (T, D), chunk by chunk as nnet3-latgen-faster computes it.

    Each chunk starts from a zero recurrent state and sees `chunks`'s extra context, edge frames being
    repeated beyond the ends of the utterance; `ivector` gives its i-vector.
    """
    import torch

    if chunks.frames_per_chunk < 1:
        raise ConfigError(f"frames-per-chunk is {chunks.frames_per_chunk}")
    total = feats.shape[0]
    outputs = []
    for begin in range(0, total, chunks.frames_per_chunk):
        count = min(chunks.frames_per_chunk, total - begin)
        left, right = chunks.extra_left_context, chunks.extra_right_context
        if begin == 0 and chunks.extra_left_context_initial >= 0:
            left = chunks.extra_left_context_initial
        if begin + count == total and chunks.extra_right_context_final >= 0:
            right = chunks.extra_right_context_final
        left += network.left_context
        right += network.right_context
        times = torch.arange(begin - left, begin + count + right).clamp(0, total - 1)
        with torch.no_grad():
            ivectors = None if ivector is None else ivector(begin, count).unsqueeze(0)
            outputs.append(network(feats[times].unsqueeze(0), -left, count, ivectors=ivectors)[0])
    return torch.cat(outputs)
