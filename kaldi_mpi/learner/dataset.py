"""The data of a training: utterances with alignments, or an existing egs directory; how they are cut and read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.scp import read_table
from kaldi_mpi.learner.batches import DeviceBatches, page_locked, streams_of
from kaldi_mpi.learner.options import DataOptions
from kaldi_mpi.loader import (
    ChainExamples,
    Chunking,
    ChunkPlan,
    ChunkShape,
    Corpus,
    Examples,
    Labels,
    MinibatchReader,
    MinibatchRule,
    PdfAlignments,
    Source,
    Targets,
    new_buffers,
)
from kaldi_mpi.log import logger
from kaldi_mpi.transport.world import World

# Of the utterances, at most this share is held out, whatever --num-utts-subset says.
_LARGEST_HELD_OUT_SHARE = 0.1

# Why chain training does not begin.
NO_CHAIN_EGS = "--egs.dir is needed: a learner makes no chain examples; Kaldi's steps/nnet3/chain/get_egs.sh does"

# A pass in the data's own order gains nothing from more memory than reading ahead needs.
_UNSHUFFLED_MEMORY = 16 * 2**20


# What get_egs.sh sets aside for nnet3-compute-prob: of held-out utterances, and of the training's; with .egs or .cegs.
_DIAGNOSTIC = ("valid_diagnostic", "train_diagnostic")
_COMBINE = "combine"  # and for nnet3-combine


def diagnostic_egs(options: DataOptions) -> list[str]:
    """Names of the archives with examples for validations: of held-out utterances, and of the training's."""
    return [f"{name}.{_suffix(options)}" for name in _DIAGNOSTIC]


def _suffix(options: DataOptions) -> str:
    return "egs" if options.frame_subsampling_factor is None else "cegs"


