"""The settings of strategies: options, ranges, who has a use for them, and what the strategies make of them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kaldi_mpi.averaging import NAMES, Settings, check_settings, make_strategy
from kaldi_mpi.averaging.settings import SETTINGS, add_options, settings_of
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.options import Parser
from kaldi_mpi.transport.world import SoloWorld
from tests.paths import REPO


def parse(*words: str) -> Settings:
    """The settings of a command line, with the seed that a training gives them."""
    parser = Parser(prog="test")
    add_options(parser)
    given = vars(parser.parse_args(words))
    settings = settings_of(given, seed=7)
    assert not given, "an option that is no setting"
    return settings


def test_every_setting_is_an_option_with_its_default_and_a_help() -> None:
    parser = Parser(prog="test")
    add_options(parser)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert set(actions) == {name for name, (setting, _) in SETTINGS.items() if setting.own_option}
    assert set(SETTINGS) - set(actions) == {"seed"}
    for name, action in actions.items():
        setting, default = SETTINGS[name]
        assert action.option_strings == [setting.option] and action.default == default and len(action.help or "") > 8
    assert parse() == Settings(seed=7)


def test_options_become_settings() -> None:
    assert parse(
        "--frames-per-average=400", "--block-momentum", "0.5", "--bmuf-nesterov=true", "--bmuf-reset-momentum=false",
        "--elastic-alpha=1", "--staleness-bound=0", "--transfer-dtype=bfloat16", "--dedicated-server", "true",
    ) == Settings(
        frames_per_average=400, block_momentum=0.5, nesterov=True, reset_momentum=False, elastic_alpha=1.0,
        staleness_bound=0, seed=7, transfer_dtype="bfloat16", dedicated_server=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--frames-per-average=0", "--frames-per-average 0: must be 1 or more"),
        ("--frames-per-average=2.5", "--frames-per-average: expected a number, got '2.5'"),
        ("--block-momentum=1", "--block-momentum 1.0: must be at least 0 and less than 1"),
        ("--block-learning-rate=inf", "--block-learning-rate inf: must be above 0"),
        ("--elastic-alpha=0", "--elastic-alpha 0.0: must be above 0 and at most 1"),
        ("--elastic-momentum=nan", "--elastic-momentum nan: must be at least 0 and less than 1"),
        ("--bmuf-nesterov=yes", "--bmuf-nesterov: expected true or false, got 'yes'"),
        ("--transfer-dtype=float8", "--transfer-dtype: invalid choice: 'float8'"),
    ],
)
def test_options_that_cannot_be_are_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(word)


def test_errors_speak_of_options_that_there_are() -> None:
    """The seed of partners is the training's own."""
    assert SETTINGS["seed"][0].option == "--trainer.srand"
    documented = (REPO / "docs" / "training.md").read_text() + (REPO / "docs" / "strategies.md").read_text()
    for setting, _ in SETTINGS.values():
        assert f"{setting.option}`" in documented or f"{setting.option} " in documented, setting.option


def test_users_of_settings_are_strategies() -> None:
    for setting, _ in SETTINGS.values():
        assert set(setting.users or ()) <= set(NAMES) and set(setting.needed_by) <= set(setting.users or NAMES)


@pytest.mark.parametrize(
    ("name", "frames_per_average", "message"),
    [
        ("periodic", None, "--strategy periodic needs --frames-per-average"),
        ("bmuf", None, "--strategy bmuf needs --frames-per-average"),
        ("periodic", 0, "--frames-per-average 0: must be 1 or more"),
        ("allreduce", 100, "--frames-per-average: strategy allreduce has no use for it; it is for periodic, bmuf"),
        ("adpsgd-delay1", 100, "--frames-per-average: strategy adpsgd-delay1 has no use for it"),
        ("gossip", None, "--strategy gossip: unknown; there are allreduce, periodic, "),
    ],
)
def test_bad_settings_are_named(name: str, frames_per_average: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_strategy(name, SoloWorld(), frames_per_average=frames_per_average)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames_per_average", -3),
        ("block_momentum", 1.0),
        ("block_momentum", -0.1),
        ("block_learning_rate", 0.0),
        ("elastic_alpha", 0.0),
        ("elastic_alpha", 1.5),
        ("elastic_momentum", 1.0),
        ("staleness_bound", -1),
        ("exchanges_per_step", 0),
        ("piece_size", 0),
        ("transfer_dtype", "float8"),
        ("super_learner_size", 0),
    ],
)
def test_values_that_cannot_be_are_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**{field: value})
    assert str(caught.value).startswith(f"{SETTINGS[field][0].option} {value}: must be ")
    assert "\n" not in str(caught.value)


def test_settings_without_a_user_are_named() -> None:
    values: dict[str, Any] = {
        "block_momentum": 0.5, "block_learning_rate": 2.0, "nesterov": True, "reset_momentum": False,
        "elastic_alpha": 0.5, "elastic_momentum": 0.5, "staleness_bound": 2, "exchanges_per_step": 2,
        "piece_size": 100, "super_learner_size": 2, "dedicated_server": True, "frames_per_average": 100,
    }  # fmt: skip
    assert set(values) == {name for name, (setting, _) in SETTINGS.items() if setting.users is not None}
    for field, value in values.items():
        setting = SETTINGS[field][0]
        assert setting.users is not None
        for name in NAMES:
            frames = 100 if name in ("periodic", "bmuf") else None
            settings = Settings(**({"frames_per_average": frames} | {field: value}))
            if name in setting.users:
                check_settings([name], settings)
            else:
                with pytest.raises(ConfigError, match=f"{setting.option}: strategy {name} has no use for it"):
                    check_settings([name], settings)


def test_settings_need_a_user_in_one_phase_only() -> None:
    settings = Settings(frames_per_average=100)
    check_settings(["allreduce", "periodic"], settings)
    with pytest.raises(ConfigError, match="strategy allreduce, adpsgd-delay1 have no use for it"):
        check_settings(["allreduce", "adpsgd-delay1"], settings)
    assert make_strategy("allreduce", SoloWorld(), settings).name == "allreduce"


def test_every_name_makes_its_strategy_with_its_settings() -> None:
    settings = Settings(
        frames_per_average=40, block_momentum=0.4, block_learning_rate=2.0, nesterov=True, reset_momentum=False,
        elastic_alpha=0.3, elastic_momentum=0.2, staleness_bound=3, exchanges_per_step=2, seed=5,
        transfer_dtype="float16",
    )  # fmt: skip
    made = {name: vars(make_strategy(name, SoloWorld(), settings)) for name in NAMES}
    assert all(make_strategy(name, SoloWorld(), settings).name == name for name in NAMES)
    assert all(made[name]["transfer_dtype"] == "float16" for name in ("allreduce", "periodic", "bmuf", "adpsgd-delay1"))
    assert all(
        made[name]["frames_per_average"] == 40
        for name in ("periodic", "bmuf", "easgd", "asgd", "adpsgd-fixed", "adpsgd-random", "expair")
    )
    wanted = {"momentum": 0.4, "learning_rate": 2.0, "nesterov": True, "reset_momentum": False}
    assert made["bmuf"].items() >= wanted.items()
    assert made["easgd"].items() >= {"weight": 0.3, "momentum": 0.2}.items()
    assert made["asgd"]["staleness_bound"] == 3 and made["adpsgd-random"]["seed"] == 5
    assert made["expair"]["exchanges_per_step"] == 2
