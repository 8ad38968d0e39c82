"""Every call of Kaldi's training programs in its recipes, by our parser and by Kaldi's own."""

from __future__ import annotations

import collections
import re
import subprocess
from typing import Any

import pytest

from kaldi_mpi.chain.objective import ChainOptions
from kaldi_mpi.chain.phone_lm import PhoneLmOptions
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.options import TrainOptions, read
from kaldi_mpi.learner.passed_on import Notes, egs_options, train_options
from kaldi_mpi.learner.recipe_options import BY_NAME, IGNORED, OPTIONS, PROGRAMS
from kaldi_mpi.loader import MinibatchRule
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
    "tree_dir": "ali_dir", "l2_regularize": "l2_regularize", "xent_regularize": "xent_regularize",
    "leaky_hmm_coefficient": "leaky_hmm_coefficient", "apply_deriv_weights": "apply_deriv_weights",
    "left_tolerance": "left_tolerance", "right_tolerance": "right_tolerance", "frames_per_iter": "frames_per_iter",
    "frame_subsampling_factor": "frame_subsampling_factor",
    "alignment_subsampling_factor": "alignment_subsampling_factor",
}  # fmt: skip
# Read into other forms, or of no consequence here.
OTHER = {
    "cmvn_opts", "egs_opts", "egs_stage", "egs_command", "shuffle_buffer_size", "samples_per_iter", "rand_prune",
    "num_jobs_compute_prior", "num_chunk_per_minibatch", "minibatch_size", "dropout_schedule", "train_opts", "command",
    "use_gpu", "email", "reporting_interval", "combine_sum_to_one_penalty", "lang", "nj", "chunk_width",
    "frames_per_eg", "lm_opts", "lat_dir", "egs_nj", "left_deriv_truncate", "chain_opts",
}  # fmt: skip


@pytest.fixture(scope="module")
def calls() -> list[RecipeCall]:
    return recipe_calls()


def field(ours: TrainOptions, name: str) -> Any:
    """A field of the options, or of a part of them."""
    parts = (ours, ours.data, ours.chain, None if ours.chain is None else ours.chain.objective)
    return next(getattr(part, name) for part in parts if hasattr(part, name))