class Context(NamedTuple):
    """Rows of features that a network needs beside a labelled frame."""

    left: int
    right: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The utterances, or examples, of a training. Make one with `Dataset.open`.

    Attributes:
        train: trained on; valid: held out; diagnostic: some of `train`, to compare with `valid`.
        combination: some of `train`, by which the final combination chooses: get_egs.sh's combine.egs, of the same
            utterances as `diagnostic`, which it is where there is no such file.
        chunking: how features are cut; None: examples, which have their own shapes.
        options: the same on all ranks.
        single: a frame with its context, where training takes frames one by one; None: it takes chunks.
        transition_counts: (transition-ids + 1,) float64, of the alignments that were read; None: none were.
    """

    train: Source
    valid: Source
    diagnostic: Source
    combination: Source
    chunking: ChunkShape | Chunking | None
    options: DataOptions
    single: ChunkShape | None = None
    transition_counts: NDArray[np.float64] | None = None

    @classmethod
    def open(
        cls,
        options: DataOptions,
        folder: Path,
        tid_to_pdf: NDArray[np.int32],
        context: Context,
        world: World,
        num_outputs: int,
    ) -> Dataset:
        """Open the examples, or split the utterances that have labels by the seed and open each part.

        Args:
            folder: the training's directory, where the lists of what is held out and the examples' index go.
            tid_to_pdf: pdf-ids of the transition-ids of the alignments (`TransitionModel.tid_to_pdf`).
            context, num_outputs: of the network.

        Raises:
            DataError: features and alignments do not fit each other, too few utterances are left, or an archive
                is malformed.
            ConfigError: there are more learners than utterances to train on.
        """
        single = ChunkShape(1, *extra_context(options, context)) if options.single_frames else None
        if options.egs_dir is not None:
            train, valid, diagnostic, combination = _open_egs(options, options.egs_dir, folder, world)
            return cls(train, valid, diagnostic, combination, None, options, single)
        if options.frame_subsampling_factor is not None:
            raise ConfigError(NO_CHAIN_EGS)
        if options.targets_scp is not None:
            targets = Targets(options.targets_scp, options.use_dense_targets, num_outputs)
            parts = _open_corpora(options, targets, folder, world)
            return cls(*parts, chunk_shape(options, context), options, single)
        alignments = PdfAlignments(options.ali_dir, tid_to_pdf)
        parts = _open_corpora(options, alignments, folder, world)
        return cls(*parts, chunk_shape(options, context), options, single, alignments.counts)

    @property
    def train_chunking(self) -> ChunkShape | Chunking | None:
        """How `train` is cut for training."""
        return self.single or self.chunking

    @property
    def whole_minibatch(self) -> MinibatchRule:
        """How many whole chunks make a minibatch, where training takes single frames: those of about as many frames."""
        rule = self.options.minibatch
        if self.single is None:
            return rule
        return MinibatchRule.of(max(1, rule.largest(self.single.rows) // self.options.chunk_widths[0]))

    def plan(self, size: int) -> ChunkPlan:
        """The steps of training on `train` with `size` ranks."""
        options = self.options
        return ChunkPlan(
            self.train, self.train_chunking, options.minibatch, size=size, seed=options.seed, memory=options.memory
        )

    def usual_minibatch(self, plan: ChunkPlan) -> int:
        """Chunks of a learner's minibatch of the principal width; of examples, of the shape that most of them have.

        Frames, where they are single.
        """
        shape = self._usual_shape(plan)  # of examples that have been merged already, one is a minibatch
        return self.options.minibatch.largest(shape.rows) if shape.sequences == 1 else 1

    def usual_frames(self, plan: ChunkPlan) -> int:
        """Labelled (or output) frames of such a minibatch."""
        shape = self._usual_shape(plan)
        return self.usual_minibatch(plan) * shape.sequences * shape.width

    def _usual_shape(self, plan: ChunkPlan) -> ChunkShape:
        shape_of = getattr(self.train, "shape_of", None) if self.train_chunking is None else None
        return plan.shapes[0 if shape_of is None else int(np.bincount(shape_of).argmax())]

    def batches(
        self,
        source: Source,
        device: torch.device,
        *,
        rank: int,
        size: int,
        trains: bool = True,
        seed: int | None = None,
        shuffle: bool = True,
        first_step: int = 0,
        num_epochs: int | None = None,
        on_request: bool = False,
        depth: int = 4,
        plan: ChunkPlan | None = None,
        whole: MinibatchRule | None = None,
    ) -> DeviceBatches:
        """Minibatches of `source`, one of the parts, on `device`; see `MinibatchReader` for the arguments.

        With `trains` false they are of whole chunks, whatever the training takes: these cost less for each frame. How
        many of them, `whole` says, or `whole_minibatch`.

        Raises:
            DataError: memory or threads cannot be had.
        """
        options, streams = self.options, streams_of(device)
        chunking, minibatch = (
            (self.train_chunking, options.minibatch) if trains else (self.chunking, whole or self.whole_minibatch)
        )
        buffers = None
        if streams is not None:
            buffers = new_buffers(source, chunking, minibatch, depth, page_locked(streams))
        reader = MinibatchReader(
            source,
            chunking,
            minibatch,
            seed=options.seed if seed is None else seed,
            rank=rank,
            size=size,
            threads=options.loader_threads,
            depth=depth,
            shuffle=shuffle,
            first_step=first_step,
            num_epochs=num_epochs,
            on_request=on_request,
            buffers=buffers,
            memory=options.memory if shuffle else min(options.memory, _UNSHUFFLED_MEMORY),
            skip_bad=max(0, options.skip_bad_utterances - getattr(source, "num_bad", 0)),
            plan=plan,
        )
        return DeviceBatches(reader, streams)


def extra_context(options: DataOptions, context: Context) -> tuple[int, int]:
    """Rows before and after a chunk: what was asked for, what the network itself needs, and what frame shifts need."""
    shift = (options.frame_subsampling_factor or 1) // 2
    return options.chunk_left_context + context.left + shift, options.chunk_right_context + context.right + shift


def outer_context(options: DataOptions, context: Context) -> tuple[int | None, int | None]:
    """The same before an utterance's first chunk and after its last; None: as elsewhere."""
    initial, final = options.chunk_left_context_initial, options.chunk_right_context_final
    shift = (options.frame_subsampling_factor or 1) // 2
    return (
        None if initial < 0 else initial + context.left + shift,
        None if final < 0 else final + context.right + shift,
    )


def chunk_shape(options: DataOptions, context: Context) -> ChunkShape | Chunking:
    """Chunks with the extra context asked for beyond what the network itself needs, as nnet3's egs have."""
    left, right = extra_context(options, context)
    initial, final = outer_context(options, context)
    if len(options.chunk_widths) == 1 and initial in (None, left) and final in (None, right):
        return ChunkShape(options.chunk_widths[0], left, right)
    return Chunking(options.chunk_widths, left, right, left_initial=initial, right_final=final)


