"""Examples for a chain training whose recipe gives none: Kaldi's get_egs.sh makes them, as in Kaldi's chain/train.py.

In DIR/egs, at stage -3, from features and lattices; the graphs that get_egs.sh wants (stages -6 and -5) are made here
before. A training that goes on from its checkpoint goes on with the examples that it had.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.formats.transition import read_transition_model
from kaldi_mpi.learner import export
from kaldi_mpi.learner.chain_graphs import DEN_FST, NORMALIZATION_FST, make_graphs
from kaldi_mpi.learner.dataset import NO_CHAIN_EGS, extra_context, outer_context
from kaldi_mpi.learner.network import Network
from kaldi_mpi.learner.options import TrainOptions
from kaldi_mpi.learner.stages import DENOMINATOR
from kaldi_mpi.log import logger
from kaldi_mpi.transport.world import SoloWorld

SCRIPT = Path("steps/nnet3/chain/get_egs.sh")
_STAGE = -3


def missing_for_examples(options: TrainOptions) -> list[str]:
    """What they cannot be made without: Kaldi's script, features, lattices."""
    if options.data.egs_dir is not None:
        return []
    if not os.access(SCRIPT, os.X_OK):
        return [f"{NO_CHAIN_EGS} (there is no {SCRIPT} here)"]
    given = {
        "--feat-dir": (options.data.feat_dir, "feats.scp"),
        "--lat-dir": (options.lat_dir, "lat.1.gz"),
        "--tree-dir": (options.data.ali_dir, "final.mdl"),
    }
    return [
        f"{option} {folder}: it has no {name}"
        for option, (folder, name) in given.items()
        if not Path(folder or "", name).is_file()
    ]


def make_examples(options: TrainOptions, words: Mapping[str, str]) -> Path:
    """The directory of the examples, which are made if ``--stage`` asks for it.

    Args:
        options: without an egs directory.
        words: of the call, by option.

    Raises:
        ConfigError: get_egs.sh failed.
        DataError: a graph cannot be made, or is not there at a stage that does not make it.
    """
    folder = Path(options.dir)
    egs = folder / "egs"
    there = (egs / "info" / "num_archives").is_file()
    if there and (options.stage > _STAGE or (options.resume and (folder / "checkpoint" / "current.json").is_file())):
        return egs
    transitions = read_transition_model(Path(options.data.ali_dir) / "final.mdl")
    export.copy_alignment_files(folder, Path(options.data.ali_dir))
    if options.stage <= DENOMINATOR:
        make_graphs(options, transitions)
    absent = [name for name in (DEN_FST, NORMALIZATION_FST) if not (folder / name).is_file()]
    if absent:
        raise ConfigError(
            f"{folder} has no {' and no '.join(absent)}: --stage {options.stage} begins after they are made"
        )
    command = [str(SCRIPT), *words.get("egs.opts", "").split(), *_options(options, words)]
    command += [str(options.data.feat_dir), str(folder), str(options.lat_dir), str(egs)]
    logger.info("%s", " ".join(command))
    status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if status != 0:
        raise ConfigError(f"{SCRIPT} ended with status {status}: see its messages above, and {egs}/log")
    return egs


def _options(options: TrainOptions, words: Mapping[str, str]) -> list[str]:
    """Those that chain/train.py gives it."""
    data, chain = options.data, options.chain
    assert chain is not None
    network = Network(options.xconfig, data.seed, SoloWorld(), options.input_model)
    left, right = extra_context(data, network.context)
    initial, final = (-1 if frames is None else frames for frames in outer_context(data, network.context))
    given = {
        "cmd": words.get("egs.cmd") or words.get("cmd") or "queue.pl",
        "cmvn-opts": words.get("feat.cmvn-opts", ""),
        "online-ivector-dir": data.online_ivector_dir or "",
        "left-context": left,
        "right-context": right,
        "left-context-initial": initial,
        "right-context-final": final,
        "left-tolerance": chain.left_tolerance,
        "right-tolerance": chain.right_tolerance,
        "frame-subsampling-factor": data.frame_subsampling_factor,
        "alignment-subsampling-factor": chain.alignment_subsampling_factor,
        "stage": words.get("egs.stage", "0"),
        "frames-per-iter": chain.frames_per_iter,
        "frames-per-eg": ",".join(map(str, data.chunk_widths)),
        "srand": data.seed,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def remove_examples(egs: Path) -> None:
    """Remove the archives that are trained on, and what links of them lead to; as Kaldi's remove_egs.sh."""
    if (egs / ".nodelete").exists():
        return
    for path in egs.glob("cegs.*.ark"):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
