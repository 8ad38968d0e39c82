"""``kaldi-mpi get-chain-egs [OPTIONS] DATA CHAIN_DIR ALI_OR_LAT_DIR EGS_DIR``: examples for chain training.

What ``steps/nnet3/chain/get_egs.sh`` makes, under its option names, without Kaldi: from alignments (``ali.*.gz``), or
where there are none from lattices of phones (``lat.*.gz`` after lattice-align-phones). CHAIN_DIR has ``tree``,
``0.trans_mdl`` and ``normalization.fst``. Kaldi's programs take the directory, too. Equal options and data give equal
files, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kaldi_mpi.chain.supervision import SupervisionOptions
from kaldi_mpi.embedded.chain_chunks import ChunkWidths
from kaldi_mpi.embedded.chain_example_maker import ExampleOptions, JobMaker, Made, MakerTask
from kaldi_mpi.embedded.datadir import DataDir, make_directories, read_table
from kaldi_mpi.embedded.jobs import WorkerPool
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.files import atomic_write, read_text
from kaldi_mpi.formats.cmvn_options import parse_cmvn_opts
from kaldi_mpi.formats.tree import read_tree
from kaldi_mpi.loader.entries import job_files
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser, at_least, boolean, number, optional

# What draws from the seed, so that one does not repeat another.
_SUBSETS, _SHUFFLE, _DIAGNOSTICS = 1, 2, 3
# Options of get_egs.sh for what is not there: a queue and its jobs, or which are read with an option that is refused.
_WITHOUT_EFFECT = ("cmd", "stage", "max-jobs-run", "max-shuffle-jobs-run", "acwt")
_REFUSED = ("frames-overlap-per-eg", "lattice-prune-beam", "deriv-weights-scp", "online-cmvn", "generate-egs-scp")
_OFF = ("", "0", "false")  # what a refused option may be
_KEEP = ".nodelete"  # the user wants the examples kept


@dataclass(frozen=True)
class EgsOptions:
    """What an egs directory is to have; names as get_egs.sh's.

    Attributes:
        examples: how examples are made.
        frames_per_eg: the widths as given, for ``info``.
        cmvn_opts: as given.
        ivector_dir: None: without i-vectors.
        num_utts_subset: utterances held out, and of the training's whose objective is shown.
        num_train_egs_combine, num_valid_egs_combine: examples of these two in combine.cegs.
        num_egs_diagnostic: examples in train_diagnostic.cegs and valid_diagnostic.cegs.
        frames_per_iter: input frames of an archive.
        nj: processes.
    """

    examples: ExampleOptions
    frames_per_eg: str = "25"
    cmvn_opts: str = ""
    ivector_dir: str | None = None
    num_utts_subset: int = 300
    num_train_egs_combine: int = 1000
    num_valid_egs_combine: int = 0
    num_egs_diagnostic: int = 400
    frames_per_iter: int = 400000
    nj: int = 4


def get_chain_egs(
    data_dir: str | Path, chain_dir: str | Path, source_dir: str | Path, egs_dir: str | Path, options: EgsOptions
) -> None:
    """Make an egs directory; see the module's text.

    Args:
        data_dir: feats.scp, utt2spk, and cmvn.scp where features are normalised.
        chain_dir: of the chain training.
        source_dir: alignments or phone lattices.
        egs_dir: appears when it is complete; examples that were there until then are replaced.
        options: see `EgsOptions`.

    Raises:
        DataError: something in the data is missing or malformed, too few utterances, or no example came out.
        ConfigError: `egs_dir` is there and holds something else than examples.
    """
    began = time.monotonic()
    final = Path(egs_dir).resolve()
    _check_replaceable(final)
    data = DataDir(data_dir)
    subsets = _subsets(data, options)
    kinds = [kind for kind in ("ali", "lat") if any(Path(source_dir).glob(f"{kind}.*"))]
    if not kinds:
        raise DataError("no ali.*.gz and no lat.*.gz in this directory", file=str(source_dir))
    kind = kinds[0]
    sources = job_files(Path(source_dir), kind)
    if kind == "ali" and options.examples.supervision.lm_scale:
        raise ConfigError("--lattice-lm-scale is for lattices: alignments have no costs")
    jobs = min(options.nj, len(sources))
    cmvn = parse_cmvn_opts(options.cmvn_opts, where="--cmvn-opts")
    make_directories(final.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{final.name}.tmp", dir=final.parent) as work:
            parts = [Path(work, f"part.{job}") for job in range(jobs)]
            tasks = [
                MakerTask(
                    str(data_dir), str(chain_dir), str(source_dir), sources[job::jobs], options.ivector_dir,
                    cmvn, options.examples, str(part),
                )
                for job, part in enumerate(parts)
            ]  # fmt: skip
            with WorkerPool(JobMaker, tasks) as workers:
                made = workers.call("make")
            _report_dropped(made)
            egs = Path(work, "egs")
            _write(egs, _Parts(parts, made), data, Path(chain_dir), options, subsets)
            if (final / _KEEP).exists():
                (egs / _KEEP).touch()
            _replace(egs, final)
    except OSError as error:
        raise DataError(f"cannot write: {error.strerror or error}", file=str(final)) from error
    logger.info("%s: made in %.1f s", egs_dir, time.monotonic() - began)


def _check_replaceable(final: Path) -> None:
    """Only a directory of examples, or an empty one, is replaced."""
    if final.is_dir() and any(final.iterdir()) and not (final / "info").is_dir():
        raise ConfigError(f"{final} is there and is no directory of examples: it is not replaced")
    if final.exists() and not final.is_dir():
        raise ConfigError(f"{final} is there and is no directory")


def _replace(new: Path, final: Path) -> None:
    """Put the directory in its place; what was there is left beside it, and goes with it."""
    old = new.with_name("old")
    if not final.exists():
        os.rename(new, final)
        return
    os.rename(final, old)
    try:
        os.rename(new, final)
    except OSError:
        os.rename(old, final)
        raise


@dataclass(frozen=True)
class _Subsets:
    """Utterances that are held out, and some of the others whose objective is shown; in the C locale's order."""

    valid: list[str]
    train: list[str]


