"""What a training starts from: its files, its model, its device.

Every rank reads the same files and makes the same choices from the same seed, so nothing need be sent.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.formats.tokens import read_matrix, write_matrix
from kaldi_mpi.formats.transition import TransitionModel, read_transition_model
from kaldi_mpi.learner.data import DIAGNOSTIC_EGS, Data, check_egs, extra_context, open_data, outer_context
from kaldi_mpi.learner.evaluate import Pass, lda_statistics
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.learner.reading import Reading
from kaldi_mpi.loader import Chunking, ChunkShape, Examples, MinibatchRule, PdfAlignments
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel, Config, build_model, missing_transforms, parse_xconfig, transform_files
from kaldi_mpi.models.config import ComponentNode, InputNode
from kaldi_mpi.transport.world import World

__all__ = ["Data", "open_data"]


def check_inputs(options: TrainOptions) -> None:
    """Look for every file that the training will need, before any work.

    Raises:
        DataError: a directory or file is missing; names it and the option that gave it.
    """
    needed = {}
    if options.egs_dir is not None:
        info = [f"info/{name}" for name in ("feat_dim", "num_archives", "left_context", "right_context")]
        needed["--egs.dir"] = (options.egs_dir, [*info, *DIAGNOSTIC_EGS])
    elif options.feat_dir is not None:
        cmvn = ["cmvn.scp", "utt2spk"] if options.cmvn.norm_means or options.cmvn.norm_vars else []
        needed["--feat-dir"] = (options.feat_dir, ["feats.scp", *cmvn])
        if options.online_ivector_dir is not None:
            names = ["ivector_online.scp", "ivector_period"]
            needed["--feat.online-ivector-dir"] = (options.online_ivector_dir, names)
    needed["--ali-dir"] = (options.ali_dir, ["final.mdl", "tree", "num_jobs"])
    for option, (folder, names) in needed.items():
        if not Path(folder).is_dir():
            raise DataError(f"no such directory (given by {option})", file=folder)
        for name in names:
            if not (Path(folder) / name).is_file():
                raise DataError(f"no such file (needed in {option})", file=str(Path(folder) / name))
    if not Path(options.xconfig).is_file():
        raise DataError("no such file (the network's xconfig)", file=options.xconfig)


def load_labels(options: TrainOptions) -> tuple[PdfAlignments | None, TransitionModel]:
    """The alignments, not read yet, and the transition model that gave them.

    Existing examples have their labels in them: no alignments for them.

    Raises:
        DataError: the transition model cannot be read.
    """
    transitions = read_transition_model(Path(options.ali_dir) / "final.mdl")
    if options.egs_dir is not None:
        return None, transitions
    return PdfAlignments(options.ali_dir, transitions.tid_to_pdf), transitions


def chunk_shape(options: TrainOptions, model: AcousticModel) -> ChunkShape | Chunking | None:
    """Chunks with the extra context asked for beyond what the model itself needs, as nnet3's egs have.

    None for existing examples, which are cut already.
    """
    if options.egs_dir is not None:
        return None
    left, right = extra_context(options, model)
    initial, final = outer_context(options, model)
    if len(options.chunk_widths) == 1 and initial in (None, left) and final in (None, right):
        return ChunkShape(options.chunk_widths[0], left, right)
    return Chunking(options.chunk_widths, left, right, left_initial=initial, right_final=final)


def make_reading(options: TrainOptions, model: AcousticModel) -> Reading:
    """How the training reads its data."""
    return Reading(
        chunk_shape(options, model),
        MinibatchRule.parse(options.minibatch),
        seed=options.seed,
        threads=options.loader_threads,
        memory=options.loader_memory * 2**20,
        skip_bad=options.skip_bad_utterances,
    )


def make_model(options: TrainOptions, data: Data, num_pdfs: int, world: World, device: torch.device) -> AcousticModel:
    """Build the network of the recipe and check it against the data.

    Transforms (``lda.mat``) that do not exist yet are estimated, on all learners together, and written to the
    path that the xconfig names, where a later run finds them again.

    Raises:
        ConfigError: the xconfig is malformed, or its dimensions are not those of features and tree.
    """
    config = parse_xconfig(options.xconfig)
    transforms = {path: _stand_in(config, component) for component, path in transform_files(config)}
    model = build_model(config, seed=options.seed, transforms=transforms)
    if model.input_dim != data.train.feat_dim:
        raise ConfigError(
            f"{options.xconfig}: the input has dim={model.input_dim}, but the features have {data.train.feat_dim}"
        )
    if model.ivector_dim != data.train.ivector_dim:
        have = f"i-vectors of {data.train.ivector_dim}" if data.train.ivector_dim else "none"
        wanted = f"an i-vector of dim={model.ivector_dim}" if model.ivector_dim else "no i-vector"
        raise ConfigError(f"{options.xconfig}: the network takes {wanted}, but the data have {have}{_hint(options)}")
    if isinstance(data.train, Examples) and data.train.num_pdfs != num_pdfs:
        raise ConfigError(
            f"the examples in {options.egs_dir} have {data.train.num_pdfs} pdf-ids, but the tree has {num_pdfs}"
        )
    if model.output_dim != num_pdfs:
        raise ConfigError(
            f"{options.xconfig}: the output has dim={model.output_dim}, but the tree has {num_pdfs} pdf-ids"
        )
    if options.egs_dir is not None:
        check_egs(options, model)
    how = Pass(make_reading(options, model), world, torch.device("cpu"))
    for component, path in world.broadcast(missing_transforms(config)):
        chunks = options.max_lda_jobs * options.samples_per_iter
        stats = lda_statistics(model, component, data.train, how, chunks, options.seed)
        if world.rank == 0:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_matrix(path, stats.estimate())
            logger.info("estimated %s from %d frames", path, stats.counts.sum())
        world.barrier()
    transforms = {path: read_matrix(path) for path in transforms}
    return build_model(config, seed=options.seed, transforms=transforms).to(device)


def _hint(options: TrainOptions) -> str:
    return "" if options.egs_dir or options.online_ivector_dir else " (--feat.online-ivector-dir gives them)"


def _stand_in(config: Config, component: str) -> NDArray[np.float32]:
    """An identity of the right size for a transform that is not known yet, (dim, dim + 1)."""
    dims = {node.name: node.dim for node in config.nodes if isinstance(node, InputNode)}
    node = next(n for n in config.nodes if isinstance(n, ComponentNode) and n.component == component)
    try:
        dim = node.input.dim(dims.__getitem__)
    except KeyError as above:
        # Its statistics would depend on layers that are still to be trained.
        raise ConfigError(
            f"{config.source}: layer {component} takes {above} as its input; "
            "a fixed-affine-layer can only transform the network's input"
        ) from None
    return np.eye(dim, dim + 1, dtype=np.float32)


def choose_device(options: TrainOptions, world: World) -> torch.device:
    """The CPU, or this learner's GPU: learners of one host take its GPUs in turn.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    wanted, there = options.use_gpu, torch.cuda.is_available()
    if wanted in ("no", "false") or (wanted == "auto" and not there):
        return torch.device("cpu")
    if not there:
        raise ConfigError(f"--use-gpu {wanted}: learner rank {world.rank} sees no CUDA device")
    import socket

    hosts = world.gather(socket.gethostname())
    local = hosts[: world.rank].count(hosts[world.rank])
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def group_sum(group: World, device: torch.device) -> Callable[[torch.Tensor], None]:
    """How the learners of a super-learner sum a (P,) tensor in place: by NCCL on GPUs, by MPI on CPUs."""
    if device.type == "cuda":
        from kaldi_mpi.transport.gpu import TorchGroup

        return TorchGroup(group, device).sum_
    return lambda tensor: group.sum_(tensor.numpy())


def describe_transfer(device: torch.device, options: TrainOptions) -> str:
    """The line of the log that says how parameters travel."""
    wire = options.settings.transfer_dtype
    if device.type != "cuda":
        return f"parameters travel from main memory, in {wire}"
    from kaldi_mpi.transport.gpu import describe

    return f"{describe()}, in {wire}"