def _open_corpora(
    options: DataOptions, given: PdfAlignments | Targets, folder: Path, world: World
) -> tuple[Corpus, Corpus, Corpus, Corpus]:
    """The utterances with labels, split by the seed; rank 0 writes down which ones are held out.

    Each file is read once. The parts share the labels, which take two bytes a frame: the alignments, all of them at a
    time, would take more memory than all else.
    """
    assert options.feat_dir is not None  # the options' parser sees to it
    feat_dir = Path(options.feat_dir)
    scp = read_table(feat_dir / "feats.scp")
    labels = Labels.read(given.pairs(wanted=scp))
    keys = sorted(labels)
    if len(keys) < 2:
        raise DataError(
            f"{len(keys)} of its utterances have labels in {options.targets_scp or options.ali_dir}; 2 are needed",
            file=scp.name,
        )
    rng = np.random.default_rng([options.seed, 0x76616C])  # 'val': apart from every other use of the seed
    held_out = max(1, min(options.num_utts_subset, int(len(keys) * _LARGEST_HELD_OUT_SHARE)))
    order = [keys[i] for i in rng.permutation(len(keys))]
    valid, train = sorted(order[:held_out]), sorted(order[held_out:])
    diagnostic = sorted(order[held_out : 2 * held_out])
    if world.size > len(train):
        raise ConfigError(
            f"{world.size} learners, but only {len(train)} utterances to train on in {feat_dir} "
            f"({held_out} held out): start at most {len(train)} learners"
        )
    cmvn = options.cmvn.norm_means or options.cmvn.norm_vars
    cmvn_scp, utt2spk = (read_table(feat_dir / name) if cmvn else None for name in ("cmvn.scp", "utt2spk"))

    def corpus(utterances: list[str]) -> Corpus:
        return Corpus.open(
            scp,
            labels,
            utterances=utterances,
            cmvn_scp=cmvn_scp,
            utt2spk=utt2spk,
            **options.cmvn._asdict(),
            online_ivector_dir=options.online_ivector_dir,
            skip_bad=options.skip_bad_utterances,
        )

    parts = corpus(train), corpus(valid), corpus(diagnostic)
    if world.rank == 0:
        for name, part in (("valid_uttlist", valid), ("train_subset_uttlist", diagnostic)):
            with atomic_write(folder / name, "w") as stream:
                stream.writelines(f"{key}\n" for key in part)
        logger.info(
            "training on %d utterances, %d frames; %d utterances, %d frames held out; %d in feats.scp have no labels",
            len(train), parts[0].total_frames, len(valid), parts[1].total_frames, len(scp) - len(keys),
        )  # fmt: skip
    return (*parts, parts[2])


def _open_egs(options: DataOptions, egs_dir: str, folder: Path, world: World) -> tuple[Examples | ChainExamples, ...]:
    """Rank 0 makes the index of the examples, by one pass over them, for all ranks and for later runs."""
    index, place, factor = folder / "egs.index", Path(egs_dir), options.frame_subsampling_factor

    def opened(source: Path, threads: int = 1, **trains: Any) -> Examples | ChainExamples:
        skip_bad = options.skip_bad_utterances
        if factor is None:
            return Examples.open(source, threads=threads, skip_bad=skip_bad, **trains)
        return ChainExamples.open(
            source, threads=threads, skip_bad=skip_bad, frame_subsampling_factor=factor, shifts=bool(trains), **trains
        )

    if world.rank == 0:
        train = opened(place, options.loader_threads + 1, index_cache=index)
    world.barrier()
    if world.rank != 0:
        train = opened(place, index_cache=index)
    names = diagnostic_egs(options)
    valid, diagnostic = (opened(place / name) for name in names)
    combining = place / f"{_COMBINE}.{_suffix(options)}"
    combination = opened(combining) if combining.is_file() else diagnostic
    if world.size > train.num_units:
        raise ConfigError(f"{world.size} learners, but only {train.num_units} examples in {egs_dir}")
    for part, name in ((valid, names[0]), (diagnostic, names[1]), (combination, combining.name)):
        ours, theirs = (part.feat_dim, part.ivector_dim), (train.feat_dim, train.ivector_dim)
        if ours != theirs:
            raise DataError(
                f"features and i-vectors have dimensions {ours}, and in the other archives {theirs}",
                file=str(place / name),
            )
    if world.rank == 0:
        logger.info(
            "training on %d examples, %d frames, in %d archives of %s; %d examples, %d frames held out",
            train.num_units, train.total_frames, len(train.paths), egs_dir, valid.num_units, valid.total_frames,
        )  # fmt: skip
    return train, valid, diagnostic, combination
