"""Masks of each kind of dropout beside those that a real Kaldi draws: their values, what shares them, how often.

nnet3-compute-from-egs computes as training does. Ones go in, masks come out; what is drawn independently in them is
counted, by both, and the shares must agree within what chance allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kaldi_mpi.models.chance import Chance
from kaldi_mpi.nnet3 import read_nnet, to_torch
from tests.kaldi import nnet3

pytestmark = pytest.mark.kaldi

SEQUENCES, FRAMES, DIM = 400, 48, 12
P = 0.3
Mask = NDArray[np.float32]  # (frames, columns), of one sequence
Draws = Iterator[Hashable]


def value(x: np.float32) -> float:
    return round(float(x), 4)


def by_element(mask: Mask) -> Draws:
    yield from (value(x) for x in mask.ravel())
    yield from (("neighbours", value(a), value(b)) for a, b in pairwise(mask[:, 0]))


def by_frame(mask: Mask) -> Draws:
    for row in mask:
        yield value(row[0]), bool((row == row[0]).all())
    yield from (("neighbours", value(a), value(b)) for a, b in pairwise(mask[:, 0]))


def by_column(mask: Mask) -> Draws:
    for column in mask.T:
        yield value(column[0]), bool((column == column[0]).all())
    yield ("neighbours", value(mask[0, 0]), value(mask[0, 1]))


def by_period(mask: Mask) -> Draws:
    """Blocks of 4 columns, periods of 10 frames."""
    periods = [mask[first : first + 10] for first in range(0, FRAMES, 10)]
    for period in periods:
        yield from (value(x) for x in period[0, :4])
        yield bool((period == np.tile(period[0, :4], 3)).all())
    yield from (("periods", value(a[0, 0]), value(b[0, 0])) for a, b in pairwise(periods))


def continuous(mask: Mask) -> Draws:
    for column in mask.T:
        yield int((column[0] - (1 - 2 * P)) / (4 * P) * 8), bool((column == column[0]).all())
        yield "inside", bool(1 - 2 * P - 1e-5 <= column[0] <= 1 + 2 * P + 1e-5)


def rows_together(mask: Mask) -> Draws:
    yield from (tuple(value(x) for x in row) for row in mask)
    yield from (("neighbours", value(a), value(b)) for a, b in pairwise(mask[:, 0]))


def rows_together_continuous(mask: Mask) -> Draws:
    for row in mask:
        yield tuple(int((x - (1 - 2 * P)) / (4 * P) * 3) for x in row)


def frequency(mask: Mask) -> Draws:
    row = mask[0]
    zeros = int((row == 0).sum())
    yield "frames agree", bool((mask == row).all()), tuple(sorted({value(x) for x in row}))
    yield zeros
    yield "runs", zeros, sum(a == 0 and b != 0 for a, b in zip(row, np.roll(row, 1), strict=True))
    yield "first", value(row[0])


def runs(mask: Mask) -> Draws:
    yield "columns agree", bool((mask == mask[:, :1]).all())
    lengths = [(value(x), len(list(group))) for x, group in groupby(mask[:, 0])]
    yield "begins", lengths[0][0]
    yield from lengths[:-1]  # the end cuts the last one
    for x in mask[:, 0]:
        yield "frame", value(x)


GENERAL = f"type=GeneralDropoutComponent dim={DIM}"
CASES: dict[str, tuple[str, Callable[[Mask], Draws]]] = {
    "element": (f"type=DropoutComponent dim={DIM} dropout-proportion={P}", by_element),
    "frame": (f"type=DropoutComponent dim={DIM} dropout-proportion={P} dropout-per-frame=true", by_frame),
    "sequence": (f"{GENERAL} dropout-proportion={P}", by_column),
    "periods": (f"{GENERAL} dropout-proportion={P} block-dim=4 time-period=10", by_period),
    "continuous": (f"{GENERAL} dropout-proportion={P} continuous=true", continuous),
    "frequency": (f"{GENERAL} specaugment-max-proportion=0.5", frequency),
    "frequency-regions": (f"{GENERAL} specaugment-max-proportion=0.5 specaugment-max-regions=2", frequency),
    "time": (f"type=SpecAugmentTimeMaskComponent dim={DIM} zeroed-proportion=0.3 time-mask-max-frames=8", runs),
    "gates": (f"type=DropoutMaskComponent output-dim=3 dropout-proportion={P}", rows_together),
    "two-gates": (f"type=DropoutMaskComponent output-dim=2 dropout-proportion={P}", rows_together),
    "many-gates": (f"type=DropoutMaskComponent output-dim=4 dropout-proportion={P}", rows_together),
    "gates-continuous": (
        f"type=DropoutMaskComponent output-dim=3 dropout-proportion={P} continuous=true",
        rows_together_continuous,
    ),
}


@pytest.fixture(scope="module")
def egs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of ones."""
    folder = tmp_path_factory.mktemp("ones")
    row = " ".join(["1"] * DIM)
    matrix = "[\n" + f"{row}\n" * FRAMES + "]\n"
    (folder / "feats").write_text("".join(f"u{n:04d} {matrix}" for n in range(SEQUENCES)))
    (folder / "post").write_text("".join(f"u{n:04d} {'[ 0 1 ] ' * FRAMES}\n" for n in range(SEQUENCES)))
    nnet3(
        "nnet3-get-egs", f"--num-frames={FRAMES}", "--num-pdfs=2", "--compress=false",
        f"ark,t:{folder}/feats", f"ark,t:{folder}/post", f"ark:{folder}/egs",
    )  # fmt: skip
    return folder / "egs"