def _subsets(data: DataDir, options: EgsOptions) -> _Subsets:
    """Draw both.

    Raises:
        DataError: fewer utterances than are asked for.
    """
    wanted, rng = options.num_utts_subset, np.random.default_rng([options.examples.seed, _SUBSETS])
    groups = [[utterance] for utterance in data.utterances]
    if data.has("utt2uniq"):
        # All versions of an utterance (speeds, volumes) are held out together.
        versions: dict[str, list[str]] = {}
        for utterance, original in read_table(data.file("utt2uniq")).items():
            versions.setdefault(original, []).append(utterance)
        groups = list(versions.values())
    valid: list[str] = []
    for group in rng.permutation(len(groups)):
        if len(valid) >= wanted:
            break
        valid += groups[group]
    held_out = set(valid)
    others = [utterance for utterance in data.utterances if utterance not in held_out]
    if min(len(valid), len(others)) < wanted:
        raise DataError(
            f"{len(data.utterances)} utterances are too few for two subsets of {wanted} (--num-utts-subset)",
            file=str(data.path),
        )
    train = [others[place] for place in rng.permutation(len(others))[:wanted]]
    return _Subsets(sorted(valid), sorted(train))


def _report_dropped(made: Sequence[Made]) -> None:
    dropped: Counter[str] = Counter()
    for one in made:
        dropped.update(one.dropped)
    for reason, count in sorted(dropped.items()):
        logger.warning("left out: %d %s", count, reason)


