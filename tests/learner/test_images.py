"""Augmented images beside those that a real nnet3-egs-augment-image makes: each of its results is one of ours."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.learner.images import ImageAugmentation
from kaldi_mpi.models.chance import Chance
from kaldi_mpi.testing.examples import read_examples
from tests.egs_data import Chunk, chunk_example, float_matrix, write_egs
from tests.kaldi import nnet3

WIDTH, HEIGHT, CHANNELS = 9, 7, 2
COUNT = 300


def images() -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((COUNT, WIDTH, HEIGHT * CHANNELS)).astype(np.float32)


def augmented(folder: Path, options: str) -> Tensor:
    """What Kaldi's program makes of the images."""
    chunks = {
        f"image-{number:03d}": chunk_example(
            Chunk(image, 0, [[(1, 1.0)]], matrices={"input": float_matrix(image)}), num_pdfs=3
        )
        for number, image in enumerate(images())
    }
    write_egs(folder / "in.ark", chunks)
    nnet3("nnet3-egs-augment-image", "--srand=3", *options.split(), f"ark:{folder}/in.ark", f"ark:{folder}/out.ark")
    found = {key: example["input"].matrix for key, example in read_examples(folder / "out.ark")}
    return torch.from_numpy(np.stack([np.asarray(found[key]) for key in sorted(chunks)]))


def moves_of(results: Tensor, how: ImageAugmentation, most: tuple[int, int]) -> list[tuple[int, int, bool]]:
    """Shift and flip of each image, found by trying all; there must be one."""
    original = torch.from_numpy(images())
    found: dict[int, list[tuple[int, int, bool]]] = {}
    for x, y, flip in itertools.product(range(-most[0], most[0] + 1), range(-most[1], most[1] + 1), (False, True)):
        across, down = (torch.full((COUNT,), float(value)) for value in (x, y))
        tried = how.moved(original, across, down, torch.full((COUNT,), flip), torch.zeros(COUNT))
        for number in ((tried - results).abs().amax(dim=(1, 2)) < 1e-5).nonzero().flatten().tolist():
            found.setdefault(number, []).append((x, y, flip))
    assert sorted(found) == list(range(COUNT)), "an image is none of ours"
    return [found[number][0] for number in range(COUNT)]


def similar(ours: list[object], theirs: list[object]) -> None:
    """Outcomes are as frequent, within what chance allows."""
    for outcome in {*ours, *theirs}:
        share, wanted = ours.count(outcome) / len(ours), theirs.count(outcome) / len(theirs)
        mean = (share + wanted) / 2
        spread = np.sqrt(mean * (1 - mean) * (1 / len(ours) + 1 / len(theirs)))
        assert abs(share - wanted) <= 4.5 * spread, (outcome, share, wanted)


@pytest.mark.kaldi
@pytest.mark.parametrize("fill", ["nearest", "reflect"])
def test_shifts_and_flips_are_kaldis(tmp_path: Path, fill: str) -> None:
    options = (
        f"--horizontal-flip-prob=0.4 --horizontal-shift=0.3 --vertical-shift=0.2 --num-channels=2 --fill-mode={fill}"
    )
    how = ImageAugmentation.parse(options)
    theirs = moves_of(augmented(tmp_path, options), how, (3, 2))
    ours = moves_of(how(torch.from_numpy(images()), Chance(2, 0)), how, (3, 2))
    for part in range(3):
        similar([move[part] for move in ours], [move[part] for move in theirs])
    assert {move[0] for move in theirs} == set(range(-3, 4))


@pytest.mark.kaldi
@pytest.mark.parametrize("fill", ["nearest", "reflect"])
def test_turns_are_kaldis(tmp_path: Path, fill: str) -> None:
    """Each of Kaldi's images is ours, turned by some angle within the limit; about half are turned."""
    options = f"--rotation-degree=25 --rotation-prob=0.5 --num-channels=2 --fill-mode={fill}"
    how, original = ImageAugmentation.parse(options), torch.from_numpy(images())
    results, zeros = augmented(tmp_path, options), torch.zeros(COUNT)

    def error(angles: Tensor) -> Tensor:
        return (how.moved(original, zeros, zeros, zeros > 0, angles) - results).square().sum(dim=(1, 2))

    best, width = zeros.clone(), 25.0
    for _ in range(4):  # the best of ever finer grids
        steps = torch.linspace(-width, width, 101) * (np.pi / 180)
        grid = torch.stack([error(best + step) for step in steps])
        best, width = best + steps[grid.argmin(dim=0)], width / 40
    assert error(best).max() < 1e-3
    degrees = best * (180 / np.pi)
    turned = (degrees.abs() > 0.05).float().mean().item()
    assert degrees.abs().max() <= 25.1 and turned == pytest.approx(0.5, abs=4.5 * np.sqrt(0.25 / COUNT))
    assert degrees.abs().max() > 23 and abs(degrees.mean().item()) < 4.5 * 25 / np.sqrt(6 * COUNT)


def test_nothing_asked_for_changes_nothing() -> None:
    original = torch.from_numpy(images())
    assert torch.equal(ImageAugmentation.parse("--num-channels=2")(original, Chance(1, 0)), original)


def test_bad_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ImageAugmentation.parse("--horizontal-flip-prob=2 --fill-mode=black --zoom=1 --num-channels=x flip")
    lines = str(caught.value).splitlines()
    assert [line.split(": ", 1)[0] for line in lines] == ["--image.augmentation-opts"] * 5
    assert "--horizontal-flip-prob=2: must be from 0 to 1" in lines[0] and "nearest or reflect" in lines[1]
    with pytest.raises(ConfigError, match=r"--num-channels=4 does not divide the input's 14"):
        ImageAugmentation(num_channels=4).check(14)
