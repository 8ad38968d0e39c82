"""Alignment of a data directory with a GMM system: what ``steps/align_si.sh`` does, without Kaldi.

``python -m kaldi_mpi.embedded.align [--nj N] DATA_DIR LANG_DIR SRC_DIR ALI_DIR`` writes ``ali.JOB.gz`` (binary
int32 vectors of transition-ids), with the source's ``tree``, ``final.mdl``, ``phones.txt`` and
``cmvn_opts``, and ``num_jobs``: an alignment directory as training takes it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from kaldi_mpi.embedded.aligner import Aligner, AlignmentOptions, AlignmentSummary, AlignmentTask
from kaldi_mpi.embedded.command import run_command
from kaldi_mpi.embedded.datadir import DataDir
from kaldi_mpi.embedded.gmm_features import CmvnOptions
from kaldi_mpi.embedded.gmm_model import read_gmm_model
from kaldi_mpi.embedded.processes import WorkerPool
from kaldi_mpi.embedded.split import split_by_speaker
from kaldi_mpi.errors import DataError


def align_data(
    data_dir: str | Path,
    lang_dir: str | Path,
    src_dir: str | Path,
    ali_dir: str | Path,
    *,
    nj: int = 4,
    options: AlignmentOptions | None = None,
) -> AlignmentSummary:
    """Align all utterances of a data directory; see the module's text.

    Args:
        data_dir: features, CMVN statistics and transcripts.
        lang_dir: lexicon; its phones must be the source system's.
        src_dir: a GMM system over delta features (no LDA).
        ali_dir: is made.
        nj: number of processes, and of ``ali.JOB.gz``.
        options: beams and scales; those of align_si.sh by default.

    Returns:
        counts over all utterances; those that fail are left out of the archives and warned about.

    Raises:
        DataError: unusable input, another phone set, or no utterance could be aligned.
    """
    source, target = Path(src_dir), Path(ali_dir)
    if (source / "final.mat").exists():
        raise DataError("systems with an LDA transform need Kaldi's own scripts", file=str(source))
    model = read_gmm_model(source / "tree", source / "final.mdl")
    _check_same_phones(Path(lang_dir) / "phones.txt", source / "phones.txt")
    cmvn = CmvnOptions.read(source / "cmvn_opts", CmvnOptions())
    data = DataDir(data_dir)
    parts = split_by_speaker(data.utt2spk, nj)
    tasks = [AlignmentTask(str(data_dir), str(lang_dir), part, model.hmm, cmvn) for part in parts]
    (target / "log").mkdir(parents=True, exist_ok=True)
    for old in target.glob("ali.*.gz"):
        old.unlink()
    with WorkerPool(Aligner, tasks) as workers:
        answers = workers.call("align", model.gmms, model.hmm.log_probs, options or AlignmentOptions())
        summary = AlignmentSummary.total(answers)
        summary.report("alignment")
        workers.call("write", each=[str(target / f"ali.{job}.gz") for job in range(1, nj + 1)])
    for name in ("tree", "final.mdl", "final.occs", "phones.txt", "cmvn_opts"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    (target / "num_jobs").write_text(f"{nj}\n", encoding="utf-8")
    return summary


def _check_same_phones(ours: Path, theirs: Path) -> None:
    """Compare phone tables up to their disambiguation symbols, whose number may differ."""

    def table(path: Path) -> list[str]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror or error}", file=str(path)) from error
        return [line for line in lines if not line.startswith("#")]

    if table(ours) != table(theirs):
        raise DataError(f"its phones are not those of {theirs}", file=str(ours))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="kaldi_mpi.embedded.align", description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("lang_dir")
    parser.add_argument("src_dir")
    parser.add_argument("ali_dir")
    parser.add_argument("--nj", type=int, default=4)
    parser.add_argument("--beam", type=float, default=AlignmentOptions.beam)
    parser.add_argument("--retry-beam", type=float, default=AlignmentOptions.retry_beam)
    chosen = parser.parse_args(arguments)
    align_data(
        chosen.data_dir,
        chosen.lang_dir,
        chosen.src_dir,
        chosen.ali_dir,
        nj=chosen.nj,
        options=AlignmentOptions(beam=chosen.beam, retry_beam=chosen.retry_beam),
    )


if __name__ == "__main__":
    run_command(main)