class _Parts:
    """The examples of all processes, in the order of utterances and chunks.

    Raises:
        DataError: an utterance has been made twice, dimensions differ, or there is no example.
    """

    def __init__(self, paths: Sequence[Path], made: Sequence[Made]) -> None:
        twice = [key for key, count in Counter(key for one in made for key in one.utterances).items() if count > 1]
        if twice:
            raise DataError("the utterance is in more than one file of alignments or lattices", key=min(twice))
        if len({one.feat_dim for one in made if one.feat_dim}) > 1:
            raise DataError(f"features of dimensions {sorted({one.feat_dim for one in made if one.feat_dim})}")
        self.entries = sorted((entry, part) for part, one in enumerate(made) for entry in one.entries)
        if not self.entries:
            raise DataError("no example came out of these alignments or lattices and features")
        self.feat_dim = max(one.feat_dim for one in made)
        self.ivector_dim = max(one.ivector_dim for one in made)
        self.frames = sum(one.frames for one in made)
        self._paths = paths

    def of(self, utterances: Collection[str]) -> list[int]:
        """The places in `entries` of the examples of these utterances."""
        wanted = set(utterances)
        return [place for place, (entry, _) in enumerate(self.entries) if entry.utterance in wanted]

    def write(self, path: Path, places: Sequence[int]) -> None:
        """Write an archive of the examples at these places.

        Raises:
            DataError: there are none, or it cannot be written.
        """
        if not places:
            raise DataError("it would have no example", file=path.name)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(part, "rb")) for part in self._paths]
            stream = stack.enter_context(atomic_write(path))
            for place in places:
                entry, part = self.entries[place]
                stream.write(os.pread(files[part].fileno(), entry.size, entry.offset))


