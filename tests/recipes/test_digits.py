"""egs/digits/s5 as a user runs it, from audio to word error rates, and Kaldi's programs on what it leaves."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import fsdd, kaldi_root
from tests.recipe import Recipe, copy_recipe, run_recipe


def best_wer(folder: Path) -> float:
    """The lowest word error rate of a decoding, in percent."""
    rates = [
        float(line.split()[1])
        for path in folder.glob("wer_*")
        for line in path.read_text().splitlines()
        if line.startswith("%WER")
    ]
    assert len(rates) == 33, "17-7+1 language-model weights times 3 penalties"
    return min(rates)


def test_the_recipe_writes_what_kaldi_would(digits: Recipe) -> None:
    s5 = digits.folder
    for name in ("train", "test", "train_hires", "test_hires"):
        for file in ("wav.scp", "text", "utt2spk", "spk2utt", "feats.scp", "cmvn.scp", "utt2num_frames"):
            assert (s5 / "data" / name / file).stat().st_size > 0, (name, file)
    for file in ("tree", "final.mdl", "ali.1.gz", "ali.2.gz", "num_jobs", "phones.txt"):
        assert (s5 / "exp" / "mono_ali" / file).stat().st_size > 0, file
    for file in ("final.mdl", "tree", "cmvn_opts", "phones.txt", "num_jobs", "configs/lda.mat"):
        assert (s5 / "exp" / "lstm" / file).stat().st_size > 0, file
    assert (s5 / "exp" / "lstm" / "cmvn_opts").read_text() == "--norm-means=false --norm-vars=false\n"
    for job in (1, 2):
        with gzip.open(s5 / "exp" / "lstm" / "decode_test" / f"lat.{job}.gz") as stream:
            assert b"\xd6\xfd\xb2\x7e" in stream.read(200)  # an OpenFst vector FST


def test_both_systems_recognise_digits(digits: Recipe) -> None:
    """Twelve minutes of speech do not make a good model; guessing would be wrong nine times out of ten."""
    printed = re.findall(r"%WER ([\d.]+) \[ \d+ / \d+, .* \] exp/(\w+)/decode_test/wer_", digits.output)
    assert [system for _, system in printed] == ["mono", "lstm"]
    for rate, system in printed:
        assert float(rate) == best_wer(digits.folder / "exp" / system / "decode_test")
        assert float(rate) < 40


def test_training_again_gives_the_same_bytes(digits: Recipe) -> None:
    """Stages 3 and 4 again, in a copy: alignments and model come out byte for byte the same."""
    s5 = copy_recipe(digits.folder.parents[2].with_name("again"))
    shutil.copytree(digits.folder / "data", s5 / "data", symlinks=True)
    first = digits.folder / "exp"
    for scp in (s5 / "data").glob("*/*.scp"):
        scp.write_text(scp.read_text().replace(str(digits.folder), str(s5)))
    if (digits.folder / "mfcc").exists():
        shutil.copytree(digits.folder / "mfcc", s5 / "mfcc")
    options = ["--stage", "3", "--stop-stage", "4", "--num-epochs", "1", "--num-learners", "2"]
    result = run_recipe(s5, *options)
    assert result.returncode == 0, result.stderr
    for job in (1, 2):
        name = f"mono_ali/ali.{job}.gz"
        assert gzip.decompress((s5 / "exp" / name).read_bytes()) == gzip.decompress((first / name).read_bytes())
    again = (s5 / "exp" / "lstm" / "final.mdl").read_bytes()
    result = run_recipe(s5, "--stage", "4", "--stop-stage", "4", "--num-epochs", "1", "--num-learners", "2")
    assert result.returncode == 0, result.stderr
    assert (s5 / "exp" / "lstm" / "final.mdl").read_bytes() == again


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, r"/nowhere: no such directory$"),
        ({}, r"user: not a Kaldi data directory: it has no wav\.scp and no feats\.scp$"),
        (
            {
                "wav.scp": "a-1 false |\na-2 false |\n",
                "text": "a-1 ONE\na-2 TWO\n",
                "utt2spk": "a-1 a\na-2 a\n",
            },
            r"wav\.scp, key a-1: the command failed with status 1: false$",
        ),
        (
            {"wav.scp": "a-1 true |\n", "text": "a-2 ONE\n", "utt2spk": "a-1 a\n"},
            r"user/text, key a-1: ",
        ),
    ],
    ids=["no-such-directory", "no-data-directory", "failing-command", "other-keys"],
)  # fmt: skip
def test_bad_data_is_told_in_one_line(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    s5 = copy_recipe(tmp_path / "root")
    data = tmp_path / "user"
    if files is not None:
        data.mkdir()
        for name, text in files.items():
            (data / name).write_text(text)
    given = str(data) if files is not None else "/nowhere"
    result = run_recipe(s5, "--train", given, "--test", given, "--stop-stage", "2")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    assert len(errors) >= 1 and re.search(message, errors[0]), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_real_speech_given_as_data_directories(tmp_path: Path) -> None:
    """A third of the strings of real digits, the official split, given with --train and --test."""
    pytest.importorskip("kaldi_hmm_gmm", reason="the recipe without Kaldi needs kaldi_hmm_gmm", exc_type=ImportError)
    strings = fsdd() / "make_strings.py"
    subprocess.run(
        [sys.executable, strings, fsdd() / "recordings", tmp_path / "fsdd", "--train-strings=600", "--test-strings=99"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    s5 = copy_recipe(tmp_path / "root")
    train, test = tmp_path / "fsdd" / "train", tmp_path / "fsdd" / "test"
    result = run_recipe(s5, "--train", str(train), "--test", str(test), "--num-learners", "2")
    assert result.returncode == 0, result.stderr
    assert best_wer(s5 / "exp" / "lstm" / "decode_test") <= 3.0, result.stdout


@pytest.mark.kaldi
def test_kaldis_decode_sh_decodes_the_model_unchanged(digits: Recipe) -> None:
    """steps/nnet3/decode.sh on exp/lstm; its word error rate is ours within 0.2 % absolute."""
    kaldi_root()
    lengths = (digits.folder / "data/test_hires/utt2num_frames").read_text().splitlines()
    frames = max(int(line.split()[1]) for line in lengths)
    result = digits.run(
        "steps/nnet3/decode.sh", "--nj", "2", "--cmd", "run.pl", "--frames-per-chunk", str(frames),
        "exp/mono/graph", "data/test_hires", "exp/lstm/decode_test_kaldi", kaldi=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    theirs = best_wer(digits.folder / "exp/lstm/decode_test_kaldi")
    ours = best_wer(digits.folder / "exp/lstm/decode_test")
    assert abs(theirs - ours) <= 0.2, (theirs, ours)


@pytest.mark.kaldi
def test_kaldis_lattice_programs_read_our_lattices(digits: Recipe) -> None:
    """lattice-best-path and lattice-determinize-pruned find in our lattices the words that we scored."""
    kaldi_root()
    decode = "exp/lstm/decode_test"
    texts = []
    for program in ("cat", "lattice-determinize-pruned --beam=8 --acoustic-scale=0.1 ark:- ark:-"):
        pipe = (
            f"gunzip -c {decode}/lat.*.gz | {program}"
            " | lattice-best-path --acoustic-scale=0.1 ark:- ark,t:- 2>/dev/null"
            " | utils/int2sym.pl -f 2- exp/mono/graph/words.txt | sort"
        )
        result = digits.run("bash", "-o", "pipefail", "-c", pipe, kaldi=True)
        assert result.returncode == 0, result.stderr
        texts.append(result.stdout.splitlines())
    ours = sorted((digits.folder / decode / "scoring_kaldi/penalty_0.0/10.txt").read_text().splitlines())
    assert [line.split() for line in texts[0]] == [line.split() for line in ours]
    assert texts[1] == texts[0]


@pytest.mark.kaldi
def test_kaldi_computes_what_pytorch_computes(digits: Recipe) -> None:
    """nnet3-am-info accepts the model, and nnet3-compute equals PyTorch within 1e-4 on whole utterances."""
    import kaldi_native_io
    import numpy as np
    import torch

    from kaldi_mpi.nnet3 import read_am, to_torch

    kaldi_root()
    info = digits.run("nnet3-am-info", "exp/lstm/final.mdl", kaldi=True)
    assert info.returncode == 0 and "num-pdfs: 67" in info.stdout, info.stderr
    result = digits.run(
        "bash", "-c", "head -n 5 data/test_hires/feats.scp > few.scp && nnet3-compute --use-gpu=no --use-priors=true "
        "--frames-per-chunk=10000 exp/lstm/final.mdl scp:few.scp ark:kaldi.ark", kaldi=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    am = read_am(digits.folder / "exp/lstm/final.mdl")
    model = to_torch(am.nnet).eval()
    with kaldi_native_io.SequentialFloatMatrixReader(f"scp:{digits.folder}/few.scp") as reader:
        feats = {key: np.array(value) for key, value in reader}
    count = 0
    with kaldi_native_io.SequentialFloatMatrixReader(f"ark:{digits.folder}/kaldi.ark") as reader:
        for key, value in reader:
            ours = model.whole_utterance(torch.from_numpy(feats[key])).numpy() - np.log(am.priors)
            assert np.abs(ours - np.array(value)).max() < 1e-4
            count += 1
    assert count == 5
