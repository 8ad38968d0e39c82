"""Every call of Kaldi's training programs in its recipes, by our parser and by Kaldi's own."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.options import TrainOptions, read
from kaldi_mpi.learner.passed_on import Notes, egs_options, train_options
from kaldi_mpi.learner.recipe_options import BY_NAME, IGNORED, OPTIONS, PROGRAMS
from tests.paths import kaldi_root
from tests.recipe_calls import RecipeCall, kaldi_parses, recipe_calls

pytestmark = pytest.mark.kaldi

# Ours by Kaldi's names, where they are the same number.
SAME = {
    "srand": "seed", "max_param_change": "max_param_change", "initial_effective_lrate": "initial_rate",
    "final_effective_lrate": "final_rate", "momentum": "momentum", "proportional_shrink": "proportional_shrink",
    "num_jobs_initial": "num_jobs_initial", "num_jobs_final": "num_jobs_final", "num_jobs_step": "num_jobs_step",
    "max_models_combine": "max_models_combine", "max_objective_evaluations": "max_objective_evaluations",
    "do_final_combination": "do_final_combination", "backstitch_training_scale": "backstitch_scale",
    "backstitch_training_interval": "backstitch_interval", "compute_per_dim_accuracy": "compute_per_dim_accuracy",
    "presoftmax_prior_scale_power": "presoftmax_prior_scale_power", "max_lda_jobs": "max_lda_jobs",
    "stage": "stage", "exit_stage": "exit_stage", "cleanup": "cleanup", "remove_egs": "remove_egs",
    "preserve_model_interval": "preserve_model_interval", "input_model": "input_model", "num_epochs": "num_epochs",
    "shrink_value": "shrink_value", "shrink_saturation_threshold": "shrink_saturation_threshold",
    "deriv_truncate_margin": "deriv_truncate_margin", "prior_subset_size": "prior_subset_size",
    "compute_average_posteriors": "compute_average_posteriors", "dir": "dir",
    "image_augmentation_opts": "image_augmentation", "online_ivector_dir": "online_ivector_dir",
    "feat_dir": "feat_dir", "ali_dir": "ali_dir", "egs_dir": "egs_dir", "targets_scp": "targets_scp",
    "use_dense_targets": "use_dense_targets", "chunk_left_context": "chunk_left_context",
    "chunk_right_context": "chunk_right_context", "chunk_left_context_initial": "chunk_left_context_initial",
    "chunk_right_context_final": "chunk_right_context_final",
}  # fmt: skip
# Read into other forms, or of no consequence here.
OTHER = {
    "cmvn_opts", "egs_opts", "egs_stage", "egs_command", "shuffle_buffer_size", "samples_per_iter", "rand_prune",
    "num_jobs_compute_prior", "num_chunk_per_minibatch", "minibatch_size", "dropout_schedule", "train_opts", "command",
    "use_gpu", "email", "reporting_interval", "combine_sum_to_one_penalty", "lang", "nj", "chunk_width",
    "frames_per_eg",
}  # fmt: skip


@pytest.fixture(scope="module")
def calls() -> list[RecipeCall]:
    return recipe_calls()


def ours_and_theirs(ours: TrainOptions, theirs: dict[str, Any]) -> None:
    for name, value in theirs.items():
        if name in SAME:
            mine = getattr(ours, SAME[name]) if hasattr(ours, SAME[name]) else getattr(ours.data, SAME[name])
            assert mine == value, f"{name}: {mine}, Kaldi {value}"
        else:
            assert name in OTHER, name
    width = theirs.get("frames_per_eg", 0)
    assert ours.samples_per_iter == theirs["samples_per_iter"]
    assert ours.data.chunk_widths == tuple(int(n) for n in str(theirs.get("chunk_width", width)).split(","))
    assert ours.data.single_frames == ("frames_per_eg" in theirs)
    assert bool(ours.dropout_schedule.groups) == bool(theirs["dropout_schedule"])


def test_all_are_found(calls: list[RecipeCall]) -> None:
    assert len([call for call in calls if not call.program.startswith("raw-")]) >= 51
    assert len(calls) >= 101 and {call.program for call in calls} == set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_is_accepted_and_means_the_same(calls: list[RecipeCall], program: str) -> None:
    mine = [call for call in calls if call.program == program]
    for call, theirs in zip(mine, kaldi_parses(program, [call.arguments for call in mine]), strict=True):
        try:
            ours, _ = read([f"--program={program}", *call.arguments])
        except ConfigError as error:
            # One script leaves out the quotes around a variable, and its call is one for neither.
            assert isinstance(theirs, str) and program.startswith("raw-"), f"{call.script}: {error}"
            continue
        if isinstance(theirs, str):
            assert "--trainer.rnn.num-bptt-steps" in theirs, f"{call.script}: only we accept it: {theirs}"
        else:
            ours_and_theirs(ours, theirs)


@pytest.mark.parametrize("program", PROGRAMS)
def test_defaults_are_kaldis(program: str) -> None:
    given = ["--feat-dir=f", "--dir=d", "--targets-scp=t" if program.startswith("raw-") else "--ali-dir=a"]
    (theirs,) = kaldi_parses(program, [given])
    assert isinstance(theirs, dict)
    ours_and_theirs(read([f"--program={program}", *given])[0], theirs)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_table_has_all_that_kaldi_has(program: str) -> None:
    """Each option of Kaldi's parser by itself, with a value of its kind: known to both or to neither."""
    given = ["--feat-dir=f", "--dir=d", "--targets-scp=t" if program.startswith("raw-") else "--ali-dir=a"]
    names = sorted(BY_NAME)
    values = ["1", "true", "no", "x", "0,0"]
    answers = iter(kaldi_parses(program, [[*given, f"--{name}={value}"] for name in names for value in values]))
    for name in names:
        taken = [isinstance(next(answers), dict) for _ in values]
        assert any(taken) == (program in BY_NAME[name].programs and not BY_NAME[name].old), name