def _write(egs: Path, parts: _Parts, data: DataDir, chain_dir: Path, options: EgsOptions, subsets: _Subsets) -> None:
    """All files of the directory."""
    seed = options.examples.seed
    for folder in (egs, egs / "info", egs / "log"):
        folder.mkdir()
    frames = sum(data.utt2num_frames.values()) if data.has("utt2num_frames") else parts.frames
    archives = frames // options.frames_per_iter + 1
    held_out = set(parts.of(subsets.valid))
    train = [place for place in range(len(parts.entries)) if place not in held_out]
    if len(train) < archives:
        raise DataError(f"{len(train)} examples for {archives} archives: use a larger --frames-per-iter")
    order = np.array(train)[np.random.default_rng([seed, _SHUFFLE]).permutation(len(train))]
    for archive in range(archives):
        parts.write(egs / f"cegs.{archive + 1}.ark", order[archive::archives].tolist())
    rng = np.random.default_rng([seed, _DIAGNOSTICS])

    def some(utterances: Collection[str], most: int) -> list[int]:
        places = parts.of(utterances)
        return [places[chosen] for chosen in rng.permutation(len(places))[:most]]

    combine = some(subsets.valid, options.num_valid_egs_combine) + some(subsets.train, options.num_train_egs_combine)
    parts.write(egs / "combine.cegs", combine)
    parts.write(egs / "valid_diagnostic.cegs", some(subsets.valid, options.num_egs_diagnostic))
    parts.write(egs / "train_diagnostic.cegs", some(subsets.train, options.num_egs_diagnostic))
    files = {
        "valid_uttlist": "\n".join(subsets.valid),
        "train_subset_uttlist": "\n".join(subsets.train),
        "cmvn_opts": options.cmvn_opts,
        **{f"info/{name}": str(value) for name, value in _info(parts, chain_dir, options).items()},
        "info/num_archives": str(archives),
        "info/num_frames": str(frames),
        "info/egs_per_archive": str(len(train) // archives),
    }
    extractor = Path(options.ivector_dir or "", "final.ie.id")
    if options.ivector_dir is not None and extractor.is_file():
        files["info/final.ie.id"] = read_text(extractor)
    for name, text in files.items():
        (egs / name).write_text(f"{text}\n", encoding="utf-8")
    logger.info(
        "%d examples in %d archives, %d of utterances held out; %d frames of speech",
        len(train), archives, len(held_out), frames,
    )  # fmt: skip


def _info(parts: _Parts, chain_dir: Path, options: EgsOptions) -> dict[str, str | int]:
    made = options.examples
    return {
        "left_context": made.left,
        "right_context": made.right,
        "left_context_initial": made.left_initial,
        "right_context_final": made.right_final,
        "feat_dim": parts.feat_dim,
        "ivector_dim": parts.ivector_dim,
        "frames_per_eg": options.frames_per_eg,
        "num_pdfs": 1 + max(read_tree(chain_dir / "tree").pdfs()),
    }


def _parser() -> Parser:
    parser = Parser(
        prog="kaldi-mpi get-chain-egs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "chain_dir", "ali_or_lat_dir", "egs_dir"):
        parser.add_argument(name)

    def option(name: str, default: object, kind: Callable[[str], object], text: str) -> None:
        parser.add_argument(f"--{name}", default=default, type=kind, help=f"{text} (default: %(default)s)")

    option("frames-per-eg", "25", str, "widths of chunks in input frames, or -1: whole utterances")
    option("frame-subsampling-factor", 3, at_least(1), "input frames an output frame")
    option("alignment-subsampling-factor", 3, at_least(1), "the same, of the alignments")
    option("left-context", 4, at_least(0), "input frames before a chunk")
    option("right-context", 4, at_least(0), "input frames after a chunk")
    option("left-context-initial", -1, at_least(-1), "the same before an utterance's first chunk; -1: no other")
    option("right-context-final", -1, at_least(-1), "the same after its last one; -1: no other")
    option("left-tolerance", 5, _or_default(5), "input frames that a phone may begin earlier")
    option("right-tolerance", 5, _or_default(5), "input frames that a phone may end later")
    option("constrained", True, boolean, "whether phones keep their times within a chunk")
    option("lattice-lm-scale", 0.0, _or_default(0.0), "scale of the lattices' graph costs")
    option("compress", True, boolean, "whether features are compressed")
    option("num-utts-subset", 300, at_least(1), "utterances held out, and as many shown of the others")
    option("num-valid-egs-combine", 0, at_least(0), "held-out examples in combine.cegs")
    option("num-train-egs-combine", 1000, at_least(0), "other examples in combine.cegs")
    option("num-egs-diagnostic", 400, at_least(1), "examples in each of the diagnostic archives")
    option("frames-per-iter", 400000, at_least(1), "input frames of an archive")
    option("cmvn-opts", "", str, "as of apply-cmvn")
    option("online-ivector-dir", None, optional, "with ivector_online.scp and ivector_period")
    option("srand", 0, at_least(0), "seed")
    option("nj", 4, at_least(1), "processes; at most one for each file of alignments or lattices")
    for name in _WITHOUT_EFFECT:
        option(name, None, str, "accepted, without effect")
    for name in _REFUSED:
        option(name, "", str, "only its default can be had here")
    return parser


def _or_default(default: float) -> Callable[[str], object]:
    """A number of the default's kind; an empty string gives the default, as Kaldi's script has it."""
    convert = number(type(default))
    return lambda text: convert(text) if text else default


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi get-chain-egs``; see the module's text."""
    chosen = _parser().parse_args(arguments)
    given = vars(chosen)
    for name in _REFUSED:
        if given[name.replace("-", "_")] not in _OFF:
            raise ConfigError(f"--{name} {given[name.replace('-', '_')]}: this is not done here; leave it out")
    for name in _WITHOUT_EFFECT:
        if given[name.replace("-", "_")]:
            logger.info("--%s has no effect here", name)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes are the parallelism
    examples = ExampleOptions(
        ChunkWidths.parse(chosen.frames_per_eg, chosen.frame_subsampling_factor),
        chosen.left_context,
        chosen.right_context,
        chosen.left_context_initial,
        chosen.right_context_final,
        SupervisionOptions(
            chosen.left_tolerance,
            chosen.right_tolerance,
            chosen.alignment_subsampling_factor,
            chosen.lattice_lm_scale,
        ),
        chosen.constrained,
        chosen.compress,
        chosen.srand,
    )
    options = EgsOptions(
        examples,
        chosen.frames_per_eg,
        chosen.cmvn_opts,
        chosen.online_ivector_dir,
        chosen.num_utts_subset,
        chosen.num_train_egs_combine,
        chosen.num_valid_egs_combine,
        chosen.num_egs_diagnostic,
        chosen.frames_per_iter,
        chosen.nj,
    )
    get_chain_egs(chosen.data, chosen.chain_dir, chosen.ali_or_lat_dir, chosen.egs_dir, options)
