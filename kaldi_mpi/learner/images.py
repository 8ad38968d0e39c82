"""Images that are moved, mirrored and turned at random as they are trained on (nnet3-egs-augment-image).

An image is a chunk: a row of features a column of pixels, from left to right; in it the pixels from top to bottom, and
the channels of each side by side.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from kaldi_mpi.errors import ConfigError
from kaldi_mpi.models.chance import Chance


@dataclasses.dataclass(frozen=True)
class ImageAugmentation:
    """What may happen to an image; the fields are nnet3-egs-augment-image's options.

    Attributes:
        num_channels: colours of a pixel.
        horizontal_flip_prob: how probable it is that left and right change places.
        horizontal_shift, vertical_shift: at most, as shares of width and height.
        rotation_degree: at most, to either side.
        rotation_prob: how probable a turn is.
        fill_mode: what lies outside of the image: ``nearest`` pixel, or the image mirrored there (``reflect``).
    """

    num_channels: int = 1
    horizontal_flip_prob: float = 0.0
    horizontal_shift: float = 0.0
    vertical_shift: float = 0.0
    rotation_degree: float = 0.0
    rotation_prob: float = 0.0
    fill_mode: str = "nearest"

    @classmethod
    def parse(cls, text: str) -> ImageAugmentation:
        """Read ``--horizontal-flip-prob=0.5 --num-channels=3 ...``.

        Raises:
            ConfigError: an option or a value that nnet3-egs-augment-image does not have; all of them, a line each.
        """
        complaints: list[str] = []
        given: dict[str, int | float | str] = {}
        limits = {"num_channels": (1, math.inf), "rotation_degree": (0, 180)}
        kinds: dict[str, type[int] | type[float] | type[str]] = {
            "num_channels": int, "fill_mode": str,
            **dict.fromkeys(("horizontal_flip_prob", "horizontal_shift", "vertical_shift", "rotation_degree",
                "rotation_prob"), float),
        }  # fmt: skip
        for word in text.split():
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if name not in kinds or not equals or not word.startswith("--"):
                complaints.append(f"{word} is no option of nnet3-egs-augment-image")
                continue
            try:
                given[name] = kinds[name](value)
            except ValueError:
                complaints.append(f"{word}: a number expected")
                continue
            low, high = limits.get(name, (0, 1))
            if name == "fill_mode":
                if value not in ("nearest", "reflect"):
                    complaints.append(f"{word}: nearest or reflect expected")
            elif not low <= float(value) <= high:
                complaints.append(f"{word}: must be from {low} to {high}")
        if complaints:
            raise ConfigError("\n".join(f"--image.augmentation-opts: {complaint}" for complaint in complaints))
        return cls(**given)  # type: ignore[arg-type]

    def check(self, columns: int) -> None:
        """Raises ConfigError if a row of so many columns has not whole pixels."""
        if columns % self.num_channels:
            raise ConfigError(
                f"--image.augmentation-opts: --num-channels={self.num_channels} does not divide the input's {columns}"
            )

    def __call__(self, images: Tensor, chance: Chance) -> Tensor:
        """Each of `images`, (B, width, height * channels), by draws of its own."""
        width, height = images.shape[1], images.shape[2] // self.num_channels
        shift_x, shift_y, flip, turn, angle = chance.uniform(5, len(images), like=images)
        radians = (2 * angle - 1) * (self.rotation_degree * math.pi / 180)
        return self.moved(
            images,
            ((2 * shift_x - 1) * self.horizontal_shift * width).round(),
            ((2 * shift_y - 1) * self.vertical_shift * height).round(),
            flip < self.horizontal_flip_prob,
            torch.where(turn < self.rotation_prob, radians, torch.zeros_like(radians)),
        )

    def moved(self, images: Tensor, x: Tensor, y: Tensor, flipped: Tensor, angle: Tensor) -> Tensor:
        """Images shifted by x and y pixels, mirrored, and turned by `angle` (radians) about their centres; (B,) each.

        A pixel is interpolated between the four about the place that it comes from, as in Kaldi.
        """
        batch, width, columns = images.shape
        height = columns // self.num_channels
        across = torch.arange(width, dtype=images.dtype, device=images.device) - (width / 2 - 0.5)
        down = torch.arange(height, dtype=images.dtype, device=images.device) - (height / 2 - 0.5)
        sign = torch.where(flipped, -1.0, 1.0).to(images.dtype)
        moved_x = (across * sign.unsqueeze(1) + x.unsqueeze(1)).unsqueeze(2)  # (B, width, 1)
        moved_y = (down + y.unsqueeze(1)).unsqueeze(1)  # (B, 1, height)
        cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
        from_x = cos * moved_x - sin * moved_y + (width / 2 - 0.5)
        from_y = sin * moved_x + cos * moved_y + (height / 2 - 0.5)
        left, top = from_x.floor(), from_y.floor()
        of_right, of_bottom = (from_x - left).unsqueeze(3), (from_y - top).unsqueeze(3)
        pixels = images.reshape(batch, width * height, self.num_channels)

        def at(column: Tensor, row: Tensor) -> Tensor:
            index = self._inside(column, width) * height + self._inside(row, height)
            index = index.reshape(batch, -1, 1).expand(-1, -1, self.num_channels)
            return pixels.gather(1, index).view(batch, width, height, self.num_channels)

        mixed = (1 - of_right) * ((1 - of_bottom) * at(left, top) + of_bottom * at(left, top + 1))
        mixed += of_right * ((1 - of_bottom) * at(left + 1, top) + of_bottom * at(left + 1, top + 1))
        return mixed.view(batch, width, columns)

    def _inside(self, place: Tensor, size: int) -> Tensor:
        place = place.to(torch.int64)
        if self.fill_mode == "reflect":
            place = place.abs()
            place = torch.where(place >= size, 2 * size - 2 - place, place)
        return place.clamp(0, size - 1)
