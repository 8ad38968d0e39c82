"""The settings of all strategies, with the checks that can be made before a run starts.

Each has the name of its command line option in `OPTIONS`, which is what errors speak of. A setting that none
of the chosen strategies has a use for is an error: it would otherwise be ignored in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kaldi_mpi.averaging.published import DEFAULT_PIECE
from kaldi_mpi.errors import ConfigError
from kaldi_mpi.transport.number_formats import WIRE_TYPES

OPTIONS = {
    "frames_per_average": "--frames-per-average",
    "block_momentum": "--block-momentum",
    "block_learning_rate": "--block-learning-rate",
    "nesterov": "--bmuf-nesterov",
    "reset_momentum": "--bmuf-reset-momentum",
    "elastic_alpha": "--elastic-alpha",
    "elastic_momentum": "--elastic-momentum",
    "staleness_bound": "--staleness-bound",
    "exchanges_per_step": "--exchanges-per-step",
    "seed": "--seed",
    "piece_size": "--piece-size",
    "transfer_dtype": "--transfer-dtype",
    "super_learner_size": "--super-learner-size",
    "dedicated_server": "--dedicated-server",
}

_GOSSIP = ("adpsgd-fixed", "adpsgd-random", "expair")
CENTRES = ("easgd", "asgd")  # those with a model besides the learners'
HIERARCHICAL = (*_GOSSIP, "adpsgd-delay1")  # those in which super-learners can take the learners' place

# Which strategies have a use for a setting; those not named here are of use to all.
USERS: dict[str, tuple[str, ...]] = {
    "frames_per_average": ("periodic", "bmuf", *CENTRES, *_GOSSIP),
    "block_momentum": ("bmuf",),
    "block_learning_rate": ("bmuf",),
    "nesterov": ("bmuf",),
    "reset_momentum": ("bmuf",),
    "elastic_alpha": ("easgd",),
    "elastic_momentum": ("easgd",),
    "staleness_bound": ("asgd",),
    "exchanges_per_step": ("expair",),
    "piece_size": (*_GOSSIP, *CENTRES),
    "super_learner_size": HIERARCHICAL,
    "dedicated_server": CENTRES,
}
_NEEDS_FRAMES = ("periodic", "bmuf")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``--strategy`` and its companions say.

    Attributes:
        frames_per_average: frames over all learners between two averagings, K; in asynchronous ones
            each learner exchanges after K/N frames of its own, None: after each of its steps.
        block_momentum: eta of ``bmuf``, in [0, 1); None: 1 - 1/N.
        block_learning_rate: zeta of ``bmuf``, above 0.
        nesterov: whether blocks of ``bmuf`` start ahead, where block momentum is about to carry the model.
        reset_momentum: whether the learner's own momentum is forgotten where a block of ``bmuf`` ends.
        elastic_alpha: alpha of ``easgd``, in (0, 1]; None: 0.9/N.
        elastic_momentum: delta of ``easgd``'s momentum variant (EAMSGD), in [0, 1).
        staleness_bound: s of ``asgd``, exchanges that a learner may be ahead of the slowest, 0 or more.
        exchanges_per_step: of ``expair``, 1 or more.
        seed: of permutations and partners.
        piece_size: parameters that travel in one message, 1 or more.
        transfer_dtype: ``float32``, ``float16`` or ``bfloat16``, of what travels.
        super_learner_size: learners that act as one, 1 or more.
        dedicated_server: whether the last rank keeps the centre of ``easgd`` or ``asgd`` and learns nothing.

    Raises:
        ConfigError: a value that cannot be; the message begins with the option's name.
    """

    frames_per_average: int | None = None
    block_momentum: float | None = None
    block_learning_rate: float = 1.0
    nesterov: bool = False
    reset_momentum: bool = True
    elastic_alpha: float | None = None
    elastic_momentum: float = 0.0
    staleness_bound: int = 16
    exchanges_per_step: int = 1
    seed: int = 0
    piece_size: int = DEFAULT_PIECE
    transfer_dtype: str = "float32"
    super_learner_size: int = 1
    dedicated_server: bool = False

    def __post_init__(self) -> None:
        def require(field: str, holds: bool, wanted: str) -> None:
            if not holds:
                raise ConfigError(f"{OPTIONS[field]} {getattr(self, field)}: must be {wanted}")

        frames, eta, alpha = self.frames_per_average, self.block_momentum, self.elastic_alpha
        require("frames_per_average", frames is None or frames > 0, "a number of frames above 0")
        require("block_momentum", eta is None or 0 <= eta < 1, "at least 0 and less than 1")
        require("block_learning_rate", 0 < self.block_learning_rate < float("inf"), "above 0")
        require("elastic_alpha", alpha is None or 0 < alpha <= 1, "above 0 and at most 1")
        require("elastic_momentum", 0 <= self.elastic_momentum < 1, "at least 0 and less than 1")
        require("staleness_bound", self.staleness_bound >= 0, "0 or more")
        require("exchanges_per_step", self.exchanges_per_step >= 1, "1 or more")
        require("piece_size", self.piece_size >= 1, "1 or more")
        require("transfer_dtype", self.transfer_dtype in WIRE_TYPES, " or ".join(WIRE_TYPES))
        require("super_learner_size", self.super_learner_size >= 1, "1 or more")


def check_settings(names: Sequence[str], settings: Settings) -> None:
    """Check that the strategies `names`, all of one run, have what they need and a use for all that was set.

    Raises:
        ConfigError: a setting is missing, or no strategy of the run has a use for it.
    """
    for name in names:
        if name in _NEEDS_FRAMES and settings.frames_per_average is None:
            raise ConfigError(f"--strategy {name} needs --frames-per-average, a number of frames above 0")
    for field, users in USERS.items():
        if getattr(settings, field) != getattr(_DEFAULTS, field) and not set(users) & set(names):
            verb = "has" if len(names) == 1 else "have"
            raise ConfigError(
                f"{OPTIONS[field]}: strategy {', '.join(names)} {verb} no use for it; it is for {', '.join(users)}"
            )


_DEFAULTS = Settings()
