"""Dropout schedules, against what Kaldi's own Python makes of them (golden/training/dropout_schedule.json)."""

from __future__ import annotations

import json
import re

import pytest

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.dropout_schedule import DropoutSchedule
from kaldi_mpi.models import build_model
from kaldi_mpi.models.components.dropout import DropoutBase
from kaldi_mpi.models.config import Place, parse_config
from tests.paths import golden


def test_values_are_kaldis() -> None:
    checked = 0
    for text, stages in json.loads(golden("training/dropout_schedule.json").read_text()).items():
        schedule = DropoutSchedule.parse(text)
        for fraction, stage in stages.items():
            theirs = re.findall(r"name=(\S+) proportion=([-0-9.e]+)", stage)
            ours = schedule.proportions(float(fraction))
            assert [name for name, _ in ours] == [name for name, _ in theirs]
            assert [value for _, value in ours] == pytest.approx([float(value) for _, value in theirs], abs=1e-12)
            checked += len(theirs)
    assert checked > 20


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.5", "at least a first and a last value"),
        ("0,x,0", "a proportion between 0 and 1 expected, found 'x'"),
        ("0,1.5@0.5,0", "a proportion between 0 and 1 expected, found '1.5'"),
        ("0,0.5@2,0", "a fraction of the data between 0 and 1 expected, found '2'"),
        ("0,0.5@0.6,0.1@0.3,0", "must not decrease, '0.1@0.3' comes after 0.6"),
        ("0@0,0.5,0", "have no '@'"),
        ("a=b=0,0", "more than one '='"),
        ("=0,0", "no pattern before it"),
        ("0,nan,0", "found 'nan'"),
        ("-0.1,0", "found '-0.1'"),
    ],
)
def test_mistakes_are_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"^--trainer\.dropout-schedule: .*" + re.escape(says)):
        DropoutSchedule.parse(text)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        DropoutSchedule.parse("0.5 lstm*=0,2,0 *=0,0.1,0")
    assert len(str(caught.value).splitlines()) == 2


def test_components_get_their_own() -> None:
    lines = ["input-node name=input dim=3"]
    for name, kind in (("a.dropout", "DropoutComponent"), ("lstm1.dropout", "GeneralDropoutComponent")):
        lines.append(f"component name={name} type={kind} dim=3 dropout-proportion=0.25")
    lines += [
        "component-node name=a component=a.dropout input=input",
        "component-node name=b component=lstm1.dropout input=a",
        "output-node name=output input=b",
    ]
    model = build_model(parse_config(((line, Place()) for line in lines), "net"), seed=0)
    schedule = DropoutSchedule.parse("*=0,0.4,0 lstm*=0,0.2,0")
    schedule.apply(model, 0.5)
    found = {name: c.dropout_proportion for name, c in model.by_name.items() if isinstance(c, DropoutBase)}
    assert found == {"a.dropout": 0.4, "lstm1.dropout": 0.2}
    assert schedule.check(model) == [] and DropoutSchedule.parse("gru*=0,0").check(model) == ["gru*"]
    DropoutSchedule.parse("").apply(model, 0.1)
    assert model.by_name["a.dropout"].dropout_proportion == 0.4
