"""The data of a training: features, split into training and held-out utterances, or an existing egs directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.scp import read_table
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.loader import Corpus, Examples, Labels, PdfAlignments, Source
from kaldi_mpi.log import logger
from kaldi_mpi.models import AcousticModel
from kaldi_mpi.transport.world import World

# Of the utterances, at most this share is held out, whatever --num-utts-subset says.
_LARGEST_HELD_OUT_SHARE = 0.1

# What get_egs.sh sets aside for nnet3-compute-prob: of held-out utterances, and of the training's.
DIAGNOSTIC_EGS = ("valid_diagnostic.egs", "train_diagnostic.egs")


@dataclasses.dataclass(frozen=True)
class Data:
    """The utterances, or examples, of a training.

    Attributes:
        train: trained on; valid: held out; diagnostic: some of `train`, to compare with `valid`.
    """

    train: Source
    valid: Source
    diagnostic: Source


def open_data(options: TrainOptions, alignments: PdfAlignments | None, world: World) -> Data:
    """Open the examples, or split the aligned utterances by the seed and open each part.

    Each file is read once. The parts share the labels, which take two bytes a frame: the alignments, all of them at a
    time, would take more memory than all else.

    Raises:
        DataError: features and alignments do not fit each other, too few utterances are left, or an archive
            is malformed.
        ConfigError: there are more learners than utterances to train on.
    """
    if options.egs_dir is not None:
        return _open_egs(options, options.egs_dir, world)
    assert options.feat_dir is not None and alignments is not None  # the options' parser sees to it
    feat_dir = Path(options.feat_dir)
    scp = read_table(feat_dir / "feats.scp")
    labels = Labels.read(alignments.pairs(wanted=scp))
    keys = sorted(labels)
    if len(keys) < 2:
        raise DataError(
            f"{len(keys)} of its utterances have alignments in {options.ali_dir}; 2 are needed", file=scp.name
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

    data = Data(corpus(train), corpus(valid), corpus(diagnostic))
    if world.rank == 0:
        for name, part in (("valid_uttlist", valid), ("train_subset_uttlist", diagnostic)):
            with atomic_write(Path(options.dir) / name, "w") as stream:
                stream.writelines(f"{key}\n" for key in part)
        logger.info(
            "training on %d utterances, %d frames; %d utterances, %d frames held out; %d in feats.scp are not aligned",
            len(train), data.train.total_frames, len(valid), data.valid.total_frames, len(scp) - len(keys),
        )  # fmt: skip
    return data


def extra_context(options: TrainOptions, model: AcousticModel) -> tuple[int, int]:
    """Rows before and after a chunk: what was asked for and what the model itself needs."""
    return options.chunk_left_context + model.left_context, options.chunk_right_context + model.right_context


def outer_context(options: TrainOptions, model: AcousticModel) -> tuple[int | None, int | None]:
    """The same before an utterance's first chunk and after its last; None: as elsewhere."""
    initial, final = options.chunk_left_context_initial, options.chunk_right_context_final
    return (
        None if initial < 0 else initial + model.left_context,
        None if final < 0 else final + model.right_context,
    )


def _open_egs(options: TrainOptions, folder: str, world: World) -> Data:
    """Rank 0 makes the index of the examples, by one pass over them, for all ranks and for later runs."""
    index, skip_bad = Path(options.dir) / "egs.index", options.skip_bad_utterances
    if world.rank == 0:
        train = Examples.open(folder, index_cache=index, threads=options.loader_threads + 1, skip_bad=skip_bad)
    world.barrier()
    if world.rank != 0:
        train = Examples.open(folder, index_cache=index, skip_bad=skip_bad)
    valid, diagnostic = (Examples.open(Path(folder) / name, skip_bad=skip_bad) for name in DIAGNOSTIC_EGS)
    if world.size > train.num_units:
        raise ConfigError(f"{world.size} learners, but only {train.num_units} examples in {folder}")
    for part, name in ((valid, DIAGNOSTIC_EGS[0]), (diagnostic, DIAGNOSTIC_EGS[1])):
        ours, theirs = (part.feat_dim, part.ivector_dim), (train.feat_dim, train.ivector_dim)
        if ours != theirs:
            raise DataError(
                f"features and i-vectors have dimensions {ours}, and in the other archives {theirs}",
                file=str(Path(folder) / name),
            )
    if world.rank == 0:
        logger.info(
            "training on %d examples, %d frames, in %d archives of %s; %d examples, %d frames held out",
            train.num_units, train.total_frames, len(train.paths), folder, valid.num_units, valid.total_frames,
        )  # fmt: skip
    return Data(train, valid, diagnostic)


def check_egs(options: TrainOptions, model: AcousticModel) -> None:
    """Check an egs directory against the model and the options, as train_rnn.py's verify_egs_dir does.

    Raises:
        ConfigError: the examples were made for another network, or by other options.
        DataError: a file of the directory is missing or malformed.
    """
    assert options.egs_dir is not None
    place = Path(options.egs_dir)
    left, right = extra_context(options, model)
    have = _number(place, "left_context"), _number(place, "right_context")
    if have[0] < left or have[1] < right:
        raise ConfigError(
            f"the examples in {place} have contexts of {have[0]} and {have[1]} frames; {left} and {right} are needed: "
            f"{model.left_context} and {model.right_context} by the network, the rest by --egs.chunk-left-context "
            "and --egs.chunk-right-context"
        )
    outer = tuple(-1 if frames is None else frames for frames in outer_context(options, model))
    have = _number(place, "left_context_initial", -1), _number(place, "right_context_final", -1)
    if have != outer:
        raise ConfigError(
            f"the examples in {place} have contexts of {have[0]} and {have[1]} frames at the ends of utterances, and "
            f"the options ask for {outer[0]} and {outer[1]} (-1: as elsewhere): see --egs.chunk-left-context-initial "
            "and --egs.chunk-right-context-final"
        )
    widths, wanted = _text(place, "frames_per_eg"), ",".join(map(str, options.chunk_widths))
    if widths != wanted:
        raise ConfigError(f"the examples in {place} are of {widths} frames, and --egs.chunk-width asks for {wanted}")
    theirs, ours = _text(place, "final.ie.id", ""), ivector_id(options.online_ivector_dir)
    if theirs and ours and theirs != ours:
        raise ConfigError(
            f"the examples in {place} have i-vectors of extractor {theirs}, and those in "
            f"{options.online_ivector_dir} are of {ours}"
        )
    if model.ivector_dim and not (theirs and ours):
        logger.warning("nothing tells whether the examples' i-vectors are of the extractor that decoding will use")


def ivector_id(folder: str | None) -> str:
    """What a directory of online i-vectors says of their extractor: ``final.ie.id``; '' where it says nothing."""
    path = Path(folder or "") / "final.ie.id"
    return path.read_text(encoding="utf-8").strip() if folder and path.is_file() else ""


def _text(place: Path, name: str, default: str | None = None) -> str:
    path = place / "info" / name
    if default is not None and not path.exists():
        return default
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read: {error}", file=str(path)) from error


def _number(place: Path, name: str, default: int | None = None) -> int:
    text = _text(place, name, None if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise DataError(f"a number is expected, not {text!r}", file=str(place / "info" / name)) from None