@pytest.mark.parametrize("script", ["get_egs.sh", "get_egs_targets.sh"])
def test_options_inside_egs_opts(script: str) -> None:
    """Each of the script's variables is an option that has an effect or a line, if it is not harmless."""
    source = (kaldi_root() / "egs/wsj/s5/steps/nnet3" / script).read_text().partition("parse_options.sh")[0]
    names = re.findall(r"^([a-z_]+)=", source, re.M)
    assert len(names) > 15
    for name in names:
        notes = Notes()
        subset = egs_options(f"--{name} 17", False, notes)
        assert len(notes.lines) + len(notes.warnings) + (subset == 17) == 1, name


def test_options_of_nnet3_train() -> None:
    done = subprocess.run(
        [str(kaldi_root() / "src/nnet3bin/nnet3-train"), "--help"], capture_output=True, text=True, check=False
    )
    names = re.findall(r"^ +--([a-z0-9.-]+) ", done.stderr, re.M)
    assert len(names) > 40
    for name in names:
        if name != "help":
            notes = Notes()
            acts = train_options([f"--{name}=1"], notes)
            assert len(notes.lines) + len(acts) == 1, name


def test_what_is_ignored_is_said_once(calls: list[RecipeCall]) -> None:
    checked = 0
    for call in calls:
        try:
            _, notes = read([f"--program={call.program}", *call.arguments])
        except ConfigError:
            continue
        said = [*notes.lines, *notes.warnings]
        for option in OPTIONS:
            lines = [line for line in said if line.startswith(f"option --{option.name} ")]
            assert len(lines) <= 1
            words = [word.removeprefix(f"--{option.name}=") for word in call.arguments]
            given = [word for word, whole in zip(words, call.arguments, strict=True) if word != whole]
            if option.use == IGNORED and given and option.kind(given[-1]) != option.default_of(call.program):
                assert len(lines) == 1, (call.script, option.name)
                checked += 1
    assert checked > 50