def ours_and_theirs(ours: TrainOptions, theirs: dict[str, Any]) -> None:
    if theirs.get("left_deriv_truncate") is not None:  # as train.py goes on
        theirs = theirs | {"deriv_truncate_margin": -theirs["left_deriv_truncate"]}
    for name, value in theirs.items():
        if name in SAME:
            mine = field(ours, SAME[name])
            assert mine == value, f"{name}: {mine}, Kaldi {value}"
        else:
            assert name in OTHER, name
    width = theirs.get("frames_per_eg", 0)
    assert ours.data.chunk_widths == tuple(int(n) for n in str(theirs.get("chunk_width", width)).split(","))
    assert ours.data.single_frames == ("frames_per_eg" in theirs)
    assert bool(ours.dropout_schedule.groups) == bool(theirs["dropout_schedule"])
    minibatch = str(theirs["minibatch_size" if "frames_per_eg" in theirs else "num_chunk_per_minibatch"])
    assert ours.data.minibatch == MinibatchRule.parse(minibatch)
    if ours.chain is None:
        assert ours.samples_per_iter == theirs["samples_per_iter"]
        return
    # Of chunks of the usual width, as many as an archive's frames make.
    assert ours.samples_per_iter == max(1, theirs["frames_per_iter"] // max(1, ours.data.chunk_widths[0]))
    given = [word.partition("=") for word in (theirs["lm_opts"] or "").split()]
    asked = {name.removeprefix("--").replace("-", "_"): int(value) for name, _, value in given}
    assert ours.chain.lm_opts == PhoneLmOptions(**asked)


def required(program: str) -> list[str]:
    """The least that a call of the program must say."""
    if program == "chain":
        return ["--feat-dir=f", "--tree-dir=t", "--lat-dir=l", "--dir=d"]
    return ["--feat-dir=f", "--dir=d", "--targets-scp=t" if program.startswith("raw-") else "--ali-dir=a"]


def test_all_are_found(calls: list[RecipeCall]) -> None:
    programs = collections.Counter(call.program for call in calls)
    assert set(programs) == set(PROGRAMS)
    assert programs["chain"] >= 359 and programs["rnn"] + programs["dnn"] >= 51 and programs.total() >= 460


# Calls that are not accepted, and why; but for the last one Kaldi's own program refuses them, too: one script leaves
# out the quotes around a variable, and one has an option that there never was in the program.
REFUSED = {
    "chime6/s5c_track2/local/segmentation/tuning/train_stats_sad_1a.sh": "unrecognized arguments: --norm-vars=false",
    "tedlium/s5_r2/local/chain/tuning/run_tdnn_lstm_1c.sh": "unrecognized arguments: --trainer.slow-start",
    "cl_english/v1/local/chain/run_lwf_clean_1a.sh": "--lwf-den-scale=0.6: learning without forgetting is not done",
}
ONLY_OURS = {"cl_english/v1/local/chain/run_lwf_clean_1a.sh"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_is_accepted_and_means_the_same(calls: list[RecipeCall], program: str) -> None:
    mine = [call for call in calls if call.program == program]
    for call, theirs in zip(mine, kaldi_parses(program, [call.arguments for call in mine]), strict=True):
        try:
            ours, _ = read([f"--program={program}", *call.arguments])
        except ConfigError as error:
            assert REFUSED.get(call.script, "accepted") in str(error) and "\n" not in str(error), call.script
            assert isinstance(theirs, str) == (call.script not in ONLY_OURS), f"{call.script}: {theirs}"
            continue
        assert call.script not in REFUSED, call.script
        if isinstance(theirs, str):
            assert "--trainer.rnn.num-bptt-steps" in theirs, f"{call.script}: only we accept it: {theirs}"
        else:
            ours_and_theirs(ours, theirs)


@pytest.mark.parametrize("program", PROGRAMS)
def test_defaults_are_kaldis(program: str) -> None:
    (theirs,) = kaldi_parses(program, [required(program)])
    assert isinstance(theirs, dict)
    ours_and_theirs(read([f"--program={program}", *required(program)])[0], theirs)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_table_has_all_that_kaldi_has(program: str) -> None:
    """Each option of Kaldi's parser by itself, with a value of its kind: known to both or to neither."""
    (bare,) = kaldi_parses(program, [required(program)])
    assert isinstance(bare, dict)
    names = sorted(BY_NAME)
    values = ["1", "2", "true", "false", "no", "x", "0,0"]
    words = [[*required(program), f"--{name}={value}"] for name in names for value in values]
    answers = iter(kaldi_parses(program, words))
    changed: set[str] = set()
    for name in names:
        found = [next(answers) for _ in values]
        taken = any(isinstance(answer, dict) for answer in found)
        assert taken == (program in BY_NAME[name].programs and not BY_NAME[name].old), name
        for answer in found:
            if isinstance(answer, dict):
                changed |= {dest for dest in bare if answer[dest] != bare[dest]}
    assert changed == set(bare), set(bare) - changed  # an option that the table has not would have changed nothing


def test_left_deriv_truncate_goes_before_the_margin() -> None:
    given = ["--program=chain", *required("chain"), "--chain.left-deriv-truncate=4"]
    for more in ([], ["--trainer.deriv-truncate-margin=8"]):
        assert read([*given, *more])[0].deriv_truncate_margin == -4


def options_of_script(script: str) -> list[str]:
    source = (kaldi_root() / "egs/wsj/s5/steps/nnet3" / script).read_text().partition("parse_options.sh")[0]
    names = re.findall(r"^([a-z_]+)=", source, re.M)
    assert len(names) > 15
    return names


@pytest.mark.parametrize("script", ["get_egs.sh", "get_egs_targets.sh"])
def test_options_inside_egs_opts(script: str) -> None:
    """Each of the script's variables is an option that has an effect or a line, if it is not harmless."""
    for name in options_of_script(script):
        notes = Notes()
        subset = egs_options(f"--{name} 17", False, notes)
        assert len(notes.lines) + len(notes.warnings) + (subset == 17) == 1, name


def test_options_inside_egs_opts_of_chain() -> None:
    """The script itself gets them, so what it has is taken without a line, and nothing else is."""
    there = options_of_script("chain/get_egs.sh")
    for name in there:
        notes = Notes()
        assert egs_options(f"--{name} 17", False, notes, chain=True) == (17 if name == "num_utts_subset" else 300)
        assert not notes.lines and not notes.warnings, name
    others = {*options_of_script("get_egs.sh"), *options_of_script("get_egs_targets.sh")} - set(there)
    assert len(others) > 5
    for name in others:
        with pytest.raises(ConfigError, match=f"chain/get_egs.sh has no option --{name.replace('_', '-')}"):
            egs_options(f"--{name} 17", False, Notes(), chain=True)


def options_of_program(path: str) -> dict[str, str]:
    """The options of one of Kaldi's programs, with a value of its kind each."""
    done = subprocess.run([str(kaldi_root() / "src" / path), "--help"], capture_output=True, text=True, check=False)
    kinds = re.findall(r"^ +--([a-z0-9.-]+) +:(?:.*\((bool|int|uint|float|string), default = )?", done.stderr, re.M)
    assert len(kinds) > 40
    return {name: "true" if kind == "bool" else "1" for name, kind in kinds if name != "help"}


@pytest.mark.parametrize("program", ["nnet3bin/nnet3-train", "chainbin/nnet3-chain-train"])
def test_options_of_the_training_program(program: str) -> None:
    for name, value in options_of_program(program).items():
        notes = Notes()
        if "lwf" in name:
            with pytest.raises(ConfigError, match="learning without forgetting is not done"):
                train_options([f"--{name}={value}"], notes, chain=True)
            value = "0"
        acts = train_options([f"--{name}={value}"], notes, "chain" in program)
        assert len(notes.lines) + len(acts) == 1, name


def test_options_of_the_chain_objective_act() -> None:
    """--chain-opts stands behind --trainer.add-option on the program's command line, and that behind the others."""
    given = ["--program=chain", *required("chain"), "--chain.leaky-hmm-coefficient=0.1", "--chain.l2-regularize=0.5",
        "--trainer.add-option=--l2-regularize=0.25 --xent-regularize=0.2 --apply-deriv-weights=false"]  # fmt: skip
    options, _ = read([*given, "--chain-opts=--xent-regularize=0.1 --out-of-range-regularize=0.02"])
    assert options.chain is not None
    assert options.chain.objective == ChainOptions(
        l2_regularize=0.25, xent_regularize=0.1, leaky_hmm_coefficient=0.1, out_of_range_regularize=0.02,
        apply_deriv_weights=False,
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        read([*given, "--chain-opts=--leaky-hmm-coefficient=x --nosuch=1"])
    assert str(caught.value).splitlines() == [
        "--chain-opts: --leaky-hmm-coefficient: expected a number, got 'x'",
        "--chain-opts: nnet3-chain-train has no option --nosuch",
    ]


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
