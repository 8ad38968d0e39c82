"""What can be known to be wrong before any data are read: missing files, and an egs directory of another network."""

from __future__ import annotations

from pathlib import Path

from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import read_number, read_text
from kaldi_mpi.learner.dataset import NO_CHAIN_EGS, Context, diagnostic_egs, extra_context, outer_context
from kaldi_mpi.learner.network import Network
from kaldi_mpi.learner.options import DataOptions
from kaldi_mpi.loader.tables import peek_columns
from kaldi_mpi.log import logger


def check_files(options: DataOptions, xconfig: str, input_model: str | None = None) -> None:
    """Look for every file that the training will need, before any work.

    Args:
        xconfig: the network; need not be there with `input_model`.

    Raises:
        DataError: a directory or file is missing; names it and the option that gave it.
    """
    needed = {}
    if options.egs_dir is not None:
        info = [f"info/{name}" for name in ("feat_dim", "num_archives", "left_context", "right_context")]
        needed["--egs.dir"] = (options.egs_dir, [*info, *diagnostic_egs(options)])
    elif options.frame_subsampling_factor is not None:
        raise ConfigError(NO_CHAIN_EGS)
    elif options.feat_dir is not None:
        cmvn = ["cmvn.scp", "utt2spk"] if options.cmvn.norm_means or options.cmvn.norm_vars else []
        needed["--feat-dir"] = (options.feat_dir, ["feats.scp", *cmvn])
        if options.online_ivector_dir is not None:
            names = ["ivector_online.scp", "ivector_period"]
            needed["--feat.online-ivector-dir"] = (options.online_ivector_dir, names)
    if options.ali_dir:  # raw networks have none
        option = "--ali-dir" if options.frame_subsampling_factor is None else "--tree-dir"
        needed[option] = (options.ali_dir, ["final.mdl", "tree", "num_jobs"])
    if options.egs_dir is None and options.targets_scp is not None and not Path(options.targets_scp).is_file():
        raise DataError("no such file (--targets-scp)", file=options.targets_scp)
    for option, (folder, names) in needed.items():
        if not Path(folder).is_dir():
            raise DataError(f"no such directory (given by {option})", file=folder)
        for name in names:
            if not (Path(folder) / name).is_file():
                raise DataError(f"no such file (needed in {option})", file=str(Path(folder) / name))
    if input_model is not None:
        if not Path(input_model).is_file():
            raise DataError("no such file (--trainer.input-model)", file=input_model)
    elif not Path(xconfig).is_file():
        raise DataError("no such file (the network's xconfig)", file=xconfig)


def check_egs(options: DataOptions, context: Context, takes_ivectors: bool) -> None:
    """Check an egs directory against the network and the options, as train_rnn.py's verify_egs_dir does.

    Raises:
        ConfigError: the examples were made for another network, or by other options.
        DataError: a file of the directory is missing or malformed.
    """
    assert options.egs_dir is not None
    info = Path(options.egs_dir) / "info"
    left, right = extra_context(options, context)
    have = read_number(info / "left_context"), read_number(info / "right_context")
    if have[0] < left or have[1] < right:
        raise ConfigError(
            f"the examples in {options.egs_dir} have contexts of {have[0]} and {have[1]} frames; {left} and {right} "
            f"are needed: {context.left} and {context.right} by the network, the rest by --egs.chunk-left-context "
            "and --egs.chunk-right-context"
        )
    outer = tuple(-1 if frames is None else frames for frames in outer_context(options, context))
    have = read_number(info / "left_context_initial", -1), read_number(info / "right_context_final", -1)
    if have != outer:
        raise ConfigError(
            f"the examples in {options.egs_dir} have contexts of {have[0]} and {have[1]} frames at the ends of "
            f"utterances, and the options ask for {outer[0]} and {outer[1]} (-1: as elsewhere): see "
            "--egs.chunk-left-context-initial and --egs.chunk-right-context-final"
        )
    widths, wanted = read_text(info / "frames_per_eg"), ",".join(map(str, options.chunk_widths))
    if widths != wanted:
        option = "--egs.frames-per-eg" if options.single_frames else "--egs.chunk-width"
        raise ConfigError(f"the examples in {options.egs_dir} are of {widths} frames, and {option} asks for {wanted}")
    theirs, ours = read_text(info / "final.ie.id", ""), _extractor_id(options.online_ivector_dir)
    if theirs and ours and theirs != ours:
        raise ConfigError(
            f"the examples in {options.egs_dir} have i-vectors of extractor {theirs}, and those in "
            f"{options.online_ivector_dir} are of {ours}"
        )
    if takes_ivectors and not (theirs and ours):
        logger.warning("nothing tells whether the examples' i-vectors are of the extractor that decoding will use")


def check_first_features(options: DataOptions, network: Network) -> None:
    """Compare the network's inputs with the first features and i-vectors: to open a whole corpus takes minutes.

    Raises:
        ConfigError: they do not fit.
    """
    assert options.feat_dir is not None
    feats = peek_columns(Path(options.feat_dir) / "feats.scp")
    ivectors = 0
    if options.online_ivector_dir is not None:
        ivectors = peek_columns(Path(options.online_ivector_dir) / "ivector_online.scp") or network.model.ivector_dim
    network.check_input(feats or network.model.input_dim, ivectors, options.online_ivector_dir is None)


def _extractor_id(folder: str | None) -> str:
    """What a directory of online i-vectors says of their extractor: ``final.ie.id``; '' where it says nothing."""
    return read_text(Path(folder) / "final.ie.id", "") if folder else ""
