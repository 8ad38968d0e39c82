"""``--strategy`` with several strategies in turn."""

from __future__ import annotations

import pytest

from kaldi_mpi.averaging.registry import NAMES
from kaldi_mpi.averaging.sequence import PhaseSpec, parse_sequence
from kaldi_mpi.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_epochs", "phases"),
    [
        ("allreduce", None, [PhaseSpec("allreduce", 8.0)]),
        ("allreduce", 2.5, [PhaseSpec("allreduce", 2.5)]),
        ("expair:3ep", None, [PhaseSpec("expair", 3.0)]),
        (
            "allreduce:1ep,adpsgd-random:14ep,periodic:1ep",
            None,
            [PhaseSpec("allreduce", 1.0), PhaseSpec("adpsgd-random", 14.0), PhaseSpec("periodic", 1.0)],
        ),
        (" allreduce : 0.5 ep , asgd:1.5ep ", 2.0, [PhaseSpec("allreduce", 0.5), PhaseSpec("asgd", 1.5)]),
        ("allreduce:0.1ep,easgd:0.2ep", 0.3, [PhaseSpec("allreduce", 0.1), PhaseSpec("easgd", 0.2)]),
        ("bmuf:1ep,bmuf:1ep", 2.0, [PhaseSpec("bmuf", 1.0), PhaseSpec("bmuf", 1.0)]),
    ],
)
def test_phases_are_read(text: str, num_epochs: float | None, phases: list[PhaseSpec]) -> None:
    assert parse_sequence(text, num_epochs, 8.0, NAMES) == phases


@pytest.mark.parametrize(
    ("text", "num_epochs", "message"),
    [
        ("gossip", None, "--strategy gossip: there is no strategy 'gossip'; there are allreduce, periodic, "),
        ("allreduce:1ep,gossip:1ep", None, "there is no strategy 'gossip'"),
        ("", None, "there is no strategy ''"),
        ("allreduce:1ep,", None, "there is no strategy ''"),
        ("allreduce,periodic:1ep", None, "say how long allreduce lasts, as in allreduce:2ep"),
        ("allreduce:1ep,periodic", 2.0, "say how long periodic lasts"),
        ("allreduce:1", None, "'1' is no length; write a number of epochs above 0 as in 2ep"),
        ("allreduce:", None, "'' is no length"),
        ("allreduce:ep", None, "'ep' is no length"),
        ("allreduce:0ep", None, "'0ep' is no length"),
        ("allreduce:-1ep,periodic:2ep", None, "'-1ep' is no length"),
        ("allreduce:infep", None, "'infep' is no length"),
        ("allreduce:nanep", None, "'nanep' is no length"),
        ("allreduce:1ep:2ep", None, "'1ep:2ep' is no length"),
        ("allreduce:1ep,periodic:2ep", 4.0, "the phases have 3 epochs together, --trainer.num-epochs 4"),
        ("allreduce:1ep", 2.0, "the phases have 1 epochs together, --trainer.num-epochs 2"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, num_epochs: float | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sequence(text, num_epochs, 8.0, NAMES)
    assert message in str(caught.value) and str(caught.value).startswith(f"--strategy {text}: ")
    assert "\n" not in str(caught.value)
