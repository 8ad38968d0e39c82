"""Utterances of a data directory for N jobs, divided as Kaldi's ``utils/split_data.sh`` divides them.

Alignments and lattices are stored by job, and Kaldi's scripts expect the utterances of ``split{N}/{JOB}`` in
``ali.JOB.gz`` and ``lat.JOB.gz``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kaldi_mpi.embedded.features import split_jobs
from kaldi_mpi.errors import DataError


def split_by_speaker(utt2spk: Mapping[str, str], jobs: int) -> list[list[str]]:
    """Divide utterances without dividing a speaker, as evenly as that allows.

    Speakers stay in their order. As in split_scp.pl each job first gets equally many speakers, then
    speakers at the borders move to the neighbour as long as that evens out the numbers of utterances.
    With fewer speakers than jobs, speakers are divided (``split_data.sh --per-utt``).

    Args:
        utt2spk: utterance -> speaker, in the order of the utterances.
        jobs: number of parts.

    Returns:
        `jobs` lists of utterances, none of them empty.

    Raises:
        DataError: fewer utterances than jobs.
    """
    if not 1 <= jobs <= len(utt2spk):
        raise DataError(f"{len(utt2spk)} utterances cannot be split into {jobs} jobs")
    speakers: dict[str, list[str]] = {}
    for utterance, speaker in utt2spk.items():
        speakers.setdefault(speaker, []).append(utterance)
    if len(speakers) < jobs:
        return split_jobs(list(utt2spk), jobs)
    names = list(speakers)
    parts: list[list[str]] = [[] for _ in range(jobs)]
    for index, speaker in enumerate(names):
        parts[index * jobs // len(names)].append(speaker)
    sizes = {speaker: len(utterances) for speaker, utterances in speakers.items()}
    while any(_move_border_speaker(parts, job, sizes) for job in range(jobs)):
        pass
    if not all(parts):
        return split_jobs(list(utt2spk), jobs)
    return [[utterance for speaker in part for utterance in speakers[speaker]] for part in parts]


def _move_border_speaker(parts: Sequence[list[str]], job: int, sizes: Mapping[str, int]) -> bool:
    """Give the last speaker of `job` to the next part, or the first to the one before, if that is fairer."""
    moved = False
    for neighbour, position in ((job + 1, -1), (job - 1, 0)):
        if not parts[job] or not 0 <= neighbour < len(parts):
            continue
        speaker = parts[job][position]
        mine = sum(sizes[s] for s in parts[job])
        theirs = sum(sizes[s] for s in parts[neighbour])
        if abs((theirs + sizes[speaker]) - (mine - sizes[speaker])) < abs(theirs - mine):
            parts[job].pop(position)
            parts[neighbour].insert(0 if position == -1 else len(parts[neighbour]), speaker)
            moved = True
    return moved
