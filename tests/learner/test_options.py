"""Options: the names that there are, what is told of mistakes, and what of options inside options."""

from __future__ import annotations

import logging

import pytest

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner import recipe_options
from kaldi_mpi.learner.options import kaldi_names, option_names, parse, read
from kaldi_mpi.learner.recipe_options import HONOURED, IGNORED, OPTIONS, PROGRAMS, TRANSLATED
from kaldi_mpi.loader import MinibatchRule
from kaldi_mpi.options import Words
from tests.paths import REPO

RNN = ["--program=rnn", "--feat-dir=f", "--ali-dir=a", "--dir=d"]
DNN = ["--program=dnn", *RNN[1:]]


def mistakes(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(words)
    return str(caught.value).splitlines()


def test_names_may_be_shortened_as_in_kaldi() -> None:
    """Our own options do not make a recipe's abbreviation ambiguous: --st is --stage, though there is --strategy."""
    options, _ = read([*RNN, "--st=3", "--trainer.num-e", "2", "--trainer.optimization.num-jobs-f=5", "--strat=expair"])
    assert (options.stage, options.num_epochs, options.num_jobs_final) == (3, 2.0, 5)
    assert options.phases[0].name == "expair"
    (said,) = mistakes(*RNN, "--trainer.optimization.num-jobs=3")
    assert said.startswith("kaldi-mpi train: ambiguous option: --trainer.optimization.num-jobs could match --trainer.")


def test_both_spellings_and_what_counts_as_a_value() -> None:
    words = Words(["--a=1", "--b", "-2", "--a", "--x --y", "--b=", "--a", "--b=3"], ("a", "b"))
    assert words.pairs == [("a", "1"), ("b", "-2"), ("a", "--x --y"), ("b", ""), ("b", "3")]
    assert words.complaints == ["argument --a: expected one argument"]
    assert Words(["x", "--", "--c", "--a"], ("a",)).complaints == [
        "unrecognized arguments: x",
        "unrecognized arguments: --",
        "unrecognized arguments: --c",
        "argument --a: expected one argument",
    ]


def test_all_mistakes_at_once() -> None:
    said = mistakes(
        "--program=rnn", "--nosuch=1", "stray", "--trainer.srand=x", "--cleanup=yes", "--trainer.dropout-schedule=0,2",
        "--use-gpu=perhaps", "--egs.frames-per-eg=8",
    )  # fmt: skip
    assert said == [
        "kaldi-mpi train: unrecognized arguments: --nosuch=1",
        "kaldi-mpi train: unrecognized arguments: stray",
        "kaldi-mpi train: unrecognized arguments: --egs.frames-per-eg=8",
        "kaldi-mpi train: argument --trainer.srand: expected a number, got 'x'",
        "kaldi-mpi train: argument --cleanup: expected true or false, got 'yes'",
        "kaldi-mpi train: argument --trainer.dropout-schedule: '0,2': a proportion between 0 and 1 expected, found '2'",
        "kaldi-mpi train: argument --use-gpu: expected one of auto, true, false, yes, no, wait, got 'perhaps'",
        "--ali-dir is needed",
        "--dir is needed",
        "--feat-dir is needed (or --egs.dir, to train on existing examples)",
    ]
    inside = ["--egs.opts=--nosuch 1 --num-utts-subset x", "--trainer.add-option=--fly", "--feat.cmvn-opts=-x"]
    assert len(mistakes(*RNN, *inside)) == 4
    assert mistakes("--program=tree") == ["--program=tree: must be one of rnn, dnn, raw-rnn, raw-dnn, chain"]
    assert mistakes("--program=raw-rnn", "--dir=d") == ["--feat-dir is needed", "--targets-scp is needed"]
    assert mistakes(*RNN, "--trainer.optimization.proportional-shrink=2000")[0].endswith("Kaldi wants more than 0.5")


def test_defaults_of_programs() -> None:
    rnn, dnn = read(RNN)[0], read(DNN)[0]
    assert (rnn.program, rnn.momentum, rnn.samples_per_iter, rnn.shrink_value) == ("rnn", 0.5, 20000, 0.99)
    assert (dnn.program, dnn.momentum, dnn.samples_per_iter, dnn.shrink_value) == ("dnn", 0.0, 400000, 1.0)
    assert (dnn.data.chunk_widths, dnn.data.single_frames, rnn.data.single_frames) == ((8,), True, False)
    assert dnn.data.minibatch == MinibatchRule.of(512) and dnn.data.chunk_left_context == 0
    # train.sh: as one of them, by --egs.frames-per-eg.
    general = read([*RNN[1:], "--egs.frames-per-eg=8"])[0]
    assert (general.program, general.data.single_frames, general.momentum) == ("dnn", True, 0.0)
    assert read(RNN[1:])[0] == rnn
    raw = read(["--program=raw-dnn", "--dir=d", "--egs.dir=e", "--use-dense-targets=false"])[0]
    assert raw.raw and (raw.data.ali_dir, raw.data.use_dense_targets, raw.data.feat_dir) == ("", False, None)


def test_empty_words_count_as_not_given() -> None:
    given = ["--egs.opts=", "--feat.online-ivector-dir= ", "--trainer.input-model=", "--trainer.dropout-schedule=",
        "--reporting.email", "", "--egs.dir="]  # fmt: skip
    options, notes = read([*RNN, *given])
    assert options == read(RNN)[0] and notes.lines == notes.warnings == []


def test_options_of_get_egs() -> None:
    said = "--frames-overlap-per-eg 0 --num_utts_subset 12 --nj 4 --online-cmvn true --frame-subsampling-factor=1"
    options, notes = read([*RNN, f"--egs.opts={said}"])
    assert options.data.num_utts_subset == 12
    assert notes.lines == [
        "--egs.opts --frames-overlap-per-eg 0 is ignored: chunks do not overlap",
        "--egs.opts --nj 4 is ignored: no examples are made, features are read as they are needed",
    ]
    assert notes.warnings == [
        "--egs.opts --online-cmvn true does nothing: online CMVN is not done, normalisation is by speaker"
    ]
    _, notes = read([*RNN, f"--egs.opts={said}", "--egs.dir=e"])
    assert notes.lines == ["--egs.opts is ignored: the examples of --egs.dir are there already"]
    assert mistakes(*RNN, "--egs.opts=--nj")[0] == "--egs.opts: '--nj' is not an option with a value"


def test_options_of_nnet3_train() -> None:
    options, notes = read(
        [*DNN, "--trainer.add-option=--optimization.memory-compression-level=2", "--trainer.add-option=--momentum=0.9"]
    )
    assert options.momentum == 0.9
    assert notes.lines == [
        "--trainer.add-option --optimization.memory-compression-level=2 is ignored: there is no computation to compile"
    ]
    assert mistakes(*DNN, "--trainer.add-option=x --momentum=y --nosuch=1") == [
        "--trainer.add-option: 'x' is no option of nnet3-train: they are --name=value",
        "--trainer.add-option: --momentum: expected a number, got 'y'",
        "--trainer.add-option: nnet3-train has no option --nosuch",
    ]


def test_the_log_says_what_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    given = ["--egs.stage=3", "--trainer.lda.rand-prune=4.0", "--lang=l", "--trainer.optimization.num-jobs-initial=3",
        "--trainer.optimization.num-jobs-final=15"]  # fmt: skip
    with caplog.at_level(logging.INFO, "kaldi_mpi"):
        parse([*RNN, *given])
    assert caplog.messages == [
        "option --egs.stage 3 is ignored: no examples are made, features are read as they are needed",
        "option --lang l is ignored: nothing needs it, in Kaldi neither",
        "jobs from 3 to 15: learning rates are effective ones, of the averaged model, and stay so: each of N learners "
        "applies N times them, where Kaldi's jobs apply 3 to 15 times",
    ]


def test_each_option_stands_once_in_the_table() -> None:
    names = [name for option in OPTIONS for name in (option.name, *option.aliases)]
    assert len(names) == len(set(names)) == len(recipe_options.BY_NAME)
    assert all(option.use in (HONOURED, TRANSLATED, IGNORED) for option in OPTIONS)
    assert all((option.dest == "") == (option.use == IGNORED) for option in OPTIONS)
    for program in PROGRAMS:
        assert set(kaldi_names(program)) < set(option_names(program))


def table() -> list[str]:
    """The table of docs/training.md, out of that in the code."""
    lines = ["| option of Kaldi's | programs | here |", "|---|---|---|"]
    for option in OPTIONS:
        names = ", ".join(f"`--{name}`" for name in (option.name, *option.aliases))
        programs = "all" if option.programs == PROGRAMS else ", ".join(option.programs)
        note = option.note.replace("|", "\\|")
        lines.append(f"| {names} | {programs} | {option.use}: {note} |")
    return lines


def test_the_docs_have_the_table() -> None:
    text = (REPO / "docs" / "training.md").read_text("utf-8")
    assert "\n".join(table()) in text, "put this there:\n" + "\n".join(table())
