"""What a training starts from: its data, split into training and held-out utterances, and its model.

Every rank reads the same files and makes the same choices from the same seed, so nothing need be sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.atomic import atomic_write
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.learner.evaluate import Pass, lda_statistics
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.loader import ChunkShape, Corpus, read_alignments, to_pdfs
from kaldi_mpi.loader.scp import read_table
from kaldi_mpi.models import AcousticModel, Config, build_model, missing_transforms, parse_xconfig, transform_files
from kaldi_mpi.models.config import ComponentNode, InputNode
from kaldi_mpi.nnet3 import TransitionModel, read_matrix, read_transition_model, write_matrix
from kaldi_mpi.report.log import logger
from kaldi_mpi.transport.world import World

# Of the utterances, at most this share is held out, whatever --num-utts-subset says.
_LARGEST_HELD_OUT_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Data:
    """The utterances of a training.

    Attributes:
        train: trained on; valid: held out; diagnostic: some of `train`, to compare with `valid`.
    """

    train: Corpus
    valid: Corpus
    diagnostic: Corpus


def check_inputs(options: TrainOptions) -> None:
    """Look for every file that the training will need, before any work.

    Raises:
        DataError: a directory or file is missing; names it and the option that gave it.
    """
    needed = {
        "--feat-dir": (options.feat_dir, ["feats.scp"]),
        "--ali-dir": (options.ali_dir, ["final.mdl", "tree", "num_jobs"]),
    }
    if options.norm_means or options.norm_vars:
        needed["--feat-dir"][1].extend(["cmvn.scp", "utt2spk"])
    for option, (folder, names) in needed.items():
        if not Path(folder).is_dir():
            raise DataError(f"no such directory (given by {option})", file=folder)
        for name in names:
            if not (Path(folder) / name).is_file():
                raise DataError(f"no such file (needed in {option})", file=str(Path(folder) / name))
    if not Path(options.xconfig).is_file():
        raise DataError("no such file (the network's xconfig)", file=options.xconfig)


def load_labels(options: TrainOptions) -> tuple[dict[str, NDArray[np.int32]], TransitionModel]:
    """The pdf-ids of all aligned utterances, (T,) int32 each, and the transition model that gave them.

    Raises:
        DataError: the alignments do not fit the transition model, or are malformed.
    """
    transitions = read_transition_model(Path(options.ali_dir) / "final.mdl")
    labels = to_pdfs(read_alignments(options.ali_dir), transitions.tid_to_pdf, source=options.ali_dir)
    return labels, transitions


def open_data(options: TrainOptions, labels: dict[str, NDArray[np.int32]], world: World) -> Data:
    """Split the aligned utterances by the seed and open each part.

    Raises:
        DataError: features and alignments do not fit each other, or too few utterances are left.
        ConfigError: there are more learners than utterances to train on.
    """
    scp = Path(options.feat_dir) / "feats.scp"
    table = read_table(scp)
    keys = sorted(key for key in table if key in labels)
    if len(keys) < 2:
        raise DataError(
            f"{len(keys)} of its utterances have alignments in {options.ali_dir}; 2 are needed", file=str(scp)
        )
    rng = np.random.default_rng([options.seed, 0x76616C])  # 'val': apart from every other use of the seed
    held_out = max(1, min(options.num_utts_subset, int(len(keys) * _LARGEST_HELD_OUT_SHARE)))
    order = [keys[i] for i in rng.permutation(len(keys))]
    valid, train = sorted(order[:held_out]), sorted(order[held_out:])
    diagnostic = sorted(order[held_out : 2 * held_out])
    if world.size > len(train):
        raise ConfigError(
            f"{world.size} learners, but only {len(train)} utterances to train on in {options.feat_dir} "
            f"({held_out} held out): start at most {len(train)} learners"
        )
    feat_dir = Path(options.feat_dir)
    cmvn = options.norm_means or options.norm_vars

    def corpus(utterances: list[str]) -> Corpus:
        return Corpus.open(
            scp,
            labels,
            utterances=utterances,
            cmvn_scp=feat_dir / "cmvn.scp" if cmvn else None,
            utt2spk=feat_dir / "utt2spk" if cmvn else None,
            norm_means=options.norm_means,
            norm_vars=options.norm_vars,
        )

    data = Data(corpus(train), corpus(valid), corpus(diagnostic))
    if world.rank == 0:
        for name, part in (("valid_uttlist", valid), ("train_subset_uttlist", diagnostic)):
            with atomic_write(Path(options.dir) / name, "w") as stream:
                stream.writelines(f"{key}\n" for key in part)
        logger.info(
            "training on %d utterances, %d frames; %d utterances, %d frames held out; %d in feats.scp are not aligned",
            len(train), data.train.total_frames, len(valid), data.valid.total_frames, len(table) - len(keys),
        )  # fmt: skip
    return data


def chunk_shape(options: TrainOptions, model: AcousticModel) -> ChunkShape:
    """Chunks with the extra context asked for beyond what the model itself needs, as nnet3's egs have."""
    return ChunkShape(
        width=options.chunk_width,
        left=options.chunk_left_context + model.left_context,
        right=options.chunk_right_context + model.right_context,
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
    if model.output_dim != num_pdfs:
        raise ConfigError(
            f"{options.xconfig}: the output has dim={model.output_dim}, but the tree has {num_pdfs} pdf-ids"
        )
    how = Pass(chunk_shape(options, model), options.chunks_per_minibatch, world, torch.device("cpu"))
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
        from kaldi_mpi.transport.torch_group import TorchGroup

        return TorchGroup(group, device).sum_
    return lambda tensor: group.sum_(tensor.numpy())


def describe_transfer(device: torch.device, options: TrainOptions) -> str:
    """The line of the log that says how parameters travel."""
    wire = options.settings.transfer_dtype
    if device.type != "cuda":
        return f"parameters travel from main memory, in {wire}"
    from kaldi_mpi.transport.cuda import describe

    return f"{describe()}, in {wire}"
