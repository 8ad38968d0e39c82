"""A small language and speech made of random vectors, on which the whole embedded back end runs in seconds.

Each HMM state of each phone has a mean of its own, so that a monophone system finds the words.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import kaldi_native_io
import numpy as np

from kaldi_mpi.embedded.align import align_data
from kaldi_mpi.embedded.cmvn import make_cmvn
from kaldi_mpi.embedded.datadir import write_data_dir
from kaldi_mpi.embedded.graph import make_graph
from kaldi_mpi.embedded.lang import make_grammar, prepare_lang
from kaldi_mpi.embedded.mono import MonoOptions, train_mono

LEXICON = """\
!SIL SIL
<UNK> SPN
ALPHA A L A
BET B A
GAMMA G A
GAMMA G B A
LAB L A B
LABEL L A B A L
"""
WORDS = ["ALPHA", "BET", "GAMMA", "LAB", "LABEL"]
DIM = 6
OPTIONS = MonoOptions(nj=2, num_iters=12, max_iter_inc=8, totgauss=60)


def write_dict(folder: Path, lexicon: str = LEXICON) -> Path:
    """A dictionary directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lexicon.txt").write_text(lexicon)
    (folder / "silence_phones.txt").write_text("SIL\nSPN\n")
    (folder / "nonsilence_phones.txt").write_text("A\nB\nG\nL\n")
    (folder / "optional_silence.txt").write_text("SIL\n")
    (folder / "extra_questions.txt").write_text("SIL SPN\n")
    return folder


def write_arpa(path: Path, words: list[str]) -> Path:
    """A language model in which the words and the end are equally likely."""
    logprob = -np.log10(len(words) + 1)
    lines = [f"{logprob:.6f} {word}" for word in [*words, "</s>"]]
    path.write_text(f"\\data\\\nngram 1={len(words) + 2}\n\n\\1-grams:\n-99 <s>\n" + "\n".join(lines) + "\n\n\\end\\\n")
    return path


def write_speech(folder: Path, utterances: int, seed: int, words: list[str] = WORDS) -> Path:
    """A data directory with features and CMVN statistics; speakers differ by an offset, which CMVN removes."""
    states = np.random.default_rng(1)
    means = {p: states.normal(scale=3.0, size=(5 if p == "SIL" else 3, DIM)) for p in ["SIL", *"ABGL"]}
    prons = {line.split()[0]: line.split()[1:] for line in LEXICON.splitlines()}
    rng = np.random.default_rng(seed)
    speakers = [f"spk{n}" for n in range(4)]
    offsets = {speaker: rng.normal(scale=5.0, size=DIM) for speaker in speakers}
    text, utt2spk, wav_scp = {}, {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    with kaldi_native_io.FloatMatrixWriter(f"ark,scp:{folder}/feats.ark,{folder}/feats.scp") as writer:
        for speaker in speakers:
            for number in range(utterances // len(speakers)):
                key = f"{speaker}-{number:03d}"
                chosen = [words[i] for i in rng.integers(len(words), size=rng.integers(1, 5))]
                phones = ["SIL"]
                for word in chosen:
                    phones += prons[word] + (["SIL"] if rng.random() < 0.5 else [])
                frames = [
                    rng.normal(mean, 1.0)
                    for phone in phones
                    for mean in means[phone]
                    for _ in range(rng.integers(1, 5))
                ]
                writer.write(key, (np.stack(frames) + offsets[speaker]).astype(np.float32))
                text[key], utt2spk[key], wav_scp[key] = " ".join(chosen), speaker, "none.wav"
    write_data_dir(folder, wav_scp=wav_scp, text=text, utt2spk=utt2spk)
    make_cmvn(folder)
    return folder


@functools.cache
def toy_system() -> Path:
    """train, test, lang, mono (with graph) and mono_ali in a folder that goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="toy_hmm."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_speech(folder / "train", 40, seed=2)
    write_speech(folder / "test", 12, seed=3)
    prepare_lang(write_dict(folder / "dict"), "<UNK>", folder / "lang")
    make_grammar(write_arpa(folder / "lm.arpa", WORDS), folder / "lang")
    train_mono(folder / "train", folder / "lang", folder / "mono", OPTIONS)
    align_data(folder / "train", folder / "lang", folder / "mono", folder / "mono_ali", nj=2)
    make_graph(folder / "lang", folder / "mono", folder / "mono" / "graph")
    return folder