def shares(masks: list[Mask], draws: Callable[[Mask], Draws]) -> tuple[Counter[Hashable], Counter[str]]:
    """How often each outcome was drawn, and how many there were of its kind (outcomes of one name and type)."""
    counts = Counter(outcome for mask in masks for outcome in draws(mask))
    kinds: Counter[str] = Counter()
    for outcome, count in counts.items():
        kinds[kind(outcome)] += count
    return counts, kinds


def kind(outcome: Hashable) -> str:
    first = outcome[0] if isinstance(outcome, tuple) else outcome
    return first if isinstance(first, str) else type(outcome).__name__


@pytest.mark.parametrize("name", CASES)
def test_masks_are_drawn_as_kaldi_draws_them(egs: Path, tmp_path: Path, name: str) -> None:
    config, draws = CASES[name]
    takes = "c" if "output-dim" in config else "input"  # a mask takes nothing: Kaldi's recipes name itself
    (tmp_path / "net.config").write_text(
        f"input-node name=input dim={DIM}\ncomponent name=c {config}\n"
        f"component-node name=c component=c input={takes}\noutput-node name=output input=c objective=quadratic\n"
    )
    raw = str(tmp_path / "0.raw")
    nnet3("nnet3-init", str(tmp_path / "net.config"), raw)
    nnet3("nnet3-compute-from-egs", "--use-gpu=no", raw, f"ark:{egs}", f"ark:{tmp_path}/out")
    from kaldi_native_io import SequentialFloatMatrixReader

    with SequentialFloatMatrixReader(f"ark:{tmp_path}/out") as reader:
        theirs = [np.array(matrix) for _, matrix in reader]
    assert len(theirs) == SEQUENCES and theirs[0].shape[0] == FRAMES

    model = to_torch(read_nnet(raw))
    model.mode.chance = Chance(7, 0)
    model.train()
    with torch.no_grad():
        out = model(torch.ones(SEQUENCES, FRAMES, DIM), 0, FRAMES)
    ours = list(out.numpy())

    (counts, kinds), (wanted, wanted_kinds) = shares(ours, draws), shares(theirs, draws)
    assert set(kinds) == set(wanted_kinds)
    for outcome in counts.keys() | wanted.keys():
        number, number_wanted = kinds[kind(outcome)], wanted_kinds[kind(outcome)]
        share, wanted_share = counts[outcome] / number, wanted[outcome] / number_wanted
        mean = (counts[outcome] + wanted[outcome]) / (number + number_wanted)
        spread = np.sqrt(mean * (1.0 - mean) * (1.0 / number + 1.0 / number_wanted))
        assert abs(share - wanted_share) <= 4.5 * spread, (outcome, share, wanted_share)
