"""``kaldi-mpi link RECIPE_DIR``: put ``steps_mpi``, beside ``steps``, into a recipe, or take it out again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import kaldi_mpi
from kaldi_mpi.errors import ConfigError, DataError
from kaldi_mpi.log import logger
from kaldi_mpi.options import Parser

NAME = "steps_mpi"


def steps_folder() -> Path:
    """Where ``steps_mpi`` lies: in the checkout that kaldi_mpi comes from, or where its wheel was installed.

    Raises:
        ConfigError: it is nowhere.
    """
    checkout = Path(kaldi_mpi.__file__).resolve().parent.parent / NAME
    if (checkout / "train.sh").is_file():
        return checkout
    try:
        files = metadata.files("kaldi-mpi") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.parts[-2:] == (NAME, "train.sh"):
            return Path(os.path.abspath(str(file.locate()))).parent
    raise ConfigError(f"{NAME} is neither beside {checkout.parent}/kaldi_mpi nor among the files of its installation")


def link(recipe: Path) -> None:
    """Put the link into the recipe; where it is already, nothing changes.

    Raises:
        ConfigError: the directory is no recipe, or has something else of that name.
        DataError: the link cannot be made.
    """
    place, steps = recipe / NAME, steps_folder()
    if not recipe.is_dir():
        raise ConfigError(f"{recipe}: no such directory")
    if not (recipe / "path.sh").is_file() and not (recipe / "steps" / "utils").exists():
        raise ConfigError(f"{recipe}: not a recipe's directory: it has neither path.sh nor steps/utils")
    if place.is_symlink() and _points_to(place, steps):
        logger.info("%s is there already, and leads to %s", place, steps)
        return
    if place.is_symlink() or place.exists():
        raise ConfigError(f"{place}: is there already, and is not a link to {steps}; remove it first")
    try:
        place.symlink_to(steps)
    except OSError as error:
        raise DataError(f"cannot be made: {error.strerror}", file=str(place)) from error
    logger.info(
        "%s leads to %s: call steps_mpi/nnet3/train_rnn.py instead of steps/nnet3/train_rnn.py, and so on", place, steps
    )


def unlink(recipe: Path) -> None:
    """Take the link out of the recipe.

    Raises:
        ConfigError: there is none, or it is not one that `link` has made.
        DataError: it cannot be removed.
    """
    place = recipe / NAME
    if not place.is_symlink():
        raise ConfigError(f"{place}: {'is not a link, and stays' if place.exists() else 'no such link'}")
    # One into an installation that is gone is ours too.
    gone = not place.exists() and Path(os.readlink(place)).name == NAME
    if not gone and not _points_to(place, steps_folder()):
        raise ConfigError(f"{place}: leads to {os.readlink(place)}, which is not of this installation; it stays")
    try:
        place.unlink()
    except OSError as error:
        raise DataError(f"cannot be removed: {error.strerror}", file=str(place)) from error
    logger.info("removed %s", place)


def _points_to(place: Path, steps: Path) -> bool:
    return place.resolve() == steps.resolve()


def main(arguments: Sequence[str]) -> None:
    """``kaldi-mpi link RECIPE_DIR [--remove]``."""
    parser = Parser(prog="kaldi-mpi link", description="Put a link to steps_mpi into a recipe's directory (egs/X/s5).")
    parser.add_argument("recipe", type=Path, help="the directory: it has path.sh, or steps/utils")
    parser.add_argument("--remove", action="store_true", help="take the link out")
    options = parser.parse_args(arguments)
    if options.remove:
        unlink(options.recipe)
    else:
        link(options.recipe)
